"""LeasedDevice: what a launcher needs of one device."""

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import structs
from msgspec.structs import replace

from vmplug.drivers.plug import (
    BlockDrive,
    Plug,
    RNGDevice,
    SharedFS,
    VFIODevice,
    VFIODevices,
    VhostUserDevice,
)
from vmplug.journal.records import Attachment


class LeasedFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function of a group, or a mediated device, as VFIO hands it over.

    `bdf` is None for a mediated device, `uuid` for a function. `cdev_node` is its own node, None
    where the kernel has none; `descriptor` is that node, open, None unless it must be passed.
    """

    bdf: str | None = None
    uuid: str | None = None
    sysfs_path: str | None = None
    cdev_node: str | None = None
    descriptor: int | None = None


class LeasedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One device of a lease. What it does not have is None.

    `name` is that of the request, `kind` the word of its kind. `descriptor` is the open file of a
    disk, an image or a character device, or the connection to a virtiofsd. `socket` is that of a
    vhost-user backend; where it is that of a virtiofsd of vmplug's, its path leads there only in
    the process that inherits it. `group_node` is that of an IOMMU group with its `functions`, and
    `group_descriptor` the same, open.
    """

    name: str
    kind: str
    host_path: str
    read_only: bool
    descriptor: int | None = None
    size_bytes: int | None = None
    format: str | None = None
    socket: str | None = None
    mac_address: str | None = None
    tag: str | None = None
    group_node: str | None = None
    group_descriptor: int | None = None
    functions: tuple[LeasedFunction, ...] = ()

    def fields(self) -> Iterator[dict[str, Any]]:
        """The values for a template: one set, or one for each function of a group."""
        own = {name: value for name, value in structs.asdict(self).items() if name != "functions"}
        for function in self.functions or (LeasedFunction(),):
            known = {k: v for k, v in structs.asdict(function).items() if v is not None}
            yield dict.fromkeys(LeasedFunction.__struct_fields__) | own | known


class Opened(msgspec.Struct, kw_only=True):
    """What this process holds open for one device: to be passed on, and to lock it.

    `nodes` are those of functions, by BDF or UUID. `socket` is the file of a virtiofsd's socket.
    """

    descriptor: int | None = None
    socket: int | None = None
    group_descriptor: int | None = None
    nodes: dict[str, int] = msgspec.field(default_factory=dict)
    locks: list[int] = msgspec.field(default_factory=list)

    def all(self) -> list[int]:
        """Every descriptor."""
        known = (self.descriptor, self.socket, self.group_descriptor)
        some = [descriptor for descriptor in known if descriptor is not None]
        return [*some, *self.nodes.values(), *self.locks]


def describe(hold: Attachment, plug: Plug | None, opened: Opened) -> LeasedDevice:
    """The device of a hold; `plug` is None for a character device."""
    device = LeasedDevice(
        name=hold.name,
        kind=hold.kind.word,
        host_path=hold.host_path,
        read_only=hold.read_only,
        descriptor=opened.descriptor,
    )
    match plug:
        case BlockDrive():
            return replace(device, size_bytes=plug.size_bytes, format=str(plug.format))
        case VhostUserDevice():
            return replace(
                device,
                socket=plug.socket_path or _path_of(opened.socket),
                mac_address=plug.mac_address,
                tag=plug.tag,
            )
        case SharedFS():
            return replace(device, tag=plug.tag)
        case VFIODevices():
            is_group = not plug.node.startswith("/dev/vfio/devices/")
            return replace(
                device,
                group_node=plug.node if is_group else None,
                group_descriptor=opened.group_descriptor,
                functions=tuple(_function(one, opened) for one in plug.devices),
            )
        case RNGDevice() | None:
            return device


def without_descriptors(device: LeasedDevice) -> LeasedDevice:
    """The device without what is open of it."""
    functions = tuple(replace(function, descriptor=None) for function in device.functions)
    return replace(device, descriptor=None, group_descriptor=None, functions=functions)


def _path_of(descriptor: int | None) -> str | None:
    return None if descriptor is None else f"/proc/self/fd/{descriptor}"


def _function(device: VFIODevice, opened: Opened) -> LeasedFunction:
    return LeasedFunction(
        bdf=str(device.bdf) if device.bdf else None,
        uuid=None if device.bdf else device.name,
        sysfs_path=device.sysfs_path,
        cdev_node=device.cdev_node,
        descriptor=opened.nodes.get(device.name),
    )
