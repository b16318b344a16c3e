"""Whether the process of a lease still runs."""

from enum import StrEnum

from vmplug.host.process import is_running
from vmplug.host.root import HostRoot
from vmplug.journal.records import VmRecord, is_elsewhere


class LeaseState(StrEnum):
    """What has a lease. `made`: its maker, so far. `held`: the process that it was given to.

    `ended`: that process has ended. `unknown`: it is one of another PID namespace.
    """

    MADE = "made"
    HELD = "held"
    ENDED = "ended"
    UNKNOWN = "unknown"


def find_state(record: VmRecord, host: HostRoot) -> LeaseState:
    """Whether the process of a lease still runs."""
    if record.is_of_earlier_boot:
        return LeaseState.ENDED
    if is_elsewhere(record, host):
        return LeaseState.UNKNOWN
    if record.pid:
        is_held = is_running(record.pid, record.started_at, host)
        return LeaseState.HELD if is_held else LeaseState.ENDED
    is_made = record.starting_by is not None and record.starting_by.is_alive(host)
    return LeaseState.MADE if is_made else LeaseState.ENDED
