"""Places: what a VM has to plug into, one place of it, and where the guest sees that."""

from dataclasses import dataclass
from enum import StrEnum

from vmplug.address import CcwDevNo, PciPath, PciSlot, ScsiAddress


class PlugMode(StrEnum):
    """Whether the VM runs, or is still to be started."""

    HOT = "hot"
    COLD = "cold"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CcwPlace:
    """A number in the channel subsystem of an s390 machine."""

    devno: CcwDevNo

    def __str__(self) -> str:
        return f"ccw/{self.devno}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MmioPlace:
    """A virtio-mmio transport of a microvm that is to be started; `index` is the guest's order.

    It names virtio disks by it.
    """

    bus: str
    index: int

    def __str__(self) -> str:
        return self.bus


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySlot:
    """A slot for a memory device; `index` is how many NVDIMMs came before."""

    slot: int
    index: int

    def __str__(self) -> str:
        return f"memory/{self.slot}"


Place = PciPlace | ScsiPlace | CcwPlace | MmioPlace | MemorySlot

UNPLUGGED_NEVER = ("memory/", "virtio-mmio-bus.")
"""How places begin that a device never leaves: QEMU has no unplug for them."""


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
    """What a VM has to plug into, as it said itself or, when it is to be started, as it will be.

    `shared_memory` says that all guest memory can be mapped by another process, as every
    vhost-user device needs. `ccw_used` are the numbers in use in a channel subsystem, None without
    one; `mmio` the free virtio-mmio transports of a microvm. `memory_slots` and
    `memory_slots_used` are for memory devices, `nvdimms` how many of those there are; `nvdimm`
    says that the machine takes them.
    """

    machine: str
    ports: tuple[PciPort, ...]
    controllers: tuple[ScsiController, ...]
    shared_memory: bool
    mode: PlugMode = PlugMode.HOT
    kvm: bool = False
    cpus: int = 1
    ccw_used: frozenset[CcwDevNo] | None = None
    mmio: tuple[MmioPlace, ...] = ()
    nvdimm: bool = False
    memory_slots: int = 0
    memory_slots_used: frozenset[int] = frozenset()
    nvdimms: int = 0

    @property
    def is_microvm(self) -> bool:
        """Whether the machine has virtio-mmio transports and nothing else, and those only cold."""
        return self.machine == "microvm"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestAddress:
    """Where the guest finds a device.

    A PCI device is at `pci_path`; a SCSI disk at `scsi_address` behind the controller at
    `pci_path`; a device of the channel subsystem at `ccw_devno`. An NVDIMM has the handle
    `nvdimm_handle` in the guest's /sys/bus/nd/devices/nmem*/nfit/handle, and is /dev/pmem<N> with
    `nvdimm_id` as N when it came alone: of several that come at once the guest numbers any first,
    and the id is None. A shared directory is mounted by its `mount_tag`, a network device is
    known by its `mac_address`. `virt_path` is for the disks of a microvm, which has no other
    address. Names such as /dev/vda are else the guest's to choose and are not predicted.
    """

    pci_path: PciPath | None = None
    scsi_address: ScsiAddress | None = None
    ccw_devno: CcwDevNo | None = None
    virt_path: str | None = None
    nvdimm_id: int | None = None
    nvdimm_handle: int | None = None
    mount_tag: str | None = None
    mac_address: str | None = None

    def __str__(self) -> str:
        if self.nvdimm_id is not None:
            return f"/dev/pmem{self.nvdimm_id}"
        if self.nvdimm_handle is not None:
            return f"NVDIMM with handle {self.nvdimm_handle}"
        if self.ccw_devno:
            place = f"CCW {self.ccw_devno}"
        elif self.scsi_address:
            place = f"SCSI {self.scsi_address}"
        else:
            place = f"PCI {self.pci_path}" if self.pci_path else self.virt_path or ""
        name = f"tag {self.mount_tag}" if self.mount_tag else self.mac_address
        return " ".join(word for word in (place, name) if word)
