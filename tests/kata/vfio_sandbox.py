"""Groups of a whole request: in which order, hot or cold, and what the agent is told of them."""

from typing import Any

from tests.kata.cold import ColdMachine
from tests.kata.host import add_device, request
from tests.kata.machine import Machine, add_behind, agent_record, memory_monitor
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Refusal,
    error_of,
    kind_of,
)
from tests.kata.vfio_tree import (
    AP_MATRIX,
    TYPES,
    UUID,
    add_cdev,
    add_mediated,
    named,
    node_request,
)
from tests.kata.vfio_vm import ap_monitor, machine_on, ports_monitor
from tests.support.pci_tree import PciTree
from tests.support.requests import with_options
from vmplug.host.pci.mdev import VFIODeviceType
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.records import Attachment
from vmplug.oci.info import DeviceInfo
from vmplug.oci.requests import Request

_FUNCTION = "0000:41:00.0"
_GROUP = 12
_CONTAINER = {"DevType": "c", "Major": 10, "Minor": 196}
"""/dev/vfio/vfio, by which programs open groups."""


def _group_tree(case: Case, bdf: str = _FUNCTION, group: int = _GROUP) -> PciTree:
    tree = PciTree(case.path).pci_function(bdf, group=group, driver="vfio-pci")
    return tree.vfio_group(group)


def _group_request(tree: PciTree, path: str) -> DeviceInfo:
    """A group's node, asked for by its number as a container does."""
    major, minor = (tree.path / f"sys/class/vfio/{path[10:]}/dev").read_text().split(":")
    return node_request(path, int(major), int(minor))


def _order(case: Case) -> Answer:
    """Kata puts the container of VFIO first; what is only counted is as good anywhere."""
    tree = PciTree(case.path).char_device("10:196", "vfio/vfio")
    infos: list[Request] = []
    for number, path in enumerate(case.input["devices"] or ()):
        device: dict[str, Any] = {"ContainerPath": path, **_CONTAINER}
        if path == "/dev/vfio/vfio":
            infos.append(request(device))
        elif path.startswith("/dev/vfio/"):
            group = int(path.removeprefix("/dev/vfio/"))
            tree.pci_function(f"0000:4{number}:00.0", group=group, driver="vfio-pci")
            infos.append(_group_request(tree.vfio_group(group), path))
        else:
            disk = {**device, "DevType": "b", "Major": 8, "Minor": 0}
            add_device(tree, disk)
            infos.append(request(disk))
    machine = Machine(case, tree)
    held = machine.manager.attach_all(infos)
    return Answer([hold.container_path for hold in held], case.expected["result"] or [])


# what the agent is told


def _agent(case: Case) -> Answer:
    (said,) = case.input["devices"]
    kind = TYPES[said.get("Type", 1)]
    if "cold_plug_vfio" in case.setup:
        assert case.setup["cold_plug_vfio"] == "no-port"
    mode = case.setup.get("vfio_mode", "vfio")
    path = case.input.get("container_path", "/dev/vfio/12")
    machine, info = _agents_device(case, said, kind, path)
    options = {**info.driver_options, "mode": mode}
    record = agent_record(machine.attach(with_options(info, options)))
    if "record" in case.expected:
        return Answer(record, case.expected["record"])
    return Answer({key: record[key] for key in case.expected}, dict(case.expected))


def _agents_device(
    case: Case, said: dict[str, Any], kind: VFIODeviceType, path: str
) -> tuple[Machine, Request]:
    """A VM that has a place for the device where Kata's guest sees it, and the request for it."""
    tree = PciTree(case.path)
    if kind is VFIODeviceType.AP:
        add_mediated(tree, kind, AP_MATRIX, queues=said["APDevices"])
        return machine_on(case, tree, ap_monitor()), named(UUID)
    if kind is VFIODeviceType.MEDIATED:
        add_mediated(tree, kind, f"/sys/devices/pci0000:00/0000:{said['BDF']}")
        info: Request = named(UUID, port="bridge-port")
    elif path.startswith("/dev/vfio/devices/"):
        tree.pci_function(said["BDF"], group=_GROUP, driver="vfio-pci")
        info = add_cdev(tree, said["BDF"], path)
    else:
        info = _group_request(_group_tree(case, said["BDF"]), path)
    return machine_on(case, tree, ports_monitor()), info


def _mode(case: Case) -> Answer:
    """What Kata has as a number, the agent is told in a word."""
    case.setup.skip("a mode of ours has no value before it is said", "initial")
    tree = _group_tree(case)
    answer = Machine(case, tree).try_attach(named(_FUNCTION, mode=case.input["mode"]))
    ours = answer if isinstance(answer, Refusal) else agent_record(answer)["type"]
    assert case.expected["error"] is None
    return Answer(ours, {0: "vfio-pci", 1: "vfio-pci-gk"}[case.expected["value"]])


# what is plugged, and when


def plug_group(case: Case) -> Answer:
    """A group of three, of which QEMU has the second already; or what is no group at all."""
    if "device" in case.input:
        return _no_group(case)
    assert case.setup["hypervisor"] == "second add fails"
    tree = PciTree(case.path)
    names = {f"0000:4{number}:00.0": name for number, name in enumerate("abc", start=1)}
    assert case.input["vfio_devices"] == list(names.values())
    for bdf in names:
        tree.pci_function(bdf, group=_GROUP, driver="vfio-pci")
    monitor = memory_monitor(ports=4, scsi=False)
    (second,) = (bdf for bdf, name in names.items() if name == "b")
    add_behind(monitor, "rp3", "other", "vfio-pci", 0)
    monitor.devices["other"].properties = {"addr": 0, "host": second}
    machine = machine_on(case, tree, monitor)
    answer = machine.try_attach(named(f"/dev/vfio/{_GROUP}"))
    added = [c.arguments for c in machine.changes if c.execute == "device_add"]
    calls = [f"add {names[arguments['host']]}" for arguments in added]
    by_id = {arguments["id"]: names[arguments["host"]] for arguments in added}
    removed = [by_id[c.arguments["id"]] for c in machine.changes if c.execute == "device_del"]
    ours = {"hypervisor_calls": calls, "removed": removed, "error": error_of(answer)}
    katas = {
        "hypervisor_calls": [c.partition(" -> ")[0] for c in case.expected["hypervisor_calls"]],
        "removed": case.expected["removed"],
        "error": kind_of(case.expected["error"]),
    }
    return Answer(ours, katas)


def _no_group(case: Case) -> Answer:
    """Something else asked for as VFIO's."""
    assert (case.input["device"], case.input["device_type"]) == ("generic object", "vfio")
    tree = PciTree(case.path).char_device("4:2", "tty2")
    machine = Machine(case, tree)
    tty = {"ContainerPath": "/dev/tty2", "DevType": "c", "Major": 4, "Minor": 2}
    answer = machine.try_attach(request(tty, driver_options={"mode": "vfio"}))
    return Answer({"error": error_of(answer)}, {"error": kind_of(case.expected["error"])})


def _empty_group(case: Case) -> Answer:
    assert case.input["vfio_devices"] == []
    tree = PciTree(case.path).iommu_group(_GROUP)
    answer = ColdMachine(case, tree.root).try_attach(named(f"/dev/vfio/{_GROUP}"))
    return Answer({"error": error_of(answer)}, {"error": kind_of(case.expected["error"])})


def _hot_or_cold(case: Case) -> Answer:
    """Kata says for each whether and where; ours takes a VM as it is, where the request says."""
    hot, cold = case.setup["hot_plug_vfio"], case.setup["cold_plug_vfio"]
    path = case.input["container_path"]
    tree = _group_tree(case)
    vm: Machine | ColdMachine
    if hot == "no-port":
        vm = ColdMachine(case, tree.root)
        port, offer = cold, vm.qemu.offer()
    else:
        vm = machine_on(case, tree, ports_monitor())
        port, offer = hot, Qemu(vm.monitor).offer()
    answer = vm.try_attach(named(path, port=port))
    assert isinstance(answer, Attachment)
    (record,) = vm.records()
    assert record.place
    kinds = {port.bus: str(port.kind) for port in offer.ports}
    ours = {"port": kinds[record.place.partition("/")[0]], "mode": str(offer.mode)}
    katas = {"port": case.expected["port"], "mode": case.expected["mode"].partition(" ")[0]}
    return Answer(ours, katas)


def _confidential(case: Case) -> Answer:
    assert case.setup["confidential_guest"]
    machine = Machine(case, _group_tree(case))
    answer = machine.try_attach(named(case.input["host_path"]))
    return Answer({"error": error_of(answer)}, {"error": kind_of(case.expected["error"])})


ADAPTERS: dict[str, Adapter] = {
    "Container.sortContainerVFIODevices": _order,
    "Sandbox.AppendDevice": _empty_group,
    "Sandbox.coldOrHotPlugVFIO": _hot_or_cold,
    "config.VFIOModeType.VFIOSetMode": _mode,
    "kataAgent.appendVfioDevice": _agent,
    "qemu.createPCIeTopology": _confidential,
}
