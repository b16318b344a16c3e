"""Was what a process has opened the file that was checked?

Between a check and QEMU's open(2) a path may come to lead somewhere else: a symlink turned, a node
made anew, a file renamed over it. So the file that QEMU has open is looked at again, before the
guest sees anything of it.
Source: proc_pid_fd(5): stat(2) of such a link is that of the open file, whatever its name is now.
"""

import os
import stat

from vmplug.errors import AttributeReadError, NoSuchDevice
from vmplug.host.root import HostRoot, describe, node_number


def file_id(status: os.stat_result) -> str:
    """What is the same for two paths only if they lead to one file, or to nodes of one device."""
    match stat.S_IFMT(status.st_mode):
        case stat.S_IFBLK:
            return f"block {node_number(status)}"
        case stat.S_IFCHR:
            return f"char {node_number(status)}"
        case _:
            return f"inode {status.st_dev}:{status.st_ino}"


def check_opened(path: str, checked: str, pid: int | None) -> None:
    """NoSuchDevice unless the process has opened the file of that id by that path.

    Where the process or what it has open cannot be looked at (`pid` None, or of another user),
    the path must lead to that file still.
    """
    root = HostRoot()
    status = root.try_stat(path)
    is_there = status is not None and file_id(status) == checked
    if not is_there or not (pid is None or _has_open(pid, checked, root)):
        raise replaced(path, root)


def replaced(path: str, root: HostRoot) -> NoSuchDevice:
    """The error for a path that came to lead somewhere else."""
    found = describe(root.try_stat(path))
    return NoSuchDevice(
        path,
        f"{path} is not what was checked any more: somebody replaced it meanwhile",
        found=found,
        hint=f"nothing is left of it in the VM; look at what is there now, {found}, and try again",
    )


def _has_open(pid: int, checked: str, root: HostRoot) -> bool:
    directory = f"/proc/{pid}/fd"
    try:
        numbers = sorted(map(int, root.names(directory)), reverse=True)  # the newest first
    except AttributeReadError:
        return True  # not ours to look at: the path must do
    statuses = (root.try_stat(f"{directory}/{number}") for number in numbers)
    return any(status and file_id(status) == checked for status in statuses)
