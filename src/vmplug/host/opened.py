"""Was what a process has opened the file that was checked?

Between a check and QEMU's open(2) a path may come to lead somewhere else: a symlink turned, a node
made anew, a file renamed over it. So what QEMU has opened is looked at, before the guest sees
anything of it.
Source: proc_pid_fd(5): stat(2) of such a link is that of the open file, whatever its name is now.
"""

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

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


@contextmanager
def held(path: str, checked: str) -> Iterator[None]:
    """NoSuchDevice unless the path leads to the file of that id; that file is held meanwhile.

    Otherwise its number could be that of another file at once: QEMU makes an empty one where
    that of an NVDIMM has just gone. Source: open(2), O_PATH.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise replaced(path, HostRoot()) from error
    try:
        if file_id(os.fstat(descriptor)) != checked:
            raise replaced(path, HostRoot())
        yield
    finally:
        os.close(descriptor)


_NAMED = {stat.S_IFBLK, stat.S_IFCHR, stat.S_IFREG, stat.S_IFDIR}


def read_open_files(pid: int | None) -> Counter[str]:
    """The ids of what the process has open by a name, and how often; of nobody for None.

    Empty for a process of another user, which may not be looked at.
    """
    root, directory = HostRoot(), f"/proc/{pid}/fd"
    try:
        links = [f"{directory}/{number}" for number in root.names(directory)] if pid else []
    except AttributeReadError:
        links = []
    statuses = (root.try_stat(link) for link in links)
    return Counter(
        file_id(status) for status in statuses if status and stat.S_IFMT(status.st_mode) in _NAMED
    )


def check_opened(path: str, checked: str, opened: Collection[str]) -> None:
    """NoSuchDevice unless the path leads to the file of that id, and that is what was opened.

    `opened` are the ids of what the process has opened meanwhile. When it is nothing, it is
    somebody else who opens files, such as the QEMU behind a proxy, and the path must do.
    """
    root = HostRoot()
    status = root.try_stat(path)
    is_there = status is not None and file_id(status) == checked
    if not is_there or (opened and checked not in opened):
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
