"""Plugs: what can be plugged into a VM, as values, and where the guest finds it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from vmplug.address import Bdf, virtio_disk_path
from vmplug.drivers.place import (
    ApPlace,
    CcwPlace,
    GroupPlace,
    GuestAddress,
    GuestFunction,
    MemorySlot,
    MmioPlace,
    PciPlace,
    Place,
    ScsiPlace,
)
from vmplug.host.block.image import ImageFormat
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
        """Past the host's page cache (O_DIRECT)."""
        return self in {Cache.NONE, Cache.DIRECTSYNC}

    @property
    def no_flush(self) -> bool:
        """The guest's flushes are dropped: a host crash loses data."""
        return self is Cache.UNSAFE

    @property
    def write_cache(self) -> bool:
        """The guest sees a volatile write cache that it must flush."""
        return self not in {Cache.WRITETHROUGH, Cache.DIRECTSYNC}


class Aio(StrEnum):
    """How QEMU does asynchronous I/O. Source: QEMU qapi/block-core.json, BlockdevAioOptions."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttle:
    """Limits per second, bytes and operations; None is no limit."""

    bps_total: int | None = None
    bps_read: int | None = None
    bps_write: int | None = None
    iops_total: int | None = None
    iops_read: int | None = None
    iops_write: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDrive:
    """A disk to be plugged, or with the driver `nvdimm` persistent memory of `size_bytes`.

    `file` is a block device node when `is_device`, a regular file otherwise. `file_id` is what
    QEMU must have opened by that name (see `vmplug.host.file_id`), None for anything.
    `backing_allowed` lets a qcow2 image open the files that its header names. `throttle` is None
    for no limits.
    """

    id: str
    file: str
    is_device: bool
    driver: DiskFrontend
    format: ImageFormat = ImageFormat.RAW
    backing_allowed: bool = False
    read_only: bool = False
    share_rw: bool = False
    cache: Cache = Cache.WRITEBACK
    aio: Aio = Aio.THREADS
    discard: bool = False
    serial: str = ""
    sector_bytes: int = 512
    iothread: bool = False
    throttle: Throttle | None = None
    size_bytes: int | None = None
    file_id: str | None = None


DAEMON_MARK = "VMPLUG_DEVICE"
"""What such a daemon has in its environment: its device's id, a blank, and its VM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtiofsdSpec:
    """A virtiofsd that vmplug itself runs for one share of `directory`.

    It begins before the share is plugged and ends after it is unplugged. `options` are those that
    the program has (see `vmplug.host.vhost_user.virtiofsd`), `cache` is auto, always or never.
    `file_id` is that of the directory, None for any.
    """

    program: str
    options: frozenset[str]
    directory: str
    cache: str
    read_only: bool
    file_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostUserDevice:
    """A device whose other end is a process that speaks vhost-user.

    QEMU connects to it at `socket_path`; or `descriptor` is a connection to it that this process
    holds open; or it is a `daemon` of vmplug's own. The others are None. `queues` are request
    queues, for a network pairs. `reconnect_s` is how often QEMU tries again when the backend is
    lost, 0 never; `msix` is whether the device may use message interrupts. Shares have `tag`,
    `queue_size` and `cache_size_mib`, networks `mac_address`.
    """

    id: str
    type: DeviceType
    socket_path: str | None = None
    descriptor: int | None = None
    daemon: VirtiofsdSpec | None = None
    queues: int = 1
    reconnect_s: int = 0
    msix: bool = True
    mac_address: str | None = None
    tag: str | None = None
    queue_size: int | None = None
    cache_size_mib: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFS:
    """A directory shared by QEMU itself, as virtio-9p; `file_id` is as for a BlockDrive."""

    id: str
    directory: str
    tag: str
    read_only: bool
    file_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RNGDevice:
    """Random numbers from `filename`; the guest may take `max_bytes` in each period.

    `file_id` is as for a BlockDrive.
    """

    id: str
    filename: str
    max_bytes: int | None = None
    period_ms: int | None = None
    file_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VFIODevice:
    """One function of a group, or a mediated device; of one that is no PCI device `bdf` is None.

    `name` is its BDF or UUID, `cdev_node` its own node, None where it is reached by its group;
    `descriptor` is that node as this process holds it open, None until it is to be plugged.
    """

    name: str
    type: VFIODeviceType
    bdf: Bdf | None = None
    sysfs_path: str | None = None
    cdev_node: str | None = None
    descriptor: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VFIODevices:
    """All of an IOMMU group that goes into the VM; plugged whole or not at all.

    `vendor_id` and `device_id` are what the guest reads instead of the real ones, `rom` is whether
    it sees the option ROM. `node` is that of the group.
    """

    id: str
    node: str
    devices: tuple[VFIODevice, ...]
    vendor_id: int | None = None
    device_id: int | None = None
    rom: bool = False
    ap_queues: tuple[str, ...] = ()


Plug = BlockDrive | VhostUserDevice | SharedFS | RNGDevice | VFIODevices
"""What can be plugged; hot and cold plug take the same values."""


def guest_address(plug: Plug, place: Place) -> GuestAddress:
    """Where the guest will find it."""
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
            raise AssertionError(f"{plug.id} is no group")
        case ScsiPlace():
            return GuestAddress(pci_path=place.path, scsi_address=place.address)
        case CcwPlace():
            return GuestAddress(ccw_devno=place.devno, mount_tag=tag, mac_address=mac)
        case MmioPlace():
            virt_path = virtio_disk_path(place.index) if is_disk else None
            return GuestAddress(virt_path=virt_path, mount_tag=tag, mac_address=mac)
        case MemorySlot():
            return GuestAddress(nvdimm_id=place.index, nvdimm_handle=place.slot + 1)
        case _:
            assert_never(place)


def _group_address(plug: VFIODevices, place: Place) -> GuestAddress:
    match place:
        case GroupPlace():
            pairs = zip(plug.devices, place.places, strict=True)
            functions = tuple(GuestFunction(device.name, at.path) for device, at in pairs)
            return GuestAddress(pci_path=functions[0].pci_path, functions=functions)
        case CcwPlace():
            function = GuestFunction(plug.devices[0].name, None)
            return GuestAddress(ccw_devno=place.devno, functions=(function,))
        case _:
            return GuestAddress(ap_queues=plug.ap_queues)
