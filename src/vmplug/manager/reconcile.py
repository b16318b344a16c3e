"""Make the journal agree with the devices that the VM really has, after any crash.

| journal | VM | done |
| --- | --- | --- |
| plugging | any part, or none | unplugged: its attach had not returned |
| attached | the device | nothing; reported when its vhost-user backend is gone |
| attached | remains, or none | remains removed, forgotten |
| detaching | any part, or none | unplugged |
| retained | the device, or none | nothing, or forgotten |
| nothing, for no VM | remains whose name has this journal's id | removed |
| nothing, for no VM | a device, or remains named by another vmplug | nothing, unless taken over |

A device that the guest has was in the journal once: an older copy of that has been put in its
place, or its VM was forgotten. A container may be using it.

A device that a running process has in progress is left to it. A device that the guest does not
release stays "detaching". Devices that QEMU cannot unplug, NVDIMMs and virtio-mmio devices, stay
in the journal as "retained".
"""

from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import assert_never

import msgspec

from vmplug.address import journal_id_of
from vmplug.drivers.ports import Hypervisor, UnplugFailure
from vmplug.errors import StateError
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord, foreign_names
from vmplug.journal.state import State
from vmplug.log import Log
from vmplug.manager.left_files import close_left_files
from vmplug.waiting import waiting

log = Log(__name__)


class RepairOutcome(StrEnum):
    """The outcome of reconcile for a device."""

    UNDONE = "undone"
    FINISHED = "detached"
    FORGOTTEN = "forgotten"
    REMOVED = "removed"
    RETAINED = "retained"
    BACKEND_LOST = "backend lost"
    STILL_DETACHING = "still detaching"
    IN_PROGRESS = "in progress"
    ANOTHER_JOURNAL = "another journal"


_STAYING = {
    RepairOutcome.RETAINED,
    RepairOutcome.BACKEND_LOST,
    RepairOutcome.IN_PROGRESS,
    RepairOutcome.ANOTHER_JOURNAL,
}
_UNFINISHED = {RepairOutcome.UNDONE, RepairOutcome.FINISHED}


class Repair(msgspec.Struct, frozen=True):
    """One repaired device; `host_path` is None for one that was not in the journal."""

    device_id: str
    host_path: str | None
    outcome: RepairOutcome
    reason: str

    @property
    def is_gone(self) -> bool:
        """Whether the VM no longer has it."""
        return self.outcome not in {*_STAYING, RepairOutcome.STILL_DETACHING}


_ATTEMPTS = 5


def reconcile(
    vm: str,
    journal: Journal,
    hypervisor: Hypervisor,
    *,
    timeout_s: float,
    take_over: bool = False,
) -> list[Repair]:
    """Repair every device of `vm` that does not agree, and return the repairs.

    `take_over` unplugs devices of other journals too, as if this one had lost them.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return _reconcile(vm, journal, hypervisor, timeout_s, take_over=take_over)
        except StateError as error:  # another reconcile, or a detach, has just been faster
            log.debug("VM %s is checked again: %s", vm, error)
    return _reconcile(vm, journal, hypervisor, timeout_s, take_over=take_over)


def _reconcile(
    vm: str, journal: Journal, hypervisor: Hypervisor, timeout_s: float, *, take_over: bool
) -> list[Repair]:
    close_left_files(vm, journal, hypervisor)
    # In this order: a device that a process plugs or unplugs meanwhile is in one of the two.
    records = {record.id: record for record in journal.devices(vm)}
    hypervisor.claim_foreign_names(foreign_names(records.values()))
    held = hypervisor.find_devices()
    repairs = {
        record.id: repair
        for record in records.values()
        if (repair := _in_progress(record, journal) or _judge(record, held))
    }
    unknown = held.keys() - journal.device_ids() - records.keys()
    foreign = set[str]()
    if not take_over:
        foreign = journal.find_foreign(unknown) | {one for one in unknown if held[one]}
    repairs |= {device_id: _not_in_journal(device_id) for device_id in unknown - foreign}
    repairs |= _foreign(foreign, journal, hypervisor)
    for device_id in hypervisor.find_lost() & records.keys() - repairs.keys():
        path, reason = (
            records[device_id].host_path,
            "start its backend again, or detach the device",
        )
        repairs[device_id] = Repair(device_id, path, RepairOutcome.BACKEND_LOST, reason)
    stuck = [i for i, repair in repairs.items() if repair.outcome is RepairOutcome.RETAINED]
    unfinished = [i for i, repair in repairs.items() if repair.outcome in _UNFINISHED]
    leaving = [i for i, repair in repairs.items() if repair.outcome not in _STAYING]
    with journal.in_progress(unfinished):
        journal.set_state(stuck, State.RETAINED)
        journal.set_state(unfinished, State.DETACHING)
        left = _unplug(hypervisor, leaving, held, timeout_s)
        # No VM lists these; a function that one has open cannot go back to its driver.
        hypervisor.close_files(
            [i for i in unfinished if repairs[i].outcome is RepairOutcome.UNDONE]
        )
        journal.forget_devices([i for i in leaving if i in records and i not in left])
    journal.give_up(left)
    return [
        Repair(repair.device_id, repair.host_path, RepairOutcome.STILL_DETACHING, left[device_id])
        if device_id in left
        else repair
        for device_id, repair in repairs.items()
    ]


def _not_in_journal(device_id: str) -> Repair:
    reason = "it is in the VM, but not in the journal"
    return Repair(device_id, None, RepairOutcome.REMOVED, reason)


def _foreign(
    device_ids: Collection[str], journal: Journal, hypervisor: Hypervisor
) -> dict[str, Repair]:
    """Devices that other journals have, or a newer copy, which know what and whose they are."""
    drivers = hypervisor.find_drivers() if device_ids else {}
    repairs = {}
    for device_id in device_ids:
        what, whose = drivers.get(device_id, "remains"), journal_id_of(device_id)
        which = "which has no row of it" if whose == journal.id else f"and this is {journal.id}"
        reason = f"{what} of journal {whose}, {which}: --take-over unplugs it"
        outcome = RepairOutcome.ANOTHER_JOURNAL
        repairs[device_id] = Repair(device_id, None, outcome, reason)
    return repairs


def _in_progress(record: DeviceRecord, journal: Journal) -> Repair | None:
    worker = record.in_progress_by
    if not (worker and worker.is_alive(journal.host)):
        return None
    reason = f"process {worker.pid} is working on it"
    return Repair(record.id, record.host_path, RepairOutcome.IN_PROGRESS, reason)


def _judge(record: DeviceRecord, held: Mapping[str, bool]) -> Repair | None:
    is_unfinished = record.state in {State.PLUGGING, State.DETACHING}
    if is_unfinished and held.get(record.id) and not record.can_be_unplugged:
        reason = "QEMU cannot unplug it"
        return Repair(record.id, record.host_path, RepairOutcome.RETAINED, reason)
    match record.state:
        case State.PLUGGING:
            return Repair(
                record.id, record.host_path, RepairOutcome.UNDONE, "its attach was interrupted"
            )
        case State.DETACHING:
            return Repair(
                record.id, record.host_path, RepairOutcome.FINISHED, "its detach was interrupted"
            )
        case State.ATTACHED | State.RETAINED:
            if held.get(record.id) or record.place is None:
                return None
            return Repair(
                record.id, record.host_path, RepairOutcome.FORGOTTEN, "the VM no longer holds it"
            )


def _unplug(
    hypervisor: Hypervisor, device_ids: Sequence[str], held: Mapping[str, bool], timeout_s: float
) -> dict[str, str]:
    """The reason for each device that is still there."""
    asked = [device_id for device_id in device_ids if held.get(device_id)]
    answers = hypervisor.request_unplug(asked) if asked else {}
    refused = {device_id: error.message for device_id, error in answers.items()}
    parts = [i for i in device_ids if i in held and i not in refused]
    left = dict[str, UnplugFailure]()
    if parts:
        with waiting(f"a guest to release {len(parts)} devices", timeout_s):
            left = hypervisor.wait_unplugged(parts, timeout_s)
    return refused | {device_id: _spoken(why) for device_id, why in left.items()}


def _spoken(reason: UnplugFailure) -> str:
    match reason:
        case UnplugFailure.REFUSED:
            return "the guest refuses"
        case UnplugFailure.LOST:
            return "its vhost-user backend is gone, and the guest waits for it"
        case UnplugFailure.TIMEOUT:
            return "the guest does not answer"
        case _:
            assert_never(reason)
