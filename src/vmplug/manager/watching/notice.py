"""Explain a change on the host: compare two checks, and the events between them.

Arithmetic only: this reads and changes nothing.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from enum import StrEnum

import msgspec

from vmplug.drivers.ports import FailedDisk
from vmplug.drivers.vhost_user import OPTIONS, RECONNECT_S
from vmplug.errors import counted
from vmplug.host.events import Event, HostEvent
from vmplug.host.kind import DeviceType, Identity
from vmplug.host.use.claim import spoken_holder
from vmplug.journal.records import Attachment, DeviceRecord, VmRecord
from vmplug.manager.watching.health import DeviceHealth, HostState, is_served


class EventKind(StrEnum):
    """The kinds of event; the first ones are states of `HostState`."""

    GONE = "gone"
    UNIDENTIFIED = "unidentified"
    DELETED = "deleted"
    REPLACED = "replaced"
    OTHER_DRIVER = "other-driver"
    DISCONNECTED = "disconnected"
    NOT_ANSWERING = "not answering"
    BACK = "back"
    RESIZED = "resized"
    VM_STOPPED = "vm-stopped"
    VM_RESUMED = "vm-resumed"
    VM_ENDED = "vm-ended"
    EVENTS_LOST = "events-lost"


class DeviceEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of the host device of one attachment, or of a VM.

    `message` is a sentence, `meaning` the effect on the guest, `hint` what to do now. `vm` is None
    only for `events-lost`, `attachment` for that and for what concerns a whole VM. The sizes are
    those of a resized disk, None for anything else.
    """

    time: datetime = msgspec.field(default_factory=lambda: datetime.now(UTC))
    what: EventKind
    message: str
    meaning: str
    hint: str
    vm: str | None = None
    attachment: Attachment | None = None
    old_size_bytes: int | None = None
    size_bytes: int | None = None


_TAKES_AWAY = {"remove", "unbind"}


def find_removed(events: Iterable[Event]) -> set[Identity | str]:
    """What the kernel removed, even for a moment: disks, and the names of all other devices."""
    removed = set[Identity | str]()
    for event in events:
        if not (isinstance(event, HostEvent) and event.action in _TAKES_AWAY):
            continue
        if event.subsystem != "block":
            removed.add(event.name)
        elif event.devnum:
            removed.add(Identity.of_block(event.devnum))
    return removed


def was_taken_away(record: DeviceRecord, removed: AbstractSet[Identity | str]) -> bool:
    """Whether the device, or one of the functions of a group, is among what was removed."""
    if record.kind is DeviceType.BLOCK:
        return record.identity in removed
    address = record.guest_address
    members = [function.host for function in address.functions] if address else []
    is_function = record.kind is DeviceType.VFIO
    return is_function and not removed.isdisjoint({record.identity.key, *members})


def compare(
    before: DeviceHealth | None, now: DeviceHealth, *, taken_away: bool
) -> EventKind | None:
    """The event between two checks; `before` is None at the first one. None for no event."""
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
    """One notice for each hold on the device."""
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
    """The notice for a VM that has ended."""
    count = sum(hold.vm == vm.name for hold in holds)
    return DeviceEvent(
        what=EventKind.VM_ENDED,
        message=f"{spoken_holder(vm.name)} (process {vm.pid}) has ended",
        meaning=f"it had {counted(count, 'attachment')}; no guest uses "
        f"{'it' if count == 1 else 'them'} now",
        hint=f"vmplug reconcile{'' if vm.is_lease else f' --vm {vm.name}'} frees what it held",
        vm=vm.name,
    )


def stopped_notice(vm: str, disks: Iterable[FailedDisk]) -> DeviceEvent:
    """The notice for a VM that an error on these disks has stopped."""
    return DeviceEvent(
        what=EventKind.VM_STOPPED,
        message=f"an error has stopped VM {vm}: " + "; ".join(map(str, disks)),
        meaning="the guest stands still, and loses nothing: QEMU keeps the writes that failed",
        hint=f"make room or mend the disk, then vmplug vm resume {vm}",
        vm=vm,
    )


def resumed_notice(vm: str) -> DeviceEvent:
    """The notice for a VM that runs again."""
    return DeviceEvent(
        what=EventKind.VM_RESUMED,
        message=f"VM {vm} runs again",
        meaning="QEMU has repeated what had failed",
        hint="no action needed",
        vm=vm,
    )


def lost_notice() -> DeviceEvent:
    """The notice for events that the kernel dropped."""
    return DeviceEvent(
        what=EventKind.EVENTS_LOST,
        message="the kernel dropped some events because its buffer was full",
        meaning="vmplug checked every device again; it cannot report what disappeared and came "
        "back meanwhile",
        hint="vmplug reconcile shows the lost backends of the VMs",
    )


def _message(
    what: EventKind, record: DeviceRecord, old_size: int | None, now: DeviceHealth
) -> str:
    match what:
        case EventKind.BACK:
            return f"{record.host_path} is back as it was"
        case EventKind.RESIZED:
            return f"{record.host_path} has {now.size_bytes} bytes; it had {old_size}"
        case EventKind.REPLACED if not now.detail:
            return f"{record.host_path} was removed, and another device is there now"
        case _:
            return now.detail or record.host_path


def _meaning(what: EventKind, record: DeviceRecord) -> str:
    if record.guest_address is None:
        return "the guest never had it: vmplug only counted it"
    return (_TO_BACKEND_USER if is_served(record) else {}).get(what) or _TO_GUEST[what]


_TO_GUEST = {
    EventKind.GONE: "the guest's reads and writes fail",
    EventKind.UNIDENTIFIED: "the guest keeps what it has; vmplug neither counts nor resizes it",
    EventKind.DELETED: "the guest keeps working; its writes are lost when the VM closes the file",
    EventKind.REPLACED: "the guest has the old device or nothing, not the new one",
    EventKind.OTHER_DRIVER: "the guest has lost it",
    EventKind.NOT_ANSWERING: "the guest's reads and writes wait, and all of the VM may",
    EventKind.BACK: "a VM that lost it does not open it again by itself",
    EventKind.RESIZED: "the guest sees the size that was last reported to it",
}
_TO_BACKEND_USER = {
    EventKind.GONE: "the guest waits for its I/O",
    EventKind.DISCONNECTED: "the guest waits for its I/O: its VM is not connected to the backend",
    EventKind.BACK: "the guest's I/O continues",
}


def _hint(what: EventKind, record: DeviceRecord, attachment: str) -> str:
    seconds = _reconnect_s(record)
    texts = dict(_TO_DO)
    if is_served(record):
        texts |= _TO_DO_FOR_BACKEND | (_TO_DO_FOR_RECONNECTING if seconds else {})
    return texts[what].format(detach=f"vmplug detach {attachment}", id=attachment, seconds=seconds)


_ANEW = "{detach}, and attach it again when the right device is there"
_TO_DO = {
    EventKind.GONE: _ANEW,
    EventKind.UNIDENTIFIED: "{detach}, and attach it again when it can be spared",
    EventKind.DELETED: "save the data from inside the guest, then {detach}",
    EventKind.REPLACED: _ANEW,
    EventKind.OTHER_DRIVER: _ANEW,
    EventKind.NOT_ANSWERING: "bring its storage back; to detach the disk would stop the guest "
    "until then",
    EventKind.BACK: "if the guest does not see it, {detach}, and attach it again",
    EventKind.RESIZED: "vmplug resize {id} reports the new size to the guest, unless that "
    "was just done",
}
_TO_DO_FOR_BACKEND = {
    EventKind.GONE: "start the backend again, then {detach}, and attach it again",
    EventKind.DISCONNECTED: _ANEW,
    EventKind.BACK: "no action needed",
}
_TO_DO_FOR_RECONNECTING = {
    EventKind.GONE: "start the backend again; QEMU tries to connect every {seconds} s",
    EventKind.DISCONNECTED: "QEMU tries every {seconds} s; if it stays disconnected, "
    "restart the backend",
}


def _reconnect_s(record: DeviceRecord) -> int:
    """The interval at which QEMU reconnects to the backend, 0 for never."""
    if "reconnect" not in OPTIONS.get(record.kind, {}):
        return 0
    return int(record.options.get("reconnect", RECONNECT_S))
