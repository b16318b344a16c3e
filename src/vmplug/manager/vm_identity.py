"""Is the VM that answers still the one in the journal, or another one of its name?

A QEMU that has ended has taken its devices along, and the next one behind the same socket knows
nothing of them. What the journal still has of the former life is released before anything is done
with the new one.
"""

from collections.abc import Sequence

from vmplug.drivers.ports import Endpoint, Hypervisor
from vmplug.host.process import read_start_time
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord, VmRecord, foreign_names, has_ended, record_vm
from vmplug.manager.reconcile import Repair, RepairOutcome


def release_if_restarted(vm: str, journal: Journal, hypervisor: Hypervisor) -> list[Repair]:
    """Write a VM down that the journal does not know, and release what a former one held.

    Tells what was released; its functions are still to be given back to the host.
    """
    endpoint, record = hypervisor.endpoint, journal.find_vm(vm)
    if endpoint is None:
        return []
    if record is None:
        journal.add_vm(record_vm(vm, endpoint, journal.host))
        return []
    if not _may_have_ended(record, journal):
        return []
    devices = journal.devices(vm)
    if not record.is_of_earlier_boot and _holds_any(devices, hypervisor):
        _correct(record, endpoint, journal)
        return []
    journal.replace_vm(record_vm(vm, endpoint, journal.host))
    hypervisor.wait_unplugged([device.id for device in devices], 0)  # ends their daemons
    reason = "its VM has ended, and another QEMU has the name"
    return [Repair(d.id, d.host_path, RepairOutcome.FORGOTTEN, reason) for d in devices]


def _may_have_ended(record: VmRecord, journal: Journal) -> bool:
    """Whether the process that the journal knows is no more."""
    if record.is_of_earlier_boot:
        return True
    return has_ended(record, journal.host)


def _holds_any(devices: Sequence[DeviceRecord], hypervisor: Hypervisor) -> bool:
    """Whether the QEMU is the old one after all: no other has a device by one of these ids.

    An older vmplug wrote down who had made the socket, which may have been a launcher.
    """
    hypervisor.claim_foreign_names(foreign_names(devices))
    held = hypervisor.find_devices()
    return any(held.get(device.id) for device in devices)


def _correct(record: VmRecord, endpoint: Endpoint, journal: Journal) -> None:
    if endpoint.pid:
        started_at = read_start_time(endpoint.pid, journal.host)
        journal.set_process(record.name, endpoint.pid, started_at)
