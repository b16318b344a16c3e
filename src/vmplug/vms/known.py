"""The VMs that the journal knows: which of them still run, and how one is forgotten."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from vmplug.errors import StateError
from vmplug.host.root import HostRoot
from vmplug.hypervisor.keeper import end_keepers
from vmplug.hypervisor.listening import is_listening
from vmplug.hypervisor.qemu.start.ended_logs import EndedLogs, keep_logs
from vmplug.hypervisor.qemu.start.ended_logs import list_ended_logs as list_logs
from vmplug.journal.journal import Journal
from vmplug.journal.records import VmRecord, has_ended
from vmplug.manager.setup import DEFAULT_SETUP, Setup

__all__ = (
    "EndedLogs",
    "find_ended",
    "forget_ended",
    "forget_vm",
    "is_gone",
    "is_starting",
    "keep_ended_logs",
    "list_ended_logs",
    "require_started",
)


def is_gone(record: VmRecord, host: HostRoot) -> bool:
    """Whether the VM has surely ended: its process has, or the host has booted since.

    A socket that refuses proves nothing while the process runs: it may be that of a proxy. Only
    where the process was never known does the socket decide; a missing file proves nothing.
    """
    if record.is_of_earlier_boot:
        return True
    if record.starting_by and record.pid is None:  # QEMU does not run before its pid is recorded
        return not is_starting(record, host)
    if record.pid is None:
        return is_listening(record.qmp_socket) is False
    return has_ended(record, host)


def is_starting(record: VmRecord, host: HostRoot) -> bool:
    """Whether a running process is starting it."""
    return record.starting_by is not None and record.starting_by.is_alive(host)


def require_started(record: VmRecord, host: HostRoot) -> None:
    """StateError while a VM is being started, or when its start was interrupted."""
    if record.starting_by is None:
        return
    is_alive = is_starting(record, host)
    told = f"process {record.starting_by.pid} is starting it" if is_alive else "interrupted start"
    raise StateError(
        f"VM {record.name} does not run yet: {told}",
        state="starting" if is_alive else "interrupted",
        required="started",
        hint="try again when that process has finished"
        if is_alive
        else "vmplug reconcile removes what it left; then start the VM again",
    )


def find_ended(journal: Journal, names: Iterable[str]) -> list[str]:
    """Return those of the named VMs that seem to have ended. No VM is asked."""
    wanted = set(names)
    return [vm.name for vm in journal.vms() if vm.name in wanted and is_gone(vm, journal.host)]


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
