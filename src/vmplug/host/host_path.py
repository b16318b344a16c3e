"""The path of a device on the host: a node, a socket of the store, or a disk image."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple, Self

from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError, NoSuchDevice
from vmplug.host.block.sysfs import find_block_node
from vmplug.host.root import HostRoot, describe, node_number
from vmplug.oci.info import DeviceInfo, DevType

if TYPE_CHECKING:
    from vmplug.host.vhost_user.store import VhostUserStore


SYSFS_DIRECTORY = {
    DevType.BLOCK: "/sys/dev/block/",
    DevType.CHAR: "/sys/dev/char/",
    DevType.CHAR_UNBUFFERED: "/sys/dev/char/",
}
"""A FIFO has no entry in sysfs."""


def get_host_path(
    info: DeviceInfo, root: HostRoot, vhost_user_store: VhostUserStore | None = None
) -> str:
    """The path of a device on the host: a node, a socket of the store, or a disk image.

    For a number in sysfs it reads the kernel's DEVNAME in three system calls; a block device that
    has none, in a copy of a host, is called as its directory. Raises NoSuchDevice
    when the host has no such device, AttributeReadError when it cannot be read.
    """
    if vhost_user_store and info.devnum and is_in_store(info, vhost_user_store):
        return vhost_user_store.find_socket(info.devnum)
    if info.host_path is not None:
        return _regular_file(info.host_path, root)
    return find_sysfs_node(info, root) or _container_node(info, root)


def is_in_store(info: DeviceInfo, vhost_user_store: VhostUserStore | None) -> bool:
    """Whether the number stands for a socket of the store: only block devices' numbers do."""
    owned = (
        vhost_user_store is not None
        and info.devnum is not None
        and vhost_user_store.owns(info.devnum)
    )
    return owned and info.dev_type is DevType.BLOCK


def find_sysfs_node(info: DeviceInfo, root: HostRoot) -> str | None:
    """The node that the kernel names for this type and number; None when sysfs has no entry."""
    directory = SYSFS_DIRECTORY.get(info.dev_type)
    if directory is None:
        return None
    path = f"{directory}{info.devnum}/uevent"
    uevent = root.read_attribute(path)
    if uevent is None and root.is_live:  # where every device has one
        return None
    if (
        info.dev_type is DevType.BLOCK
        and info.devnum
        and (uevent is None or not _has_name(uevent))
    ):
        node = find_block_node(info.devnum, root)
        if node or uevent is None:
            return node
    return None if uevent is None else _device_node(uevent, path)


def _has_name(uevent: bytes) -> bool:
    return b"\nDEVNAME=" in b"\n" + uevent


def _device_node(uevent: bytes, path: str) -> str:
    """`/dev/` + DEVNAME, which may contain directories but never leaves /dev.

    The file is the kernel's environment for udev, one KEY=VALUE a line, nothing else.
    Source: Documentation/ABI/testing/sysfs-uevent.
    """
    _, found, rest = (b"\n" + uevent).rpartition(b"\nDEVNAME=")
    if not found:
        raise AttributeReadError(path, why="it has no DEVNAME")
    name = os.fsdecode(rest.partition(b"\n")[0])
    if not name.isprintable() or name[:1] in {"", "/"} or ".." in name.split("/"):
        raise AttributeReadError(path, why=f"its DEVNAME {name!r} is not a name below /dev")
    return "/dev/" + name


def _container_node(info: DeviceInfo, root: HostRoot) -> str:
    """The container path, for devices that sysfs does not list, such as /dev/cuse on old kernels.

    Used only when it is a node of the requested type and number.
    """
    path = info.container_path
    status = root.stat(path if root.is_live else root.real_path(path))
    if status and _is_node_of(info, status):
        return info.container_path
    found, wanted = describe(status), info.description
    if info.devnum is None:
        raise NoSuchDevice(
            wanted,
            f"no FIFO at {info.container_path} on this host: there is {found}",
            found=found,
            hint="create it with mkfifo, or leave it to the container runtime",
        )
    raise NoSuchDevice(
        wanted,
        f"no {wanted} on this host: sysfs has no entry for it, and at "
        f"{info.container_path} there is {found}",
        found=found,
        hint="compare with the numbers in `ls -l /dev` on the host; check that the driver is "
        "loaded and the disk is plugged in",
    )


def _is_node_of(info: DeviceInfo, status: os.stat_result) -> bool:
    match info.dev_type:
        case DevType.FIFO:
            return stat.S_ISFIFO(status.st_mode)
        case DevType.BLOCK:
            is_type = stat.S_ISBLK(status.st_mode)
        case DevType.CHAR | DevType.CHAR_UNBUFFERED:
            is_type = stat.S_ISCHR(status.st_mode)
    return is_type and node_number(status) == info.devnum


def _regular_file(path: str, root: HostRoot) -> str:
    real = root.real_path(path)
    status = root.stat(real) if path.startswith("/") else None
    if status is None or not stat.S_ISREG(status.st_mode):
        found = describe(status)
        raise NoSuchDevice(
            f"file {path}",
            f"{path} cannot be a disk: found {found}, expected a regular file",
            found=found,
            hint="name a device as /dev/sdb, without file:, and a file by its absolute path",
        )
    return real


class HostPathCache:
    """A cache of host paths, whose answers the kernel validates.

    A descriptor on a device's uevent file stays open. While the device exists, one `pread` gives
    its DEVNAME again; once it is gone the kernel always answers ENODEV, even when another device
    takes the number. Only files of the running kernel's sysfs behave so: below another root
    nothing is cached. Holds at most `limit` descriptors; a context manager, not thread-safe.
    """

    def __init__(self, root: HostRoot, *, limit: int = 256) -> None:
        self._root = root
        self._limit = limit
        self._open: dict[tuple[DevType, DevNum | None], _CacheEntry] = {}

    def get_host_path(self, info: DeviceInfo) -> str:
        """As the function `get_host_path`, for devices outside a vhost-user store."""
        key = (info.dev_type, info.devnum)
        kept = self._open.get(key)
        if kept is not None:
            uevent = self._root.reread_attribute(kept.descriptor)
            if uevent == kept.uevent:
                return kept.host_path
            self._forget(key)
        host_path = get_host_path(info, self._root)
        self._keep(key, host_path)
        return host_path

    def close(self) -> None:
        """Close every descriptor; the cache may be used again."""
        while self._open:
            self._forget(next(iter(self._open)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _keep(self, key: tuple[DevType, DevNum | None], host_path: str) -> None:
        dev_type, devnum = key
        directory = SYSFS_DIRECTORY.get(dev_type)
        if directory is None or devnum is None:
            return
        path = f"{directory}{devnum}/uevent"
        descriptor = self._root.open_kernel_attribute(path)
        if descriptor is None:
            return
        # Read again: only text that came through this descriptor may be cached for it.
        uevent = self._root.reread_attribute(descriptor)
        self._open[key] = _CacheEntry(descriptor, uevent or b"", host_path)
        if not (uevent and _has_name(uevent) and _device_node(uevent, path) == host_path):
            self._forget(key)
        elif len(self._open) > self._limit:
            self._forget(next(iter(self._open)))

    def _forget(self, key: tuple[DevType, DevNum | None]) -> None:
        self._root.close_attribute(self._open.pop(key).descriptor)


class _CacheEntry(NamedTuple):
    descriptor: int
    uevent: bytes
    host_path: str
