"""Commands: what is said to QEMU to plug and unplug a disk, and to the agent in the guest."""

import json
import re
from typing import Any

from tests.kata import agent, ccw, pmem
from tests.kata.host import add_device, request
from tests.kata.machine import Machine, add_bridge, agent_record
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Facts,
    kinds_of,
)
from tests.support.tree import HostTree
from vmplug.address import ScsiAddress
from vmplug.host.finding import Code
from vmplug.journal.records import Attachment
from vmplug.oci.info import DeviceInfo

_DISK = {"ContainerPath": "/dev/null", "DevType": "b", "Major": 8, "Minor": 0}
_FILE = {"ContainerPath": "/x", "DevType": "b", "Major": -1, "Minor": 0, "HostPath": "/disk.img"}
_DEVICES = {"/dev/null": _DISK, "<regular file of 8192 bytes>": _FILE}


def _hot_plug(case: Case) -> Answer:
    """One disk, through the manager: QEMU never hears of what the manager refuses."""
    drive = case.input["drive"]
    if drive["Pmem"] or case.setup["block_device_driver"] == "nvdimm":
        return pmem.hot_plug(case)
    if case.setup["block_device_driver"] == "virtio-blk-ccw":
        return ccw.hot_plug(case)
    drive.skip("ours is drawn", "ID")
    tree = HostTree(case.path)
    machine = Machine(case, tree, ports=0, used_scsi=drive["Index"])
    if case.setup["bridges"] == "1 bridge(s)":
        add_bridge(machine.monitor, 2)
    ours = _plug(case, machine, _requested(case.setup, drive, tree))
    katas = {
        "errors": kinds_of(case.expected["errors"]),
        "PCIPath": case.expected["PCIPath"],
        "places": sum(len(bridge["slots"]) for bridge in case.expected["bridges_after"] or ()),
        "qmp": [_parse(text) for text in case.expected["qmp"]],
    }
    assert case.expected["DevNo"] == case.expected["NvdimmID"] == ""
    return Answer(ours, katas)


def _requested(setup: Facts, drive: Facts, tree: HostTree) -> DeviceInfo:
    """Kata says once for the VM what a request of ours says for its disk.

    What it knows as swap is a disk like others to us, with the driver that Kata takes for it.
    """
    setup.skip("QEMU's own number of queues does", "vcpus")
    assert setup["iothreads"] == bool(setup["indep_iothreads"])
    device = _DEVICES[drive["File"]]
    add_device(tree, device)
    is_direct, is_set = setup["cache_direct"], setup["cache_set"]
    options = {
        "block-driver": "virtio-blk" if drive["Swap"] else setup["block_device_driver"],
        "aio": setup["aio"],
        "cache": "none" if is_direct and is_set else "writeback",
    }
    if setup["iothreads"]:
        options["iothread"] = "on"
    return request(device, driver_options=options, read_only=drive["ReadOnly"])


def _plug(case: Case, machine: Machine, info: DeviceInfo) -> dict[str, Any]:
    """The last operation is the one that QEMU refuses, if it refuses one."""
    operations = case.input["ops"]
    replies = case.setup["qmp_replies"] or {}
    assert all("boom" in replies[command] for command in replies)
    refused = next(iter(replies), None)
    machine.monitor.fail_at = refused if operations == ["add"] else None
    answer = machine.try_attach(info, allow=[Code.NO_DIRECT_IO])
    ours: dict[str, Any] = {"errors": [None], "PCIPath": ""}
    if not isinstance(answer, Attachment):
        ours["errors"] = [answer]
    elif answer.guest_address and not answer.guest_address.scsi_address:
        ours["PCIPath"] = str(answer.guest_address.pci_path)
    if isinstance(answer, Attachment) and operations == ["add", "remove"]:
        machine.monitor.fail_at = refused
        ours["errors"].append(machine.try_detach(answer))
    ours["places"] = sum((r.place or "").startswith("pci") for r in machine.records())
    ours["qmp"] = _said(machine)
    if isinstance(answer, Attachment) and ours["errors"][-1]:
        ours["again"] = machine.try_detach(answer) or machine.count()
    return ours


def _said(machine: Machine) -> list[Any]:
    """The commands that change the VM, with one word for the id that was drawn."""
    said = json.dumps([[command.execute, command.arguments] for command in machine.changes])
    return list(json.loads(re.sub(r"\b[0-9a-f]{16}\b", "ID", said)))


def _parse(text: str) -> list[Any]:
    command, _, arguments = text.partition(" ")
    return [command, json.loads(arguments)]


def _agent_device(case: Case) -> Answer:
    """Kata's bridge at 02 and its first slot."""
    if case.setup["block_device_driver"] != "virtio-blk":
        return agent.device(case)
    device = {**_DISK, "ContainerPath": case.input["container_path"]}
    tree = HostTree(case.path)
    add_device(tree, device)
    machine = Machine(case, tree, ports=0)
    add_bridge(machine.monitor, 2)
    hold = machine.attach(request(device))
    assert hold.guest_address
    assert str(hold.guest_address.pci_path) == case.input["drive"]["PCIPath"]
    assert case.input["drive"]["VirtPath"] == case.expected["vm_path"]
    record = agent_record(hold)
    ours = {key: record[key] for key in ("type", "id", "vm_path")}
    return Answer({**ours, "container_path": hold.container_path}, dict(case.expected))


def _agent_storage(case: Case) -> Answer:
    driver = case.setup["block_device_driver"]
    if driver != "virtio-scsi":
        return agent.volume(case)
    tree = HostTree(case.path)
    add_device(tree, _DISK)
    address = ScsiAddress.parse(case.input["drive"]["SCSIAddr"])
    machine = Machine(case, tree, ports=0, used_scsi=address.scsi_id << 8 | address.lun)
    record = agent_record(machine.attach(request(_DISK, driver_options={"block-driver": driver})))
    return Answer({"driver": record["type"], "source": record["id"]}, dict(case.expected))


ADAPTERS: dict[str, Adapter] = {
    "kataAgent.appendBlockDevice": _agent_device,
    "kataAgent.handleBlockVolume": _agent_storage,
    "qemu.hotplugBlockDevice": _hot_plug,
}
