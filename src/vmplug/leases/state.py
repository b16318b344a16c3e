"""Whether the process of a lease still runs."""

from enum import StrEnum

from vmplug.devnum import is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.process import is_running, read_start_time
from vmplug.host.root import HostRoot
from vmplug.journal.process import read_pid_namespace
from vmplug.journal.records import VmRecord, is_elsewhere, namespace_of


class LeaseState(StrEnum):
    """What has a lease. `made`: its maker, so far. `held`: the process that it was given to.

    `ended`: that process has ended. `unknown`: it is one of another PID namespace, and may run.
    """

    MADE = "made"
    HELD = "held"
    ENDED = "ended"
    UNKNOWN = "unknown"


_INITIAL_NAMESPACE = 0xEFFFFFFC
"""The PID namespace from which every process is visible. Source: include/linux/proc_ns.h."""


def _has_left_all(record: VmRecord, host: HostRoot) -> bool:
    """Whether no process is in the PID namespace of a lease any more, and so not its own.

    The first process of a namespace runs for as long as any other. Source: pid_namespaces(7).
    """
    if read_pid_namespace(host) != _INITIAL_NAMESPACE:
        return False
    return not any(_is_in(pid, namespace_of(record), host) for pid in host.list_dir("/proc"))


def _is_in(pid: str, namespace: str, host: HostRoot) -> bool:
    """Whether a process may be in a namespace; a zombie is in none any more."""
    try:
        status = host.stat_or_none(f"/proc/{pid}/ns/pid") if is_decimal(pid) else None
    except AttributeReadError:
        return True
    if status is None or str(status.st_ino) != namespace:
        return False
    return read_start_time(int(pid), host) is not None


def find_state(record: VmRecord, host: HostRoot) -> LeaseState:
    """Whether the process of a lease still runs."""
    if record.is_of_earlier_boot:
        return LeaseState.ENDED
    if is_elsewhere(record, host):
        return LeaseState.ENDED if _has_left_all(record, host) else LeaseState.UNKNOWN
    if record.pid:
        is_held = is_running(record.pid, record.started_at, host)
        return LeaseState.HELD if is_held else LeaseState.ENDED
    is_made = record.starting_by is not None and record.starting_by.is_alive(host)
    return LeaseState.MADE if is_made else LeaseState.ENDED
