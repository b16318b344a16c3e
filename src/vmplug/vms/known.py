"""The VMs that the journal knows: which of them still run."""

from collections.abc import Iterable

from vmplug.errors import StateError
from vmplug.host.root import HostRoot
from vmplug.hypervisor.listening import is_listening
from vmplug.journal.journal import Journal
from vmplug.journal.records import VmRecord, has_ended
from vmplug.leases.state import LeaseState, find_state


def is_gone(record: VmRecord, host: HostRoot) -> bool:
    """Whether the VM has surely ended: its process has, or the host has booted since.

    A socket that refuses proves nothing while the process runs: it may be that of a proxy. Only
    where the process was never known does the socket decide; a missing file proves nothing. But
    a QEMU that vmplug started has its socket alone, and while that listens it runs.
    """
    if record.is_of_earlier_boot:
        return True
    if record.starting_by and record.pid is None:  # QEMU does not run before its pid is recorded
        return not is_starting(record, host)
    if record.pid is None:
        return is_listening(record.qmp_socket) is False
    if record.is_ours and is_listening(record.qmp_socket):
        return False
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
    """Return those of the named VMs and leases that seem to have ended. No VM is asked."""
    wanted = set(names)
    known = (record for record in journal.all_holders() if record.name in wanted)
    return [record.name for record in known if _seems_ended(record, journal.host)]


def _seems_ended(record: VmRecord, host: HostRoot) -> bool:
    if record.is_lease:
        return find_state(record, host) is LeaseState.ENDED
    return is_gone(record, host)
