"""End a VM that vmplug started, and release what it held."""

from vmplug.errors import HypervisorError
from vmplug.host.kind import DeviceType
from vmplug.host.process import end_process
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord, VmRecord
from vmplug.vms.known import forget_vm

_GRACE_S = 2.0
"""For QEMU to close its files after SIGTERM."""


def end_vm(record: VmRecord) -> None:
    """End the process of a VM that vmplug started. HypervisorError when it does not end."""
    if record.pid and not end_process(record.pid, record.started_at, _GRACE_S):
        raise HypervisorError(
            f"process {record.pid} of VM {record.name} does not end, even when killed",
            hint=f"a device or a file system holds it up: cat /proc/{record.pid}/stack",
        )


def abandon_start(journal: Journal, record: VmRecord) -> None:
    """End the QEMU of a start that was interrupted, if it runs already, and forget the VM."""
    end_vm(record)
    release_vm(journal, record)


def release_vm(journal: Journal, record: VmRecord) -> list[DeviceRecord]:
    """Forget a VM that has ended, with the devices that it held, and return those."""
    held = journal.devices(record.name)
    shares = [device.id for device in held if device.kind is DeviceType.VHOST_USER_FS]
    if shares:
        HostVirtiofsdRunner(record.qmp_socket).end(shares)
    forget_vm(journal, record)
    return held
