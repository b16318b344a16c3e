"""The process that has a device in progress, distinct from all others of any boot.

A pid alone is reused; with the start time it names one process of one boot.
"""

import os
from typing import Self

import msgspec

from vmplug.host.process import is_running, read_start_time
from vmplug.host.root import HostRoot

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


def read_boot_id(host: HostRoot) -> str:
    """The id of this boot of the kernel; empty where it is unknown."""
    return (host.read_text(_BOOT_ID) or "").strip()


def read_pid_namespace(host: HostRoot) -> int:
    """The number of this process's PID namespace, in which it knows others; 0 where unknown."""
    status = host.stat_or_none("/proc/self/ns/pid")
    return status.st_ino if status else 0


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A process; `started_at` is in clock ticks after boot, None where it is unknown.

    As text, `PID STARTED_AT BOOT_ID` with `-` for unknown.
    """

    pid: int
    started_at: int | None
    boot_id: str

    @classmethod
    def own(cls, host: HostRoot) -> Self:
        """This process."""
        pid = os.getpid()
        return cls(pid=pid, started_at=read_start_time(pid, host), boot_id=read_boot_id(host))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str()`; ValueError for anything else."""
        pid, started_at, boot_id = text.split(" ")
        return cls(
            pid=int(pid),
            started_at=None if started_at == "-" else int(started_at),
            boot_id="" if boot_id == "-" else boot_id,
        )

    def __str__(self) -> str:
        started_at = "-" if self.started_at is None else self.started_at
        return f"{self.pid} {started_at} {self.boot_id or '-'}"

    def is_alive(self, host: HostRoot) -> bool:
        """Whether it is still running; never if it began before the host's last boot."""
        is_of_this_boot = self.boot_id == read_boot_id(host)
        return is_of_this_boot and is_running(self.pid, self.started_at, host)
