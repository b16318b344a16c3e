"""Places: what a VM has to plug into, one place of it, and where the guest sees that."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

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
class GroupPlace:
    """Places for all functions of a group, in their order; as text, one word each."""

    places: tuple[PciPlace, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.places))


@dataclass(frozen=True, slots=True, kw_only=True)
class ApPlace:
    """The adapter bus of an s390 machine, which takes one matrix."""

    def __str__(self) -> str:
        return "ap"


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


Place = PciPlace | GroupPlace | ApPlace | ScsiPlace | CcwPlace | MmioPlace | MemorySlot

UNPLUGGED_NEVER = ("memory/", "virtio-mmio-bus.")
"""How places begin that a device never leaves: QEMU has no unplug for them."""


class PortKind(StrEnum):
    """What a PCI device is plugged into, in the words of Kata's config.go."""

    ROOT_PORT = "root-port"
    SWITCH_PORT = "switch-port"
    BRIDGE_PORT = "bridge-port"


class Windows(NamedTuple):
    """Guest addresses behind a port, in bytes, that BARs of devices fit into.

    `prefetchable` is for 64-bit prefetchable memory, `other` for all other memory.
    """

    prefetchable: int
    other: int

    def hold(self, needed: "Windows") -> bool:
        """Whether BARs of that much fit."""
        return needed.prefetchable <= self.prefetchable and needed.other <= self.other


FIRMWARE_WINDOWS = Windows(2 << 20, 2 << 20)
"""What SeaBIOS gives a hot-plug port that does not say what it wants, and Linux never widens it:
a BAR of 4 MiB behind it is silently left without an address. Measured on QEMU 7.2, Linux 6.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PciPort:
    """A port or bridge that takes hot-plugged devices, and its free slots in order.

    `numa_node` is the guest's, None where the VM does not say.
    """

    bus: str
    path: PciPath
    free: tuple[PciSlot, ...]
    kind: PortKind = PortKind.ROOT_PORT
    windows: Windows = FIRMWARE_WINDOWS
    numa_node: int | None = None


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
    says that the machine takes them. `viommu` says that the guest has an IOMMU of its own,
    `iommufd` that QEMU knows that way to the host's, `ap` that there is an adapter bus.
    `memory_bytes` is all of the guest's memory, 0 where it is not known.
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
    viommu: bool = False
    iommufd: bool = False
    ap: bool = False
    memory_bytes: int = field(default=0, compare=False)

    @property
    def is_microvm(self) -> bool:
        """Whether the machine has virtio-mmio transports and nothing else, and those only cold."""
        return self.machine == "microvm"


class GuestFunction(NamedTuple):
    """A function of a group: what it is on the host, a BDF or a UUID, and where the guest sees it.

    `pci_path` is None for what is no PCI device.
    """

    host: str
    pci_path: PciPath | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestAddress:
    """Where the guest finds a device.

    A PCI device is at `pci_path`; a SCSI disk at `scsi_address` behind the controller at
    `pci_path`; a device of the channel subsystem at `ccw_devno`. An NVDIMM has the handle
    `nvdimm_handle` in the guest's /sys/bus/nd/devices/nmem*/nfit/handle, and is /dev/pmem<N> with
    `nvdimm_id` as N when it came alone: of several that come at once the guest numbers any first,
    and the id is None. A shared directory is mounted by its `mount_tag`, a network device is
    known by its `mac_address`. `virt_path` is for the disks of a microvm, which has no other
    address. `functions` are all that came with an IOMMU group, `ap_queues` the queues of an
    adapter. Names such as /dev/vda are else the guest's to choose and are not predicted.
    """

    pci_path: PciPath | None = None
    scsi_address: ScsiAddress | None = None
    ccw_devno: CcwDevNo | None = None
    virt_path: str | None = None
    nvdimm_id: int | None = None
    nvdimm_handle: int | None = None
    mount_tag: str | None = None
    mac_address: str | None = None
    functions: tuple[GuestFunction, ...] = ()
    ap_queues: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.ap_queues:
            return f"AP {' '.join(self.ap_queues)}"
        if len(self.functions) > 1:
            return "PCI " + ", ".join(str(function.pci_path) for function in self.functions)
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
