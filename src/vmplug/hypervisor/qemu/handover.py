"""Hand the files of a device to QEMU by descriptor: it opens what was checked, whatever its name.

A QEMU that runs gets them in fd sets (`add-fd`), and uses our open file itself. QEMU 7.2 does not
close the files of a set while it is paused, and no QEMU takes a set for memory: there it gets a
file by `getfd`, and opens it again through its own /proc/self/fd, which no name leads away from.
That takes the number of the file in QEMU, so its /proc/PID must be readable. Elsewhere it opens
the path, and vmplug verifies the file as far as it can.
Source: QEMU monitor/fds.c; measured on QEMU 7.2, 10.0 and 11.1.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from itertools import count

from vmplug.address import qemu_id
from vmplug.drivers.ports import Command
from vmplug.errors import CommandError, HypervisorError
from vmplug.host.file_id import (
    CheckedFile,
    check_path,
    file_replaced,
    find_open,
    has_open,
    number_leads_to,
    opened,
    pinned,
)
from vmplug.host.root import THIS_HOST
from vmplug.hypervisor.qmp.monitor import Monitor

log = logging.getLogger(__name__)

NO_DESCRIPTOR = "No file descriptor supplied via SCM_RIGHTS"
"""Source: QEMU monitor/fds.c."""

Verify = Callable[[], None]
"""NoSuchDevice unless QEMU opened the file that was checked."""


def _file_name(device_id: str, index: int) -> str:
    """What a file of a device is called in QEMU between `getfd` and `closefd`."""
    return qemu_id(device_id, f"f{index}")


class Handover:
    """The files of one device on their way to a QEMU.

    `find_pid` gives QEMU's process, None where its files cannot be read; it is asked only where
    that matters. `sets`: QEMU can use fd sets.
    """

    def __init__(
        self, monitor: Monitor, device_id: str, find_pid: Callable[[], int | None], *, sets: bool
    ) -> None:
        self._monitor = monitor
        self._device_id = device_id
        self._find_pid = find_pid
        self._sets = sets
        self._checks: list[Verify] = []
        self._given: list[Command] = []
        self._numbers = count()
        self._pins = ExitStack()

    @cached_property
    def _pid(self) -> int | None:
        return self._find_pid()

    def finish(self) -> None:
        """NoSuchDevice unless QEMU opened the files that were checked; then close them in QEMU.

        The device has its own descriptors by now. No set stays that nothing could close later.
        """
        for check in self._checks:
            check()
        while self._given:
            self._monitor.execute(self._given[-1])
            self._given.pop()

    @contextmanager
    def names(self, files: Sequence[CheckedFile]) -> Iterator[Mapping[str, str]]:
        """By their paths, the names at which QEMU opens the files until this ends.

        Raises NoSuchDevice when another file is there by now.
        """
        with self._pins, self._monitor.keep_turn() if files else nullcontext():
            try:
                yield {file.path: self._give(file) for file in files}
            finally:
                for command in reversed(self._given):
                    self._take_back(command)

    def _give(self, file: CheckedFile) -> str:
        pin = self._pins.enter_context(pinned(file.path, file.file_id))
        with opened(pin, file) as descriptor:
            try:
                if descriptor is not None and self._sets:
                    return self._give_set(descriptor)
                if descriptor is not None and self._pid is not None:
                    return self._give_number(self._pid, descriptor, file)
            except CommandError as error:
                if NO_DESCRIPTOR not in error.desc:  # a proxy at the socket passes none on
                    raise
        self._checks.append(lambda: self._verify_path(file))
        return file.path

    def _give_set(self, descriptor: int) -> str:
        """QEMU chooses the number: in a set that exists it could choose an older file."""
        told = {"opaque": qemu_id(self._device_id)}
        answer = self._monitor.execute(Command("add-fd", told, descriptor=descriptor))
        number = answer["fdset-id"]
        self._given.append(Command("remove-fd", {"fdset-id": number}))
        return f"/dev/fdset/{number}"

    def _give_number(self, pid: int, descriptor: int, file: CheckedFile) -> str:
        before = find_open(pid, file.file_id)
        named = {"fdname": _file_name(self._device_id, next(self._numbers))}
        self._monitor.execute(Command("getfd", named, descriptor=descriptor))
        self._given.append(Command("closefd", named))
        new = find_open(pid, file.file_id) - before
        if not new:
            raise file_replaced(file.path, THIS_HOST)
        number = min(new)

        def verify() -> None:
            if not number_leads_to(pid, number, file.file_id):
                raise file_replaced(file.path, THIS_HOST)

        self._checks.append(verify)
        return f"/proc/self/fd/{number}"

    def _verify_path(self, file: CheckedFile) -> None:
        check_path(file.path, file.file_id)
        if self._pid is not None and has_open(self._pid, file.file_id) is False:
            raise file_replaced(file.path, THIS_HOST)

    def _take_back(self, command: Command) -> None:
        """After a failure; when the connection is lost, reconcile does it."""
        try:
            self._monitor.execute(command)
        except CommandError as error:
            log.warning("ignored: cannot undo %s: %s", command.arguments, error)
        except HypervisorError as error:
            log.debug("%s is left to reconcile: %s", command.execute, error)


def take_back_all(monitor: Monitor, device_id: str) -> None:
    """Close what an interrupted attach handed over for a device."""
    for found in monitor.execute(Command("query-fdsets", {})):
        if any(fd.get("opaque") == qemu_id(device_id) for fd in found["fds"]):
            monitor.execute(Command("remove-fd", {"fdset-id": found["fdset-id"]}))
    for index in count():
        named = {"fdname": _file_name(device_id, index)}
        _, refusal = monitor.attempt([Command("closefd", named)])
        if refusal:  # they were given in this order, and closed in the reverse one
            return
