"""The threads of a process, whose first one may end before the others.

Then it is a zombie without files and memory, and only the others show them.
Source: proc_pid_stat(5); pthread_exit(3), "Notes".
"""

from vmplug.host.root import HostRoot

ENDED = frozenset("ZX")
"""The states of a thread that has ended."""
NLINK_OF_ONE_TASK = 3
"""Links of a directory task: `.`, `..`, and one for each thread. Source: fs/proc/base.c."""


def list_other_threads(pid: int | str, root: HostRoot) -> list[str]:
    """The threads of a process that run, without its first one."""
    directory = f"/proc/{pid}/task"
    status = root.stat_or_none(directory)
    if status and status.st_nlink == NLINK_OF_ONE_TASK:  # a list takes five times as long
        return []
    others = (name for name in root.list_dir(directory) if name != str(pid))
    fields = ((name, read_fields(f"{directory}/{name}/stat", root)) for name in others)
    return [name for name, found in fields if found and found[0] not in ENDED]


def read_fields(path: str, root: HostRoot) -> list[str] | None:
    """The fields behind the name, which may contain blanks and brackets; None when absent."""
    text = root.read_text(path)
    return None if text is None else text.rpartition(")")[2].split()
