"""The loop devices of the host, each with the file or block device that it is open on.

sysfs has the name by which a process opened that, in its own mount namespace: now the name may
lead to another file, or to none. The kernel's numbers are always right.
Source: include/uapi/linux/loop.h; drivers/block/loop.c, loop_get_status.
"""

import os
import stat
import struct
from collections.abc import Iterable, Iterator

import msgspec

from vmplug.devnum import DevNum
from vmplug.host.block.loop import LoopBacking, read_backing_file
from vmplug.host.root import HostRoot, node_number
from vmplug.host.use.silent import find_silent


class Loop(msgspec.Struct, frozen=True, kw_only=True):
    """One configured loop device.

    `opened` is the file or block device that it is open on, by the kernel's own numbers; None
    where only the name is known, as below another root.
    """

    devnum: DevNum
    device_node: str
    backing: LoopBacking
    opened: "OpenedFile | None" = None

    def shows(self, path: str, root: HostRoot) -> bool:
        """Whether it is on that file, or on the device of that node, whatever their names are."""
        if self.opened is None:
            is_named = not self.backing.deleted
            return is_named and same_file(self.backing.backing_file, path, root)
        status = root.stat_or_none(path)
        return status is not None and self.opened == OpenedFile.of(status)

    def own_name(self, root: HostRoot) -> str:
        """What it shows, whenever that is set up again: its file's name, and the part of it.

        Where that name leads elsewhere now, its numbers keep it apart from others that had it.
        """
        backing, opened = self.backing, self.opened
        words = [backing.backing_file, str(backing.offset_bytes)]
        words += [str(backing.size_limit_bytes)] if backing.size_limit_bytes else []
        if opened not in {None, _SILENT} and not self.shows(backing.backing_file, root):
            words += map(str, msgspec.structs.astuple(opened))
        return " ".join(words)


class OpenedFile(msgspec.Struct, frozen=True):
    """A file by its device and inode, or a block device by its number alone."""

    device: int
    inode: int
    devnum: DevNum | None

    @classmethod
    def of(cls, status: os.stat_result) -> "OpenedFile":
        """The file with that status."""
        if stat.S_ISBLK(status.st_mode):
            return cls(0, 0, node_number(status))
        return cls(status.st_dev, status.st_ino, None)


class LoopIndex:
    """The loop devices by what they are on, so that not each of them is asked for each disk."""

    def __init__(self, loops: Iterable[Loop], root: HostRoot) -> None:
        self.by_number = {loop.devnum: loop for loop in loops}
        self._root = root
        self._by_file: dict[OpenedFile | str, list[Loop]] = {}
        for loop in self.by_number.values():
            for key in _keys(loop, root):
                self._by_file.setdefault(key, []).append(loop)

    def find_on(self, path: str) -> list[Loop]:
        """Those on that file, or on the device of that node."""
        status = self._root.stat_or_none(path)
        keys = (OpenedFile.of(status), path) if status else (path,)
        found = (loop for key in keys for loop in self._by_file.get(key, ()))
        return list({loop.devnum: loop for loop in found}.values())

    def find_beside(self, loop: Loop) -> list[Loop]:
        """Those on the file or device that a loop device is on, with itself."""
        if loop.opened is not None:
            return self._by_file[loop.opened]
        return [] if loop.backing.deleted else self.find_on(loop.backing.backing_file)


def _keys(loop: Loop, root: HostRoot) -> Iterator[OpenedFile | str]:
    """What it is on; where only its name is known, that and what has the name now."""
    if loop.opened is not None:
        yield loop.opened
    elif not loop.backing.deleted:
        yield (name := loop.backing.backing_file)
        if status := root.stat_or_none(name):
            yield OpenedFile.of(status)


_SILENT = OpenedFile(-1, -1, None)
"""A file whose storage does not answer: nothing that was asked for is on it, or it would wait."""
_LOOP_GET_STATUS64 = 0x4C05
_STATUS_BYTES = 232
_STATUS_BEGINS = struct.Struct("=QQQ")
"""lo_device, lo_inode, lo_rdevice of struct loop_info64."""


def read_loops(root: HostRoot) -> list[Loop]:
    """Every configured loop device. Raises AttributeReadError."""
    return _read([f"/sys/block/{name}" for name in root.list_dir("/sys/block")], root)


def read_loop(sysfs_path: str, root: HostRoot) -> Loop | None:
    """The loop device of that directory; None for another disk. Raises AttributeReadError."""
    return next(iter(_read([sysfs_path], root)), None)


def _read(paths: Iterable[str], root: HostRoot) -> list[Loop]:
    loops = []
    found = {path: read_backing_file(path, root) for path in paths if "/loop" in path}
    silent = find_silent({backing.backing_file for backing in found.values() if backing}, root)
    for sysfs_path, backing in found.items():
        node = f"/dev/{sysfs_path.rpartition('/')[2]}"
        if backing and (devnum := root.read_devnum(f"{sysfs_path}/dev")):
            opened = None
            if backing.backing_file in silent:  # the kernel would ask the file who it is
                opened = _SILENT
            elif root.is_live:
                opened = _read_opened(node, root)
            loops.append(Loop(devnum=devnum, device_node=node, backing=backing, opened=opened))
    return loops


def _read_opened(node: str, root: HostRoot) -> OpenedFile | None:
    """The name in sysfs is that of another mount namespace, or one that now leads elsewhere."""
    status = root.ask_node(node, _LOOP_GET_STATUS64, _STATUS_BYTES)
    if status is None:
        return None
    device, inode, number = _STATUS_BEGINS.unpack_from(status)
    if number:  # of a block device; the inode is that of the node
        return OpenedFile(0, 0, DevNum(os.major(number), os.minor(number)))
    return OpenedFile(device, inode, None)


def same_file(path: str, other: str, root: HostRoot) -> bool:
    """Whether two paths lead to one file or to nodes of one device; False if one leads nowhere."""
    if path == other:
        return True
    a, b = root.stat_or_none(path), root.stat_or_none(other)
    return a is not None and b is not None and OpenedFile.of(a) == OpenedFile.of(b)
