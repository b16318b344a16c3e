"""Processes: is it still the same one?

Source: proc_pid_stat(5), field 22, starttime in clock ticks after boot.
"""

from vmplug.host.root import HostRoot


def read_start_time(pid: int, root: HostRoot) -> int | None:
    """When the process began; None when there is none of that number, or only its corpse."""
    text = root.read_text(f"/proc/{pid}/stat")
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    return None if fields[0] in {"Z", "X"} else int(fields[19])
