"""Hand the files of a device to QEMU by descriptor: it opens what was checked, whatever its name.

A QEMU that runs gets them in fd sets (`add-fd`), and uses our open file itself. QEMU 7.2 does not
close the files of a set while it is paused, and no QEMU takes a set for memory: there it gets a
file by `getfd`, and opens it again through its own /proc/self/fd, which no name leads away from.
That takes the number of the file in QEMU, so its /proc/PID must be readable, and QEMU's user must
have rights on the file. A paused QEMU without them gets a set all the same, and closes its files
when it is asked again after it has been resumed. For memory it then opens the path, and vmplug
verifies the file as far as it can, as it does behind a proxy that passes no descriptors on.
Source: QEMU monitor/fds.c; measured on QEMU 7.2, 10.0 and 11.1.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from itertools import count
from typing import Any

import msgspec

from vmplug.address import qemu_id
from vmplug.drivers.place import Place
from vmplug.drivers.plug import Plug
from vmplug.drivers.ports import Command
from vmplug.errors import CommandError
from vmplug.host.file_id import (
    CheckedFile,
    check_path,
    file_replaced,
    has_open,
    list_open,
    number_leads_to,
    opened,
    pinned,
)
from vmplug.host.root import THIS_HOST
from vmplug.hypervisor.qemu.abilities import Abilities
from vmplug.hypervisor.qemu.fd_sets import close_sets
from vmplug.hypervisor.qemu.graph import check_graph
from vmplug.hypervisor.qemu.steps.plug import plug_steps, renamed
from vmplug.hypervisor.qemu.transaction import UNDONE, transaction
from vmplug.hypervisor.qmp.monitor import Monitor, Talk
from vmplug.log import Log

log = Log(__name__)

NO_DESCRIPTOR = "No file descriptor supplied via SCM_RIGHTS"
"""Source: QEMU monitor/fds.c."""

NOT_ALLOWED = "Permission denied"
"""EACCES, of a file that QEMU's user may not open again."""

Verify = Callable[[], None]
"""NoSuchDevice unless QEMU opened the file that was checked."""

_ATTEMPTS = 3


def _file_name(device_id: str, index: int) -> str:
    """What a file of a device is called in QEMU between `getfd` and `closefd`."""
    return qemu_id(device_id, f"f{index}")


class OpenedFile(msgspec.Struct, frozen=True):
    """A checked file, and the descriptor for QEMU; None where only QEMU itself may open it."""

    file: CheckedFile
    descriptor: int | None


@contextmanager
def held_open(files: Sequence[CheckedFile]) -> Iterator[list[OpenedFile]]:
    """The files as QEMU needs them; until this ends no other file gets the inode of one.

    Raises NoSuchDevice when another file is there by now.
    """
    with ExitStack() as held:
        pins = [held.enter_context(pinned(file.path, file.file_id)) for file in files]
        yield [
            OpenedFile(file, held.enter_context(opened(pin, file)))
            for pin, file in zip(pins, files, strict=True)
        ]


class RunState:
    """Whether the VM runs: asked for once, and again after any event.

    QEMU reports each change by an event.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._is_running: bool | None = None
        monitor.listen(self._forget)

    def _forget(self, event: str, data: Mapping[str, Any]) -> None:  # noqa: ARG002
        self._is_running = None

    def ask(self) -> Generator[Command, Any, bool]:
        """The answer, in a talk."""
        if self._is_running is None:
            status = (yield Command("query-status", {}))["status"]
            self._is_running = status == "running"
        return self._is_running


class Way(Enum):
    """How files go. `SET_OR_NUMBER`: in a set while the VM runs, by number while it is paused."""

    SET_OR_NUMBER = 1
    SET = 2
    PATH = 3


class Handover:
    """The files of one device on their way to a QEMU, as parts of one talk with it.

    `pid` is QEMU's process, None where its files cannot be read: then no number is known. No QEMU
    uses a set for memory: then `running` is None.
    """

    def __init__(
        self,
        device_id: str,
        pid: int | None,
        running: RunState | None,
        way: Way = Way.SET_OR_NUMBER,
    ) -> None:
        self._device_id = device_id
        self._pid = pid
        self._way = way
        self._running = running
        self._checks: list[Verify] = []
        self._given: list[Command] = []
        self._numbers = count()

    def give(self, files: Sequence[OpenedFile]) -> Generator[Command, Any, Mapping[str, str]]:
        """By their paths, the names at which QEMU opens the files. Raises as `finish`."""
        passes = self._way is not Way.PATH
        sets = False
        if passes and any(file.descriptor is not None for file in files):
            sets = yield from self._uses_sets()
        names = {}
        for opened_file in files:
            file, descriptor = opened_file.file, opened_file.descriptor
            if descriptor is not None and sets:
                names[file.path] = yield from self._give_set(descriptor)
            elif descriptor is not None and passes and self._pid is not None:
                names[file.path] = yield from self._give_number(self._pid, descriptor, file)
            else:
                names[file.path] = file.path
                self._check_path_of(file)
        return names

    def _uses_sets(self) -> Generator[Command, Any, bool]:
        if self._running is None:
            return False
        if self._way is Way.SET or self._pid is None:
            return True
        return (yield from self._running.ask())

    def finish(self) -> Talk:
        """NoSuchDevice unless QEMU opened the files that were checked; then close them in QEMU.

        The device has its own descriptors by now. No set stays that nothing could close later.
        """
        for check in self._checks:
            check()
        while self._given:
            yield self._given[-1]
            self._given.pop()

    def take_back(self) -> Talk:
        """After a failure; when the connection is lost, reconcile does it."""
        for command in reversed(self._given):
            try:
                yield command
            except CommandError as error:
                log.warning("ignored: cannot undo %s: %s", command.execute, error.error_class)

    def _give_set(self, descriptor: int) -> Generator[Command, Any, str]:
        """QEMU chooses the number: in a set that exists it could choose an older file."""
        told = {"opaque": qemu_id(self._device_id)}
        number = (yield Command("add-fd", told, descriptor=descriptor))["fdset-id"]
        self._given.append(Command("remove-fd", {"fdset-id": number}))
        return f"/dev/fdset/{number}"

    def _give_number(
        self, pid: int, descriptor: int, file: CheckedFile
    ) -> Generator[Command, Any, str]:
        """Its number is one that QEMU did not use before, or it is given again.

        QEMU may close a file at the same time, and use the number of that.
        """
        named = {"fdname": _file_name(self._device_id, next(self._numbers))}
        back = Command("closefd", named)
        for _ in range(_ATTEMPTS):
            before = list_open(pid)
            yield Command("getfd", named, descriptor=descriptor)
            self._given.append(back)
            new = sorted(list_open(pid) - before)
            number = next((n for n in new if number_leads_to(pid, n, file.file_id)), None)
            if number is not None:
                self._check_number(pid, number, file)
                return f"/proc/self/fd/{number}"
            yield self._given.pop()
        raise file_replaced(file.path, THIS_HOST)

    def _check_number(self, pid: int, number: int, file: CheckedFile) -> None:
        def verify() -> None:
            if not number_leads_to(pid, number, file.file_id):
                raise file_replaced(file.path, THIS_HOST)

        self._checks.append(verify)

    def _check_path_of(self, file: CheckedFile) -> None:
        def verify() -> None:
            check_path(file.path, file.file_id)
            if self._pid is not None and has_open(self._pid, file.file_id) is False:
                raise file_replaced(file.path, THIS_HOST)

        self._checks.append(verify)


def plug_opened(
    plug: Plug, place: Place, files: Sequence[OpenedFile], handover: Handover, can: Abilities
) -> Talk:
    """Plug it with these files; what QEMU opened is verified before the guest sees it."""

    def verify() -> Talk:
        yield from check_graph(plug)
        yield from handover.finish()

    try:
        names = yield from handover.give(files)
        steps = plug_steps(renamed(plug, names), place, can)
        yield from transaction(steps, verify=verify())
    except UNDONE:
        yield from handover.take_back()
        raise


def find_way(hand_over: Callable[[Way], None], *, takes_sets: bool) -> None:
    """Hand over; in another way where a proxy passes no descriptors on, or rights are missing."""
    try:
        hand_over(Way.SET_OR_NUMBER)
    except CommandError as error:
        if NO_DESCRIPTOR in error.desc:
            hand_over(Way.PATH)
        elif NOT_ALLOWED in error.desc and takes_sets:
            hand_over(Way.SET)
        else:
            raise


def take_back_all(monitor: Monitor, device_id: str) -> None:
    """Close what an interrupted attach handed over for a device."""
    close_sets(monitor, {device_id}.intersection)
    for index in count():
        named = {"fdname": _file_name(device_id, index)}
        _, refusal = monitor.attempt([Command("closefd", named)])
        if refusal:  # they were given in this order, and closed in the reverse one
            return
