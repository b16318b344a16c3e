"""Processes: is it still the same one?

Source: proc_pid_stat(5), field 22, starttime in clock ticks after boot.
"""

import os
import select

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
