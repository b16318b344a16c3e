"""The namespaces of the host for mounts and for networks, and the mount tables of all of them.

A namespace exists as long as a process is in it, a file of it is mounted somewhere (ip-netns(8),
unshare(1) --mount=FILE), or a process has such a file open. Each of these is looked for.
Source: namespaces(7); proc_pid_mountinfo(5): a process sees only the mounts below its root.
"""

import errno
import os
import re
import stat
from collections.abc import Mapping, Sequence

import msgspec

from vmplug.devnum import is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.process import NLINK_OF_ONE_TASK
from vmplug.host.root import HostRoot
from vmplug.host.use.enter import CLONE_NEWNS, ask_inside, is_mounted, read_mount_table
from vmplug.host.use.mounts import own_mount_table, unescape
from vmplug.host.use.openers import OpenFiles
from vmplug.host.use.statx import read_place

_NAMED = "/run/netns"
"""Where ip-netns(8) and container engines keep the network namespaces that have a name."""

RECORDED = "/vmplug-mounts"
"""Where a record has the mount tables that no process of it shows: by what led to each namespace,
with `!` for `/`."""

_NSFS = " - nsfs "
_MOUNTED = re.compile(rf" (mnt|net):\[([0-9]+)\] (\S+) [^\n]*{_NSFS}", re.ASCII)
_OPENED = re.compile(r"(mnt|net):\[([0-9]+)\]\Z", re.ASCII)
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM})
_UNSEEN = _FORBIDDEN | {errno.EINVAL}
"""Another user's process, or one that is ending."""


class Namespaces(msgspec.Struct, frozen=True, kw_only=True):
    """What leads to the namespaces, other than this process's: a file for each number.

    `tables` are mount tables, by the file that each was read from, or the namespace: that of this
    process is the first, and those of whole namespaces come before what one process sees. `unread`
    says why not all of them are there, None when they are.
    """

    networks: Mapping[int, str]
    tables: Mapping[str, str]
    unread: str | None = None


def read_namespaces(opened: OpenFiles, root: HostRoot) -> Namespaces:
    """Every namespace that a process is in, is mounted or is open. Raises AttributeReadError."""
    if not root.is_live:
        return _read_copied(root)
    found = _Found(root)
    found.read_processes()
    found.read_links(opened)
    found.enter_others()
    return Namespaces(
        networks=found.networks,
        tables=found.tables,
        unread=_why_unread(found.hidden) if found.hidden else None,
    )


def _read_copied(root: HostRoot) -> Namespaces:
    """The first mount table of each namespace that a copy of a host has."""
    found, seen, hidden, has_table = dict[str, str](), set[str](), list[str](), False
    for pid in filter(is_decimal, root.list_dir("/proc")):
        namespace, path = _copied_namespace(pid, root), f"/proc/{pid}/mountinfo"
        if namespace in seen:
            continue
        try:
            table = root.read_text(path)
        except AttributeReadError as error:
            if error.errno not in _UNSEEN:
                raise
            hidden += [path] if error.errno in _FORBIDDEN else []
            continue
        has_table |= table is not None
        if table:
            seen.add(namespace)
            found[path] = table
    for name in root.list_dir(RECORDED):
        found[name.replace("!", "/")] = root.read_text(f"{RECORDED}/{name}") or ""
    unread = _why_unread(hidden) if hidden or not has_table else None
    return Namespaces(networks={}, tables=found, unread=unread)


def _copied_namespace(pid: str, root: HostRoot) -> str:
    """The mount namespace of a process; its own number where only its mounts may be read."""
    try:
        return root.read_link(f"/proc/{pid}/ns/mnt") or pid
    except AttributeReadError as error:
        if error.errno not in _UNSEEN:
            raise
        return pid


def _why_unread(hidden: Sequence[str]) -> str:
    return f"{hidden[0]} cannot be read" if hidden else "no /proc/PID/mountinfo"


class _Found:
    """Collects the files that lead to namespaces; the first that was found of each is kept."""

    def __init__(self, root: HostRoot) -> None:
        self.tables: dict[str, str] = {}
        self.hidden: list[str] = []
        self.networks: dict[int, str] = {}
        self._mounts: dict[int, str] = {}
        self._of_threads = set[str]()
        self._root = root
        for name in root.list_dir(_NAMED):
            if status := root.stat_or_none(f"{_NAMED}/{name}"):
                self.networks.setdefault(status.st_ino, f"{_NAMED}/{name}")

    def read_processes(self) -> None:
        """The namespaces of all processes, and one mount table for each root in each of them."""
        seen = set[object]()
        for pid in filter(is_decimal, self._root.list_dir("/proc")):
            view = self._read_view(f"/proc/{pid}")
            self._read_threads(pid)
            if view in seen:
                continue
            try:
                table = self._root.read_text(f"/proc/{pid}/mountinfo")
            except AttributeReadError as error:
                if error.errno not in _UNSEEN:
                    raise
                self.hidden += [f"/proc/{pid}/mountinfo"] if error.errno in _FORBIDDEN else []
                continue
            if table:
                seen.add(view)
                self.tables[f"/proc/{pid}/mountinfo"] = table
                if not isinstance(view, str):
                    self._add_mounted(f"/proc/{pid}/root", table)

    def _read_view(self, process: str) -> object:
        """The mount namespace and the root in it: processes with the same see the same mounts."""
        names = (f"{process}/ns/mnt", f"{process}/ns/net", f"{process}/root")
        try:
            mount, network, base = map(read_place, names)
        except AttributeReadError as error:
            if error.errno not in _UNSEEN:
                raise
            return process  # its mount table may be read nevertheless, if not its files
        if mount and network:
            self._mounts.setdefault(mount[0][2], names[0])
            self.networks.setdefault(network[0][2], names[1])
        return mount, base

    def _read_threads(self, pid: str) -> None:
        """A thread of root's may leave the namespaces of its process, as network tools do."""
        tasks = f"/proc/{pid}/task"
        status = self._root.stat_or_none(tasks)
        if status is None or status.st_uid or status.st_nlink == NLINK_OF_ONE_TASK:
            return
        try:
            for tid in self._root.list_dir(tasks):
                for kind in ("mnt", "net"):
                    path = f"{tasks}/{tid}/ns/{kind}"
                    link = self._root.read_link(path)
                    if link and link not in self._of_threads:
                        self._of_threads.add(link)
                        self._add(kind, int(link[len(kind) + 2 : -1]), path)
        except AttributeReadError as error:
            if error.errno not in _UNSEEN:
                raise

    def _add_mounted(self, base: str, table: str) -> None:
        for kind, number, path in _MOUNTED.findall(table) if _NSFS in table else ():
            self._add(kind, int(number), base + unescape(path))

    def read_links(self, opened: OpenFiles) -> None:
        """The namespaces that a process has open."""
        device = os.stat("/proc/self/ns/mnt").st_dev
        for key, links in opened.links.items():
            if key[:2] != (stat.S_IFREG, device):
                continue
            if match := _OPENED.match(self._root.read_link(links[0]) or ""):
                self._add(match[1], int(match[2]), links[0])

    def _add(self, kind: str, number: int, path: str) -> None:
        (self._mounts if kind == "mnt" else self.networks).setdefault(number, path)

    def enter_others(self) -> None:
        """Read the whole table of each: the only process in it may be in a chroot, or have ended.

        It leaves this process's own networks out.
        """
        self.networks.pop(os.stat("/proc/self/ns/net").st_ino, None)
        self._mounts.pop(os.stat("/proc/self/ns/mnt").st_ino, None)
        own = own_mount_table(self._root)
        whole = {own: self._root.read_text(own) or ""}
        if others := self._mounts.values():
            whole |= ask_inside(others, CLONE_NEWNS, read_mount_table)
            self.hidden += [path for path in others if is_mounted(path) and path not in whole]
        self.tables = whole | self.tables
