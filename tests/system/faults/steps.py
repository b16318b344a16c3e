"""The steps of an operation, and what can go wrong at each."""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class Op(StrEnum):
    """What is interrupted."""

    ATTACH = "attach"
    DETACH = "detach"
    RECONCILE = "reconcile"
    RESIZE = "resize"
    ADOPT = "adopt"
    FORGET = "forget"
    START = "start"
    STOP = "stop"
    CREATE = "create"
    REMOVE = "remove"
    LEASE = "lease"
    END = "end"
    LEND = "lend"
    TAKE_OVER = "take over"


class StepKind(StrEnum):
    """What a step is done to."""

    JOURNAL = "journal"
    KERNEL = "sysfs"
    COMMAND = "qmp"
    QUERIES = "ask"
    EVENT = "event"
    DAEMON = "daemon"


class Step(NamedTuple):
    """One step; `number` counts those of the same name. Queries in a row are one step."""

    kind: StepKind
    name: str
    number: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" #{self.number}" if self.number > 1 else "")


class Fault(StrEnum):
    """What goes wrong at a step. `silent`: what was asked is done, and never answered.

    The last two are of the QEMU that vmplug itself starts and stops.
    """

    KILLED_BEFORE = "killed before"
    KILLED_AFTER = "killed after"
    REFUSED = "refused"
    LOST_BEFORE = "socket lost before"
    LOST_AFTER = "socket lost after"
    SILENT = "QEMU silent"
    GUEST_SILENT = "guest silent"
    GUEST_REFUSES = "guest refuses"
    NOTED_WRONG = "row names another process"
    QEMU_DIES = "QEMU dies"
    BACKEND_DIES = "backend dies"
    DEVICE_GONE = "device gone"
    DISK_FULL = "disk full"
    OWN_DIES = "its QEMU dies"
    OWN_HANGS = "its QEMU hangs"


KILLED = frozenset({Fault.KILLED_BEFORE, Fault.KILLED_AFTER})
_KILLED = (Fault.KILLED_BEFORE, Fault.KILLED_AFTER)
_LOST = (Fault.LOST_BEFORE, Fault.LOST_AFTER)
OWN = (Fault.OWN_DIES, Fault.OWN_HANGS)
GUEST = (Fault.GUEST_SILENT, Fault.GUEST_REFUSES, Fault.NOTED_WRONG)
"""Of the guest, when it is asked to let a device go. In the last it is silent, and the journal has
an ended process for its VM: only its devices show that it runs."""
_ANYWHERE = (Fault.BACKEND_DIES, Fault.DEVICE_GONE)

FAULTS: Mapping[StepKind, tuple[Fault, ...]] = {
    StepKind.JOURNAL: (*_KILLED, Fault.DISK_FULL, Fault.QEMU_DIES),
    StepKind.KERNEL: (*_KILLED, Fault.REFUSED, *_ANYWHERE),
    StepKind.COMMAND: (
        *_KILLED,
        Fault.REFUSED,
        *_LOST,
        Fault.SILENT,
        *GUEST,
        Fault.QEMU_DIES,
        *_ANYWHERE,
    ),
    StepKind.QUERIES: (Fault.KILLED_BEFORE, Fault.REFUSED, Fault.LOST_BEFORE, Fault.SILENT),
    StepKind.EVENT: (*_KILLED, *_LOST, Fault.SILENT, Fault.QEMU_DIES, *_ANYWHERE),
    StepKind.DAEMON: (*_KILLED, *_ANYWHERE, Fault.QEMU_DIES),
}
"""What can go wrong at which kind of step. The kernel refuses as QEMU does. Queries change
nothing: after them is before the next step."""

AGAINST_QEMU: Mapping[StepKind, tuple[Fault, ...]] = {
    StepKind.JOURNAL: _KILLED,
    StepKind.KERNEL: (),
    StepKind.COMMAND: (*_KILLED, *_LOST),
    StepKind.QUERIES: (),
    StepKind.EVENT: (*_KILLED, *_LOST),
    StepKind.DAEMON: _KILLED,
}
"""The columns that are run against a real QEMU. What queries ask for they do not change."""

QUICK: Mapping[StepKind, tuple[Fault, ...]] = {
    StepKind.JOURNAL: (Fault.KILLED_AFTER, Fault.DISK_FULL),
    StepKind.KERNEL: (Fault.KILLED_AFTER, Fault.REFUSED, Fault.DEVICE_GONE),
    StepKind.COMMAND: (
        Fault.KILLED_AFTER,
        Fault.REFUSED,
        *_LOST,
        Fault.SILENT,
        *GUEST,
        Fault.QEMU_DIES,
        *_ANYWHERE,
    ),
    StepKind.QUERIES: (Fault.REFUSED,),
    StepKind.EVENT: (Fault.KILLED_AFTER, Fault.LOST_BEFORE, Fault.SILENT, Fault.QEMU_DIES),
    StepKind.DAEMON: (Fault.KILLED_AFTER, *_ANYWHERE),
}
"""What every run of the tests has time for. A process killed before a step leaves what one leaves
that was killed after the step before."""

QUICK_AGAINST_QEMU: Mapping[StepKind, tuple[Fault, ...]] = {
    StepKind.JOURNAL: (Fault.KILLED_AFTER,),
    StepKind.KERNEL: (),
    StepKind.COMMAND: (Fault.KILLED_AFTER, Fault.LOST_AFTER),
    StepKind.QUERIES: (),
    StepKind.EVENT: (Fault.LOST_BEFORE,),
    StepKind.DAEMON: (Fault.KILLED_AFTER,),
}
