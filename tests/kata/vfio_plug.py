"""Hot plug of functions, mediated devices and adapters: what is said to QEMU."""

import json
import re
from typing import Any

from tests.kata.machine import Machine
from tests.kata.terms import Terms, commands
from tests.kata.vector import Adapter, Answer, Case, Facts, kind_of, kinds_of
from tests.kata.vfio_tree import AP_MATRIX, TYPES, UUID, add_cdev, add_mediated, named
from tests.kata.vfio_vm import (
    IommufdMonitor,
    ap_monitor,
    machine_on,
    ports_monitor,
    qom_monitor,
)
from tests.support.pci_tree import PciTree
from vmplug.drivers.ports import Step
from vmplug.host.pci.mdev import VFIODeviceType
from vmplug.journal.records import Attachment
from vmplug.oci.requests import VfioInfo

_QUESTION = "qom-get"


def _words(terms: Terms) -> Terms:
    """The terms with one word for the id that was drawn, and with Kata's for the UUID."""
    text = re.sub(r"\b[0-9a-f]{16}\b", "ID", json.dumps(terms))
    return list(json.loads(re.sub(rf"/{UUID}\b", "/uuid", text)))


def said(machine: Machine) -> Terms:
    """What was said to QEMU to change the VM."""
    return _words(commands(machine.changes))


def _function_host(case: Case, bdf: str) -> PciTree:
    return PciTree(case.path).pci_function(bdf, group=9, driver="vfio-pci")


def _on_port(case: Case) -> Answer:
    """One function on a root port or a bridge; with iommufd, QEMU gets open files instead."""
    if case.input["iommufd"]:
        return _by_iommufd(case)
    return _one_command(case, "root-port")


def _on_bridge(case: Case) -> Answer:
    return _one_command(case, "bridge-port")


def _one_command(case: Case, port: str) -> Answer:
    case.input.skip("ours is drawn", "id")
    assert case.input["bus"] in {"rp0", "pci-bridge-0"}
    assert case.input.get("addr", "01") == "01"
    bdf = case.input["host"]
    machine = machine_on(case, _function_host(case, bdf), ports_monitor())
    answer = machine.try_attach(named(bdf, port=port))
    ours = {"commands": said(machine), "error": None if isinstance(answer, Attachment) else answer}
    return Answer(ours, _katas(case))


def _katas(case: Case) -> dict[str, Any]:
    katas = commands(case.expected["commands"])
    return {"commands": katas, "error": kind_of(case.expected["error"])}


def _by_iommufd(case: Case) -> Answer:
    """What would be said, with what takes each of it back; no file is opened for that."""
    (refused,) = filter(None, case.setup["replies"])
    assert '"error"' in refused
    tree = _function_host(case, "0000:04:00.0")
    node = f"/dev/vfio/devices/vfio{case.input['iommufd']}"
    add_cdev(tree, "0000:04:00.0", node)
    monitor = IommufdMonitor(root_ports=0, scsi=False)
    monitor.devices = ports_monitor().devices
    machine = machine_on(case, tree, monitor)
    steps = machine.manager.plan([named(node, port="root-port")])
    assert not machine.records()
    assert not machine.changes
    ours = {"commands": _words(commands(step.do for step in steps)), "undone": _undone(steps)}
    assert kind_of(case.expected["error"]) == "CommandError"
    return Answer(ours, {"commands": commands(case.expected["commands"]), "undone": []})


def _undone(steps: list[Step]) -> list[str]:
    """What takes the steps before the last one back, in turn."""
    return [step.undo.execute for step in reversed(steps[:-1]) if step.undo]


def _adapter(case: Case) -> Answer:
    case.input.skip("ours is drawn", "id")
    assert case.input["sysfsdev"] == f"{AP_MATRIX}/u"
    tree = PciTree(case.path)
    add_mediated(tree, VFIODeviceType.AP, AP_MATRIX, queues=["05.001f"])
    machine = machine_on(case, tree, ap_monitor())
    answer = machine.try_attach(named(UUID))
    ours = {"commands": said(machine), "error": None if isinstance(answer, Attachment) else answer}
    katas = _katas(case)
    for _, arguments in katas["commands"]:
        arguments["sysfsdev"] = re.sub(r"/u\Z", "/uuid", arguments["sysfsdev"])
    return Answer(ours, katas)


def _hot_plug(case: Case) -> Answer:
    """One device, through the manager: QEMU never hears of what the manager refuses."""
    port = case.setup["hot_plug_vfio"]
    device = case.input["device"]
    machine = _machine(case, device)
    options = {} if TYPES.get(device["Type"]) is VFIODeviceType.AP else {"port": port}
    ours = _plug(case, machine, named(_name(device), **options))
    katas = {
        "errors": kinds_of(case.expected["errors"]),
        "GuestPciPath": case.expected["GuestPciPath"],
        "places": sum(len(bridge["slots"]) for bridge in case.expected["bridges_after"]),
        "qmp": commands(
            text for text in case.expected["qmp"] or () if not text.startswith(_QUESTION)
        ),
    }
    return Answer(ours, katas)


def _machine(case: Case, device: Facts) -> Machine:
    """A VM with what QEMU answers for in the vector, or with a bridge and a port as elsewhere."""
    device.skip("ours are drawn and found", "ID", "Bus")
    assert device["DevfsDev"] == ""
    tree = _device_host(case, device)
    qom: Facts | None = case.setup["qom"]
    if qom:
        qom.skip("what is asked of a device once it is plugged is known before", *qom)
    if TYPES.get(device["Type"]) is VFIODeviceType.AP:
        return machine_on(case, tree, ap_monitor())
    has_ports = qom and any("/peripheral/" in key for key in qom)
    monitor = qom_monitor(qom) if qom and has_ports else ports_monitor()
    if qom is None:
        monitor.fail_at = _QUESTION
    return machine_on(case, tree, monitor)


def _name(device: Facts) -> str:
    match TYPES.get(device["Type"]):
        case VFIODeviceType.NORMAL:
            return str(device["BDF"])
        case None:
            return "/dev/vfio/9"
        case _:
            return UUID


def _device_host(case: Case, device: Facts) -> PciTree:
    """The device in group 9; one of an unknown type is there by a name that says nothing."""
    tree, kind = PciTree(case.path), TYPES.get(device["Type"])
    parent, _, name = device["SysfsDev"].rpartition("/")
    match kind:
        case VFIODeviceType.NORMAL:
            assert name == device["BDF"]
            tree.pci_function(name, group=9, driver="vfio-pci")
        case None:
            assert device["BDF"]
            tree.file("/sys/kernel/iommu_groups/9/devices/unknown/uevent")
        case _:
            assert name == "uuid"
            device.skip("of its parent", "BDF")
            add_mediated(tree, kind, parent, queues=["05.001f"])
    return tree


def _plug(case: Case, machine: Machine, info: VfioInfo) -> dict[str, Any]:
    operations = case.input["ops"]
    replies = case.setup["qmp_replies"] or {}
    assert all("boom" in replies[command] for command in replies)
    refused = next(iter(replies), None)
    if operations == ["add"] and refused:
        machine.monitor.fail_at = refused
    answer = machine.try_attach(info)
    ours: dict[str, Any] = {"errors": [None], "GuestPciPath": ""}
    if isinstance(answer, Attachment):
        assert answer.guest_address
        path = answer.guest_address.pci_path
        ours["GuestPciPath"] = str(path) if path else ""
    else:
        ours["errors"] = [answer]
    if isinstance(answer, Attachment) and operations == ["add", "remove"]:
        machine.monitor.fail_at = refused
        ours["errors"].append(machine.try_detach(answer))
    ours["places"] = sum((r.place or "").startswith("pci-bridge") for r in machine.records())
    ours["qmp"] = said(machine)
    if isinstance(answer, Attachment) and ours["errors"][-1]:
        ours["again"] = machine.try_detach(answer) or machine.count()
    return ours


ADAPTERS: dict[str, Adapter] = {
    "govmm QMP.ExecuteAPVFIOMediatedDeviceAdd": _adapter,
    "govmm QMP.ExecutePCIVFIODeviceAdd": _on_bridge,
    "govmm QMP.ExecuteVFIODeviceAdd": _on_port,
    "qemu.hotplugVFIODevice": _hot_plug,
}
