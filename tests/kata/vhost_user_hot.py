"""Hot plug of vhost-user devices: which there are, where they go, what is left of them."""

from typing import Any

from tests.kata.machine import Machine, add_bridge, add_port
from tests.kata.terms import commands
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Deviation,
    Refusal,
    error_of,
    kind_of,
    kinds_of,
)
from tests.kata.vhost_user import SOCKET, TOLD_TO_FAIL, open_machine, open_store, stored
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

_LINK = {
    "id": "chardev 1",
    "backend": {
        "type": "socket",
        "data": {"addr": {"type": "unix", "data": {"path": SOCKET}}, "server": "off"},
    },
}


def _front(bus: str, addr: str) -> list[object]:
    device = {"driver": "vhost-user-blk-pci", "id": "device 1", "chardev": "chardev 1"}
    return ["device_add", {**device, "bus": bus, "addr": addr}]


DEVIATIONS: dict[str, Deviation] = {
    "vhost-user-blk hot-plug: q35 device_add fails: slot freed, chardev removed": Deviation(
        27,
        "no address is told of what could not be plugged",
        {
            "errors": [TOLD_TO_FAIL],
            "PCIPath": "",
            "places": 0,
            "qmp": [
                ["chardev-add", _LINK],
                _front("pci-bridge-0", "01"),
                ["chardev-remove", {"id": "chardev 1"}],
            ],
        },
    ),
    "vhost-user-blk hot-plug: q35 no bridge: chardev removed": Deviation(
        None,
        "what cannot be plugged is refused before QEMU connects to the backend",
        {"errors": ["NoFreePort()"], "PCIPath": "", "places": 0, "qmp": []},
    ),
    "vhost-user-blk hot-plug: virt machine uses a root port": Deviation(
        37,
        "a root port is free again once QEMU has confirmed the unplug",
        {
            "errors": [None, None],
            "PCIPath": "02/00",
            "places": 0,
            "qmp": [
                ["chardev-add", _LINK],
                _front("rp0", "00"),
                ["device_del", {"id": "device 1"}],
                ["netdev_del", {"id": "netdev 1"}],
                ["chardev-remove", {"id": "chardev 1"}],
            ],
        },
    ),
    "vhost-user-scsi/net/fs cannot be hot-plugged": Deviation(
        None,
        "QEMU takes them while the VM runs, and so does vmplug",
        {
            "scsi": {"error": None, "qmp": ["chardev-add", "device_add"]},
            "net": {"error": None, "qmp": ["chardev-add", "netdev_add", "device_add"]},
            "fs": {"error": None, "qmp": ["chardev-add", "device_add"]},
        },
    ),
    "BUG: net device_add fails: the tap is removed but the bridge slot stays taken": Deviation(
        37,
        "the slot of a device that was refused is free",
        {"bridge_slot_freed": True, "netdev_del_sent": True},
    ),
    "BUG: net device on virt goes to a root port but its removal looks on the bridge": Deviation(
        37, "a device is taken out of the place that it was put in", [None, None]
    ),
}
