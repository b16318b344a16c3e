"""The free places of a VM for a device, lowest first, or the reason why there are none."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import chain

from vmplug.address import CcwDevNo, PciSlot, ScsiAddress
from vmplug.drivers.place import (
    FIRMWARE_WINDOWS,
    CcwPlace,
    MemorySlot,
    MmioPlace,
    PciPlace,
    Place,
    Places,
    PlugMode,
    Port,
    PortKind,
    ScsiPlace,
)
from vmplug.errors import CannotPlug, NoFreePort


def pci_places(offer: Places, taken: Collection[str] = ()) -> Iterator[PciPlace]:
    """Free slots of ports and bridges; those with the large windows last.

    A running VM is asked port by port, and not about one whose only slot is `taken`.
    """
    large = list[Port]()
    for port in offer.ports:
        if port.kind is not PortKind.BRIDGE_PORT and f"{port.bus}/{_ONLY_SLOT}" in taken:
            continue
        if port.free and port.windows.prefetchable > FIRMWARE_WINDOWS.prefetchable:
            large.append(port)
        else:
            yield from _slots(port)
    for port in sorted(large, key=lambda port: port.windows.prefetchable):
        yield from _slots(port)


_ONLY_SLOT = PciSlot(0)


def _slots(port: Port) -> Iterator[PciPlace]:
    for slot in port.free:
        yield PciPlace(bus=port.bus, slot=slot, path=port.path.child(slot))


class Taken(set[str]):
    """The places, as text, that one plan may not give to a device. They only become more.

    `full_to` says for each SCSI bus, and for leases, how many of the first places are not free:
    the search for the next one goes on there.
    """

    def __init__(self, places: Iterable[str] = ()) -> None:
        super().__init__(places)
        self.full_to = Counter[str]()


def scsi_places(offer: Places, taken: Collection[str] = ()) -> Iterator[ScsiPlace]:
    """Free addresses of virtio-scsi controllers. Many may be `taken`: they cost no object."""
    full_to = taken.full_to if isinstance(taken, Taken) else Counter[str]()
    for controller in offer.controllers:
        bus = controller.bus
        for index in range(full_to[bus], 1 << 16):
            is_taken = _scsi_text(bus, index) in taken
            if not is_taken and (a := ScsiAddress.from_index(index)) not in controller.used:
                yield ScsiPlace(bus=bus, address=a, path=controller.path)
            elif index == full_to[bus]:
                full_to[bus] += 1


def _scsi_text(bus: str, index: int) -> str:
    """The text of a ScsiPlace at `ScsiAddress.from_index(index)`."""
    return f"{bus}/{index >> 8}:{index & 0xFF}"


def ccw_places(offer: Places) -> Iterator[CcwPlace]:
    """Free numbers of the channel subsystem, in its first set; 0 is reserved for the machine."""
    if offer.ccw_used is not None:
        for number in range(1, 1 << 16):
            devno = CcwDevNo(0, number)
            if devno not in offer.ccw_used:
                yield CcwPlace(devno=devno)


def mmio_places(offer: Places) -> Iterator[MmioPlace]:
    """Free virtio-mmio transports, for disks: the guest names those in this order."""
    yield from offer.mmio


def _mmio_places_for_others(offer: Places) -> Iterator[MmioPlace]:
    yield from reversed(offer.mmio)


def virtio_place(
    offer: Places, taken: Collection[str], what: str, *, is_disk: bool = False
) -> Place:
    """The first free place for a virtio device, named `what` in errors.

    Raises NoFreePort, and CannotPlug when no device can be plugged while the VM runs.
    """
    if offer.is_microvm and offer.mode is PlugMode.HOT:
        raise cold_plug_only(what)
    transports = mmio_places if is_disk else _mmio_places_for_others
    ports, others = pci_places(offer, taken), (ccw_places(offer), transports(offer))
    for place in chain[Place](ports, *others):
        if str(place) not in taken:
            return place
    raise NoFreePort(
        f"the VM ({offer.machine}) has no free PCI port for {what}", hint=more_places(offer)
    )


def has_pci(offer: Places) -> bool:
    """Whether vmplug can start such a machine with PCIe ports, or this one has some."""
    return bool(offer.ports) or not (offer.is_microvm or offer.ccw_used is not None)


def more_places(offer: Places) -> str:
    """What to do when all places of a VM are taken."""
    if has_pci(offer):
        return "detach something, or start it with more ports (vmplug vm start --ports N)"
    return "detach something, or start another VM: this machine cannot have more places"


def memory_slot(offer: Places, taken: Collection[str]) -> MemorySlot:
    """The lowest free memory slot, for an NVDIMM.

    The guest numbers NVDIMMs in the order of plugging; none is ever unplugged.
    """
    if not (offer.nvdimm and offer.memory_slots):
        raise CannotPlug(
            "no-nvdimm",
            f"the VM ({offer.machine}) does not support NVDIMMs",
            hint="attach it as a disk (leave block-driver out)"
            if offer.is_microvm or offer.ccw_used is not None
            else "start QEMU with -machine nvdimm=on and -m SIZE,slots=N,maxmem=MAX, as vmplug "
            "vm start does; or set block-driver=virtio-blk",
        )
    given = [slot for slot in range(offer.memory_slots) if f"memory/{slot}" in taken]
    ahead = len([slot for slot in given if slot not in offer.memory_slots_used])
    for slot in range(offer.memory_slots):
        if slot not in offer.memory_slots_used and slot not in given:
            return MemorySlot(slot=slot, index=offer.nvdimms + ahead)
    raise NoFreePort(
        f"all {offer.memory_slots} memory slots of the VM are in use",
        hint="start it with more (vmplug vm start --memory-slots N): QEMU cannot unplug an NVDIMM",
    )


def check_shared_memory(offer: Places, what: str) -> None:
    """CannotPlug unless a vhost-user backend can map the guest's memory.

    Without it QEMU plugs the device all the same, and all its I/O hangs.
    """
    if not offer.shared_memory:
        raise CannotPlug(
            "memory-not-shared",
            f"the VM's memory is not shared with other processes, and {what} needs that",
            hint="start QEMU with -object memory-backend-memfd,id=mem,share=on,size=SIZE and "
            "-machine memory-backend=mem, as vmplug vm start does; memory-backend-ram is shared "
            "with none before QEMU 10.0",
        )


_REGIONS_MAX, _RAM_REGIONS = 8, 2
"""The regions that a backend without CONFIGURE_MEM_SLOTS can map, and those of the guest's RAM.

Source: QEMU hw/virtio/vhost-user.c, VHOST_MEMORY_BASELINE_NREGIONS; hw/i386/pc.c.
"""


def check_memory_regions(offer: Places, taken: Collection[str], what: str) -> None:
    """CannotPlug when the guest's memory has more regions than the backend maps.

    QEMU 7.2 would try without end to plug a network all the same, and do nothing else. Measured.
    """
    given = {slot for slot in range(offer.memory_slots) if f"memory/{slot}" in taken}
    pieces = len(offer.memory_slots_used | given) + _RAM_REGIONS
    if pieces > _REGIONS_MAX:
        raise CannotPlug(
            "too-many-memory-regions",
            f"the VM's memory has {pieces} regions with its NVDIMMs; the backend of {what} maps "
            f"at most {_REGIONS_MAX}",
            hint="plug it before the NVDIMMs, or use a backend with CONFIGURE_MEM_SLOTS",
        )


def cold_plug_only(what: str) -> CannotPlug:
    """The error for a device that QEMU accepts only at its start."""
    return CannotPlug(
        "cold-plug-only",
        f"{what} can only be plugged before the VM starts",
        hint="request it when you start the VM: vmplug vm start NAME --bundle BUNDLE",
    )
