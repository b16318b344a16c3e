"""Users of block devices on the host: mounts, swap areas and loop devices, read once for many.

Source: proc(5), proc_pid_mountinfo(5), Documentation/ABI/testing/sysfs-block-loop.
"""

import errno
import re
import stat

import msgspec

from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError
from vmplug.host.block.loop_files import Loop, read_loops
from vmplug.host.root import HostRoot, node_number

MOUNTS, SWAP = "mounts", "swap space"
"""What `HostUsage.unknown` begins with."""
_NO_SWAPS = f"{SWAP} (no /proc/swaps)"


class MountedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One mounted device; `read_only` is the state of the file system, not of one mount."""

    devnum: DevNum
    mount_point: str
    read_only: bool


class HostUsage(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of everything that uses block devices or disk images.

    `unknown` is what could not be looked for, such as `swap space (no /proc/swaps)`.
    """

    mounts: tuple[MountedDevice, ...]
    swaps: tuple[str, ...]
    loops: tuple[Loop, ...]
    unknown: tuple[str, ...] = ()


def read_usage(root: HostRoot, *, with_mounts: bool = True) -> HostUsage:
    """The users of block devices on the host now.

    Without mounts it is enough for disk images: a file can be mounted only through a loop device.
    """
    mounts, unknown = _read_mounts(root) if with_mounts else (set[MountedDevice](), None)
    swaps = _read_swaps(root)
    has_table = swaps is not None or root.is_live  # a kernel may be built without swap
    return HostUsage(
        mounts=tuple(mounts),
        swaps=tuple(swaps or ()),
        loops=tuple(read_loops(root)),
        unknown=tuple(filter(None, (unknown, None if has_table else _NO_SWAPS))),
    )


def _read_mounts(root: HostRoot) -> tuple[set[MountedDevice], str | None]:
    """The mounts of every mount namespace that can be seen, each namespace read once.

    Then what is unknown of them, None for nothing.
    """
    found: set[MountedDevice] = set()
    seen, known, hidden = set[str](), 0, list[str]()
    for pid in root.list_dir("/proc"):
        if not pid.isdigit():
            continue
        namespace = _namespace(pid, root)
        if namespace in seen:
            continue
        try:
            table = root.read_text(f"/proc/{pid}/mountinfo")
        except AttributeReadError as error:
            if error.errno not in {errno.EACCES, errno.EPERM, errno.EINVAL}:
                raise
            if error.errno != errno.EINVAL:  # the answer for a process that is ending
                hidden.append(pid)
            continue
        known += table is not None
        if table:
            seen.add(namespace)
            try:
                found.update(_parse_mountinfo(table, root))
            except (ValueError, IndexError) as error:
                raise AttributeReadError(f"/proc/{pid}/mountinfo", why=str(error)) from error
    if hidden:
        return found, f"{MOUNTS} (/proc/{hidden[0]}/mountinfo cannot be read)"
    return found, None if known else f"{MOUNTS} (no /proc/PID/mountinfo)"


def _namespace(pid: str, root: HostRoot) -> str:
    """The mount namespace of a process; its own number where only its mounts may be read."""
    try:
        return root.read_link(f"/proc/{pid}/ns/mnt") or pid
    except AttributeReadError as error:
        if error.errno not in {errno.EACCES, errno.EPERM}:
            raise
        return pid


class MountPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One line of mountinfo; `shown` is the directory of the file system that it shows.

    `read_only` is the state of the file system, `shown_read_only` that of this mount.
    """

    devnum: DevNum
    shown: str
    path: str
    fs_type: str
    source: str
    fs_options: tuple[str, ...]
    read_only: bool
    shown_read_only: bool


def read_mount_points(root: HostRoot) -> list[MountPoint]:
    """The mounts that this process sees; in another root, that its first process saw."""
    path = "/proc/self/mountinfo" if root.is_live else "/proc/1/mountinfo"
    try:
        return _parse_lines(root.read_text(path) or "")
    except (ValueError, IndexError) as error:
        raise AttributeReadError(path, why=str(error)) from error


def _parse_lines(table: str) -> list[MountPoint]:
    mounts = []
    # Only "\n" ends a line: the kernel leaves "\r" and U+2028 in names as they are.
    for line in table.removesuffix("\n").split("\n") if table else ():
        mount, _, file_system = line.partition(" - ")
        fields, (fs_type, source, super_options) = mount.split(" "), file_system.split(" ")[:3]
        mounts.append(
            MountPoint(
                devnum=DevNum.parse(fields[2]),
                shown=_unescape(fields[3]),
                path=_unescape(fields[4]),
                fs_type=fs_type,
                source=_unescape(source),
                fs_options=tuple(super_options.split(",")),
                read_only="ro" in super_options.split(","),
                shown_read_only="ro" in fields[5].split(","),
            )
        )
    return mounts


def _parse_mountinfo(table: str, root: HostRoot) -> list[MountedDevice]:
    mounts = list[MountedDevice]()
    for mount in _parse_lines(table):
        devnum = mount.devnum
        if devnum.major == 0:  # btrfs and others show a number of their own
            # The mounter chose this text: it may lead anywhere.
            status = root.stat_or_none(mount.source) if mount.source.startswith("/") else None
            if status is None or not stat.S_ISBLK(status.st_mode):
                continue
            devnum = node_number(status)
        devnums = {devnum, *(_btrfs_devices(devnum, root) if mount.fs_type == "btrfs" else ())}
        mounts += (
            MountedDevice(devnum=each, mount_point=mount.path, read_only=mount.read_only)
            for each in devnums
        )
    return mounts


def _btrfs_devices(devnum: DevNum, root: HostRoot) -> set[DevNum]:
    """All devices of the file system that this one is part of: mountinfo names only one.

    Source: Linux fs/btrfs/sysfs.c, /sys/fs/btrfs/UUID/devices.
    """
    for uuid in root.list_dir("/sys/fs/btrfs"):
        devices = f"/sys/fs/btrfs/{uuid}/devices"
        numbers = (root.read_devnum(f"{devices}/{name}/dev") for name in root.list_dir(devices))
        if devnum in (found := {number for number in numbers if number}):
            return found
    return set()


def _read_swaps(root: HostRoot) -> list[str] | None:
    """The swap areas; None without the table."""
    table = root.read_text("/proc/swaps")
    lines = (table or "").split("\n")[1:]
    return (
        None
        if table is None
        else [_unescape(re.split("[ \t]", line, maxsplit=1)[0]) for line in lines if line]
    )


def _unescape(text: str) -> str:
    """Undo the kernel's octal escapes of blank, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
