"""Decide whether the VM that answers is the one in the journal, or another one of its name.

The devices of a QEMU that has ended are gone, and the next one behind the same socket does not
have them. vmplug releases the former devices in the journal before it uses the new VM.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from vmplug.drivers.ports import Hypervisor
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord, VmRecord, foreign_names, has_ended, record_vm
from vmplug.manager.reconcile import Repair, RepairOutcome


def release_if_restarted(vm: str, journal: Journal, hypervisor: Hypervisor) -> list[Repair]:
    """Add a VM that is not in the journal, and release the devices of a former one.

    Returns the released devices; the caller gives their functions back to the host.
    """
    endpoint, record = hypervisor.endpoint, journal.find_vm(vm)
    if endpoint is None:
        return []
    if record is None:
        journal.add_vm(record_vm(vm, endpoint))
        return []
    if not (record.is_of_earlier_boot or has_ended(record, journal.host)):
        return []
    if is_same_vm(record, journal, hypervisor):
        return []
    devices = journal.devices(vm)
    journal.replace_vm(record_vm(vm, endpoint))
    hypervisor.wait_unplugged([device.id for device in devices], 0)  # ends their daemons
    reason = "its VM has ended, and another QEMU has its name"
    return [Repair(d.id, d.host_path, RepairOutcome.FORGOTTEN, reason) for d in devices]


def is_same_vm(record: VmRecord, journal: Journal, hypervisor: Hypervisor) -> bool:
    """Whether the QEMU that answers is the VM after all, whose process seems to have ended.

    An older vmplug recorded the process that created the socket, which may be a launcher. No other
    QEMU has a device with an id of the VM's, or the socket of one that vmplug started. The journal
    has the right process then.
    """
    if record.is_of_earlier_boot:
        return False
    if not (record.is_ours or _holds_any(journal.devices(record.name), hypervisor)):
        return False
    find_process(record, journal, hypervisor)
    return True


def _holds_any(devices: Sequence[DeviceRecord], hypervisor: Hypervisor) -> bool:
    hypervisor.claim_foreign_names(foreign_names(devices))
    held = hypervisor.find_devices()
    return any(device.id in held for device in devices)


def find_process(record: VmRecord, journal: Journal, hypervisor: Hypervisor) -> VmRecord:
    """The VM with the process that answers, where that is visible; so is its row from now on."""
    endpoint = hypervisor.endpoint
    if not (endpoint and endpoint.pid):
        return record
    found = replace(record, pid=endpoint.pid, started_at=endpoint.started_at)
    if found != record:
        journal.set_process(record.name, endpoint.pid, endpoint.started_at)
    return found
