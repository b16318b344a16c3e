"""Open the file that was checked, or verify that a process has opened it.

Between a check and an open(2) the path may change: a symlink has another target, a node is made
again, a file is renamed over it. So vmplug opens a path once without using it (O_PATH), compares
that, and opens the rest through /proc/self/fd, or it verifies what another process opened.
Source: proc_pid_fd(5): stat(2) of such a link is that of the open file, whatever its name is now.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from vmplug.devnum import FileKey, key_of
from vmplug.errors import AttributeReadError, NoSuchDevice
from vmplug.host.root import THIS_HOST, HostRoot, describe


def file_id(status: os.stat_result) -> str:
    """An id that two paths share only if they lead to one file, or to nodes of one device."""
    return _id_of(key_of(status))


def _id_of(key: FileKey) -> str:
    kind, device, inode = key
    match kind:
        case stat.S_IFBLK:
            return f"block {os.major(device)}:{os.minor(device)}"
        case stat.S_IFCHR:
            return f"char {os.major(device)}:{os.minor(device)}"
        case _:
            return f"inode {device}:{inode}"


class CheckedFile(NamedTuple):
    """A file for QEMU to open; `direct`: without the page cache."""

    path: str
    file_id: str
    read_only: bool = False
    direct: bool = False


@contextmanager
def pinned(path: str, checked: str) -> Iterator[int]:
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
        yield descriptor
    finally:
        os.close(descriptor)


def real_path_of(pin: int, path: str) -> str:
    """The path of the pinned file, without links; NoSuchDevice when this host has none for it.

    The kernel's text may be that of another mount namespace: /proc/PID/root leads to those that
    any user can make. So it is followed from our root directory, and through no link.
    """
    named = THIS_HOST.read_link(f"/proc/self/fd/{pin}") or path
    if not _is_at(named, file_id(os.fstat(pin))):
        raise file_replaced(path, THIS_HOST)
    return named


def _is_at(path: str, checked: str) -> bool:
    """Whether the path leads to the file of that id through directories alone."""
    reached = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        for name in filter(None, path.split("/")):
            further = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=reached)
            os.close(reached)
            reached = further
        return file_id(os.fstat(reached)) == checked
    except OSError:  # ENOTDIR for a link, with O_PATH
        return False
    finally:
        os.close(reached)


@contextmanager
def opened(pin: int, file: CheckedFile) -> Iterator[int | None]:
    """The pinned file, open as QEMU needs it; None where this process cannot, and QEMU may."""
    flags = os.O_RDONLY if file.read_only else os.O_RDWR
    flags |= os.O_DIRECT if file.direct else 0
    try:
        descriptor = os.open(f"/proc/self/fd/{pin}", flags | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield descriptor
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
    found = _read_open(pid) if pid else None
    return checked in found.values() if found else None


def list_open(pid: int) -> frozenset[int]:
    """The numbers of the process's descriptors; none where they cannot be listed."""
    try:
        return frozenset(map(int, THIS_HOST.list_dir(f"/proc/{pid}/fd")))
    except AttributeReadError:
        return frozenset()


def shows_open(pid: int) -> bool:
    """Whether this process may see which files that one has open."""
    return any(read_open_id(f"/proc/{pid}/fd/{number}") for number in sorted(list_open(pid)))


def number_leads_to(pid: int, number: int, checked: str) -> bool:
    """Whether that descriptor of the process is open on the file of that id."""
    return read_open_id(f"/proc/{pid}/fd/{number}") == checked


def _read_open(pid: int) -> dict[int, str] | None:
    """The ids of the files that a process has open; None where they cannot be read."""
    directory = f"/proc/{pid}/fd"
    try:
        names = THIS_HOST.list_dir(directory)
    except AttributeReadError:
        return None
    ids = {int(name): read_open_id(f"{directory}/{name}") for name in names}
    return {number: opened for number, opened in ids.items() if opened}


def read_open_id(link: str) -> str | None:
    """The id of the file that a link of /proc leads to; None where it cannot be read.

    No storage is asked: one that does not answer must not matter to the files of others.
    """
    from vmplug.host.use.statx import read_place  # noqa: PLC0415  ctypes costs 2 ms

    with suppress(AttributeReadError):  # a broken neighbour
        if place := read_place(link):
            return _id_of(place[0])
    return None


def find_missing(pid: int, files: Iterable[CheckedFile]) -> CheckedFile | None:
    """A file that the process has open less often, for reading or for writing, than it should.

    None also where its files cannot be read. Source: proc_pid_fdinfo(5), `flags`.
    """
    known, found = _read_open(pid), Counter[tuple[str, bool]]()
    if known is None:
        return None
    for number, opened_id in known.items():
        text = THIS_HOST.read_text(f"/proc/{pid}/fdinfo/{number}") or ""
        if flags := re.search(r"^flags:\s*([0-7]+)$", text, re.MULTILINE):
            is_read_only = int(flags[1], 8) & os.O_ACCMODE == os.O_RDONLY
            found[opened_id, is_read_only] += 1
    for file in files:
        found[file.file_id, file.read_only] -= 1
        if found[file.file_id, file.read_only] < 0:
            return file
    return None


def file_replaced(path: str, root: HostRoot) -> NoSuchDevice:
    """The error for a path that now leads to another file, or to none."""
    status = root.stat_or_none(path)
    found = describe(status)
    return NoSuchDevice(
        path,
        f"{path} was {'replaced' if status else 'removed'} after vmplug checked it",
        found=found,
        hint=f"the VM is unchanged; the path is now {found}: check it, then try again",
    )
