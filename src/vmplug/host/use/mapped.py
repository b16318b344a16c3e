"""Find the processes that have a file or a device mapped, whatever descriptors they have closed.

Source: proc_pid_maps(5); proc_pid_map_files(5).
"""

import os
import re
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from vmplug.devnum import is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.process import list_other_threads
from vmplug.host.root import HostRoot
from vmplug.host.use.openers import Opener, Wanted
from vmplug.host.use.silent import answer_within

if TYPE_CHECKING:
    from vmplug.host.use.statx import Place

_VFIO_FILE = "anon_inode:[vfio-device]"
"""What VFIO gives for a device of a group. Source: Linux drivers/vfio/group.c."""
_WRITES = 0o200
_TIMEOUT_S, _LEAST_S = 2.0, 0.01
"""A process answers within microseconds; one that is asked late gets some time all the same."""
_SHARED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ...s ", re.MULTILINE)


def find_mapped(wanted: Wanted, root: HostRoot) -> Iterator[Opener]:
    """The processes that share one of these files by a mapping, except this one.

    A private mapping writes nothing to its file, and VFIO gives none. A process whose mappings
    this user may not read is skipped, and so is a copy of a host. Raises AttributeReadError for a
    process that does not answer: its memory may be locked for as long as it waits for a FUSE
    server, which may be its own.
    """
    if not (wanted and root.is_live):
        return
    for pid in _others(root):
        directory = f"/proc/{pid}/map_files"
        found = answer_within(_TIMEOUT_S, partial(_read_shared, pid, root))
        if found is None:
            raise AttributeReadError(directory, why="the process does not answer")
        for name, (key, _) in found:
            if key in wanted:
                yield _opener(pid, wanted[key], root, f"{directory}/{name}")


def _read_shared(pid: str, root: HostRoot) -> "list[tuple[str, Place]]":
    from vmplug.host.use.statx import read_places  # noqa: PLC0415  ctypes costs 2 ms

    directory = f"{root.path.removesuffix('/')}/proc/{pid}/map_files"
    try:
        names = list(_shared(root.read_text(f"/proc/{pid}/maps") or ""))
        return list(read_places(directory, names))
    except AttributeReadError:  # another user's, or it has ended
        return []


def _shared(maps: str) -> Iterator[str]:
    """The names in map_files of a process's shared mappings; most processes have few."""
    for start, end in _SHARED.findall(maps):
        yield f"{int(start, 16):x}-{int(end, 16):x}"


def find_vfio_users(root: HostRoot) -> list[Opener]:
    """The processes, except this one, that may have a device of VFIO open or mapped.

    The file that a group gives for a device does not say which one. A process whose mappings
    cannot be read in time may have it too: see `find_mapped`; all of them share that time.
    """
    deadline = time.monotonic() + _TIMEOUT_S
    return [
        Opener(pid=int(pid), name=_name(pid, root), path=_VFIO_FILE)
        for pid in _others(root)
        if _may_have_vfio_file(pid, root, deadline)
    ]


def _may_have_vfio_file(pid: str, root: HostRoot, deadline: float) -> bool:
    base = f"/proc/{pid}"
    try:
        if not (numbers := root.list_dir(f"{base}/fd")):
            threads = list_other_threads(pid, root)
            base = f"{base}/task/{threads[0]}" if threads else base
            numbers = root.list_dir(f"{base}/fd")
        links = {root.read_link(f"{base}/fd/{number}") for number in numbers}
    except AttributeReadError:  # another user's, or it has ended
        return False
    if _VFIO_FILE in links:
        return True
    left_s = max(_LEAST_S, deadline - time.monotonic())
    return answer_within(left_s, partial(_maps_vfio, base, root)) in {True, None}


def _maps_vfio(base: str, root: HostRoot) -> bool:
    try:
        return _VFIO_FILE in (root.read_text(f"{base}/maps") or "")
    except AttributeReadError:
        return False


def _others(root: HostRoot) -> Iterator[str]:
    own = str(os.getpid()) if root.is_live else ""
    return (pid for pid in root.list_dir("/proc") if is_decimal(pid) and pid != own)


def _opener(pid: str, path: str, root: HostRoot, link: str) -> Opener:
    status = root.stat_or_none(link, follow_symlinks=False)
    writes = status is None or bool(status.st_mode & _WRITES)
    return Opener(pid=int(pid), name=_name(pid, root), path=path, writes=writes)


def _name(pid: str, root: HostRoot) -> str:
    return (root.read_text(f"/proc/{pid}/comm") or "").strip()
