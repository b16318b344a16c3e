"""Places: the offer of a VM, one place in it, and the guest's address of a device there."""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from enum import StrEnum
from typing import Protocol

import msgspec

from vmplug.address import CcwDevNo, PciPath, PciSlot, ScsiAddress


class PlugMode(StrEnum):
    """Whether the VM is running, not yet started, or the business of another program (a lease)."""

    HOT = "hot"
    COLD = "cold"
    LEASE = "lease"


class PciPlace(msgspec.Struct, frozen=True, kw_only=True):
    """A slot behind a port or bridge: `bus` is QEMU's name for it, `path` the guest's."""

    bus: str
    slot: PciSlot
    path: PciPath

    def __str__(self) -> str:
        return f"{self.bus}/{self.slot}"


class GroupPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Places for all functions of a group, in their order; as text, one word each."""

    places: tuple[PciPlace, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.places))


class ApPlace(msgspec.Struct, frozen=True, kw_only=True):
    """The adapter bus of an s390 machine, which supports one matrix."""

    def __str__(self) -> str:
        return "ap"


class ScsiPlace(msgspec.Struct, frozen=True, kw_only=True):
    """An address on a virtio-scsi controller; `path` is the controller's, None if unknown."""

    bus: str
    address: ScsiAddress
    path: PciPath | None

    def __str__(self) -> str:
        return f"{self.bus}/{self.address}"


class CcwPlace(msgspec.Struct, frozen=True, kw_only=True):
    """A number in the channel subsystem of an s390 machine."""

    devno: CcwDevNo

    def __str__(self) -> str:
        return f"ccw/{self.devno}"


class MmioPlace(msgspec.Struct, frozen=True, kw_only=True):
    """A virtio-mmio transport of a microvm that is not yet started; `index` is the guest's order.

    The guest names virtio disks in this order.
    """

    bus: str
    index: int

    def __str__(self) -> str:
        return self.bus


class MemorySlot(msgspec.Struct, frozen=True, kw_only=True):
    """A slot for a memory device; `index` is how many NVDIMMs come before it."""

    slot: int
    index: int

    def __str__(self) -> str:
        return f"memory/{self.slot}"


LEASED = "lease/"
"""The prefix of places of leased devices."""


class LeasePlace(msgspec.Struct, frozen=True, kw_only=True):
    """A device of a lease: another program decides where its guest sees it."""

    number: int

    def __str__(self) -> str:
        return f"{LEASED}{self.number}"


Place = (
    PciPlace | GroupPlace | ApPlace | ScsiPlace | CcwPlace | MmioPlace | MemorySlot | LeasePlace
)

UNPLUGGED_NEVER = ("memory/", "virtio-mmio-bus.")
"""The prefixes of places that a device never leaves: QEMU has no unplug for them."""


class PortKind(StrEnum):
    """The kinds of port for a PCI device, in the words of Kata's config.go."""

    ROOT_PORT = "root-port"
    SWITCH_PORT = "switch-port"
    BRIDGE_PORT = "bridge-port"


class Windows(msgspec.Struct, frozen=True):
    """Guest addresses behind a port, in bytes, that BARs of devices fit into.

    `prefetchable` is for 64-bit prefetchable memory, `other` for all other memory.
    """

    prefetchable: int
    other: int

    def hold(self, needed: "Windows") -> bool:
        """Whether BARs of that much fit."""
        return needed.prefetchable <= self.prefetchable and needed.other <= self.other


FIRMWARE_WINDOWS = Windows(2 << 20, 2 << 20)
"""The window that SeaBIOS gives a hot-plug port by default, and that Linux never widens:
a BAR of 4 MiB behind it is silently left without an address. Measured on QEMU 7.2, Linux 6.1."""


class Port(Protocol):
    """A port or bridge that may take hot-plugged devices."""

    @property
    def bus(self) -> str:
        """QEMU's name for it."""

    @property
    def kind(self) -> PortKind:
        """Its kind."""

    @property
    def free(self) -> tuple[PciSlot, ...]:
        """Its free slots in order; none where nothing can be hot-plugged."""

    @property
    def path(self) -> PciPath:
        """The guest's path of the port itself."""

    @property
    def windows(self) -> Windows:
        """The guest addresses behind it."""

    @property
    def numa_node(self) -> int | None:
        """The guest's, None where it is unknown."""


class Controller(Protocol):
    """A virtio-scsi controller."""

    @property
    def bus(self) -> str:
        """QEMU's name for it."""

    @property
    def path(self) -> PciPath | None:
        """The guest's, None if it is unknown."""

    @property
    def used(self) -> AbstractSet[ScsiAddress]:
        """The addresses in use, if not only by devices that the journal has."""


class Places(Protocol):
    """What a VM offers; a running one is asked for each value when it is first used."""

    @property
    def machine(self) -> str:
        """The machine's type, without QEMU's suffix."""

    @property
    def mode(self) -> PlugMode:
        """Whether the VM runs."""

    @property
    def ports(self) -> Sequence[Port]:
        """Ports and bridges for hot-plugged devices."""

    @property
    def controllers(self) -> Sequence[Controller]:
        """The virtio-scsi controllers."""

    @property
    def shared_memory(self) -> bool:
        """Whether another process can map all guest memory, as vhost-user needs."""

    @property
    def kvm(self) -> bool:
        """Whether KVM runs the guest."""

    @property
    def cpus(self) -> int:
        """How many CPUs the guest has."""

    @property
    def ccw_used(self) -> AbstractSet[CcwDevNo] | None:
        """The numbers in use in a channel subsystem, None without one."""

    @property
    def mmio(self) -> tuple[MmioPlace, ...]:
        """The free virtio-mmio transports of a microvm."""

    @property
    def nvdimm(self) -> bool:
        """Whether the machine supports NVDIMMs."""

    @property
    def memory_slots(self) -> int:
        """How many memory devices there can be."""

    @property
    def memory_slots_used(self) -> AbstractSet[int]:
        """The slots of memory devices that are in use."""

    @property
    def nvdimms(self) -> int:
        """How many memory devices are NVDIMMs."""

    @property
    def viommu(self) -> bool:
        """Whether the guest has a vIOMMU."""

    @property
    def iommufd(self) -> bool:
        """Whether QEMU supports iommufd."""

    @property
    def ap(self) -> bool:
        """Whether there is an adapter bus."""

    @property
    def memory_bytes(self) -> int:
        """All of the guest's memory, 0 where it is unknown."""

    @property
    def address_bits(self) -> int | None:
        """Those of the guest's physical addresses.

        None where they are unknown, or no port asks for a large window.
        """

    @property
    def is_microvm(self) -> bool:
        """Whether the machine has only virtio-mmio transports, for cold plug alone."""


class PciPort(msgspec.Struct, frozen=True, kw_only=True):
    """A port or bridge that takes hot-plugged devices; see Port."""

    bus: str
    path: PciPath
    free: tuple[PciSlot, ...]
    kind: PortKind = PortKind.ROOT_PORT
    windows: Windows = FIRMWARE_WINDOWS
    numa_node: int | None = None


class ScsiController(msgspec.Struct, frozen=True, kw_only=True):
    """A virtio-scsi controller and the addresses in use on it."""

    bus: str
    path: PciPath | None
    used: frozenset[ScsiAddress]


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """All places that a VM offers, as it reports them or, before its start, as they will be.

    See Places for its values; it has only ports that can take a device.
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
    memory_bytes: int = 0
    address_bits: int | None = None

    @property
    def is_microvm(self) -> bool:
        """Whether the machine has only virtio-mmio transports, and those only for cold plug."""
        return self.machine == "microvm"


def lacks_addresses(windows: Iterable[int], address_bits: int, memory_bytes: int) -> int | None:
    """The bytes that a guest has for 64-bit windows, if all of these do not fit; else None.

    They lie above its memory, and above the first 4 GiB. Firmware has no message for those that do
    not fit: it makes some port's window the usual one.
    """
    room = (1 << address_bits) - memory_bytes - _BELOW_WINDOWS
    return room if sum(windows) > room else None


_BELOW_WINDOWS = 4 << 30


class GuestFunction(msgspec.Struct, frozen=True):
    """A function of a group: its BDF or UUID on the host, and its address in the guest.

    `pci_path` is None for a device that is not on PCI.
    """

    host: str
    pci_path: PciPath | None


class GuestAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the guest finds a device.

    A PCI device is at `pci_path`; a SCSI disk at `scsi_address` behind the controller at
    `pci_path`; a device of the channel subsystem at `ccw_devno`. An NVDIMM has the handle
    `nvdimm_handle` in the guest's /sys/bus/nd/devices/nmem*/nfit/handle, and is /dev/pmem<N> with
    `nvdimm_id` as N when it was plugged alone. The guest numbers several that come at once in any
    order; then the id is None. A shared directory is mounted by its `mount_tag`, a network device
    has its `mac_address`. `virt_path` is for the disks of a microvm, which have no other address.
    `functions` are all that came with an IOMMU group, `ap_queues` the queues of an adapter.
    Elsewhere the guest chooses names such as /dev/vda, and vmplug does not predict them.
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
