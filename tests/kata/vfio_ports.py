"""Ports, switches, bridges and expanders: those that vmplug makes, and those that it finds."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from msgspec.structs import replace

from tests.kata.machine import Machine, add_behind, memory_monitor
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Refusal,
    attempt,
)
from tests.kata.vfio_tree import named
from tests.kata.vfio_vm import argv_monitor, machine_on
from tests.support.pci_tree import PciTree
from vmplug.address import PciSlot
from vmplug.drivers.place import Offer
from vmplug.hypervisor.fake.monitor import FakeMonitor
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.start import machine as machines
from vmplug.hypervisor.qemu.start.machine import VmSpec

_FUNCTION = "0000:41:00.0"
_PORTS = {"pcie-root-port", "x3130-upstream", "xio3130-downstream", "pxb-pcie"}
_BRIDGES = {"pci-bridge", "pcie-pci-bridge"}

Devices = list[dict[str, str]]


def _devices(arguments: Sequence[str], drivers: Iterable[str]) -> Devices:
    """What of these a command line makes, with everything that it says of each."""
    found = []
    for option, text in pairwise(arguments):
        if option == "-device" and not text.startswith("{"):
            driver, *words = text.split(",")
            facts = dict(word.split("=", 1) for word in words)
            found += [{"driver": driver, **facts}] if driver in drivers else []
    return found


def _made(spec: VmSpec, drivers: Iterable[str]) -> Devices:
    return _devices(machines.command_line(spec, 3, 4), drivers)


def _spec(machine: str, **more: Any) -> VmSpec | Refusal:
    """A VM to start; of the machines that vmplug does not know there is none."""
    return attempt(lambda: VmSpec(name="vm", machine=machines.Machine(machine), **more))


def _offer(arguments: Sequence[str]) -> Offer:
    """What a VM with that command line has to plug into."""
    made = _devices(arguments, _PORTS | _BRIDGES)
    return Qemu(argv_monitor(made)).offer()


def _kinds(arguments: Sequence[str]) -> list[str]:
    return [f"{port.bus}: {port.kind}" for port in _offer(arguments).ports if port.free]


# the words for ports


def _vm_of_all_kinds() -> FakeMonitor:
    """A VM with a port of each kind, by Kata's names."""
    monitor = memory_monitor(ports=1, scsi=False)
    add_behind(monitor, None, "pci-bridge-0", "pci-bridge", 0x10)
    add_behind(monitor, None, "swrp0", "pcie-root-port", 0x18)
    add_behind(monitor, "swrp0", "swup0", "x3130-upstream", 0)
    add_behind(monitor, "swup0", "swdp0", "xio3130-downstream", 0)
    return monitor


def _bus(machine: Machine, **options: str) -> str | Refusal:
    """The name of the port or bridge on which a function is then, without its number."""
    answer = machine.try_attach(named(_FUNCTION, **options))
    if isinstance(answer, Refusal):
        return answer
    (record,) = machine.records()
    assert record.place
    return record.place.partition("/")[0].rstrip("0123456789")


def _word(case: Case) -> Answer:
    """A kind of port, as the option of a request."""
    tree = PciTree(case.path).pci_function(_FUNCTION, group=12, driver="vfio-pci")
    bus = _bus(machine_on(case, tree, _vm_of_all_kinds()), port=case.input["port"])
    ours: dict[str, Any] = {"valid": not isinstance(bus, Refusal), "bus_prefix": bus}
    katas = {"valid": case.expected["valid"], "bus_prefix": case.expected["bus_prefix"]}
    if not katas["valid"]:
        katas["bus_prefix"] = "SpecError"
        assert case.expected["string"].startswith("<unknown PCIePort")
    else:
        assert case.expected["string"] == case.input["port"]
    assert case.expected["invalid"] == (not katas["valid"])
    assert case.expected["has_prefix"] == bool(case.expected["bus_prefix"])
    return Answer(ours, katas)


def _prefix(case: Case) -> Answer:
    """A port of any name is as good as another; where there is no port, there is no name."""
    tree = PciTree(case.path).pci_function(_FUNCTION, group=12, driver="vfio-pci")
    monitor = memory_monitor(ports=0, scsi=False)
    if prefix := case.input["prefix"]:
        add_behind(monitor, None, f"{prefix}0", "pcie-root-port", 0x10)
    return Answer(_bus(machine_on(case, tree, monitor)), case.expected["result"])


# what is made


def _one(case: Case) -> Answer:
    """The device of that name, on a VM of ours with as many ports and bridges."""
    said = case.input
    spec = _spec(case.setup["machine"], ports=3, bridges=1)
    assert isinstance(spec, VmSpec)
    if "Pref64Reserve" in said:
        spec = replace(spec, windows=(0, 0, int(said["Pref64Reserve"].removesuffix("G")) << 30))
    said.skip("what a port of ours has is its own", *said)
    argv = case.expected["argv"]
    katas = _devices(argv or (), _PORTS | _BRIDGES) if case.expected["valid"] else "invalid"
    made = _made(spec, _PORTS | _BRIDGES)
    return Answer([port for port in made if port["id"] == _OURS.get(said.get("ID"))], katas)


_OURS = {None: "rp0", "rp0": "rp0", "rp1": "rp1", "rp2": "rp2", "pci-bridge-0": "br0", "b": "br0"}
"""The name of a device of ours that does what Kata's does."""


def _ports(case: Case) -> Answer:
    """Those that vmplug makes, and those that it finds in a VM of Kata's."""
    spec = _spec(case.input["machine"], ports=case.input["count"])
    argv = [case.expected[key] or [] for key in ("root_port_argv", "switch_port_argv")]
    made = spec if isinstance(spec, Refusal) else _made(spec, _PORTS)
    katas = _devices([word for words in argv for word in words], _PORTS)
    return Answer(
        {"made": made, "found": [_kinds(words) for words in argv]},
        {"made": katas, "found": _KATAS_PORTS if katas else [[], []]},
    )


_KATAS_PORTS = [
    [f"rp{number}: root-port" for number in (0, 1)],
    [f"swdp{number}: switch-port" for number in (0, 1)],
]


def _bridges(case: Case) -> Answer:
    """Names of numbers of the channel subsystem are no bridges."""
    spec = _spec(case.input["machine"], bridges=case.input["count"])
    ours: object = spec
    if isinstance(spec, VmSpec):
        made = _made(spec, _BRIDGES)
        ours = {
            "made": made,
            "bridges": [{"id": bridge["id"], "type": "pci"} for bridge in made] or None,
            "slots": [int(bridge["addr"], 16) for bridge in made] or None,
        }
    katas = {
        "made": _devices(case.expected["argv"] or (), _BRIDGES),
        "bridges": case.expected["bridges"],
        "slots": case.expected["slots"],
    }
    return Answer(ours, katas)


def _behind_ports(case: Case) -> Answer:
    """Bridges of ours have no ports of their own; behind Kata's, a device has Kata's path."""
    argv = case.expected["argv"]
    first, second = (port for port in _offer(argv).ports if port.free)
    spec = _spec(case.input["machine"], bridges=case.input["count"])
    assert isinstance(spec, VmSpec)
    ours = {
        "made": _made(spec, _BRIDGES),
        "path_of_slot_01_on_first": str(first.path.child(PciSlot(0x01))),
        "path_of_slot_1e_on_second": str(second.path.child(PciSlot(0x1E))),
    }
    paths = {key: case.expected[key] for key in ours if key != "made"}
    return Answer(ours, {"made": _devices(argv, _PORTS | _BRIDGES), **paths})


ADAPTERS: dict[str, Adapter] = {
    "config.PCIePort": _word,
    "config.PCIePortBusPrefix.String": _prefix,
    "govmm qemu.BridgeDevice.QemuParams": _one,
    "govmm qemu.PCIeRootPortDevice.QemuParams": _one,
    "govmm qemu.PCIeSwitchDownstreamPortDevice.QemuParams": _one,
    "govmm qemu.PCIeSwitchUpstreamPortDevice.QemuParams": _one,
    "govmm qemu.PXBPCIeDevice.QemuParams": _one,
    "qemu.genericAppendPCIeRootPort / genericAppendPCIeSwitchPort": _ports,
    "qemu.genericBridges / genericAppendBridges": _bridges,
    "qemu.nestedPCIeBridges / genericAppendBridges / bridgePciPath": _behind_ports,
}
