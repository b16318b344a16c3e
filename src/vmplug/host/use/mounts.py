"""Mounts and swap areas: which block devices they use.

Source: proc(5), proc_pid_mountinfo(5).
"""

import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import msgspec

from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError
from vmplug.host.root import HostRoot, node_number

_ANYBODY_MOUNTS = frozenset({"binder", "bpf", "cgroup", "cgroup2", "devpts", "fuse", "mqueue"}) | {
    *("overlay", "proc", "ramfs", "sysfs", "tmpfs")
}


class MountedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One mounted device; `read_only` is the state of the file system, not of one mount.

    `namespace` leads to the mount namespace; None for that of this process, or of the first one of
    another root.
    """

    devnum: DevNum
    mount_point: str
    read_only: bool
    namespace: str | None = None


def parse_mounted_devices(tables: Mapping[str, str], root: HostRoot) -> list[MountedDevice]:
    """The mounted devices of several mount tables, by the files of which they are the text.

    A mount that several namespaces have is that of the first table.
    """
    found: dict[MountedDevice, None] = {}
    sources = cache(lambda source: _node_number(source, root))
    file_systems = cache(lambda devnum: _all_members(devnum, root))
    for mount, namespace in parse_mounts(tables, root):
        named = mount.other_sources
        numbers = {mount.devnum}
        if mount.devnum.major == 0:  # btrfs and others show a number of their own
            named += [] if _anybody_mounts(mount.fs_type) else [mount.source]
            numbers.clear()
        numbers.update(filter(None, map(sources, named)))
        if mount.fs_type in _MEMBERS:
            numbers.update(*map(file_systems, tuple(numbers)))
        for each in numbers:
            device = MountedDevice(
                devnum=each,
                mount_point=mount.path,
                read_only=mount.read_only,
                namespace=namespace,
            )
            found[device] = None
    return list(found)


def parse_mounts(
    tables: Mapping[str, str], root: HostRoot
) -> "Iterator[tuple[MountPoint, str | None]]":
    """Every mount of several tables with its namespace, as `MountedDevice` has that."""
    known: set[str] = set()
    for path, table in tables.items():
        namespace = None
        if path != own_mount_table(root):
            namespace = path.replace("/mountinfo", "/ns/mnt")
        try:
            # A namespace begins as a copy of another.
            lines = [line for line in dict.fromkeys(mounts_in(table)) if line not in known]
            known.update(lines)
            mounts = [_parse_line(line) for line in lines]
        except (ValueError, IndexError) as error:
            raise AttributeReadError(path, why=str(error)) from error
        yield from ((mount, namespace) for mount in mounts)


def own_mount_table(root: HostRoot) -> str:
    """The mount table that this process sees; in another root, that its first process saw."""
    return "/proc/self/mountinfo" if root.is_live else "/proc/1/mountinfo"


def _anybody_mounts(fs_type: str) -> bool:
    """Whether any user may mount it, in a namespace of his own, with a source that is only text.

    Source: FS_USERNS_MOUNT in Linux fs/.
    """
    return fs_type in _ANYBODY_MOUNTS or fs_type.startswith("fuse.")


def _node_number(source: str, root: HostRoot) -> DevNum | None:
    """The block device that a path leads to; None for anything else: it is the mounter's text.

    A copy of a host may have no nodes, only their names.
    """
    status = root.stat_or_none(source) if source.startswith("/") else None
    if status is None and not root.is_live and source.startswith("/dev/") and "\0" not in source:
        name = root.real_path(source).removeprefix("/dev/").replace("/", "!")
        return root.read_devnum(f"/sys/class/block/{name}/dev")
    return node_number(status) if status and stat.S_ISBLK(status.st_mode) else None


class MountPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One line of mountinfo; `shown` is the directory of the file system that it shows.

    `read_only` is the state of the file system, `shown_read_only` that of this mount. Where
    `has_devices` is false, nothing opens a device by its node.
    """

    devnum: DevNum
    shown: str
    path: str
    fs_type: str
    source: str
    fs_options: tuple[str, ...]
    read_only: bool
    shown_read_only: bool
    has_devices: bool = True

    @property
    def other_sources(self) -> list[str]:
        """The devices that it has besides, as its options and the source of a bcachefs say.

        xfs has them for its log and for files in real time, reiserfs for its journal, erofs for
        layers.
        """
        if _anybody_mounts(self.fs_type):
            return []
        options = (option.partition("=")[2] for option in self.fs_options)
        named = [unescape(path) for path in options if path.startswith("/dev/")]
        return named + (self.source.split(":") if self.fs_type == "bcachefs" else [])


def read_mount_points(root: HostRoot) -> list[MountPoint]:
    """The mounts of `own_mount_table`."""
    path = own_mount_table(root)
    try:
        return [_parse_line(line) for line in mounts_in(root.read_text(path) or "")]
    except (ValueError, IndexError) as error:
        raise AttributeReadError(path, why=str(error)) from error


def find_mount_point(path: str, mounts: Sequence[MountPoint]) -> MountPoint | None:
    """The one of these that a path without links is in; None where none is."""
    above = [
        mount
        for mount in reversed(mounts)  # a later one covers those before it
        if path == mount.path or path.startswith(f"{mount.path.rstrip('/')}/")
    ]
    return max(above, key=lambda mount: len(mount.path), default=None)


def mounts_in(table: str) -> list[str]:
    """The lines of a table, without the two ids that begin each and that no other table has."""
    # Only "\n" ends a line: the kernel leaves "\r" and U+2028 in names as they are.
    lines = table.removesuffix("\n").split("\n") if table else ()
    return [line.split(" ", 2)[2] for line in lines]


def _parse_line(line: str) -> MountPoint:
    mount, _, file_system = line.partition(" - ")
    fields, (fs_type, source, super_options) = mount.split(" "), file_system.split(" ")[:3]
    return MountPoint(
        devnum=DevNum.parse(fields[0]),
        shown=unescape(fields[1]),
        path=unescape(fields[2]),
        fs_type=fs_type,
        source=unescape(source),
        fs_options=tuple(super_options.split(",")),
        read_only="ro" in super_options.split(","),
        shown_read_only="ro" in fields[3].split(","),
        has_devices="nodev" not in fields[3].split(","),
    )


_MEMBERS = {"btrfs": ("/devices", ""), "bcachefs": ("", "/block")}
"""File systems of several devices: where below /sys/fs/TYPE/UUID the members are, and what follows
the name of each. Source: Linux fs/btrfs/sysfs.c; fs/bcachefs/super.c."""
_BY_DISK = ("ext4", "f2fs", "xfs")
"""File systems with a directory /sys/fs/TYPE/DISK.

Source: Documentation/ABI/testing/sysfs-fs-ext4, -f2fs, -xfs."""


def _all_members(devnum: DevNum, root: HostRoot) -> set[DevNum]:
    """All devices of the file system that this one is part of: mountinfo may name only one."""
    for paths in _members(root):
        numbers = (root.read_devnum(f"{path}/dev") for path in paths)
        if devnum in (found := {number for number in numbers if number}):
            return found
    return set()


def _members(root: HostRoot) -> Iterator[list[str]]:
    for fs_type, (directory, rest) in _MEMBERS.items():
        for uuid in root.list_dir(f"/sys/fs/{fs_type}"):
            members = f"/sys/fs/{fs_type}/{uuid}{directory}"
            yield [f"{members}/{name}{rest}" for name in root.list_dir(members)]


def read_kept(root: HostRoot) -> frozenset[str]:
    """The names of the disks on which the kernel has a file system, mounted wherever it may be."""
    names = {name for fs_type in _BY_DISK for name in root.list_dir(f"/sys/fs/{fs_type}")}
    paths = (path for members in _members(root) for path in members)
    return frozenset(names.union(root.real_path(path).rpartition("/")[2] for path in paths))


def read_swaps(root: HostRoot) -> list[str] | None:
    """The files and devices that the host swaps to; None without the table."""
    table = root.read_text("/proc/swaps")
    if table is None:
        return None
    lines = table.split("\n")[1:]
    return [unescape(re.split("[ \t]", line, maxsplit=1)[0]) for line in lines if line]


def unescape(text: str) -> str:
    """Undo octal escapes, as the kernel and exportfs(8) write a blank, tab or newline."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
