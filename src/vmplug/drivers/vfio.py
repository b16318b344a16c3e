"""IOMMU groups: choose the place of each function in the guest.

Functions of one slot of the host stay functions of one slot in the guest. A PCIe function goes to
a root or switch port, a conventional one behind a bridge; each where the port's windows fit its
BARs, and near its NUMA node if the VM has such ports.
Source: PCI Express Base specification, 7.5.1; QEMU docs/pcie.txt, docs/pci_expander_bridge.txt.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import groupby
from typing import Self

import msgspec
from msgspec.structs import replace

from vmplug.address import PciSlot
from vmplug.drivers.free_places import ccw_places, has_pci
from vmplug.drivers.options import Option, parse_options, switch, word
from vmplug.drivers.place import (
    FIRMWARE_WINDOWS,
    ApPlace,
    GroupPlace,
    PciPlace,
    Place,
    Places,
    PlugMode,
    Port,
    PortKind,
    Windows,
    lacks_addresses,
)
from vmplug.drivers.plug import VFIODevice, VFIODevices
from vmplug.drivers.ports import NewPlug
from vmplug.errors import CannotPlug, NoFreePort, SpecError
from vmplug.host.device import HostDevice
from vmplug.host.finding import Code, Finding
from vmplug.host.pci.function import LARGE_BAR_BYTES, PciFunction
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.mdev import MediatedDevice, VFIODeviceType


class VFIOMode(StrEnum):
    """The user in the guest: a container through VFIO, or the guest's own kernel.

    The words of Kata's config.go.
    """

    VFIO = "vfio"
    GUEST_KERNEL = "guest-kernel"


def _pci_id(said: str) -> int:
    """`0x10de` or `10de`."""
    digits = said.removeprefix("0x")
    if not (0 < len(digits) <= 4 and set(digits.lower()) <= set("0123456789abcdef")):
        raise ValueError("a PCI id of four hexadecimal digits, such as 0x10de")
    return int(digits, 16)


OPTIONS: Mapping[str, Option] = {
    "port": Option(
        "port", word(*PortKind), "root-port, switch-port or bridge-port; default: any that fits"
    ),
    "mode": Option("mode", word(*VFIOMode), "vfio or guest-kernel, for the agent; default: vfio"),
    "rom": Option(
        "rom", switch("on", "off"), "on if the guest should see the option ROM; default: off"
    ),
    "x-pci-vendor-id": Option(
        "vendor_id", _pci_id, "the ID that the guest reads instead of the real one"
    ),
    "x-pci-device-id": Option(
        "device_id", _pci_id, "the ID that the guest reads instead of the real one"
    ),
}


class VfioDriver(msgspec.Struct, frozen=True, kw_only=True):
    """Options of an IOMMU group, checked; `port` is None where any that fits will do."""

    port: PortKind | None = None
    mode: VFIOMode = VFIOMode.VFIO
    rom: bool = False
    vendor_id: int | None = None
    device_id: int | None = None

    @property
    def share_rw(self) -> bool:
        """Always false: a group belongs to one VM."""
        return False

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> Self:
        """The options by their names in `OPTIONS`; SpecError names the one that is wrong."""
        return cls(**parse_options(options, OPTIONS, "a VFIO device"))

    def check(self, device: HostDevice, *, read_only: bool) -> Iterator[Finding]:
        """See Driver; other reasons are among the host's findings."""
        if read_only:
            yield Finding(
                Code.CANNOT_BE_READ_ONLY,
                f"{device.host_path} is requested read-only, and VFIO always gives full access",
                "request it for reading and writing, or attach one of its disks instead",
            )

    def choose_place(self, device: HostDevice, offer: Places, taken: Collection[str]) -> Place:
        """See Driver."""
        assert isinstance(device, VfioGroup)
        if device.mediated and device.mediated.type is not VFIODeviceType.NORMAL:
            return self._place_mediated(device, device.mediated, offer, taken)
        clusters = _clusters(device.functions)
        chooser = _Chooser(device, offer, taken)
        if len(device.functions) > 1 and offer.viommu:
            return chooser.one_bridge(clusters)
        return chooser.each(clusters, self.port)

    def _place_mediated(
        self, group: VfioGroup, mediated: MediatedDevice, offer: Places, taken: Collection[str]
    ) -> Place:
        match mediated.type:
            case VFIODeviceType.AP:
                if not offer.ap:
                    raise _not_on(offer, "an adapter matrix (vfio-ap)")
                if "ap" in taken:
                    raise NoFreePort("the VM already has an adapter matrix, and supports only one")
                return ApPlace()
            case VFIODeviceType.CCW:
                for place in ccw_places(offer):
                    if str(place) not in taken:
                        return place
                raise _not_on(offer, "a channel device (vfio-ccw)")
            case _:
                alone = _Cluster(pcie=None, numa_node=None, needed=Windows(0, 0), functions=(0,))
                return _Chooser(group, offer, taken).each([alone], self.port)

    def _changes_what_is_seen(self) -> str | None:
        """The first option that makes the guest see another device than the real one."""
        said = {
            "rom": self.rom,
            "x-pci-vendor-id": self.vendor_id is not None,
            "x-pci-device-id": self.device_id is not None,
        }
        return next((option for option, is_said in said.items() if is_said), None)

    def plan(self, new: NewPlug, place: Place, offer: Places) -> VFIODevices:  # noqa: ARG002
        """See Driver."""
        group = new.device
        assert isinstance(group, VfioGroup)
        mediated = group.mediated
        is_renamed = self.vendor_id is not None or self.device_id is not None
        if is_renamed and len(group.functions) > 1:
            raise SpecError(
                "option x-pci-device-id",
                f"{group.host_path} has {len(group.functions)} functions, and all of them would "
                "show this ID",
            )
        if mediated and (option := self._changes_what_is_seen()):
            raise SpecError(
                f"option {option}",
                "does not apply to a mediated device: its driver decides what the guest sees",
            )
        devices = [_mediated(mediated)] if mediated else [_function(f) for f in group.functions]
        if offer.iommufd and group.cdev_nodes:
            nodes = dict(group.cdev_nodes)
            devices = [replace(device, cdev_node=nodes.get(device.name)) for device in devices]
        return VFIODevices(
            id=new.id,
            node=group.host_path,
            devices=tuple(devices),
            vendor_id=self.vendor_id,
            device_id=self.device_id,
            rom=self.rom,
            ap_queues=mediated.ap_queues if mediated else (),
        )


def _function(function: PciFunction) -> VFIODevice:
    return VFIODevice(
        name=str(function.bdf),
        type=VFIODeviceType.NORMAL,
        bdf=function.bdf,
        sysfs_path=function.sysfs_path,
    )


def _mediated(mediated: MediatedDevice) -> VFIODevice:
    return VFIODevice(name=mediated.uuid, type=mediated.type, sysfs_path=mediated.sysfs_path)


def _not_on(offer: Places, what: str) -> CannotPlug:
    return CannotPlug(
        "wrong-machine",
        f"the VM ({offer.machine}) does not support {what}",
        hint="start it with --machine s390-ccw-virtio, on an s390x host",
    )


class _Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """Functions that share a slot on the host; `functions` are the numbers they get in the guest.

    `pcie` is None where it is unknown, or for a mediated device.
    """

    pcie: bool | None
    numa_node: int | None
    needed: Windows
    functions: tuple[int, ...]


def _clusters(functions: Sequence[PciFunction]) -> list[_Cluster]:
    """The slots that a group needs, in the order of its functions."""
    slots = groupby(functions, key=lambda function: function.bdf.device)
    return [_cluster(list(sharing)) for _, sharing in slots]


def _cluster(functions: Sequence[PciFunction]) -> _Cluster:
    numbers = tuple(function.bdf.function for function in functions)
    return _Cluster(
        pcie=_is_pcie(functions),
        numa_node=functions[0].numa_node,
        needed=needed_windows(functions),
        # The guest ignores a slot without function 0; virtual functions have any number.
        functions=numbers if 0 in numbers else tuple(range(len(numbers))),
    )


def _is_pcie(functions: Sequence[PciFunction]) -> bool | None:
    """If a device has both kinds, as only an emulated one does, PCIe decides for all of it."""
    said = {function.pcie for function in functions}
    return True if True in said else None if None in said else False


def needed_windows(functions: Sequence[PciFunction]) -> Windows:
    """How large the windows of a port must be for the BARs of all these functions.

    A BAR is aligned to its own size, but SeaBIOS aligns a port's window to 4 GiB at most: beyond
    that part of the window may be below the first address that a BAR can have. Measured on QEMU
    7.2: 8 GiB fit into a window of 16 and not into one of 8.
    """
    bars = [bar for function in functions for bar in function.bars or () if bar.is_memory]
    is_prefetchable = [bar.is_64bit and bar.is_prefetchable for bar in bars]
    sizes = [bar.size_bytes for bar in bars]
    own = [size for size, is_pref in zip(sizes, is_prefetchable, strict=True) if is_pref]
    lost = max(0, max(own, default=0) - LARGE_BAR_BYTES)
    return Windows(sum(own) + lost, sum(sizes) - sum(own))


def check_address_space(group: VfioGroup, offer: Places) -> Iterator[Finding]:
    """Whether the guest has addresses for the windows of all ports, if the group needs one."""
    if needed_windows(group.functions).prefetchable <= FIRMWARE_WINDOWS.prefetchable:
        return
    windows = [port.windows.prefetchable for port in offer.ports]
    bits = offer.address_bits
    room = None if bits is None else lacks_addresses(windows, bits, offer.memory_bytes)
    if room is not None:
        yield Finding(
            Code.NO_ADDRESS_SPACE,
            f"the windows of the VM's ports need {sum(windows) >> 30} GiB of addresses, and its "
            f"guest has {room >> 30} GiB for them ({bits} bits): some port has none, and no "
            f"message says so, so BARs of {', '.join(group.members)} may get no address",
            "start the VM with fewer large windows (--room-for), or with more address bits: with "
            "KVM it has those of the host",
        )


def window_for(functions: Sequence[PciFunction]) -> int:
    """Bytes of prefetchable memory, a power of two, that a port for these functions needs.

    Source: QEMU hw/pci-bridge/gen_pcie_root_port.c, pref64-reserve.
    """
    needed = needed_windows(functions).prefetchable
    return 1 << (needed - 1).bit_length() if needed else 0


class _Chooser:
    """Finds a different place for each slot of one group."""

    def __init__(self, group: VfioGroup, offer: Places, taken: Collection[str]) -> None:
        self._what = f"{group.host_path} ({', '.join(group.members)})"
        self._offer = offer
        places = (place.rpartition("/") for place in taken)
        self._used = {f"{bus}/{slot.partition('.')[0]}" for bus, _, slot in places}

    def each(self, clusters: Sequence[_Cluster], port: PortKind | None) -> GroupPlace:
        """A place for each slot by itself."""
        places: list[PciPlace] = []
        for cluster in clusters:
            places += self._place(cluster, self._ports(cluster, port), port)
        return GroupPlace(places=tuple(places))

    def one_bridge(self, clusters: Sequence[_Cluster]) -> GroupPlace:
        """All slots behind one bridge, whose devices share an address space under a guest's IOMMU.

        Source: QEMU hw/pci/pci.c, pci_device_iommu_address_space; hw/vfio/common.c.
        """
        for bridge in self._bridges():
            try:
                places = [p for c in clusters for p in self._place(c, [bridge], None)]
            except NoFreePort:
                continue
            return GroupPlace(places=tuple(places))
        raise CannotPlug(
            "split-group",
            f"the VM has a vIOMMU, which would put the functions of {self._what} into several "
            "address spaces; VFIO keeps a group in one",
            hint="start the VM with a bridge for them (vmplug vm start --bridges 1), or without "
            "a vIOMMU",
        )

    def _bridges(self) -> list[Port]:
        return [port for port in self._offer.ports if port.kind is PortKind.BRIDGE_PORT]

    def _ports(self, cluster: _Cluster, kind: PortKind | None) -> list[Port]:
        """Ports that fit, the best first: near, and with no more room than is needed."""
        wants_bridge = cluster.pcie is False
        ports = [
            port
            for port in self._offer.ports
            if (
                port.kind is kind
                if kind
                else cluster.pcie is None or (port.kind is PortKind.BRIDGE_PORT) is wants_bridge
            )
        ]
        return sorted(ports, key=lambda port: self._distance(port, cluster))

    @staticmethod
    def _distance(port: Port, cluster: _Cluster) -> tuple[int, bool, int]:
        is_near = port.numa_node == cluster.numa_node
        is_far = port.numa_node is not None and not is_near
        is_bridge = port.kind is PortKind.BRIDGE_PORT
        return (0 if is_near else 2 if is_far else 1, is_bridge, port.windows.prefetchable)

    def _place(
        self, cluster: _Cluster, ports: Sequence[Port], kind: PortKind | None
    ) -> list[PciPlace]:
        too_small = None
        for port in ports:
            free = self._free_slot(port)
            if free is None:
                continue
            if self._offer.mode is PlugMode.HOT and not port.windows.hold(cluster.needed):
                too_small = port
                continue
            self._used.add(f"{port.bus}/{free}")
            slots = [PciSlot(free.slot, number) for number in cluster.functions]
            return [PciPlace(bus=port.bus, slot=s, path=port.path.child(s)) for s in slots]
        raise self._too_small(cluster) if too_small else self._none_free(cluster, kind)

    def _free_slot(self, port: Port) -> PciSlot | None:
        """A slot with no function taken."""
        slots = (slot for slot in port.free if f"{port.bus}/{slot}" not in self._used)
        return next(slots, None)

    def _too_small(self, cluster: _Cluster) -> NoFreePort:
        need = max(cluster.needed.prefetchable, cluster.needed.other)
        return NoFreePort(
            f"no free port of the VM has a window large enough for the BARs of {self._what}: "
            f"they need {need >> 20} MiB, and the guest could not assign them an address",
            hint="start the VM with a larger window (vmplug vm start --room-for BDF, or QEMU's "
            "pcie-root-port with pref64-reserve), or plug it before the VM starts (--bundle)"
            + ("; -o port=root-port avoids the bridge" if cluster.pcie is False else ""),
        )

    def _none_free(self, cluster: _Cluster, kind: PortKind | None) -> NoFreePort:
        if not has_pci(self._offer):
            return NoFreePort(
                f"the VM ({self._offer.machine}) has no PCIe ports, which {self._what} needs",
                hint="start a VM that has ports (vmplug vm start NAME --machine q35), or attach "
                "one of its disks instead",
            )
        wanted = kind or (PortKind.BRIDGE_PORT if cluster.pcie is False else PortKind.ROOT_PORT)
        how = "--bridges 1" if wanted is PortKind.BRIDGE_PORT else "--ports N"
        why = ": it is a conventional PCI device" if cluster.pcie is False and not kind else ""
        return NoFreePort(
            f"the VM ({self._offer.machine}) has no free {wanted} for {self._what}{why}",
            hint=f"detach something, or start the VM with one more (vmplug vm start {how})",
        )
