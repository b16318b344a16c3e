"""Read the places of a VM from QEMU's object tree.

The object tree is correct in every state of the VM. `query-pci` is not: it uses the bus numbers
that firmware assigns, so that before boot everything behind a port is missing.
Source: `qom-list` and `qom-get` on QEMU 7.2; a bus lists its devices as `child[N]` links.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from vmplug.address import PERIPHERAL, CcwDevNo, PciPath, PciSlot, ScsiAddress
from vmplug.drivers.place import (
    FIRMWARE_WINDOWS,
    CcwPlace,
    MemorySlot,
    Offer,
    PciPlace,
    PciPort,
    Place,
    PortKind,
    ScsiController,
    ScsiPlace,
    Windows,
)
from vmplug.drivers.ports import Command
from vmplug.errors import CommandError
from vmplug.hypervisor.qmp.monitor import Monitor

_PORTS = frozenset({"pcie-root-port", "ioh3420", "xio3130-downstream"})
"""They hold one device, in slot 0. On any other slot the guest never sees it."""
_KINDS = {
    "pcie-root-port": PortKind.ROOT_PORT,
    "ioh3420": PortKind.ROOT_PORT,
    "xio3130-downstream": PortKind.SWITCH_PORT,
    "pci-bridge": PortKind.BRIDGE_PORT,
    "pcie-pci-bridge": PortKind.BRIDGE_PORT,
}
_EXPANDERS = frozenset({"pxb-pcie", "pxb"})
_VIOMMUS = frozenset({"intel-iommu", "amd-iommu", "virtio-iommu-pci"})
_UNSAID = (1 << 64) - 1
"""The value of a window that the firmware chooses."""
_BRIDGE_SLOTS = tuple(PciSlot(slot) for slot in range(1, 32))
_ROOT_BUS = re.compile(r"/machine/(unattached/)?[^/]+/(pcie|pci)\.0\Z")
_MAX_DEPTH = 10
_SCSI_CONTROLLERS = frozenset({"virtio-scsi-pci", "virtio-scsi-ccw"})
_CSS_BRIDGE = "virtual-css-bridge"
_CSS_BUS = f"/machine/{_CSS_BRIDGE}/virtual-css"


_NUMA_UNASSIGNED = 128
"""Source: QEMU include/sysemu/numa.h, NUMA_NODE_UNASSIGNED."""


class _Expander(msgspec.Struct, frozen=True):
    number: int
    numa_node: int | None


Buses = Mapping[str, _Expander]
"""Root buses besides the machine's own, by the id of their pxb-pcie."""


def qom_list(path: str) -> Command:
    """The properties of an object."""
    return Command("qom-list", {"path": path})


def qom_get(path: str, name: str) -> Command:
    """One property of an object."""
    return Command("qom-get", {"path": path, "property": name})


def read_offer(monitor: Monitor, *, iommufd: bool) -> Offer:
    """All ports, bridges, SCSI controllers and memory slots, with their free places."""
    machine, memory, peripherals, others, properties, devices = monitor.execute_all(
        [
            qom_get("/machine", "type"),
            Command("query-memdev", {}),
            qom_list(PERIPHERAL),
            qom_list("/machine/peripheral-anon"),
            qom_list("/machine"),
            Command("query-memory-devices", {}),
        ]
    )
    cpus, sizes = monitor.execute_all(
        [Command("query-cpus-fast", {}), Command("query-memory-size-summary", {})]
    )
    types = dict(children(peripherals))
    kinds = {*types.values(), *dict(children(others)).values()}
    buses = _read_expanders(monitor, types)
    ports = [
        port
        for name, kind in types.items()
        if kind in _KINDS and (port := _read_port(monitor, name, kind, buses))
    ]
    controllers = [
        _read_controller(monitor, name, buses, has_pci_path=kind.endswith("-pci"))
        for name, kind in types.items()
        if kind in _SCSI_CONTROLLERS
    ]
    names = {entry["name"] for entry in properties}
    nvdimms = [device for device in devices if device["type"] == "nvdimm"]
    return Offer(
        machine=str(machine).removesuffix("-machine"),
        ports=tuple(sorted(ports, key=lambda port: str(port.path))),
        controllers=tuple(sorted(controllers, key=lambda controller: controller.bus)),
        shared_memory=_is_shared(memory, nvdimms),
        kvm=_has_kvm(monitor),
        cpus=len(cpus),
        ccw_used=_read_ccw(monitor) if _CSS_BRIDGE in names else None,
        nvdimm="nvdimm" in names and bool(monitor.execute(qom_get("/machine", "nvdimm"))),
        memory_slots=_read_memory_slots(monitor) if "memory" in names else 0,
        memory_slots_used=frozenset(
            device["data"]["slot"] for device in devices if "slot" in device["data"]
        ),
        nvdimms=len(nvdimms),
        viommu=bool(kinds & _VIOMMUS),
        iommufd=iommufd,
        ap="ap-bridge" in names,
        memory_bytes=sizes["base-memory"] + sizes.get("plugged-memory", 0),
        address_bits=_read_address_bits(monitor, cpus, ports),
    )


def _read_address_bits(
    monitor: Monitor, cpus: Sequence[Mapping[str, Any]], ports: Iterable[PciPort]
) -> int | None:
    """The guest's, if a port asks for a large window; None for a processor without the fact."""
    path = cpus[0].get("qom-path") if cpus else None
    if path is None or all(port.windows.prefetchable < _LARGE_WINDOW for port in ports):
        return None
    if "phys-bits" not in {entry["name"] for entry in monitor.execute(qom_list(path))}:
        return None
    return int(monitor.execute(qom_get(path, "phys-bits"))) or None


_LARGE_WINDOW = 1 << 30
"""Fewer than dozens of smaller ones fit into the addresses of every processor."""


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
    if not {"addr", "scsi-id"} & names:
        return None
    bus_path = str(monitor.execute(qom_get(path, "parent_bus")))
    bus, buses = bus_path.rpartition("/")[2], _read_expanders(monitor, peripherals)
    if "scsi-id" in names:
        numbers = monitor.execute_all([qom_get(path, "scsi-id"), qom_get(path, "lun")])
        controller = f"{PERIPHERAL}/{bus.removesuffix('.0')}"
        is_pci = peripherals.get(bus.removesuffix(".0"), "").endswith("-pci")
        above = _read_pci_path(monitor, controller, buses) if is_pci else None
        return ScsiPlace(
            bus=bus, address=ScsiAddress(*numbers), path=above.path if above else None
        )
    where = _read_pci_path(monitor, path, buses)
    slot = PciSlot.from_devfn(monitor.execute(qom_get(path, "addr")))
    return PciPlace(bus=bus, slot=slot, path=where.path) if where else None


def _is_shared(
    backends: Iterable[Mapping[str, Any]], nvdimms: Iterable[Mapping[str, Any]]
) -> bool:
    """Whether all of the guest's own memory is shared; the memory of NVDIMMs does not count."""
    others = {device["data"].get("memdev", "").rpartition("/")[2] for device in nvdimms}
    own = [backend["share"] for backend in backends if backend.get("id") not in others]
    return bool(own) and all(own)


def _read_memory_slots(monitor: Monitor) -> int:
    return int(monitor.execute(qom_get("/machine", "memory")).get("slots", 0))


def _read_port(monitor: Monitor, name: str, kind: str, buses: Buses) -> PciPort | None:
    """The port, or None when nothing can be hot-plugged behind it."""
    qom_path = f"{PERIPHERAL}/{name}"
    properties, bus = monitor.execute_all([qom_list(qom_path), qom_list(f"{qom_path}/{name}")])
    names = {entry["name"] for entry in properties}
    if "hotplug" in names and not monitor.execute(qom_get(qom_path, "hotplug")):
        return None
    has_shpc = "shpc" not in names or monitor.execute(qom_get(qom_path, "shpc"))
    windows = _read_windows(monitor, qom_path, names, FIRMWARE_WINDOWS if has_shpc else _NONE)
    if windows == _NONE:
        return None
    place = _read_pci_path(monitor, qom_path, buses)
    if place is None or "hotplug-handler" not in {entry["name"] for entry in bus}:
        return None
    occupants = [entry["name"] for entry in bus if _is_occupant(entry)]
    free: tuple[PciSlot, ...]
    if kind in _PORTS:
        free = () if occupants else (PciSlot(0),)
    else:
        used = {_slot_of(monitor, f"{qom_path}/{name}", link).slot for link in occupants}
        free = tuple(slot for slot in _BRIDGE_SLOTS if slot.slot not in used)
    return PciPort(
        bus=name,
        path=place.path,
        free=free,
        kind=_KINDS[kind],
        windows=windows,
        numa_node=place.numa_node,
    )


_NONE = Windows(0, 0)


def _read_windows(
    monitor: Monitor, qom_path: str, names: Collection[str], usual: Windows
) -> Windows:
    """The windows that the port requests from the firmware; most request none and get the default.

    A bridge with shpc=off gets none unless it requests one: the guest could not map later devices.
    A request is rounded up to the default of other ports. Measured on QEMU 7.2.
    """
    if "pref64-reserve" not in names:
        return usual
    prefetchable, other = monitor.execute_all(
        [qom_get(qom_path, "pref64-reserve"), qom_get(qom_path, "mem-reserve")]
    )
    return Windows(
        _granted(prefetchable, usual.prefetchable, FIRMWARE_WINDOWS.prefetchable),
        _granted(other, usual.other, FIRMWARE_WINDOWS.other),
    )


def _granted(said: int, usual: int, least: int) -> int:
    return usual if said in {_UNSAID, 0} else max(said, least)


def _slot_of(monitor: Monitor, bus_path: str, link: str) -> PciSlot:
    occupant = monitor.execute(qom_get(bus_path, link))
    return PciSlot.from_devfn(monitor.execute(qom_get(occupant, "addr")))


class _Where(msgspec.Struct, frozen=True):
    path: PciPath
    numa_node: int | None


def _read_pci_path(monitor: Monitor, qom_path: str, buses: Buses) -> _Where | None:
    """Slots from a root bus down: the machine's own, or that of an expander, which has a number.

    None for any other bus.
    """
    slots: list[PciSlot] = []
    for _ in range(_MAX_DEPTH):
        devfn, bus = monitor.execute_all(
            [qom_get(qom_path, "addr"), qom_get(qom_path, "parent_bus")]
        )
        slots.insert(0, PciSlot.from_devfn(devfn))
        if _ROOT_BUS.match(bus):
            return _Where(PciPath(tuple(slots)), None)
        if expander := buses.get(bus.rpartition("/")[2]):
            return _Where(PciPath(tuple(slots), expander.number), expander.numa_node)
        qom_path = bus.rpartition("/")[0]
        if not qom_path.startswith(PERIPHERAL + "/"):
            return None
    return None


def _read_expanders(monitor: Monitor, types: Mapping[str, str]) -> Buses:
    expanders = {}
    for name in (name for name, kind in types.items() if kind in _EXPANDERS):
        path = f"{PERIPHERAL}/{name}"
        number, node = monitor.execute_all([qom_get(path, "bus_nr"), qom_get(path, "numa_node")])
        expanders[name] = _Expander(number, None if node >= _NUMA_UNASSIGNED else node)
    return expanders


def _read_ccw(monitor: Monitor) -> frozenset[CcwDevNo]:
    """The device numbers in use, of cold devices without an id too."""
    links = [e["name"] for e in monitor.execute(qom_list(_CSS_BUS)) if _is_occupant(e)]
    paths = monitor.execute_all([qom_get(_CSS_BUS, link) for link in links])
    numbers = monitor.execute_all([qom_get(path, "dev_id") for path in paths])
    return frozenset(CcwDevNo.parse(number) for number in numbers)


def _read_controller(
    monitor: Monitor, name: str, buses: Buses, *, has_pci_path: bool
) -> ScsiController:
    qom_path = f"{PERIPHERAL}/{name}"
    bus = f"{name}.0"
    bus_path = f"{qom_path}/virtio-backend/{bus}"
    used = set()
    for entry in monitor.execute(qom_list(bus_path)):
        if _is_occupant(entry):
            disk = monitor.execute(qom_get(bus_path, entry["name"]))
            scsi_id, lun = monitor.execute_all([qom_get(disk, "scsi-id"), qom_get(disk, "lun")])
            if scsi_id <= 0xFF and lun <= 0xFF:
                used.add(ScsiAddress(scsi_id, lun))
    place = _read_pci_path(monitor, qom_path, buses) if has_pci_path else None
    return ScsiController(bus=bus, path=place.path if place else None, used=frozenset(used))


def children(entries: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """The names and types of the children among the entries of `qom-list`."""
    for entry in entries:
        if entry["type"].startswith("child<"):
            yield entry["name"], entry["type"][len("child<") : -1]


def _is_occupant(entry: Mapping[str, Any]) -> bool:
    return str(entry["name"]).startswith("child[") and str(entry["type"]).startswith("link<")
