"""DeviceInfo -> HostDevice: find each device on the host and say what kind it is."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError, HostError, NoSuchDevice
from vmplug.host.block import read_block_device, read_disk_file
from vmplug.host.device import CharDevice, DeviceType, FoundBy, HostDevice, VhostUserSocket
from vmplug.host.root import HostRoot, describe, node_number
from vmplug.oci.info import DeviceInfo, DevType

if TYPE_CHECKING:
    from vmplug.host.vhost_user import VhostUserStore
    from vmplug.oci.annotated import Request

_SYSFS_DIRECTORY = {
    DevType.BLOCK: "/sys/dev/block/",
    DevType.CHAR: "/sys/dev/char/",
    DevType.CHAR_UNBUFFERED: "/sys/dev/char/",
}
"""A FIFO has no entry in sysfs, so none is ever looked for."""

_VFIO_NODE = re.compile(r"/dev/vfio/([0-9]+|devices/vfio[0-9]+)\Z")
"""A group or a device of VFIO. `/dev/vfio/vfio` is the container, `noiommu-N` protects nobody."""


def get_host_path(info: DeviceInfo, root: HostRoot, store: VhostUserStore | None = None) -> str:
    """The path of a device on the host: a node, a socket of the store, or a disk image.

    A number in sysfs is answered by the kernel's DEVNAME in three system calls. Raises
    NoSuchDevice when the host has no such device, AttributeReadError when it does not say.
    """
    if store and info.devnum and _is_stored(info, store):
        return store.find_socket(info.devnum)
    if info.host_path is not None:
        return _regular_file(info.host_path, root)
    return find_sysfs_node(info, root) or _container_node(info, root)


def _is_stored(info: DeviceInfo, store: VhostUserStore | None) -> bool:
    """Whether the number stands for a socket of the store: only block devices' numbers do."""
    owned = store is not None and info.devnum is not None and store.owns(info.devnum)
    return owned and info.dev_type is DevType.BLOCK


def find_sysfs_node(info: DeviceInfo, root: HostRoot) -> str | None:
    """The node that the kernel names for this type and number; None when sysfs has no entry."""
    directory = _SYSFS_DIRECTORY.get(info.dev_type)
    if directory is None:
        return None
    path = f"{directory}{info.devnum}/uevent"
    uevent = root.read_attribute(path)
    return None if uevent is None else _device_node(uevent, path)


def _device_node(uevent: bytes, path: str) -> str:
    """`/dev/` + DEVNAME, which may hold directories but never leaves /dev.

    The file is the kernel's environment for udev, one KEY=VALUE a line, nothing else.
    Source: Documentation/ABI/testing/sysfs-uevent.
    """
    _, found, rest = (b"\n" + uevent).rpartition(b"\nDEVNAME=")
    if not found:
        raise AttributeReadError(path, why="it has no DEVNAME")
    name = os.fsdecode(rest.partition(b"\n")[0])
    if not name.isprintable() or name[:1] in {"", "/"} or ".." in name.split("/"):
        raise AttributeReadError(path, why=f"its DEVNAME {name!r} is no name below /dev")
    return "/dev/" + name


def _container_node(info: DeviceInfo, root: HostRoot) -> str:
    """The container path, for devices that sysfs does not list, such as /dev/cuse on old kernels.

    Used only when it is a node of the type and number that were asked for.
    """
    status = root.stat(root.real_path(info.container_path))
    if status and _is_node_of(info, status):
        return info.container_path
    found = describe(status)
    if info.devnum is None:
        raise NoSuchDevice(
            info.wanted,
            f"no FIFO at {info.container_path} on this host: there is {found}",
            found=found,
            hint="make it with mkfifo, or leave it to the container's runtime",
        )
    raise NoSuchDevice(
        info.wanted,
        f"no {info.wanted} on this host: sysfs has no entry for it, and at "
        f"{info.container_path} there is {found}",
        found=found,
        hint="compare with the numbers in `ls -l /dev` on the host; "
        "is the driver loaded, the disk plugged in?",
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
            hint="ask for a device by its number, for a file by its absolute path",
        )
    return real


def resolve(info: Request, root: HostRoot, store: VhostUserStore | None = None) -> HostDevice:
    """What the requested device is on this host, with its facts.

    Raises NoSuchDevice or AttributeReadError.
    """
    if not isinstance(info, DeviceInfo):
        from vmplug.host.named import resolve_named  # noqa: PLC0415  most requests are numbers

        return resolve_named(info, root)
    return _describe_device(info, get_host_path(info, root, store), root, store)


def resolve_all(
    infos: Sequence[Request], root: HostRoot, store: VhostUserStore | None = None
) -> list[HostDevice | HostError]:
    """`resolve` for many: each is answered, with its device or its error, in the order asked."""
    sockets = _find_sockets(infos, store)
    answers: list[HostDevice | HostError] = []
    for info in infos:
        try:
            if isinstance(info, DeviceInfo) and _is_stored(info, store):
                answers.append(sockets[info.devnum])
            else:
                answers.append(resolve(info, root))
        except HostError as error:
            answers.append(error)
    return answers


def _find_sockets(
    infos: Iterable[Request], store: VhostUserStore | None
) -> Mapping[DevNum | None, HostDevice | HostError]:
    """What stands behind the numbers that are the store's, from one scan of it."""
    stored = (i.devnum for i in infos if isinstance(i, DeviceInfo) and _is_stored(i, store))
    owned = [devnum for devnum in stored if devnum]
    if store is None or not owned:
        return {}
    try:
        return {
            devnum: _socket(devnum, path, store) if isinstance(path, str) else path
            for devnum, path in store.find_sockets(owned).items()
        }
    except HostError as error:
        return dict.fromkeys(owned, error)


def _socket(devnum: DevNum, path: str, store: VhostUserStore) -> VhostUserSocket:
    is_blk = devnum.major == store.blk_major
    kind = DeviceType.VHOST_USER_BLK if is_blk else DeviceType.VHOST_USER_SCSI
    return VhostUserSocket(kind=kind, devnum=devnum, socket_path=path)


def _describe_device(
    info: DeviceInfo, host_path: str, root: HostRoot, store: VhostUserStore | None
) -> HostDevice:
    if info.host_path is not None:
        found_by = FoundBy.BACKING_FILE if info.pmem else FoundBy.FILE
        return read_disk_file(host_path, root, found_by)
    kind = classify(info, host_path, store)
    if store and info.devnum and kind in {DeviceType.VHOST_USER_BLK, DeviceType.VHOST_USER_SCSI}:
        return _socket(info.devnum, host_path, store)
    in_sysfs = info.devnum and root.stat(f"{_SYSFS_DIRECTORY[info.dev_type]}{info.devnum}")
    found_by = FoundBy.SYSFS if in_sysfs else FoundBy.CONTAINER_PATH
    if info.devnum and kind is DeviceType.BLOCK:
        return read_block_device(info.devnum, host_path, found_by, root)
    if kind is DeviceType.VFIO:
        from vmplug.host.vfio import find_vfio_group  # noqa: PLC0415  few requests are for it

        return find_vfio_group(host_path, root, devnum=info.devnum, found_by=found_by)
    return CharDevice(device_node=host_path, devnum=info.devnum, found_by=found_by)


def classify(info: DeviceInfo, host_path: str, store: VhostUserStore | None = None) -> DeviceType:
    """The kind of a device, by the first row that fits."""
    is_block = info.dev_type is DevType.BLOCK
    is_stored = _is_stored(info, store)
    is_blk = is_stored and store is not None and info.major == store.blk_major
    rows = (
        (is_blk, DeviceType.VHOST_USER_BLK),
        (is_stored, DeviceType.VHOST_USER_SCSI),
        (is_block, DeviceType.BLOCK),
        (info.devnum and _VFIO_NODE.match(host_path), DeviceType.VFIO),
        (True, DeviceType.GENERIC),
    )
    return next(kind for fits, kind in rows if fits)


class HostPathCache:
    """Host paths looked up again and again, each answer validated by the kernel.

    A descriptor on a device's uevent file stays open. While the device lives, one `pread` gives
    its DEVNAME again; once it is gone the kernel answers ENODEV for ever, even when another device
    takes the number. Only files of the running kernel's sysfs behave so: below another root every
    lookup is live. Holds at most `limit` descriptors; a context manager, not thread-safe.
    """

    def __init__(self, root: HostRoot, *, limit: int = 256) -> None:
        self._root = root
        self._limit = limit
        self._open: dict[tuple[DevType, DevNum | None], _Kept] = {}

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
        directory = _SYSFS_DIRECTORY.get(dev_type)
        if directory is None or devnum is None:
            return
        path = f"{directory}{devnum}/uevent"
        descriptor = self._root.open_kernel_attribute(path)
        if descriptor is None:
            return
        # Read again: only text that came through this descriptor may stand for it later.
        uevent = self._root.reread_attribute(descriptor)
        self._open[key] = _Kept(descriptor, uevent or b"", host_path)
        if uevent is None or _device_node(uevent, path) != host_path:
            self._forget(key)
        elif len(self._open) > self._limit:
            self._forget(next(iter(self._open)))

    def _forget(self, key: tuple[DevType, DevNum | None]) -> None:
        self._root.close_attribute(self._open.pop(key).descriptor)


class _Kept(NamedTuple):
    descriptor: int
    uevent: bytes
    host_path: str
