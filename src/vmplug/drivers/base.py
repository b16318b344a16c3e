"""The values and the port between host devices and hypervisors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, Self

from vmplug.address import PciPath, PciSlot, ScsiAddress
from vmplug.host.image import ImageFormat


class BlockDriver(StrEnum):
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
    """A disk to be plugged.

    `file` is a block device node when `is_device`, a regular file otherwise. `backing_allowed`
    lets a qcow2 image open the files that its header names. `throttle` is None for no limits.
    """

    id: str
    file: str
    is_device: bool
    driver: BlockDriver
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PciPlace:
    """A slot behind a port or bridge: `bus` is QEMU's name for it, `path` the guest's."""

    bus: str
    slot: PciSlot
    path: PciPath

    def __str__(self) -> str:
        return f"{self.bus}/{self.slot}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScsiPlace:
    """An address on a virtio-scsi controller; `path` is the controller's, None if unknown."""

    bus: str
    address: ScsiAddress
    path: PciPath | None

    def __str__(self) -> str:
        return f"{self.bus}/{self.address}"


Place = PciPlace | ScsiPlace


@dataclass(frozen=True, slots=True, kw_only=True)
class PciPort:
    """A port or bridge that takes hot-plugged devices, and its free slots in order."""

    bus: str
    path: PciPath
    free: tuple[PciSlot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScsiController:
    """A virtio-scsi controller and the addresses in use on it."""

    bus: str
    path: PciPath | None
    used: frozenset[ScsiAddress]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a VM has to plug into, as it said itself.

    `shared_memory` says that all guest memory can be mapped by another process, as every
    vhost-user device needs.
    """

    machine: str
    ports: tuple[PciPort, ...]
    controllers: tuple[ScsiController, ...]
    shared_memory: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestAddress:
    """Where the guest finds a device.

    A virtio-blk disk is at `pci_path`; a SCSI disk at `scsi_address` behind the controller at
    `pci_path`. Names such as /dev/vda are the guest's to choose and are not predicted.
    """

    pci_path: PciPath | None = None
    scsi_address: ScsiAddress | None = None

    @classmethod
    def of(cls, place: Place) -> Self:
        """The guest's view of a place."""
        match place:
            case PciPlace():
                return cls(pci_path=place.path)
            case ScsiPlace():
                return cls(pci_path=place.path, scsi_address=place.address)

    def __str__(self) -> str:
        return f"SCSI {self.scsi_address}" if self.scsi_address else f"PCI {self.pci_path}"


@dataclass(frozen=True, slots=True)
class Command:
    """One QMP command; `arguments` are its JSON object."""

    execute: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """A command, and the one that takes it back."""

    do: Command
    undo: Command


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a VM is reached: its QMP socket, and the process that made it, None if unknown."""

    qmp_socket: str
    pid: int | None


class Hypervisor(Protocol):
    """What the manager needs of a VM. Every wait has a deadline.

    `endpoint` is None for a VM that no other process can reach. Raises HypervisorError and its
    kinds.
    """

    @property
    def endpoint(self) -> Endpoint | None:
        """Where another process finds this VM."""

    def offer(self) -> Offer:
        """What the VM has to plug into now."""

    def steps(self, drive: BlockDrive, place: Place) -> tuple[Step, ...]:
        """Exactly what `plug` would do; sends nothing."""

    def plug(self, drive: BlockDrive, place: Place) -> None:
        """Plug all of it or none: whatever was done before a failure is undone."""

    def request_unplug(self, device_id: str) -> None:
        """Ask the guest to let go; comes back at once, also when it was asked before."""

    def wait_unplugged(self, device_ids: Sequence[str], timeout_s: float) -> dict[str, str]:
        """Wait for the guest, then take the devices' remains away.

        Gives the reason for each device that is still there: `timeout`, or the guest's refusal.
        """

    def resize(self, device_id: str, size_bytes: int) -> None:
        """Tell the guest a disk's new size."""

    def find_devices(self) -> dict[str, bool]:
        """The ids of all devices of which the VM holds any part; True where the guest sees it."""

    def status(self) -> str:
        """QEMU's run state: `running`, `paused`, `prelaunch`, ..."""

    def close(self) -> None:
        """End the conversation; the VM goes on."""
