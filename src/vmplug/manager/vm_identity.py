"""Decide whether the VM that answers is the one in the journal, or another one of its name.

The devices of a QEMU that has ended are gone, and the next one behind the same socket does not
have them. vmplug releases the former devices in the journal before it uses the new VM.
"""

from collections.abc import Sequence

from vmplug.drivers.ports import Endpoint, Hypervisor
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
    devices = journal.devices(vm)
    if not record.is_of_earlier_boot and _holds_any(devices, hypervisor):
        _correct(record, endpoint, journal)
        return []
    journal.replace_vm(record_vm(vm, endpoint))
    hypervisor.wait_unplugged([device.id for device in devices], 0)  # ends their daemons
    reason = "its VM has ended, and another QEMU has its name"
    return [Repair(d.id, d.host_path, RepairOutcome.FORGOTTEN, reason) for d in devices]


def _holds_any(devices: Sequence[DeviceRecord], hypervisor: Hypervisor) -> bool:
    """Whether the QEMU is the old one after all: no other has a device with one of these ids.

    An older vmplug recorded the process that created the socket, which may be a launcher.
    """
    hypervisor.claim_foreign_names(foreign_names(devices))
    held = hypervisor.find_devices()
    return any(held.get(device.id) for device in devices)


def _correct(record: VmRecord, endpoint: Endpoint, journal: Journal) -> None:
    if endpoint.pid:
        journal.set_process(record.name, endpoint.pid, endpoint.started_at)
