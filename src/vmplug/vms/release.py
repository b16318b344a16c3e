"""End a VM that vmplug started, release what it held, keep its last logs, and forget it."""

import os
import shutil
from contextlib import closing
from pathlib import Path

from vmplug.errors import HypervisorError
from vmplug.host.kind import DeviceType
from vmplug.host.process import end_process
from vmplug.hypervisor.keeper import end_keepers
from vmplug.hypervisor.listening import is_listening
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.start.ended_logs import EndedLogs, keep_logs
from vmplug.hypervisor.qemu.start.ended_logs import list_ended_logs as list_logs
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord, VmRecord
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.manager.vm_identity import is_same_vm
from vmplug.vms.known import is_gone

__all__ = (
    "EndedLogs",
    "abandon_start",
    "end_vm",
    "forget_ended",
    "forget_vm",
    "keep_ended_logs",
    "list_ended_logs",
    "release_vm",
    "still_runs",
)

_ANSWER_TIMEOUT_S = 2.0
_GRACE_S = 2.0
"""For QEMU to close its files after SIGTERM."""


def still_runs(record: VmRecord, journal: Journal) -> bool:
    """Whether the VM must not be forgotten: something shows that it runs.

    Where its process has ended, that is a QEMU at its socket with devices of its own.
    """
    if not is_gone(record, journal.host):
        return True
    if record.is_of_earlier_boot or record.starting_by or not is_listening(record.qmp_socket):
        return False
    try:
        with closing(
            Qemu.connect(
                record.qmp_socket, timeout_s=_ANSWER_TIMEOUT_S, command_timeout_s=_ANSWER_TIMEOUT_S
            )
        ) as qemu:
            return is_same_vm(record, journal, qemu)
    except HypervisorError:  # a proxy without a QEMU, say
        return False


def end_vm(record: VmRecord) -> None:
    """End the process of a VM that vmplug started.

    HypervisorError when it does not end, or when another process still answers for it.
    """
    if record.pid and not end_process(record.pid, record.started_at, _GRACE_S):
        raise HypervisorError(
            f"process {record.pid} of VM {record.name} does not end, even when killed",
            hint=f"a device or a file system holds it up: cat /proc/{record.pid}/stack",
        )
    if record.pid and is_listening(record.qmp_socket):
        raise HypervisorError(
            f"VM {record.name} still runs, and not as process {record.pid} of the journal",
            hint=f"ss -xlp src {record.qmp_socket} shows its process: end that, and try again",
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


def list_ended_logs(*, setup: Setup = DEFAULT_SETUP) -> list[EndedLogs]:
    """Return the logs of VMs that ended by themselves, the latest last.

    vmplug keeps two of a name at most, and eight altogether.
    """
    return list_logs(Path(setup.state_dir).resolve())


def keep_ended_logs(record: VmRecord) -> None:
    """Keep the logs of a VM that vmplug started, and that has ended by itself."""
    if record.is_ours and not record.starting_by:
        end_keepers(record.qmp_socket)
        keep_logs(Path(record.qmp_socket).parent, record.name)


def forget_vm(journal: Journal, record: VmRecord) -> None:
    """Forget a VM that has ended, or that vmplug no longer serves, and remove vmplug's files.

    The files first: without its row in the journal nothing leads to them after a crash.
    """
    if record.is_ours:
        end_keepers(record.qmp_socket)
        shutil.rmtree(os.path.dirname(record.qmp_socket), ignore_errors=True)
    journal.forget_vm(record.name)


def forget_ended(journal: Journal, name: str) -> None:
    """Forget the VM of that name if it has ended and nothing is left attached to it.

    VMs of an earlier boot are forgotten too: the boot released whatever they held.
    """
    for record in journal.vms():
        has_left = (
            record.name == name and is_gone(record, journal.host) and not journal.devices(name)
        )
        if record.is_of_earlier_boot or has_left:
            keep_ended_logs(record)
            forget_vm(journal, record)
