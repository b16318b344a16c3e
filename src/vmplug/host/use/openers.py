"""Find the processes that have a file or a device node open.

One pass over all processes keeps what each descriptor leads to, by what it is and not by its name:
another name, a chroot or another mount namespace hides nothing. The kernel's table of locks has
those of everybody: it shows users whose open files nothing shows.
Source: proc_pid_fd(5); proc_pid_fdinfo(5); proc_locks(5), fs/locks.c.
"""

import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Self

import msgspec

from vmplug.devnum import DevNum, FileKey, is_decimal, key_of, key_of_inode, key_of_node
from vmplug.errors import AttributeReadError
from vmplug.host.process import list_other_threads
from vmplug.host.root import HostRoot, node_number

_PROBE_S, _PROBE_STEP_S = 0.5, 0.05
"""How long an open file may be just a probe: udev reads each new disk for a moment."""

_FLAGS = re.compile(r"^flags:\t([0-7]+)$", re.MULTILINE)
_LOCK = re.compile(
    r"^[0-9]+: [A-Z]+ +[A-Z]+ +(READ|WRITE|RW) +(-?[0-9]+) ([0-9a-f]+):([0-9a-f]+):([0-9]+) ",
    re.MULTILINE | re.ASCII,
)
"""One that somebody has; one that is waited for has an arrow."""
_PF_KTHREAD = 0x200000
"""Source: include/linux/sched.h."""


Wanted = dict[FileKey | str, str]
"""The names of files by what they are; in a copy of a host also by their paths."""


class DeviceNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node in /dev; `kind` is S_IFBLK or S_IFCHR. `number` is None where no node is there."""

    path: str
    kind: int
    number: DevNum | None

    @classmethod
    def of_char(cls, path: str, root: HostRoot) -> Self:
        """A character device by its path."""
        status = root.stat_or_none(path)
        is_char = status is not None and stat.S_ISCHR(status.st_mode)
        return cls(
            path=path,
            kind=stat.S_IFCHR,
            number=node_number(status) if status and is_char else None,
        )

    @property
    def key(self) -> FileKey | None:
        """What the node is; None where there is none."""
        return key_of_node(self.kind, self.number) if self.number else None


class Opener(msgspec.Struct, frozen=True, kw_only=True):
    """A process that has a file open. `name` is its command; `path` that of the file.

    `writes` is true where the mode of the open file is unknown.
    """

    pid: int
    name: str
    path: str
    writes: bool = True


class FileLock(msgspec.Struct, frozen=True, kw_only=True):
    """A lock on a file; `pid` is None where it belongs to an open file, and not to a process."""

    pid: int | None
    writes: bool


_ReadKeys = Callable[[str, Iterable[str]], Iterator[tuple[str, FileKey | str]]]


class OpenFiles(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes had open at one time, except this process.

    `links` are those of /proc that lead to a file. `unlisted` are the processes whose descriptors
    this user may not list, `guarded` those that even root may not look into: a security module or
    a user namespace forbids it. `is_known` is false for a copy of a host without descriptors.
    `read_at_s` is that time, of time.monotonic().
    """

    links: Mapping[FileKey | str, Sequence[str]]
    unlisted: tuple[int, ...]
    guarded: tuple[int, ...]
    read_at_s: float
    root: HostRoot
    is_known: bool = True

    def find(self, wanted: Wanted) -> list[Opener]:
        """The processes that have one of these files open, each once; a writer as one."""
        found = dict[int, Opener]()
        for key, path in wanted.items():
            for link in self.links.get(key, ()):
                opener = _opener(link, path, self.root)
                if opener and (
                    opener.pid not in found or opener.writes > found[opener.pid].writes
                ):
                    found[opener.pid] = opener
        return [found[pid] for pid in sorted(found)]

    def find_lasting(
        self, wanted: Wanted, matters: Callable[[Opener], bool] = lambda _: True
    ) -> list[Opener]:
        """Those that matter and keep one open, which on the running host takes a second look."""
        found = [opener for opener in self.find(wanted) if matters(opener)]
        deadline = self.read_at_s + _PROBE_S
        while found and self.root.is_live:
            now = _read_again([opener.pid for opener in found], self.root)
            found = [opener for opener in now.find(wanted) if matters(opener)]
            if time.monotonic() >= deadline:
                break
            if found:
                time.sleep(_PROBE_STEP_S)  # /proc gives no event for a closed file
        return found


def read_open_files(root: HostRoot) -> OpenFiles:
    """What every process has open now.

    A file system that does not answer is not waited for. The kernel's own threads have no files.
    """
    pids = [int(pid) for pid in root.list_dir("/proc") if is_decimal(pid)]
    files = _read_again([pid for pid in pids if pid != os.getpid()], root)
    unlisted = (pid for pid in files.unlisted if not _is_kernel_thread(pid, root))
    is_known = root.is_live or any(root.stat_or_none(f"/proc/{pid}/fd") for pid in pids)
    return msgspec.structs.replace(files, unlisted=tuple(unlisted), is_known=is_known)


def read_locks(root: HostRoot) -> Mapping[FileKey, Sequence[FileLock]]:
    """The locks and leases on regular files, of processes and of the kernel itself.

    The number is that of the super block: a file of a btrfs subvolume or an overlay has another.
    """
    found = dict[FileKey, list[FileLock]]()
    table = root.read_text("/proc/locks") or ""
    for kind, pid, major, minor, inode in _LOCK.findall(table):
        key = key_of_inode(major, minor, inode)
        owner = int(pid) if int(pid) > 0 else None
        found.setdefault(key, []).append(FileLock(pid=owner, writes="W" in kind))
    return found


def find_unseen_locks(
    key: FileKey, locks: Sequence[FileLock], opened: OpenFiles, root: HostRoot
) -> list[FileLock]:
    """The locks of those that no open file shows: an NFS server in the kernel, a hidden process.

    A process may lock a file for others that have its descriptor, and end.
    """
    unseen = [one for one in locks if one.pid and _is_kernel_thread(one.pid, root)]
    if key not in opened.links and key not in _own_files(root):
        unseen += [one for one in locks if one not in unseen]
    return unseen


def _own_files(root: HostRoot) -> set[FileKey]:
    if not root.is_live:
        return set()
    statuses = map(
        root.stat_or_none, (f"/proc/self/fd/{n}" for n in root.list_dir("/proc/self/fd"))
    )
    return {key_of(status) for status in statuses if status}


def wanted_sockets(inodes: Iterable[int], path: str, root: HostRoot) -> Wanted:
    """Sockets to look for by their inodes; `path` says what they are on.

    Source: all sockets are files of one file system, sockfs, net/socket.c.
    """
    if not root.is_live:
        return {f"socket:[{inode}]": path for inode in inodes}
    import socket  # noqa: PLC0415  2.5 ms

    with socket.socket(socket.AF_UNIX) as own:
        device = os.fstat(own.fileno()).st_dev
    return {(stat.S_IFSOCK, device, inode): path for inode in inodes}


def wanted_node(node: DeviceNode, root: HostRoot) -> Wanted:
    """A node to look for: a copy of a host may have no nodes, only their names."""
    wanted: Wanted = {} if root.is_live else {node.path: node.path}
    return wanted | ({node.key: node.path} if node.key else {})


def _read_again(pids: Sequence[int], root: HostRoot) -> OpenFiles:
    read_keys = _choose_reader(root)
    links, now = dict[FileKey | str, list[str]](), time.monotonic()
    unlisted, guarded = list[int](), list[int]()
    for pid in pids:
        directory, failed = f"/proc/{pid}/fd", unlisted
        try:
            numbers = root.list_dir(directory)
            if not numbers and (threads := list_other_threads(pid, root)):
                directory = f"/proc/{pid}/task/{threads[0]}/fd"
                numbers = root.list_dir(directory)
            failed = guarded
            for number, key in read_keys(directory, numbers):
                links.setdefault(key, []).append(f"{directory}/{number}")
        except AttributeReadError:
            failed.append(pid)
    return OpenFiles(
        links=links,
        unlisted=tuple(unlisted),
        guarded=tuple(guarded),
        read_at_s=now,
        root=root,
    )


def _choose_reader(root: HostRoot) -> _ReadKeys:
    if root.is_live:
        from vmplug.host.use.statx import read_places  # noqa: PLC0415  ctypes costs 2 ms

        base = root.path.removesuffix("/")

        def read(directory: str, numbers: Iterable[str]) -> Iterator[tuple[str, FileKey]]:
            return ((n, place[0]) for n, place in read_places(base + directory, numbers))

        return read

    def read_copied(directory: str, numbers: Iterable[str]) -> Iterator[tuple[str, FileKey | str]]:
        for number in numbers:
            target = root.read_link(f"{directory}/{number}") or ""
            yield number, target
            if target.startswith("/") and (status := root.stat_or_none(target)):
                yield number, key_of(status)

    return read_copied


def _opener(link: str, path: str, root: HostRoot) -> Opener | None:
    """None for a descriptor that only names its file (O_PATH), or that is closed now."""
    pid = link.split("/", 3)[2]
    directory, _, number = link.rpartition("/")
    writes = True
    for flags in _read_flags(f"{directory}info/{number}", root):
        if flags & os.O_PATH:
            return None
        writes = flags & os.O_ACCMODE in {os.O_WRONLY, os.O_RDWR}
    name = root.read_text(f"/proc/{pid}/comm") or ""
    return Opener(pid=int(pid), name=name.strip(), path=path, writes=writes)


def _read_flags(path: str, root: HostRoot) -> Iterator[int]:
    """The flags that a file was opened with; none where they are not shown."""
    try:
        match = _FLAGS.search(root.read_text(path) or "")
    except AttributeReadError:
        return
    if match:
        yield int(match[1], 8)


def _is_kernel_thread(pid: int, root: HostRoot) -> bool:
    try:
        fields = (root.read_text(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()
    except AttributeReadError:
        return False
    return len(fields) > 6 and is_decimal(fields[6]) and bool(int(fields[6]) & _PF_KTHREAD)
