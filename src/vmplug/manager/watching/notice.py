"""What a change on the host means for what is plugged: two looks and the events between them.

Arithmetic: nothing is read here, and nothing is done.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from vmplug.drivers.vhost_user import OPTIONS, RECONNECT_S
from vmplug.host.events import Event, HostEvent
from vmplug.host.kind import DeviceType
from vmplug.journal.records import Attachment, DeviceRecord, VmRecord
from vmplug.manager.watching.health import DeviceHealth, HostState, is_served


class EventKind(StrEnum):
    """What happened; the first are the states of `HostState` that a device can fall into."""

    GONE = "gone"
    DELETED = "deleted"
    REPLACED = "replaced"
    OTHER_DRIVER = "other-driver"
    DISCONNECTED = "disconnected"
    BACK = "back"
    RESIZED = "resized"
    VM_ENDED = "vm-ended"
    EVENTS_LOST = "events-lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEvent:
    """One thing that happened to the host device of one attachment, or to a VM.

    `message` is a sentence, `meaning` what it is to the guest, `hint` what to do now. `vm` is None
    only for `events-lost`, `attachment` for that and for `vm-ended`. The sizes are those of a
    resized disk, None for anything else.
    """

    time: datetime = field(default_factory=lambda: datetime.now(UTC), compare=False)
    what: EventKind
    message: str
    meaning: str
    hint: str
    vm: str | None = None
    attachment: Attachment | None = None
    old_size_bytes: int | None = None
    size_bytes: int | None = None


_TAKES_AWAY = {"remove", "unbind"}


def was_taken_away(record: DeviceRecord, events: Iterable[Event]) -> bool:
    """Whether the kernel took the device away, be it for a moment."""
    return any(
        isinstance(event, HostEvent) and event.action in _TAKES_AWAY and _is_of(event, record)
        for event in events
    )


def _is_of(event: HostEvent, record: DeviceRecord) -> bool:
    _, _, what = record.identity.partition(":")
    if event.subsystem == "block":
        return record.kind is DeviceType.BLOCK and record.identity == f"block:{event.devnum}"
    address = record.guest_address
    members = [function.host for function in address.functions] if address else []
    return record.kind is DeviceType.VFIO and event.name in {what, *members}


def compare(
    before: DeviceHealth | None, now: DeviceHealth, *, taken_away: bool
) -> EventKind | None:
    """What happened between two looks; `before` is None at the first. None for nothing."""
    was = before.state if before else HostState.PRESENT
    if now.state is HostState.PRESENT and was is HostState.PRESENT and taken_away:
        return EventKind.REPLACED
    if now.state is not was:
        return EventKind.BACK if now.state is HostState.PRESENT else EventKind(now.state)
    sizes = {before.size_bytes, now.size_bytes} if before else set()
    return EventKind.RESIZED if len(sizes - {None}) > 1 else None


def device_notices(
    what: EventKind,
    record: DeviceRecord,
    holds: Iterable[Attachment],
    *,
    before: DeviceHealth | None,
    now: DeviceHealth,
) -> Iterator[DeviceEvent]:
    """One for each hold on the device."""
    is_resized = what is EventKind.RESIZED
    old_size = before.size_bytes if before and is_resized else None
    for hold in holds:
        if hold.device_id == record.id:
            yield DeviceEvent(
                what=what,
                message=_message(what, record, old_size, now),
                meaning=_meaning(what, record),
                hint=_hint(what, record, hold.id),
                vm=record.vm,
                attachment=hold,
                old_size_bytes=old_size,
                size_bytes=now.size_bytes if is_resized else None,
            )


def ended_notice(vm: VmRecord, holds: Iterable[Attachment]) -> DeviceEvent:
    """The one for a VM that has ended."""
    count = sum(hold.vm == vm.name for hold in holds)
    return DeviceEvent(
        what=EventKind.VM_ENDED,
        message=f"VM {vm.name} (process {vm.pid}) has ended",
        meaning=f"it had {count} attachment{'s' * (count != 1)}, which no guest uses any more",
        hint=f"vmplug reconcile --vm {vm.name} frees what it held",
        vm=vm.name,
    )


def lost_notice() -> DeviceEvent:
    """The one for events that the kernel could not keep."""
    return DeviceEvent(
        what=EventKind.EVENTS_LOST,
        message="the kernel had more events than could be kept, and some are lost",
        meaning="all has been looked at again; what went and came back meanwhile is unknown",
        hint="vmplug reconcile shows what the VMs know of lost backends",
    )


def _message(
    what: EventKind, record: DeviceRecord, old_size: int | None, now: DeviceHealth
) -> str:
    match what:
        case EventKind.BACK:
            return f"{record.host_path} is as it was again"
        case EventKind.RESIZED:
            return f"{record.host_path} has {now.size_bytes} bytes, it had {old_size}"
        case EventKind.REPLACED if not now.detail:
            return f"{record.host_path} was taken away, and something is there again"
        case _:
            return now.detail or record.host_path


def _meaning(what: EventKind, record: DeviceRecord) -> str:
    if record.guest_address is None:
        return "the guest never had it: it was only counted"
    return (_TO_BACKEND_USER if is_served(record) else {}).get(what) or _TO_GUEST[what]


_TO_GUEST = {
    EventKind.GONE: "what the guest reads and writes there fails",
    EventKind.DELETED: "the guest goes on; what it writes is lost when the VM lets go of it",
    EventKind.REPLACED: "the guest has what was there before, or nothing, "
    "but not what is there now",
    EventKind.OTHER_DRIVER: "the guest has lost it",
    EventKind.BACK: "a VM that has lost it does not take it up again by itself",
    EventKind.RESIZED: "the guest sees the size that it was told last",
}
_TO_BACKEND_USER = {
    EventKind.GONE: "the guest waits for its I/O",
    EventKind.DISCONNECTED: "the guest waits for its I/O: its VM is not connected to the backend",
    EventKind.BACK: "the guest's I/O goes on",
}


def _hint(what: EventKind, record: DeviceRecord, attachment: str) -> str:
    seconds = _reconnect_s(record)
    texts = dict(_TO_DO)
    if is_served(record):
        texts |= _TO_DO_FOR_BACKEND | (_TO_DO_FOR_RECONNECTING if seconds else {})
    return texts[what].format(detach=f"vmplug detach {attachment}", id=attachment, seconds=seconds)


_ANEW = "{detach}, and attach it again when it is there and right"
_TO_DO = {
    EventKind.GONE: _ANEW,
    EventKind.DELETED: "save what is needed from within the guest, then {detach}",
    EventKind.REPLACED: _ANEW,
    EventKind.OTHER_DRIVER: _ANEW,
    EventKind.BACK: "if the guest does not see it, {detach}, and attach it again",
    EventKind.RESIZED: "vmplug resize {id} tells it, if that has not just been done",
}
_TO_DO_FOR_BACKEND = {
    EventKind.GONE: "start the backend again, then {detach}, and attach it again",
    EventKind.DISCONNECTED: _ANEW,
    EventKind.BACK: "nothing is to be done",
}
_TO_DO_FOR_RECONNECTING = {
    EventKind.GONE: "start the backend again; QEMU tries to connect every {seconds} s",
    EventKind.DISCONNECTED: "QEMU tries every {seconds} s; if it stays so, restart the backend",
}


def _reconnect_s(record: DeviceRecord) -> int:
    """How often QEMU tries to find the backend again, 0 for never."""
    if "reconnect" not in OPTIONS.get(record.kind, {}):
        return 0
    return int(record.options.get("reconnect", RECONNECT_S))
