"""Wait for events of the host: the kernel's uevents, and the end of processes.

vmplug receives the kernel's own messages, not those that udevd forwards after its rules: sysfs is
already complete, and a host without udevd has them too. They reach the network namespaces of the
host, but not of a container in its own user namespace.
Source: Linux lib/kobject_uevent.c; pidfd_open(2); netlink(7), ENOBUFS.
"""

import os
import selectors
import socket
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Protocol, Self

import msgspec

from vmplug.devnum import DevNum
from vmplug.errors import HostError

_LIBRARY = "libudev.so.1"
"""Where it is not there, pyudev looks for it with a gcc and an ld of the PATH: see ctypes.util."""
_SUBSYSTEMS = ("block", "pci", "mdev")
_BUFFER_BYTES = 4 << 20
"""Enough for a burst, such as many new virtual functions; without root the kernel grants less."""


class HostEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a device; `action` is the kernel's: add, remove, change, bind, unbind.

    `name` is the kernel's, `sda` or `0000:3b:00.0`; `devnum` is None for a device without a node.
    """

    action: str
    subsystem: str
    name: str
    devnum: DevNum | None


class ProcessEnded(msgspec.Struct, frozen=True, kw_only=True):
    """A process that was followed has ended."""

    pid: int


class EventsLost(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel dropped events, as the buffer was full: check everything again."""


Event = HostEvent | ProcessEnded | EventsLost


class HostEvents:
    """Receives from now on; a context manager, not thread-safe.

    Raises HostError when the kernel's events cannot be received.
    """

    def __init__(self, *, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._monitor = _start_monitor(buffer_bytes)
        self._processes: dict[int, int] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._monitor.fileno(), selectors.EVENT_READ, None)

    def close(self) -> None:
        """Stop receiving."""
        self.follow(())
        self._selector.close()
        del self._monitor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def fileno(self) -> int:
        """A descriptor that is readable while there are events."""
        return self._selector.fileno()

    def follow(self, pids: Collection[int]) -> None:
        """Report the end of these processes from now on, and of no others.

        Processes that have ended already are skipped, and so are those beyond this process's limit
        of descriptors.
        """
        for pid in self._processes.keys() - pids:
            self._forget(pid)
        for pid in pids - self._processes.keys():
            with suppress(OSError):
                self._processes[pid] = os.pidfd_open(pid)
                self._selector.register(self._processes[pid], selectors.EVENT_READ, pid)

    def wait(self, timeout_s: float) -> list[Event]:
        """Return the next events as soon as there are any; empty after `timeout_s` without one."""
        happened: list[Event] = []
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                happened += _receive_all(self._monitor)
            else:
                self._forget(key.data)
                happened.append(ProcessEnded(pid=key.data))
        return happened

    def _forget(self, pid: int) -> None:
        descriptor = self._processes.pop(pid)
        self._selector.unregister(descriptor)
        os.close(descriptor)


class _Device(Protocol):
    """The part of pyudev.Device that vmplug uses; pyudev has no types."""

    @property
    def action(self) -> str | None: ...
    @property
    def subsystem(self) -> str: ...
    @property
    def sys_name(self) -> str: ...
    @property
    def properties(self) -> Mapping[str, str]: ...


class _Monitor(Protocol):
    """The part of pyudev.Monitor that vmplug uses."""

    def fileno(self) -> int: ...
    def poll(self, timeout: float) -> _Device | None: ...


def _start_monitor(buffer_bytes: int) -> _Monitor:
    try:
        import ctypes  # noqa: PLC0415  15 ms; and only events need both

        import pyudev  # noqa: PLC0415

        ctypes.CDLL(_LIBRARY)
        monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        with suppress(OSError):  # only root may ask for it
            monitor.set_receive_buffer_size(buffer_bytes)
        for subsystem in _SUBSYSTEMS:
            monitor.filter_by(subsystem)
        monitor.start()
    except (ImportError, OSError) as error:
        raise HostError(
            f"the kernel's events cannot be received: {error}",
            hint="on Debian: apt install libudev1; pip install pyudev",
        ) from error
    started: _Monitor = monitor
    return started


def _receive_all(monitor: _Monitor) -> Iterable[Event]:
    """The messages that the kernel has sent so far.

    A socket that has lost messages reports it once, and libudev never reads that error: the socket
    would stay readable forever. Measured with libudev 252 and pyudev 0.24.
    """
    received: list[Event] = []
    if _take_error(monitor):
        received.append(EventsLost())
    try:
        while (device := monitor.poll(0)) is not None:
            received.append(_read(device))
    except OSError:  # messages were lost since
        received.append(EventsLost())
    return received


def _take_error(monitor: _Monitor) -> int:
    with socket.socket(fileno=os.dup(monitor.fileno())) as netlink:
        return netlink.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def _read(device: _Device) -> HostEvent:
    major, minor = device.properties.get("MAJOR"), device.properties.get("MINOR")
    return HostEvent(
        action=device.action or "",
        subsystem=device.subsystem,
        name=device.sys_name,
        devnum=DevNum(int(major), int(minor)) if major and minor else None,
    )
