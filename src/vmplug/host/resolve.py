"""DeviceInfo -> HostDevice: find each device on the host and its kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

from vmplug.devnum import DevNum
from vmplug.errors import HostError
from vmplug.host.block.sysfs import find_block_directory, read_block_device, read_disk_file
from vmplug.host.device import CharDevice, HostDevice
from vmplug.host.host_path import SYSFS_DIRECTORY, get_host_path, is_in_store
from vmplug.host.kind import DeviceType, FoundBy
from vmplug.host.root import HostRoot
from vmplug.host.use.silent import find_silent, no_answer
from vmplug.oci.info import DeviceInfo, DevType

if TYPE_CHECKING:
    from vmplug.host.pci.uses import BlockDevices
    from vmplug.host.vhost_user.store import VhostUserStore
    from vmplug.oci.requests import Named, Request

_VFIO_NODE = re.compile(r"/dev/vfio/([0-9]+|devices/vfio[0-9]+)\Z")
"""A VFIO group or device. `/dev/vfio/vfio` is the container; `noiommu-N` has no isolation."""


def resolve(
    info: Request, root: HostRoot, vhost_user_store: VhostUserStore | None = None
) -> HostDevice:
    """The requested device on this host, with its facts.

    Raises NoSuchDevice or AttributeReadError.
    """
    if find_silent(paths := _paths_of([info]), root):
        raise no_answer(paths[0])
    return _resolve(info, root, vhost_user_store, partial(_block_devices, root))


def _block_devices(root: HostRoot) -> BlockDevices:
    from vmplug.host.pci.uses import BlockDevices  # noqa: PLC0415  msgspec: 13 ms

    return BlockDevices(root)


def resolve_all(
    requests: Sequence[Request], root: HostRoot, vhost_user_store: VhostUserStore | None = None
) -> list[HostDevice | HostError]:
    """`resolve` for many: the device or the error of each, in the same order."""
    sockets = _find_sockets(requests, vhost_user_store)
    answers: list[HostDevice | HostError] = []
    get_blocks = cache(partial(_block_devices, root))
    silent = find_silent(_paths_of(requests), root)
    for info in requests:
        try:
            if silent and silent.intersection(paths := _paths_of([info])):
                raise no_answer(paths[0])
            if isinstance(info, DeviceInfo) and is_in_store(info, vhost_user_store):
                answers.append(sockets[info.devnum])
            else:
                answers.append(_resolve(info, root, None, get_blocks))
        except HostError as error:
            answers.append(error)
    return answers


def _paths_of(requests: Iterable[Request]) -> list[str]:
    """The paths at which vmplug will look: of an image, a socket, a directory, a node."""
    named = (
        info.host_path if isinstance(info, DeviceInfo) else _path_of(info) for info in requests
    )
    return [path for path in named if path and path.startswith("/")]


def _path_of(info: Named) -> str | None:
    """Each kind of request has one of them."""
    names = ("source", "socket_path", "device")
    return next((getattr(info, name) for name in names if hasattr(info, name)), None)


def _resolve(
    info: Request,
    root: HostRoot,
    vhost_user_store: VhostUserStore | None,
    get_blocks: Callable[[], BlockDevices],
) -> HostDevice:
    if not isinstance(info, DeviceInfo):
        from vmplug.host.resolve_named import resolve_named  # noqa: PLC0415  msgspec: 20 ms

        return resolve_named(info, root, get_blocks())
    if vhost_user_store and info.devnum and is_in_store(info, vhost_user_store):
        return vhost_user_store.find(info.devnum)
    return _describe_device(info, get_host_path(info, root), root, get_blocks)


def _find_sockets(
    requests: Iterable[Request], vhost_user_store: VhostUserStore | None
) -> Mapping[DevNum | None, HostDevice | HostError]:
    """The sockets behind the numbers of the store, from one scan of it."""
    stored = (
        i.devnum
        for i in requests
        if isinstance(i, DeviceInfo) and is_in_store(i, vhost_user_store)
    )
    owned = [devnum for devnum in stored if devnum]
    if vhost_user_store is None or not owned:
        return {}
    try:
        return dict(vhost_user_store.find_sockets(owned).items())
    except HostError as error:
        return dict.fromkeys(owned, error)


def _describe_device(
    info: DeviceInfo,
    host_path: str,
    root: HostRoot,
    get_blocks: Callable[[], BlockDevices],
) -> HostDevice:
    if info.host_path is not None:
        found_by = FoundBy.BACKING_FILE if info.pmem else FoundBy.FILE
        return read_disk_file(host_path, root, found_by)
    kind = classify(info, host_path)
    in_sysfs = info.devnum and (
        root.stat(find_block_directory(info.devnum, root))
        if info.dev_type is DevType.BLOCK
        else root.stat(f"{SYSFS_DIRECTORY[info.dev_type]}{info.devnum}")
    )
    found_by = FoundBy.SYSFS if in_sysfs else FoundBy.CONTAINER_PATH
    if info.devnum and kind is DeviceType.BLOCK:
        return read_block_device(info.devnum, host_path, found_by, root)
    if kind is DeviceType.VFIO:
        from vmplug.host.pci.vfio import find_vfio_group  # noqa: PLC0415  msgspec: 13 ms

        return find_vfio_group(
            host_path, root, devnum=info.devnum, found_by=found_by, blocks=get_blocks()
        )
    return CharDevice(device_node=host_path, devnum=info.devnum, found_by=found_by)


def classify(
    info: DeviceInfo, host_path: str, vhost_user_store: VhostUserStore | None = None
) -> DeviceType:
    """The kind of a device, by the first row that fits."""
    is_block = info.dev_type is DevType.BLOCK
    is_stored = is_in_store(info, vhost_user_store)
    is_blk = (
        is_stored and vhost_user_store is not None and info.major == vhost_user_store.blk_major
    )
    rows = (
        (is_blk, DeviceType.VHOST_USER_BLK),
        (is_stored, DeviceType.VHOST_USER_SCSI),
        (is_block, DeviceType.BLOCK),
        (info.devnum and _VFIO_NODE.match(host_path), DeviceType.VFIO),
        (True, DeviceType.GENERIC),
    )
    return next(kind for fits, kind in rows if fits)
