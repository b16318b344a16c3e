"""Make the journal agree with what the VM really holds, after a crash of anybody.

| journal | VM | done |
| --- | --- | --- |
| plugging | any part, or none | unplugged: nobody was told that it is there |
| attached | the device | nothing |
| attached | remains, or none | remains removed, forgotten |
| detaching | any part, or none | unplugged |
| nothing, for no VM | a part named by vmplug | unplugged |

A device that the guest does not release stays "detaching".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vmplug.drivers.base import Hypervisor
from vmplug.manager.records import DeviceRecord
from vmplug.manager.state import State
from vmplug.manager.store import Store


class Outcome(StrEnum):
    """What reconcile did with a device."""

    UNDONE = "undone"
    FINISHED = "detached"
    FORGOTTEN = "forgotten"
    REMOVED = "removed"
    STILL_DETACHING = "still detaching"


_LEFT = {"timeout": "the guest does not answer", "refused": "the guest refuses"}


@dataclass(frozen=True, slots=True)
class Repair:
    """One thing that did not agree; `host_path` is None for what the journal did not know."""

    device_id: str
    host_path: str | None
    outcome: Outcome
    reason: str


def reconcile(
    vm: str, journal: Store, hypervisor: Hypervisor, *, timeout_s: float
) -> list[Repair]:
    """Repair everything of `vm` that does not agree, and tell it."""
    held = hypervisor.find_devices()
    records = {record.id: record for record in journal.devices(vm)}
    repairs = {
        record.id: repair for record in records.values() if (repair := _judge(record, held))
    }
    for device_id in held.keys() - journal.device_ids():
        reason = "the VM holds it and the journal does not know it"
        repairs[device_id] = Repair(device_id, None, Outcome.REMOVED, reason)
    unfinished = [
        device_id
        for device_id in repairs
        if device_id in records and records[device_id].state is State.PLUGGING
    ]
    journal.set_state(unfinished, State.DETACHING)
    left = _unplug(hypervisor, list(repairs), held, timeout_s)
    journal.forget_devices([i for i in repairs if i in records and i not in left])
    return [
        Repair(repair.device_id, repair.host_path, Outcome.STILL_DETACHING, _LEFT[left[device_id]])
        if device_id in left
        else repair
        for device_id, repair in repairs.items()
    ]


def _judge(record: DeviceRecord, held: Mapping[str, bool]) -> Repair | None:
    match record.state:
        case State.PLUGGING:
            return Repair(
                record.id, record.host_path, Outcome.UNDONE, "its attach was interrupted"
            )
        case State.DETACHING:
            return Repair(record.id, record.host_path, Outcome.FINISHED, "it was detaching")
        case State.ATTACHED:
            if held.get(record.id) or record.place is None:
                return None
            return Repair(
                record.id, record.host_path, Outcome.FORGOTTEN, "the VM no longer holds it"
            )


def _unplug(
    hypervisor: Hypervisor, device_ids: Sequence[str], held: Mapping[str, bool], timeout_s: float
) -> dict[str, str]:
    for device_id in device_ids:
        if held.get(device_id):
            hypervisor.request_unplug(device_id)
    parts = [device_id for device_id in device_ids if device_id in held]
    return hypervisor.wait_unplugged(parts, timeout_s) if parts else {}
