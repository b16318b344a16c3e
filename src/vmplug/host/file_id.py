"""Verify that a process has opened the file that was checked.

Between a check and QEMU's open(2) the path may change: a symlink has another target, a node is
made again, a file is renamed over it. So vmplug verifies the file that QEMU opened before the
guest sees it.
Source: proc_pid_fd(5): stat(2) of such a link is that of the open file, whatever its name is now.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from vmplug.errors import AttributeReadError, NoSuchDevice
from vmplug.host.root import THIS_HOST, HostRoot, describe, node_number


def file_id(status: os.stat_result) -> str:
    """An id that two paths share only if they lead to one file, or to nodes of one device."""
    match stat.S_IFMT(status.st_mode):
        case stat.S_IFBLK:
            return f"block {node_number(status)}"
        case stat.S_IFCHR:
            return f"char {node_number(status)}"
        case _:
            return f"inode {status.st_dev}:{status.st_ino}"


@contextmanager
def pinned(path: str, checked: str) -> Iterator[None]:
    """NoSuchDevice unless the path leads to the file of that id, which is held open meanwhile.

    Otherwise another file could get its inode number at once: QEMU creates an empty file where
    that of an NVDIMM has just been deleted. Source: open(2), O_PATH.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise file_replaced(path, THIS_HOST) from error
    try:
        if file_id(os.fstat(descriptor)) != checked:
            raise file_replaced(path, THIS_HOST)
        yield
    finally:
        os.close(descriptor)


def check_path(path: str, checked: str) -> None:
    """NoSuchDevice unless the path leads to the file of that id now."""
    root = THIS_HOST
    status = root.stat_or_none(path)
    if status is None or file_id(status) != checked:
        raise file_replaced(path, root)


def has_open(pid: int | None, checked: str) -> bool | None:
    """Whether the process has the file of that id open; None where its files cannot be read."""
    root, directory = THIS_HOST, f"/proc/{pid}/fd"
    try:
        names = root.list_dir(directory) if pid else []
    except AttributeReadError:
        return None
    newest_first = sorted(map(int, names), reverse=True)
    statuses = (root.stat_or_none(f"{directory}/{number}") for number in newest_first)
    is_open = any(status and file_id(status) == checked for status in statuses)
    return is_open if names else None


def has_thread(pid: int, thread_id: int) -> bool:
    """Whether it is a thread of that process. Source: proc_pid_task(5)."""
    return THIS_HOST.stat_or_none(f"/proc/{pid}/task/{thread_id}") is not None


def file_replaced(path: str, root: HostRoot) -> NoSuchDevice:
    """The error for a path that now leads to another file."""
    found = describe(root.stat_or_none(path))
    return NoSuchDevice(
        path,
        f"{path} was replaced after vmplug checked it",
        found=found,
        hint=f"the VM is unchanged; the path is now {found}: check it, then try again",
    )
