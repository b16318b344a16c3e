"""Read the places of a VM from QEMU's object tree.

The object tree is correct in every state of the VM. `query-pci` is not: it uses the bus numbers
that firmware assigns, so that before boot everything behind a port is missing.
Source: `qom-list` and `qom-get` on QEMU 7.2; a bus lists its devices as `child[N]` links.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from vmplug.address import PERIPHERAL, CcwDevNo, PciPath, PciSlot, ScsiAddress
from vmplug.cached import cached_property
from vmplug.drivers.place import (
    CcwPlace,
    MemorySlot,
    MmioPlace,
    Offer,
    PciPlace,
    PciPort,
    Place,
    PlugMode,
    PortKind,
    ScsiController,
    ScsiPlace,
)
from vmplug.drivers.ports import Command
from vmplug.errors import CommandError
from vmplug.hypervisor.qemu.abilities import Abilities
from vmplug.hypervisor.qemu.pci_port import KINDS, Buses, PortOfQemu, Types, read_pci_path
from vmplug.hypervisor.qemu.qom import children, is_occupant, qom_get, qom_list, steadily
from vmplug.hypervisor.qmp.monitor import Monitor

_VIOMMUS = frozenset({"intel-iommu", "amd-iommu", "virtio-iommu-pci"})


_SCSI_CONTROLLERS = frozenset({"virtio-scsi-pci", "virtio-scsi-ccw"})


_SCSI_DISK = "scsi-"


_MMIO_BUS = "virtio-mmio-bus."


ANONYMOUS = "/machine/peripheral-anon"
"""Where devices without an id are."""


_CSS_BRIDGE = "virtual-css-bridge"


_CSS_BUS = f"/machine/{_CSS_BRIDGE}/virtual-css"


class Topology:
    """The places of a running VM, each asked for when it is first used, and kept.

    `find_known` gives the places that the caller knows, by the names of devices in QEMU: a SCSI
    disk with one is not asked for its address, and its address is not among those in use.
    """

    def __init__(
        self,
        monitor: Monitor,
        abilities: Abilities,
        find_known: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        self.monitor = monitor
        self._abilities = abilities
        self._find_known = find_known

    mode = PlugMode.HOT
    mmio: tuple[MmioPlace, ...] = ()

    @cached_property
    def machine(self) -> str:
        """See Places."""
        return str(self._ask(qom_get("/machine", "type"))).removesuffix("-machine")

    @property
    def is_microvm(self) -> bool:
        """See Places."""
        return self.machine == "microvm"

    @cached_property
    def ports(self) -> Sequence["PortOfQemu"]:
        """Root ports first, and rp2 before rp10; also those that cannot take a device."""
        buses = Buses(self.monitor, self._types)
        types = Types(self.monitor)
        ports = [
            PortOfQemu(self.monitor, name, driver, buses, types)
            for name, driver in self._types.items()
            if driver in KINDS
        ]
        return sorted(ports, key=lambda port: (_ORDER.index(port.kind), _natural(port.bus)))

    @cached_property
    def controllers(self) -> Sequence["_Controller"]:
        """See Places."""
        buses = Buses(self.monitor, self._types)
        found = [
            _Controller(self, name, driver, buses)
            for name, driver in self._types.items()
            if driver in _SCSI_CONTROLLERS
        ]
        return sorted(found, key=lambda controller: controller.bus)

    def count_known(self, bus: str) -> int:
        """How many addresses on that SCSI bus the caller knows devices of the VM at.

        One that QEMU cannot have given out does not count: somebody has edited the journal.
        """
        known, prefix = (self._find_known(name) or "" for name in self._types), f"{bus}/"
        texts = {text.removeprefix(prefix) for text in known if text.startswith(prefix)}
        return sum(map(_is_scsi_address, texts))

    def strange_disks(self) -> list[str]:
        """The paths of SCSI disks without a known place."""
        named = [name for name, driver in self._types.items() if driver.startswith(_SCSI_DISK)]
        strange = [f"{PERIPHERAL}/{name}" for name in named if not self._find_known(name)]
        other = [name for name, driver in self._anonymous.items() if driver.startswith(_SCSI_DISK)]
        return strange + [f"{ANONYMOUS}/{name}" for name in other]

    @cached_property
    def _types(self) -> Mapping[str, str]:
        return dict(children(self._ask(qom_list(PERIPHERAL))))

    @cached_property
    def _anonymous(self) -> Mapping[str, str]:
        return dict(children(self._ask(qom_list(ANONYMOUS))))

    @cached_property
    def _parts(self) -> frozenset[str]:
        return frozenset(entry["name"] for entry in self._ask(qom_list("/machine")))

    @cached_property
    def _memory_devices(self) -> Sequence[Mapping[str, Any]]:
        devices: Sequence[Mapping[str, Any]] = self._ask(Command("query-memory-devices", {}))
        return devices

    @cached_property
    def _nvdimms(self) -> Sequence[Mapping[str, Any]]:
        return [device for device in self._memory_devices if device["type"] == "nvdimm"]

    @cached_property
    def _cpus(self) -> Sequence[Mapping[str, Any]]:
        cpus: Sequence[Mapping[str, Any]] = self._ask(Command("query-cpus-fast", {}))
        return cpus

    @cached_property
    def shared_memory(self) -> bool:
        """See Places. The memory of NVDIMMs does not count."""
        nvdimms = {device["data"].get("memdev", "").rpartition("/")[2] for device in self._nvdimms}
        backends = self._ask(Command("query-memdev", {}))
        own = [backend for backend in backends if backend.get("id") not in nvdimms]
        if not own or not all(backend["share"] for backend in own):
            return False
        return not self._nameless_memory & {backend.get("id") for backend in own}

    @property
    def _nameless_memory(self) -> AbstractSet[str]:
        """Backends that no other process can map, whatever their `share` says.

        The memory of memory-backend-ram has a file since QEMU 10.0, where it is shared; the
        machine got a property with that. Source: QEMU system/physmem.c, hw/core/machine.c.
        """
        if _RAM_HAS_FILE in self._parts:
            return frozenset()
        kinds = children(self._ask(qom_list("/objects")))
        return {name for name, kind in kinds if kind == "memory-backend-ram"}

    @cached_property
    def kvm(self) -> bool:
        """See Places."""
        return _has_kvm(self.monitor)

    @cached_property
    def cpus(self) -> int:
        """See Places."""
        return len(self._cpus)

    @cached_property
    def ccw_used(self) -> frozenset[CcwDevNo] | None:
        """See Places."""
        return steadily(self._read_ccw) if _CSS_BRIDGE in self._parts else None

    @cached_property
    def nvdimm(self) -> bool:
        """See Places."""
        return "nvdimm" in self._parts and bool(self._ask(qom_get("/machine", "nvdimm")))

    @cached_property
    def memory_slots(self) -> int:
        """See Places."""
        if "memory" not in self._parts:
            return 0
        return int(self._ask(qom_get("/machine", "memory")).get("slots", 0))

    @cached_property
    def memory_slots_used(self) -> frozenset[int]:
        """See Places."""
        devices = self._memory_devices
        return frozenset(d["data"]["slot"] for d in devices if "slot" in d["data"])

    @property
    def nvdimms(self) -> int:
        """See Places."""
        return len(self._nvdimms)

    @cached_property
    def viommu(self) -> bool:
        """See Places."""
        return bool({*self._types.values(), *self._anonymous.values()} & _VIOMMUS)

    @property
    def iommufd(self) -> bool:
        """See Places."""
        return self._abilities.iommufd

    @property
    def ap(self) -> bool:
        """See Places."""
        return "ap-bridge" in self._parts

    @cached_property
    def memory_bytes(self) -> int:
        """See Places."""
        sizes = self._ask(Command("query-memory-size-summary", {}))
        return int(sizes["base-memory"] + sizes.get("plugged-memory", 0))

    @cached_property
    def address_bits(self) -> int | None:
        """See Places: None also for a processor without the fact."""
        path = self._cpus[0].get("qom-path") if self._cpus else None
        if path is None or all(p.windows.prefetchable < _LARGE_WINDOW for p in self.ports):
            return None
        if "phys-bits" not in {entry["name"] for entry in self._ask(qom_list(path))}:
            return None
        return int(self._ask(qom_get(path, "phys-bits"))) or None

    def _ask(self, command: Command) -> Any:
        return self.monitor.execute(command)

    def _read_ccw(self) -> frozenset[CcwDevNo]:
        return _read_ccw(self.monitor)


_RAM_HAS_FILE = "aux-ram-share"
_LARGE_WINDOW = 1 << 30
"""Fewer than dozens of smaller ones fit into the addresses of every processor."""


_ORDER = (PortKind.ROOT_PORT, PortKind.SWITCH_PORT, PortKind.BRIDGE_PORT)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(word or 0), text) for text, word in re.findall(r"([^0-9]*)([0-9]*)", name)]


def read_offer(topology: Topology) -> Offer:
    """All of it now: the ports and controllers of the VM with their free places, by their paths.

    A device that is listed may be gone before it is asked for its place: then CommandError.
    """
    ports = (
        PciPort(
            bus=port.bus,
            path=port.path,
            free=port.free,
            kind=port.kind,
            windows=port.windows,
            numa_node=port.numa_node,
        )
        for port in topology.ports
        if port.is_usable
    )
    return Offer(
        machine=topology.machine,
        ports=tuple(sorted(ports, key=lambda port: str(port.path))),
        controllers=tuple(
            ScsiController(bus=c.bus, path=c.path, used=c.used) for c in topology.controllers
        ),
        shared_memory=topology.shared_memory,
        kvm=topology.kvm,
        cpus=topology.cpus,
        ccw_used=topology.ccw_used,
        nvdimm=topology.nvdimm,
        memory_slots=topology.memory_slots,
        memory_slots_used=topology.memory_slots_used,
        nvdimms=topology.nvdimms,
        viommu=topology.viommu,
        iommufd=topology.iommufd,
        ap=topology.ap,
        memory_bytes=topology.memory_bytes,
        address_bits=topology.address_bits,
    )


def _has_kvm(monitor: Monitor) -> bool:
    """Whether KVM runs the guest. QEMU 11 deprecates query-kvm; QEMU 10 has only that."""
    try:
        return bool(monitor.execute(Command("query-kvm", {}))["enabled"])
    except CommandError as error:
        if error.error_class != "CommandNotFound":
            raise
    return bool(monitor.execute(Command("query-accelerators", {}))["enabled"] == "kvm")


def read_place(monitor: Monitor, name: str) -> Place | None:
    """The place of the device with that name; None if absent, or on another kind of bus."""
    peripherals = dict(children(monitor.execute(qom_list(PERIPHERAL))))
    if name not in peripherals:
        return None
    path = f"{PERIPHERAL}/{name}"
    names = {entry["name"] for entry in monitor.execute(qom_list(path))}
    if "memdev" in names:
        return MemorySlot(slot=monitor.execute(qom_get(path, "slot")), index=0)
    if "dev_id" in names:
        return CcwPlace(devno=CcwDevNo.parse(monitor.execute(qom_get(path, "dev_id"))))
    bus_path = str(monitor.execute(qom_get(path, "parent_bus")))
    bus, buses = bus_path.rpartition("/")[2], Buses(monitor, peripherals)
    if not {"addr", "scsi-id"} & names:
        return _transport(bus)
    if "scsi-id" in names:
        numbers = monitor.execute_all([qom_get(path, "scsi-id"), qom_get(path, "lun")])
        controller = f"{PERIPHERAL}/{bus.removesuffix('.0')}"
        is_pci = peripherals.get(bus.removesuffix(".0"), "").endswith("-pci")
        above = read_pci_path(monitor, controller, buses) if is_pci else None
        return ScsiPlace(
            bus=bus, address=ScsiAddress(*numbers), path=above.path if above else None
        )
    where = read_pci_path(monitor, path, buses)
    slot = PciSlot.from_devfn(monitor.execute(qom_get(path, "addr")))
    return PciPlace(bus=bus, slot=slot, path=where.path) if where else None


def _transport(bus: str) -> MmioPlace | None:
    number = bus.removeprefix(_MMIO_BUS)
    return MmioPlace(bus=bus, index=int(number)) if number != bus else None


def _read_ccw(monitor: Monitor) -> frozenset[CcwDevNo]:
    """The device numbers in use, of cold devices without an id too."""
    links = [e["name"] for e in monitor.execute(qom_list(_CSS_BUS)) if is_occupant(e)]
    paths = monitor.execute_all([qom_get(_CSS_BUS, link) for link in links])
    numbers = monitor.execute_all([qom_get(path, "dev_id") for path in paths])
    return frozenset(CcwDevNo.parse(number) for number in numbers)


def _is_scsi_address(text: str) -> bool:
    try:
        return str(ScsiAddress.parse(text)) == text
    except ValueError:
        return False


class _Controller:
    """A virtio-scsi controller; `topology` has the disks that may be on it."""

    def __init__(self, topology: Topology, name: str, driver: str, buses: Buses) -> None:
        self._topology = topology
        self._monitor = topology.monitor
        self._qom_path = f"{PERIPHERAL}/{name}"
        self._has_pci_path = driver.endswith("-pci")
        self._buses = buses
        self.bus = f"{name}.0"

    @cached_property
    def path(self) -> PciPath | None:
        """See Controller."""
        if not self._has_pci_path:
            return None
        where = read_pci_path(self._monitor, self._qom_path, self._buses)
        return where.path if where else None

    @cached_property
    def used(self) -> frozenset[ScsiAddress]:
        """See Controller. A disk is asked for its address only if the caller may not know it."""
        return steadily(self._read_used)

    def _read_used(self) -> frozenset[ScsiAddress]:
        bus_path = f"{self._qom_path}/virtio-backend/{self.bus}"
        listed = self._monitor.execute(qom_list(bus_path))
        links = [entry["name"] for entry in listed if is_occupant(entry)]
        known = self._topology.count_known(self.bus)
        if len(links) == known:
            return frozenset()
        disks = [path for path in self._topology.strange_disks() if self._has(path)]
        if known + len(disks) != len(links):  # such as those of -drive if=scsi
            disks = self._monitor.execute_all([qom_get(bus_path, link) for link in links])
        return frozenset(filter(None, map(self._address_of, disks)))

    def _has(self, disk: str) -> bool:
        above = str(self._monitor.execute(qom_get(disk, "parent_bus")))
        return above.rpartition("/")[2] == self.bus

    def _address_of(self, disk: str) -> ScsiAddress | None:
        """None for one that vmplug does not use."""
        asked = [qom_get(disk, "scsi-id"), qom_get(disk, "lun")]
        scsi_id, lun = self._monitor.execute_all(asked)
        return ScsiAddress(scsi_id, lun) if scsi_id <= 0xFF and lun <= 0xFF else None
