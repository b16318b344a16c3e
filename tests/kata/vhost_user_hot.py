"""Hot plug of vhost-user devices: which there are, where they go, what is left of them."""

from typing import Any

from tests.kata.machine import Machine, add_bridge, add_port
from tests.kata.terms import commands
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Refusal,
    error_of,
    kind_of,
    kinds_of,
)
from tests.kata.vhost_user import SOCKET, open_machine, open_store, stored
from tests.support.tree import HostTree
from vmplug.host.kind import DeviceType
from vmplug.journal.records import Attachment
from vmplug.oci.requests import NetInfo, Request, ShareInfo

_NET = NetInfo(label="eth0", socket_path="/vu/s")


def _open_net_machine(case: Case, **options: Any) -> Machine:
    """A VM on a host that has the socket of a network."""
    return Machine(case, HostTree(case.path).node(_NET.socket_path, "s"), **options)


def _hot_plug(case: Case) -> Answer:
    if "Type" in case.input:
        return _other_types(case)
    assert case.input["DevID"]
    assert case.input["ReconnectTime"] == 0
    machine = open_machine(case, ports=0, scsi=False)
    bridges = case.expected["bridges_after"] or ()
    _add_ports(case, machine, has_bridge=bool(bridges))
    operations = case.input["ops"]
    machine.monitor.fail_at = "device_add" if case.setup["qmp_replies"] else None
    if case.setup["qmp_replies"]:
        assert "boom" in case.setup["qmp_replies"]["device_add"]
    answer = machine.try_attach(stored(options={"reconnect": "0"}))
    ours: dict[str, Any] = {"errors": [error_of(answer)], "PCIPath": ""}
    if isinstance(answer, Attachment):
        assert answer.guest_address
        ours["PCIPath"] = str(answer.guest_address.pci_path)
        if operations == ["add", "remove"]:
            ours["errors"].append(machine.try_detach(answer))
    ours |= {
        "places": len(machine.records()),
        "qmp": commands(machine.changes),
    }
    slots = sum(len(bridge["slots"]) for bridge in bridges)
    told = [text for text in case.expected["qmp"] if not text.startswith("qom-get")]
    katas = {
        "errors": kinds_of(case.expected["errors"]),
        "PCIPath": case.expected["PCIPath"],
        "places": slots + case.expected["root_port_entries_after"],
        "qmp": commands(text.replace(case.input["SocketPath"], SOCKET) for text in told),
    }
    return Answer(ours, katas)


def _add_ports(case: Case, machine: Machine, *, has_bridge: bool) -> None:
    """On a machine `virt` Kata uses a root port, of which it asks QEMU, else its bridge."""
    ports = case.setup["qom"]
    if case.setup["machine"] == "virt":
        for name, devfn in {} if ports is None else ports.items():
            path, _, attribute = name.partition("|")
            assert attribute == "addr"
            add_port(machine.monitor, path.rpartition("/")[2], int(devfn))
    else:
        assert (case.setup["machine"], ports) == ("q35", None)
        if has_bridge:
            add_bridge(machine.monitor, 2)


def _other_types(case: Case) -> Answer:
    """All three of which Kata's vector speaks in its name."""
    assert case.input["Type"] == "vhost-user-scsi-pci"
    assert case.expected["qmp"] is None
    tree = HostTree(case.path).node("/vu/s", "s").node("/vu/fs", "s")
    kind = DeviceType.VHOST_USER_SCSI
    machine = Machine(case, tree, store=open_store(tree, kind))
    requests: dict[str, Request] = {
        "scsi": stored(kind),
        "net": _NET,
        "fs": ShareInfo(tag="work", source="/vu/fs"),
    }
    ours = {}
    for name, info in requests.items():
        before = len(machine.changes)
        error = error_of(machine.try_attach(info))
        said = [command.execute for command in machine.changes[before:]]
        ours[name] = {"error": error, "qmp": said}
    katas: dict[str, Any] = {"error": kind_of(case.expected["error"]), "qmp": []}
    return Answer(ours, dict.fromkeys(requests, katas))


def _net_hot_plug(case: Case) -> Answer:
    machine = _open_net_machine(case, ports=0, scsi=False)
    if case.setup["machine"] == "virt":
        add_port(machine.monitor, "rp0", 16)
    else:
        assert (case.setup["machine"], case.setup["bridges"]) == ("q35", "1")
        add_bridge(machine.monitor, 2)
    if case.input["ops"] == ["add"]:
        return _net_refused(case, machine)
    assert case.input["ops"] == ["add", "remove"]
    hold = machine.attach(_NET)
    return Answer([None, machine.try_detach(hold)], kinds_of(case.expected["errors"]))


def _net_refused(case: Case, machine: Machine) -> Answer:
    """The only slot of the VM is free when the next one gets it."""
    assert case.setup["qmp_replies"]["device_add"] == "error"
    machine.monitor.fail_at = "device_add"
    assert isinstance(machine.try_attach(_NET), Refusal)
    said = [command.execute for command in machine.changes]
    ours = {
        "bridge_slot_freed": isinstance(machine.try_attach(_NET), Attachment),
        "netdev_del_sent": "netdev_del" in said,
    }
    return Answer(ours, dict(case.expected))


ADAPTERS: dict[str, Adapter] = {
    "qemu.hotplugNetDevice": _net_hot_plug,
    "qemu.hotplugVhostUserDevice": _hot_plug,
}
