"""What two looks and the events between them mean for what is plugged."""

import pytest
from msgspec.structs import replace

from tests.support.journal import device_record, hold_on, vm_record
from vmplug.devnum import DevNum
from vmplug.drivers.ports import DiskError, FailedDisk
from vmplug.host.events import Event, EventsLost, HostEvent, ProcessEnded
from vmplug.host.kind import DeviceType
from vmplug.journal.records import DeviceRecord
from vmplug.manager.watching.health import DeviceHealth, HostState
from vmplug.manager.watching.notice import (
    DeviceEvent,
    EventKind,
    compare,
    device_notices,
    ended_notice,
    find_removed,
    lost_notice,
    resumed_notice,
    stopped_notice,
    was_taken_away,
)

DISK = device_record("block:8:16", "/dev/sdb")
IMAGE = device_record("file:/srv/a.img", "/srv/a.img")
BDFS = ("0000:3b:00.0", "0000:3b:00.1")
GROUP = device_record(f"vfio:{BDFS[0]}", "/dev/vfio/26", DeviceType.VFIO, functions=BDFS)
BACKEND = device_record("socket:/run/vu.sock", "/run/vu.sock", DeviceType.VHOST_USER_NET)
SCSI_BACKEND = device_record("block:242:0", "/run/s.sock", DeviceType.VHOST_USER_SCSI)
COUNTED = device_record("char:1:3", "/dev/null", DeviceType.GENERIC)
HERE = DeviceHealth(HostState.PRESENT)


def sized(size_bytes: int | None, state: HostState = HostState.PRESENT) -> DeviceHealth:
    return DeviceHealth(state, size_bytes=size_bytes)


def event(action: str, subsystem: str, name: str, number: str | None = None) -> HostEvent:
    devnum = DevNum.parse(number) if number else None
    return HostEvent(action=action, subsystem=subsystem, name=name, devnum=devnum)


@pytest.mark.parametrize(
    ("before", "now", "what"),
    [
        (None, HERE, None),
        (HERE, HERE, None),
        *(
            (None, DeviceHealth(state), EventKind(state))
            for state in HostState
            if state != "present"
        ),
        *(
            (HERE, DeviceHealth(state), EventKind(state))
            for state in HostState
            if state != "present"
        ),
        *(
            (DeviceHealth(state), HERE, EventKind.BACK)
            for state in HostState
            if state != "present"
        ),
        *((DeviceHealth(state), DeviceHealth(state), None) for state in HostState),
        (
            DeviceHealth(HostState.GONE),
            DeviceHealth(HostState.DISCONNECTED),
            EventKind.DISCONNECTED,
        ),
        (sized(1), sized(2), EventKind.RESIZED),
        (sized(2), sized(1), EventKind.RESIZED),
        (sized(1, HostState.DELETED), sized(2, HostState.DELETED), EventKind.RESIZED),
        (sized(1), sized(1), None),
        (sized(1), sized(None), None),
        (sized(None), sized(1), None),
        (None, sized(1), None),
    ],
)
def test_a_difference_between_two_reads_is_a_notice(
    before: DeviceHealth | None, now: DeviceHealth, what: EventKind | None
) -> None:
    assert compare(before, now, taken_away=False) is what


def test_a_device_that_was_away_for_a_moment_is_another_one() -> None:
    assert compare(HERE, HERE, taken_away=True) is EventKind.REPLACED
    assert compare(HERE, DeviceHealth(HostState.GONE), taken_away=True) is EventKind.GONE
    assert compare(DeviceHealth(HostState.GONE), HERE, taken_away=True) is EventKind.BACK


@pytest.mark.parametrize(
    ("record", "happened"),
    [
        (DISK, event("remove", "block", "sdb", "8:16")),
        (GROUP, event("remove", "pci", BDFS[0])),
        (GROUP, event("unbind", "pci", BDFS[1])),
    ],
)
def test_events_that_take_a_device_away(record: DeviceRecord, happened: Event) -> None:
    assert was_taken_away(record, find_removed([event("add", "pci", "0000:00:01.0"), happened]))


@pytest.mark.parametrize(
    ("record", "happened"),
    [
        (DISK, event("change", "block", "sdb", "8:16")),
        (DISK, event("add", "block", "sdb", "8:16")),
        (DISK, event("remove", "block", "sdc", "8:32")),
        (DISK, event("remove", "pci", "8:16")),
        (GROUP, event("bind", "pci", BDFS[0])),
        (GROUP, event("remove", "pci", "0000:3b:00.2")),
        (SCSI_BACKEND, event("remove", "block", "x", "242:0")),
        (IMAGE, event("remove", "block", "sdb", "8:16")),
        (DISK, ProcessEnded(pid=8)),
        (DISK, EventsLost()),
    ],
)
def test_events_of_other_devices_are_no_notices(record: DeviceRecord, happened: Event) -> None:
    assert not was_taken_away(record, find_removed([happened]))


def notice(
    what: EventKind, record: DeviceRecord, now: DeviceHealth, before: DeviceHealth | None = None
) -> DeviceEvent:
    hold = hold_on(record)
    other = hold_on(replace(record, id="other"))
    (made,) = device_notices(what, record, [other, hold], before=before, now=now)
    assert made.attachment == hold
    assert made.vm == record.vm
    return made


def test_every_hold_on_the_device_is_told() -> None:
    holds = [hold_on(DISK, "c1"), hold_on(DISK, "c2"), hold_on(IMAGE)]
    now = DeviceHealth(HostState.GONE, "/dev/sdb no longer exists")
    made = list(device_notices(EventKind.GONE, DISK, holds, before=HERE, now=now))
    assert [n.attachment for n in made] == holds[:2]
    assert {n.message for n in made} == {now.detail}
    assert [hold.id in n.hint for hold, n in zip(holds[:2], made, strict=True)] == [True, True]


OF_NO_DEVICE = {
    EventKind.VM_STOPPED,
    EventKind.VM_RESUMED,
    EventKind.VM_ENDED,
    EventKind.EVENTS_LOST,
}
OF_A_BACKEND = {EventKind.DISCONNECTED}


@pytest.mark.parametrize(
    ("what", "record"),
    [
        (what, record)
        for what in EventKind
        if what not in OF_NO_DEVICE
        for record in (DISK, IMAGE, GROUP, BACKEND, SCSI_BACKEND, COUNTED)
        if record is BACKEND or record is SCSI_BACKEND or what not in OF_A_BACKEND
    ],
)
def test_every_notice_says_what_it_means_and_what_to_do(
    what: EventKind, record: DeviceRecord
) -> None:
    made = notice(what, record, DeviceHealth(HostState.GONE, "it is not as it was"))
    for text in (made.message, made.meaning, made.hint):
        assert text
        assert "{" not in text
        assert not text.endswith(".")


def test_a_resized_disk_has_both_sizes() -> None:
    made = notice(EventKind.RESIZED, DISK, sized(2 << 20), before=sized(1 << 20))
    assert (made.old_size_bytes, made.size_bytes) == (1 << 20, 2 << 20)
    assert made.attachment
    assert f"vmplug resize {made.attachment.id}" in made.hint
    other = notice(
        EventKind.DELETED, DISK, sized(2 << 20, HostState.DELETED), before=sized(1 << 20)
    )
    assert (other.old_size_bytes, other.size_bytes) == (None, None)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (BACKEND, "every 1 s"),
        (replace(BACKEND, options={"reconnect": "7"}), "every 7 s"),
        (replace(BACKEND, options={"reconnect": "0"}), "vmplug detach"),
        (SCSI_BACKEND, "vmplug detach"),
    ],
)
def test_a_lost_backend_is_found_again_only_by_a_vm_that_tries(
    record: DeviceRecord, says: str
) -> None:
    made = notice(EventKind.GONE, record, DeviceHealth(HostState.GONE, "nobody serves it"), HERE)
    assert "start the backend again" in made.hint
    assert says in made.hint


def test_a_device_that_no_guest_was_given_is_no_loss_to_one() -> None:
    made = notice(EventKind.GONE, COUNTED, DeviceHealth(HostState.GONE, "it no longer exists"))
    assert made.meaning == "the guest never had it: vmplug only counted it"


def test_a_vm_that_ended_is_told_once_with_what_it_had() -> None:
    holds = [hold_on(DISK), hold_on(IMAGE), hold_on(replace(DISK, vm="sb2"))]
    made = ended_notice(vm_record(pid=42), holds)
    assert (made.what, made.vm, made.attachment) == (EventKind.VM_ENDED, "sb1", None)
    assert "42" in made.message
    assert "2 attachments" in made.meaning
    assert made.hint == "vmplug reconcile --vm sb1 frees what it held"


def test_lost_events_belong_to_no_vm() -> None:
    disk = FailedDisk(file="/srv/a.img", error=DiskError.NO_SPACE, device_id=None)
    stopped = stopped_notice("sb1", [disk])
    assert (stopped.what, stopped.vm) == (EventKind.VM_STOPPED, "sb1")
    assert stopped.message.endswith("VM sb1: no space left for writes to /srv/a.img")
    assert resumed_notice("sb1").what is EventKind.VM_RESUMED
    assert (lost_notice().what, lost_notice().vm) == (EventKind.EVENTS_LOST, None)
