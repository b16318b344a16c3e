"""Resolve requests by name: a socket, a directory, a source, a descriptor."""

import os
import stat
from collections.abc import Collection
from typing import assert_never

from vmplug.errors import NoSuchDevice, SpecError
from vmplug.host.device import EntropySource, HostDevice, OpenConnection, SharedDirectory
from vmplug.host.file_id import file_id
from vmplug.host.kind import DeviceType, FoundBy, SharedFilesystem
from vmplug.host.pci.uses import BlockDevices
from vmplug.host.pci.vfio import find_vfio_device, find_vfio_group
from vmplug.host.root import HostRoot, describe
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.host.vhost_user.virtiofsd import find_virtiofsd
from vmplug.oci.requests import Named, NetInfo, RngInfo, ShareInfo, VfioInfo


def resolve_named(
    request: Named, root: HostRoot, blocks: BlockDevices | None = None
) -> HostDevice:
    """The device at that path; NoSuchDevice names what was found in its place.

    `blocks` are for several VFIO devices of one request.
    """
    match request:
        case NetInfo():
            return _network(request, root)
        case ShareInfo():
            return _share(request, root)
        case RngInfo():
            return _source(request, root)
        case VfioInfo():
            return _group(request, root, blocks)
        case _:
            assert_never(request)


def _share(request: ShareInfo, root: HostRoot) -> HostDevice:
    if request.descriptor is not None:
        return _connection(request, request.descriptor, root)
    path, status = _look(
        request,
        request.source,
        root,
        kinds=(stat.S_IFDIR, stat.S_IFSOCK),
        wrong="cannot be shared",
        hint="name a directory, or the socket of a virtiofsd",
    )
    if stat.S_ISSOCK(status.st_mode):
        return VhostUserSocket(
            kind=DeviceType.VHOST_USER_FS,
            found_by=FoundBy.FILE,
            socket_path=path,
            file_id=file_id(status),
        )
    is_9p = request.driver_options.get("filesystem") == SharedFilesystem.VIRTIO_9P
    return SharedDirectory(
        DeviceType.VIRTIO_9P if is_9p else DeviceType.VHOST_USER_FS,
        path,
        request.tag,
        read_only=root.is_mounted_read_only(path),
        virtiofsd=None if is_9p else find_virtiofsd(root),
        file_id=file_id(status),
    )


def _connection(request: ShareInfo, descriptor: int, root: HostRoot) -> OpenConnection:
    status = root.stat_descriptor(descriptor)
    if status is None or not stat.S_ISSOCK(status.st_mode):
        found = describe(status)
        raise SpecError(
            request.name, f"descriptor {descriptor} is not an open socket: found {found}"
        )
    return OpenConnection(descriptor, status.st_ino)


def _group(request: VfioInfo, root: HostRoot, blocks: BlockDevices | None) -> HostDevice:
    if request.device.startswith("/"):
        return find_vfio_group(
            request.device, root, devnum=None, found_by=FoundBy.FILE, blocks=blocks
        )
    return find_vfio_device(request.device, root, blocks=blocks)


def _network(request: NetInfo, root: HostRoot) -> VhostUserSocket:
    path, status = _look(
        request,
        request.socket_path,
        root,
        kinds=(stat.S_IFSOCK,),
        wrong="is not the socket of a vhost-user backend",
        hint="start the backend that serves it, or name its socket",
    )
    return VhostUserSocket(
        kind=DeviceType.VHOST_USER_NET,
        found_by=FoundBy.FILE,
        socket_path=path,
        file_id=file_id(status),
    )


def _source(request: RngInfo, root: HostRoot) -> EntropySource:
    path, status = _look(
        request,
        request.source,
        root,
        kinds=(stat.S_IFCHR,),
        wrong="is not a source of random numbers",
        hint="name a character device such as /dev/urandom or /dev/hwrng",
    )
    return EntropySource(path, file_id(status))


def _look(
    request: Named,
    path: str,
    root: HostRoot,
    *,
    kinds: Collection[int],
    wrong: str,
    hint: str,
) -> tuple[str, os.stat_result]:
    """The canonical path and the status of the file there, if it is one of these kinds."""
    real = root.real_path(path)
    status = root.stat(real)
    if status is None or stat.S_IFMT(status.st_mode) not in kinds:
        found = describe(status)
        message = f"{path} {wrong}: found {found}"
        raise NoSuchDevice(request.description, message, found=found, hint=hint)
    return real, status
