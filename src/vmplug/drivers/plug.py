"""Plugs: the devices that can be plugged into a VM, as values, and their guest addresses."""

from collections.abc import Sequence
from enum import StrEnum
from typing import assert_never

import msgspec
from msgspec.structs import replace

from vmplug.address import Bdf, virtio_disk_path
from vmplug.drivers.place import (
    ApPlace,
    CcwPlace,
    GroupPlace,
    GuestAddress,
    GuestFunction,
    LeasePlace,
    MemorySlot,
    MmioPlace,
    PciPlace,
    Place,
    ScsiPlace,
)
from vmplug.host.block.formats import ImageFormat
from vmplug.host.block.qcow2 import ImageFile
from vmplug.host.kind import DeviceType
from vmplug.host.pci.mdev import VFIODeviceType


class DiskFrontend(StrEnum):
    """How a guest sees a disk, in the words of Kata's config.go."""

    VIRTIO_MMIO = "virtio-mmio"
    VIRTIO_BLOCK = "virtio-blk"
    VIRTIO_BLOCK_CCW = "virtio-blk-ccw"
    VIRTIO_SCSI = "virtio-scsi"
    NVDIMM = "nvdimm"


class Cache(StrEnum):
    """Cache modes, in the words of QEMU's `-drive cache=`. Source: qemu(1), -drive."""

    NONE = "none"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    DIRECTSYNC = "directsync"
    UNSAFE = "unsafe"

    @property
    def direct(self) -> bool:
        """Whether it bypasses the host's page cache (O_DIRECT)."""
        return self in {Cache.NONE, Cache.DIRECTSYNC}

    @property
    def no_flush(self) -> bool:
        """Whether the guest's flushes are dropped: then a host crash loses data."""
        return self is Cache.UNSAFE

    @property
    def write_cache(self) -> bool:
        """Whether the guest sees a volatile write cache that it must flush."""
        return self not in {Cache.WRITETHROUGH, Cache.DIRECTSYNC}


class Aio(StrEnum):
    """How QEMU does asynchronous I/O. Source: QEMU qapi/block-core.json, BlockdevAioOptions."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


class ErrorAction(StrEnum):
    """What QEMU does when I/O on a disk fails. Source: QEMU qapi/block-core.json, BlockdevOnError.

    `enospc` stops the VM where the host has no space left, and reports any other error. QEMU's
    `ignore` is not offered: the guest would take a failed write for one that succeeded.
    """

    REPORT = "report"
    STOP = "stop"
    ENOSPC = "enospc"


class Throttle(msgspec.Struct, frozen=True, kw_only=True):
    """Limits per second, in bytes and operations; None means unlimited."""

    bps_total: int | None = None
    bps_read: int | None = None
    bps_write: int | None = None
    iops_total: int | None = None
    iops_read: int | None = None
    iops_write: int | None = None


class BlockDrive(msgspec.Struct, frozen=True, kw_only=True):
    """A disk to plug, or with the driver `nvdimm` persistent memory of `size_bytes`.

    `file` is a block device node when `is_device`, a regular file otherwise. `file_id` is the file
    that QEMU must have opened by that name (see `vmplug.host.file_id`), None for any.
    `backing` and `data_file` are what a qcow2 image may open besides, None for nothing, whatever
    its header says. `throttle` is None for no limits. `aio_is_choice`: the request leaves `aio` to
    vmplug. A guest knows a SCSI disk by `disk_id` and `wwn` (VPD page 0x83); None for QEMU's, the
    first 20 bytes of `serial`. `lock` is the file of persistent memory, open in this process with
    QEMU's lock on it, None until it is plugged. `werror` and `rerror` are for writes
    and reads that fail, None for QEMU's own choice, `enospc` and `report`.
    """

    id: str
    file: str
    is_device: bool
    driver: DiskFrontend
    format: ImageFormat = ImageFormat.RAW
    backing: ImageFile | None = None
    data_file: ImageFile | None = None
    read_only: bool = False
    share_rw: bool = False
    cache: Cache = Cache.WRITEBACK
    aio: Aio = Aio.THREADS
    discard: bool = False
    serial: str = ""
    sector_bytes: int = 512
    physical_bytes: int = 512
    aio_is_choice: bool = False
    disk_id: str | None = None
    wwn: int | None = None
    iothread: bool = False
    throttle: Throttle | None = None
    werror: ErrorAction | None = None
    rerror: ErrorAction | None = None
    size_bytes: int | None = None
    file_id: str | None = None
    lock: int | None = None


DAEMON_MARK = "VMPLUG_DEVICE"
"""The environment variable of such a daemon: its device's id, a blank, and its VM."""


class VirtiofsdSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A virtiofsd that vmplug itself runs for one share of `directory`.

    It begins before the share is plugged and ends after it is unplugged. `options` are those that
    the program supports (see `vmplug.host.vhost_user.virtiofsd`), `cache` is auto, always or
    never. `file_id` is that of the directory, None for any.
    """

    program: str
    options: frozenset[str]
    directory: str
    cache: str
    read_only: bool
    file_id: str | None = None


class VhostUserDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that another process serves through vhost-user.

    QEMU connects to it at `socket_path`, unless `descriptor` is a connection to it that this
    process holds open; or vmplug runs its `daemon`. What is not used is None.
    `queues` are request queues, for a network pairs. `reconnect_s` is the interval at which QEMU
    reconnects to a lost backend, 0 for never. `msix`: the device may use message interrupts.
    `file_id` is the file at `socket_path` that QEMU must be connected to, None for any. Shares
    have `tag`, `queue_size` and `cache_size_mib`, networks `mac_address`.
    """

    id: str
    type: DeviceType
    socket_path: str | None = None
    descriptor: int | None = None
    daemon: VirtiofsdSpec | None = None
    file_id: str | None = None
    queues: int = 1
    reconnect_s: int = 0
    msix: bool = True
    mac_address: str | None = None
    tag: str | None = None
    queue_size: int | None = None
    cache_size_mib: int = 0


class SharedFS(msgspec.Struct, frozen=True, kw_only=True):
    """A directory shared by QEMU itself, as virtio-9p; `file_id` is as for a BlockDrive."""

    id: str
    directory: str
    tag: str
    read_only: bool
    file_id: str | None = None


class RNGDevice(msgspec.Struct, frozen=True, kw_only=True):
    """Random numbers from `filename`; the guest may read `max_bytes` in each period.

    `file_id` is as for a BlockDrive.
    """

    id: str
    filename: str
    max_bytes: int | None = None
    period_ms: int | None = None
    file_id: str | None = None


class VFIODevice(msgspec.Struct, frozen=True, kw_only=True):
    """One function of a group, or a mediated device; `bdf` is None if it is not on PCI.

    `name` is its BDF or UUID. `cdev_node` is its own node, None where QEMU uses its group.
    `descriptor` is that node, open in this process, None until it is plugged. `vf_token` is the
    secret that a physical function shares with its virtual ones, None where there is none.
    """

    name: str
    type: VFIODeviceType
    bdf: Bdf | None = None
    sysfs_path: str | None = None
    cdev_node: str | None = None
    descriptor: int | None = None
    vf_token: str | None = None


class VFIODevices(msgspec.Struct, frozen=True, kw_only=True):
    """The functions of an IOMMU group that go into the VM; all are plugged or none.

    The guest reads `vendor_id` and `device_id` instead of the real ones; `rom`: it sees the option
    ROM. `node` is that of the group.
    """

    id: str
    node: str
    devices: tuple[VFIODevice, ...]
    vendor_id: int | None = None
    device_id: int | None = None
    rom: bool = False
    ap_queues: tuple[str, ...] = ()


Plug = BlockDrive | VhostUserDevice | SharedFS | RNGDevice | VFIODevices
"""Everything that can be plugged; hot and cold plug use the same values."""


def guest_address(plug: Plug, place: Place) -> GuestAddress:
    """The address at which the guest will find it."""
    if isinstance(plug, VFIODevices):
        return _group_address(plug, place)
    is_blk = isinstance(plug, VhostUserDevice) and plug.type is DeviceType.VHOST_USER_BLK
    is_disk = is_blk or isinstance(plug, BlockDrive)
    tag = plug.tag if isinstance(plug, VhostUserDevice | SharedFS) else None
    mac = plug.mac_address if isinstance(plug, VhostUserDevice) else None
    match place:
        case PciPlace():
            return GuestAddress(pci_path=place.path, mount_tag=tag, mac_address=mac)
        case GroupPlace() | ApPlace():
            raise AssertionError(f"{plug.id} is not a group")
        case ScsiPlace():
            return GuestAddress(pci_path=place.path, scsi_address=place.address)
        case CcwPlace():
            return GuestAddress(ccw_devno=place.devno, mount_tag=tag, mac_address=mac)
        case MmioPlace() | LeasePlace():
            index = place.index if isinstance(place, MmioPlace) else None
            virt_path = None if index is None or not is_disk else virtio_disk_path(index)
            return GuestAddress(virt_path=virt_path, mount_tag=tag, mac_address=mac)
        case MemorySlot():
            return GuestAddress(nvdimm_id=place.index, nvdimm_handle=place.slot + 1)
        case _:
            assert_never(place)


def found_address(
    places: Sequence[Place], functions: Sequence[str], known: GuestAddress
) -> GuestAddress:
    """What is `known` of an address, with where the VM has the device.

    `functions` are those of a group by their names on the host, each at one of the places.
    """
    match places[0]:
        case PciPlace(path=path):
            pairs = zip(functions, places, strict=False)
            found = ((name, at.path if isinstance(at, PciPlace) else None) for name, at in pairs)
            guests = tuple(GuestFunction(name, where) for name, where in found)
            return replace(known, pci_path=path, functions=guests)
        case ScsiPlace(path=path, address=address):
            return replace(known, pci_path=path, scsi_address=address)
        case CcwPlace(devno=devno):
            return replace(known, ccw_devno=devno)
        case MemorySlot(slot=slot):
            return replace(known, nvdimm_handle=slot + 1)
        case _:
            return known


def _group_address(plug: VFIODevices, place: Place) -> GuestAddress:
    match place:
        case GroupPlace():
            pairs = zip(plug.devices, place.places, strict=True)
            functions = tuple(GuestFunction(device.name, at.path) for device, at in pairs)
            return GuestAddress(pci_path=functions[0].pci_path, functions=functions)
        case CcwPlace():
            function = GuestFunction(plug.devices[0].name, None)
            return GuestAddress(ccw_devno=place.devno, functions=(function,))
        case LeasePlace():
            functions = tuple(GuestFunction(device.name, None) for device in plug.devices)
            return GuestAddress(functions=functions, ap_queues=plug.ap_queues)
        case _:
            return GuestAddress(ap_queues=plug.ap_queues)
