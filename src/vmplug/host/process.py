"""Processes: is it still the same one?

Source: proc_pid_stat(5), field 22, starttime in clock ticks after boot.
"""

import os
import select
from contextlib import suppress

from vmplug.errors import AttributeReadError
from vmplug.host.root import HostRoot


def read_start_time(pid: int, root: HostRoot) -> int | None:
    """When the process began; None when there is none of that number, or only its corpse."""
    text = root.read_text(f"/proc/{pid}/stat")
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    return None if fields[0] in {"Z", "X"} else int(fields[19])


def is_running(pid: int, started_at: int | None, root: HostRoot) -> bool:
    """Whether the process of that number is there and, if known, the one that began then."""
    now = read_start_time(pid, root)
    return now is not None and started_at in {None, now}


def find_marked(variable: str) -> dict[int, str]:
    """The value of an environment variable in every process of this host that was given it.

    Processes of other users are passed over. Source: proc_pid_environ(5).
    """
    root, found = HostRoot(), dict[int, str]()
    for pid in root.names("/proc"):
        with suppress(AttributeReadError):
            text = (root.read_text(f"/proc/{pid}/environ") or "") if pid.isdigit() else ""
            _, is_marked, value = ("\0" + text).partition(f"\0{variable}=")
            if is_marked:
                found[int(pid)] = value.partition("\0")[0]
    return found


def wait_for_end(pid: int, timeout_s: float) -> bool:
    """Whether the process ends within `timeout_s`. Source: pidfd_open(2)."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)
