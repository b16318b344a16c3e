"""Groups that come and go: which port each gets, and what is remembered of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.kata.cold import ColdMachine
from tests.kata.machine import Machine, add_bridge, memory_monitor
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Refusal,
    error_of,
    kind_of,
    kinds_of,
)
from tests.kata.vfio_tree import AP_MATRIX, UUID, add_mediated, build, give_to_vfio, named
from tests.kata.vfio_vm import ap_monitor, machine_on
from tests.support.pci_tree import PciTree
from vmplug.host.pci.mdev import VFIODeviceType
from vmplug.journal.records import DeviceRecord
from vmplug.oci.requests import VfioInfo

_CALLS = {"device_add": "HotplugAddDevice(vfio)", "device_del": "HotplugRemoveDevice(vfio)"}
"""Kata's names for what is done by our commands."""


class _Life:
    """A VM with groups of the host; a group goes by its number, a step is `attach 1`."""

    def __init__(self, machine: Machine, port: str = "") -> None:
        self.machine = machine
        self._options = {"port": port} if port else {}

    def info(self, group: str) -> VfioInfo:
        return VfioInfo(
            label=group, device=f"/dev/vfio/{group}", driver_options=dict(self._options)
        )

    def do(self, step: str) -> Refusal | None:
        verb, group = step.split(" ")
        if verb == "attach":
            return error_of(self.machine.try_attach(self.info(group)))
        held = {hold.name: hold for hold in self.machine.manager.attachments()}
        name = f"vfio:{group}"
        return self.machine.try_detach(held.get(name, "/nowhere"))

    def count(self, group: str) -> int:
        holds = self.machine.manager.attachments()
        return sum(hold.count for hold in holds if hold.name == f"vfio:{group}")

    def record(self, group: str) -> DeviceRecord | None:
        path = f"/dev/vfio/{group}"
        found = (r for r in self.machine.records() if r.host_path == path)
        return next(found, None)

    def bus(self, group: str) -> str:
        record = self.record(group)
        return _bus(record.place) if record else ""

    def members_on_ports(self) -> list[str] | None:
        """The members of all groups that have a port."""
        records = self.machine.records()
        members = [r.identity.key for r in records if _bus(r.place)]
        return members or None

    def calls(self) -> list[str]:
        return [_CALLS[command.execute] for command in self.machine.changes]


def _bus(place: str | None) -> str:
    """The port or bridge of a place; empty for what has none."""
    bus, slash, _ = (place or "").partition("/")
    return bus if slash else ""


def _host(case: Case) -> PciTree:
    tree = build(case)
    functions = tree.path / "sys/bus/pci/devices"
    if functions.is_dir():
        give_to_vfio(tree, sorted(entry.name for entry in functions.iterdir()))
    return tree


def _attach_and_detach(case: Case) -> Answer:
    if case.setup.get("ColdPlug"):
        return _before_the_start(case)
    port = case.setup["port"]
    assert case.setup["receiver"] == "accepts everything"
    tree = _host(case)
    is_adapter = (tree.path / AP_MATRIX.lstrip("/")).is_dir()
    if is_adapter:
        life = _Life(machine_on(case, tree, ap_monitor()))
    elif port == "bridge-port":
        monitor = memory_monitor(ports=0, scsi=False)
        add_bridge(monitor, 2)
        life = _Life(machine_on(case, tree, monitor), port)
    else:
        life = _Life(Machine(case, tree), port)
    trace = [_step(life, fact) for fact in case.expected["trace"]]
    assert case.input["steps"] == [fact["step"] for fact in case.expected["trace"]]
    return Answer(
        {"trace": trace, "receiver_calls": life.calls()},
        {
            "trace": _katas_trace(case.expected["trace"]),
            "receiver_calls": _katas_calls(case.expected["receiver_calls"]),
        },
    )


def _step(life: _Life, fact: Mapping[str, Any]) -> dict[str, Any]:
    """One step, which QEMU refuses where Kata's receiver did."""
    verb, group = fact["step"].split(" ")
    if fact["error"] == "boom":
        life.machine.monitor.fail_at = {"attach": "device_add", "detach": "device_del"}[verb]
    error = life.do(fact["step"])
    return {
        "step": fact["step"],
        "error": error,
        "attach_count": life.count(group),
        "bus": life.bus(group),
        "tracked_on_port": life.members_on_ports(),
    }


def _katas_trace(trace: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of what is not attached Kata still knows the bus that it had."""
    lines = []
    for fact in trace:
        (bus,) = fact["bus"]
        known = bus if fact["attach_count"] else ""
        lines.append({**fact, "bus": known, "error": kind_of(fact["error"])})
    return lines


def _katas_calls(calls: Sequence[str] | None) -> list[str]:
    """Which of them failed, the trace says."""
    return [call.partition(" -> ")[0] for call in calls or ()]


def _before_the_start(case: Case) -> Answer:
    """On a command line; what is detached is not on it."""
    assert case.input["steps"] == ["attach", "detach", "attach"]
    machine = ColdMachine(case, _host(case).root)
    info = VfioInfo(label="1", device="/dev/vfio/1", driver_options={"port": case.setup["port"]})
    hold = machine.try_attach(info)
    assert not isinstance(hold, Refusal)
    errors = [None, machine.try_detach(hold), error_of(machine.try_attach(info))]
    (record,) = machine.records()
    assert set(case.expected["receiver_calls"]) == {"AppendDevice(vfio)"}
    return Answer(
        {"bus_after": _bus(record.place), "errors": errors, "devices": len(machine.terms())},
        {
            "bus_after": case.expected["bus_after"],
            "errors": kinds_of(case.expected["errors"]),
            "devices": len(case.expected["receiver_calls"]),
        },
    )


def _after_restart(case: Case) -> Answer:
    assert case.setup["restored"] == "VFIO device on rp0"
    tree = _host(case)
    tree.pci_function("0000:01:00.0", group=1, driver="vfio-pci")
    life = _Life(Machine(case, tree))
    assert life.do("attach 1") is None
    assert life.bus("1") == "rp0"
    life.machine.restart()
    group = case.input["attach"].removeprefix("/dev/vfio/")
    assert life.do(f"attach {group}") is None
    return Answer(life.bus(group), case.expected["bus"])


def _of_the_seed(case: Case) -> Answer:
    """Groups of one function each."""
    tree = PciTree(case.path)
    for number in (1, 2):
        tree.pci_function(f"0000:0{number}:00.0", group=number, driver="vfio-pci")
    life = _Life(Machine(case, tree))
    if "group" in case.setup:
        return _with_a_bad_name(case, life, tree)
    assert case.setup.get("groups", "one PCIe device each") == "one PCIe device each"
    buses = []
    for step in case.input["steps"]:
        verb, group = step.split(" g")
        assert life.do(f"{verb} {group}") is None
        if verb == "attach":
            buses.append(life.bus(group))
    return Answer(buses, case.expected["bus"])


def _with_a_bad_name(case: Case, life: _Life, tree: PciTree) -> Answer:
    assert case.setup["group"] == "good device then bad name"
    assert case.input["steps"] == ["attach (error)", "fix group", "attach"]
    stranger = "/sys/kernel/iommu_groups/1/devices/bad"
    tree.file(stranger)
    errors = [life.do("attach 1")]
    (tree.path / stranger.lstrip("/")).unlink()
    errors.append(life.do("attach 1"))
    surplus = life.calls().count("HotplugAddDevice(vfio)") - 1
    size = f"{surplus} + group size" if surplus else "group size"
    return Answer(
        {"len_VfioDevs_after_second": size, "errors": errors},
        {**case.expected, "errors": ["InUse", None]},
    )


def saved_twice(case: Case) -> Answer:
    """What another manager knows of a group: Kata writes a place as `{}`, and most of it once."""
    katas_saved, katas_again = (
        json.loads(case.expected[key]) for key in ("saved_json", "saved_again_json")
    )
    (device,) = katas_saved["VFIODevs"]
    is_adapter = device["Type"] == 3
    tree = PciTree(case.path)
    if is_adapter:
        add_mediated(tree, VFIODeviceType.AP, AP_MATRIX, queues=device["APDevices"])
        machine = machine_on(case, tree, ap_monitor())
        info = named(UUID)
    else:
        tree.pci_function(device["BDF"], group=1, driver="vfio-pci")
        machine = Machine(case, tree)
        info = named(device["HostPath"], port=device["Port"])
    machine.attach(info)
    saved = _saved(machine)
    machine.restart()
    ours = {
        "kind": saved["kind"],
        "loaded": bool(machine.manager.attachments()),
        "host_path_after_load": _saved(machine)["host_path"],
        "stable": saved == _saved(machine),
        "saved": saved,
    }
    katas = {key: case.expected[key] for key in ours if key != "saved"}
    assert case.expected["stable"] == (katas_saved == katas_again)
    return Answer(ours, {**katas, "saved": _katas_saved(katas_saved)})


def _saved(machine: Machine) -> dict[str, Any]:
    (hold,) = machine.manager.attachments()
    (record,) = machine.records()
    guest = hold.guest_address
    assert guest
    return {
        "kind": str(record.kind),
        "member": record.identity.key,
        "options": dict(record.options),
        "count": hold.count,
        "host_path": record.host_path,
        "bus": _bus(record.place),
        "pci_path": str(guest.pci_path) if guest.pci_path else None,
        "queues": list(guest.ap_queues),
    }


def _katas_saved(state: dict[str, Any]) -> dict[str, Any]:
    (device,) = state["VFIODevs"]
    return {
        "kind": state["Type"],
        "member": device["BDF"] or device["SysfsDev"],
        "options": {"port": device["Port"]} if device["Port"] else {},
        "count": state["AttachCount"],
        "host_path": device["HostPath"],
        "bus": device["Bus"],
        "pci_path": device["GuestPciPath"],
        "queues": device["APDevices"] or [],
    }


ADAPTERS: dict[str, Adapter] = {
    "drivers.VFIODevice.Attach (seed and all 1.x)": _of_the_seed,
    "drivers.VFIODevice.Attach / Detach": _attach_and_detach,
    "manager.LoadDevices + drivers.VFIODevice.Attach": _after_restart,
}
