"""Ports and bridges of a running VM, each asked for what is needed of it.

Source: `qom-list` and `qom-get` on QEMU 7.2; a bus lists its devices as `child[N]` links.
"""

import re
from collections.abc import Collection, Mapping, Sequence

import msgspec

from vmplug.address import PERIPHERAL, PciPath, PciSlot
from vmplug.cached import cached_property
from vmplug.drivers.place import (
    FIRMWARE_WINDOWS,
    PortKind,
    Windows,
)
from vmplug.hypervisor.qemu.qom import is_occupant, qom_get, qom_list, steadily
from vmplug.hypervisor.qmp.monitor import Monitor

_PORTS = frozenset({"pcie-root-port", "ioh3420", "xio3130-downstream"})
"""They hold one device, in slot 0. On any other slot the guest never sees it."""


KINDS = {
    "pcie-root-port": PortKind.ROOT_PORT,
    "ioh3420": PortKind.ROOT_PORT,
    "xio3130-downstream": PortKind.SWITCH_PORT,
    "pci-bridge": PortKind.BRIDGE_PORT,
    "pcie-pci-bridge": PortKind.BRIDGE_PORT,
}


_EXPANDERS = frozenset({"pxb-pcie", "pxb"})


_UNSAID = (1 << 64) - 1
"""The value of a window that the firmware chooses."""


_BRIDGE_SLOTS = tuple(PciSlot(slot) for slot in range(1, 32))


_ROOT_BUS = re.compile(r"/machine/(unattached/)?[^/]+/(pcie|pci)\.0\Z")


_MAX_DEPTH = 10


_NUMA_UNASSIGNED = 128
"""Source: QEMU include/sysemu/numa.h, NUMA_NODE_UNASSIGNED."""


class _Expander(msgspec.Struct, frozen=True):
    number: int
    numa_node: int | None


class Types:
    """The names of the properties of devices, which all of one driver have."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._known: dict[str, frozenset[str]] = {}

    def properties(self, driver: str, qom_path: str) -> frozenset[str]:
        """The names that a device of that driver has; one of them is asked."""
        if driver not in self._known:
            entries = self._monitor.execute(qom_list(qom_path))
            self._known[driver] = frozenset(entry["name"] for entry in entries)
        return self._known[driver]


class PortOfQemu:
    """A port or bridge; see Topology."""

    def __init__(
        self, monitor: Monitor, name: str, driver: str, buses: "Buses", types: Types
    ) -> None:
        self._monitor = monitor
        self._qom_path = f"{PERIPHERAL}/{name}"
        self._driver = driver
        self._buses = buses
        self._types = types
        self.bus = name
        self.kind = KINDS[driver]

    @cached_property
    def is_usable(self) -> bool:
        """Whether a device can be hot-plugged behind it."""
        names = self._names
        if "hotplug" in names and not self._monitor.execute(qom_get(self._qom_path, "hotplug")):
            return False
        has_handler = any(entry["name"] == "hotplug-handler" for entry in self._on_bus)
        return has_handler and self.windows != _NONE and self._where is not None

    @cached_property
    def free(self) -> tuple[PciSlot, ...]:
        """See Port."""
        occupants = [entry["name"] for entry in self._on_bus if is_occupant(entry)]
        is_full = bool(occupants) and self._driver in _PORTS
        if is_full or not self.is_usable:
            return ()
        return (PciSlot(0),) if self._driver in _PORTS else steadily(self._read_slots)

    def _read_slots(self) -> tuple[PciSlot, ...]:
        bus = f"{self._qom_path}/{self.bus}"
        links = [e["name"] for e in self._monitor.execute(qom_list(bus)) if is_occupant(e)]
        used = {_slot_of(self._monitor, bus, link).slot for link in links}
        return tuple(slot for slot in _BRIDGE_SLOTS if slot.slot not in used)

    @cached_property
    def windows(self) -> Windows:
        """See Port; those that the port requests, or the firmware's."""
        names = self._names
        has_shpc = "shpc" not in names or self._monitor.execute(qom_get(self._qom_path, "shpc"))
        usual = FIRMWARE_WINDOWS if has_shpc else _NONE
        return _read_windows(self._monitor, self._qom_path, names, usual)

    @property
    def path(self) -> PciPath:
        """See Port."""
        assert self._where, "a usable port has a path"
        return self._where.path

    @property
    def numa_node(self) -> int | None:
        """See Port."""
        return self._where.numa_node if self._where else None

    @property
    def _names(self) -> frozenset[str]:
        return self._types.properties(self._driver, self._qom_path)

    @cached_property
    def _on_bus(self) -> Sequence[Mapping[str, str]]:
        asked = qom_list(f"{self._qom_path}/{self.bus}")
        entries: Sequence[Mapping[str, str]] = self._monitor.execute(asked)
        return entries

    @cached_property
    def _where(self) -> "_Where | None":
        return read_pci_path(self._monitor, self._qom_path, self._buses)


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


def read_pci_path(monitor: Monitor, qom_path: str, buses: "Buses") -> _Where | None:
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
        if expander := buses.find(bus.rpartition("/")[2]):
            return _Where(PciPath(tuple(slots), expander.number), expander.numa_node)
        qom_path = bus.rpartition("/")[0]
        if not qom_path.startswith(PERIPHERAL + "/"):
            return None
    return None


class Buses:
    """Root buses besides the machine's own, by the id of their pxb-pcie."""

    def __init__(self, monitor: Monitor, types: Mapping[str, str]) -> None:
        self._monitor = monitor
        self._types = types

    def find(self, name: str) -> "_Expander | None":
        """The expander that has the bus of that name; None for any other bus."""
        if self._types.get(name) not in _EXPANDERS:
            return None
        asked = [qom_get(f"{PERIPHERAL}/{name}", key) for key in ("bus_nr", "numa_node")]
        number, node = self._monitor.execute_all(asked)
        return _Expander(number, None if node >= _NUMA_UNASSIGNED else node)
