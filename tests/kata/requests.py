"""Requests: what a manager makes of one, of its options, and of kinds it cannot plug."""

from typing import Any

from tests.kata.host import (
    TTY,
    add_device,
    add_disks,
    add_node,
    build_host,
    disk,
    open_store,
    request,
)
from tests.kata.machine import Machine
from tests.kata.pmem import mounted_directory
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Refusal,
    attempt,
    error_of,
    kind_of,
)
from tests.kata.vfio_sandbox import plug_group
from tests.support.tree import HostTree
from vmplug.host.block.device import BlockDevice
from vmplug.host.finding import Code
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.journal.records import Attachment
from vmplug.oci.info import DeviceInfo


def _new_device(case: Case) -> Answer:
    """Kata makes a device and attaches it later; ours does both, so its two counts are one.

    Its driver is the manager's and goes to block devices; ours is an option of the request.
    """
    if "DriverOptions" in case.input:
        return _callers_options(case)
    tree = build_host(case)
    assert open_store(case, tree, case.setup) is None
    case.setup.skip("for vhost-user devices only", "vhost_user_reconnect")
    case.input.skip("none of them is one", "Pmem")
    if case.mended:
        add_node(tree, case.input)
    machine = Machine(case, tree)
    driver = {"block-driver": case.setup["block_driver"]}
    options = driver if case.input["DevType"] == "b" else {}
    ours: dict[str, Any] = {"error": None, "kind": ""}
    info = attempt(lambda: request(case.input, driver_options=options))
    if isinstance(info, Refusal):
        ours["error"] = info
    else:
        ours |= _examined_and_attached(machine, info)
    case.expected.skip("one count of ours", "saved_attach_count")
    katas = {key: case.expected[key] for key in case.expected if key != "saved_attach_count"}
    katas["error"] = kind_of(case.expected["error"])
    return Answer({**ours, "devices_in_manager": len(machine.records())}, katas)


def _examined_and_attached(machine: Machine, info: DeviceInfo) -> dict[str, Any]:
    allow = [Code.NOT_IN_SYSFS]
    (examined,) = machine.manager.check([info], allow=allow)
    answer = machine.try_attach(info, allow=allow)
    facts: dict[str, Any] = {}
    if examined.device:
        facts |= {"kind": str(examined.device.kind), "host_path": examined.device.host_path}
    if isinstance(answer, Refusal):
        return {**facts, "error": answer}
    (record,) = machine.records()
    assert (str(record.kind), record.host_path) == (facts["kind"], facts["host_path"])
    return {
        **facts,
        "driver_options": dict(record.options) or None,
        "id_length": len(record.id),
        "saved_ref_count": machine.count(),
    }


def _callers_options(case: Case) -> Answer:
    """Also with options of ours."""
    tree = HostTree(case.path)
    disks = add_disks(tree, "ab")
    machine = Machine(case, tree)
    katas_map = dict(case.input["DriverOptions"])
    our_map = {"block-driver": case.setup["block_driver"], "discard": "unmap"}
    machine.attach(request(disks["a"], driver_options=katas_map))
    machine.attach(request(disks["b"], driver_options=our_map))
    return Answer(
        {"callers_map_after": katas_map, "our_map_after": our_map},
        {"callers_map_after": dict(case.expected["callers_map_after"])},
    )


def _filtered(case: Case) -> Answer:
    """Kata drops every device of some numbers, whatever its type is."""
    number, minor = case.input["major"], 0
    tree = HostTree(case.path).block_device(f"{number}:{minor}", "disk")
    tree.char_device(f"{number}:{minor}", "tty")
    machine = Machine(case, tree)
    ours = {}
    for kind in ("b", "c"):
        device = {
            "ContainerPath": f"/dev/{kind}",
            "DevType": kind,
            "Major": number,
            "Minor": minor,
        }
        answer = machine.try_attach(request(device))
        ours[kind] = answer if isinstance(answer, Refusal) else True
    return Answer(ours, dict.fromkeys("bc", case.expected["kept"]))


def _mount_source(case: Case) -> Answer:
    if case.input["source"] == "directory":
        return mounted_directory(case)
    tree = HostTree(case.path).block_device("8:16", "sdb", ro=case.input.get("BLKROGET") == 1)
    machine = Machine(case, tree)
    if case.input["source"] == "missing":
        file = {"ContainerPath": "/data", "DevType": "b", "Major": -1, "HostPath": "/missing"}
        error = error_of(machine.try_attach(request({**file, "Minor": 0})))
        return Answer({"error": error}, {"error": kind_of(case.expected["error"])})
    assert case.input["source"] == "block 8:16"
    device = {"ContainerPath": "/data", "DevType": "b", "Major": 8, "Minor": 16}
    wish = case.input["readonly"]
    error = error_of(machine.try_attach(request(device, read_only=wish)))
    (examined,) = machine.manager.check([request(device, read_only=wish)])
    found, asked = examined.device, examined.info
    assert isinstance(found, BlockDevice)
    assert isinstance(asked, DeviceInfo)
    hold = machine.attach(request(device, read_only=True))
    ours = {
        "error": error,
        "DevType": str(asked.dev_type),
        "Major": found.devnum.major,
        "Minor": found.devnum.minor,
        "ReadOnly": found.read_only,
        "asked_read_only": hold.read_only,
    }
    return Answer(ours, {**case.expected, "error": None, "asked_read_only": True})


def _block_driver(case: Case) -> Answer:
    """A disk whose node this host has, too: memory is never made on a file that is not there."""
    tree = HostTree(case.path)
    asked = disk("null")
    add_device(tree, asked)
    machine = Machine(case, tree)
    options = {"block-driver": case.input["block_driver"]}
    answer = machine.try_attach(request(asked, driver_options=options))
    ours: object = answer
    if isinstance(answer, Attachment):
        _, front_end = machine.changes
        ours = _DRIVERS[front_end.arguments["driver"]]
    return Answer(ours, case.expected["effective_block_driver"])


_DRIVERS = {"virtio-blk-pci": "virtio-blk", "scsi-hd": "virtio-scsi", "nvdimm": "nvdimm"}


def _other_kinds(case: Case) -> Answer:
    """A generic device, which is only counted, and one of the vhost-user store."""
    if {"vfio_devices", "device"} & case.input.keys():
        return plug_group(case)
    assert case.input["device_type"] == "generic / vhost-user-scsi-pci / other"
    tree = HostTree(case.path).char_device("4:2", "tty2")
    tree.node("/vu/block/devices/s", "b", "242:0").node("/vu/block/sockets/s", "s")
    machine = Machine(case, tree, store=VhostUserStore("/vu", root=tree.root))
    scsi = {"ContainerPath": "/dev/vu", "DevType": "b", "Major": 242, "Minor": 0}
    errors = [error_of(machine.try_attach(request(device))) for device in (TTY, scsi)]
    return Answer(
        {
            "hypervisor_calls": [command.execute for command in machine.changes],
            "generic": errors[0],
            "vhost-user-scsi": errors[1],
        },
        {
            "hypervisor_calls": case.expected["hypervisor_calls"],
            **dict.fromkeys(("generic", "vhost-user-scsi"), kind_of(case.expected["error"])),
        },
    )


ADAPTERS: dict[str, Adapter] = {
    "manager.NewDevice": _new_device,
    "manager.NewDeviceManager": _block_driver,
    "Container.filterDevices": _filtered,
    "Container.createDeviceInfo": _mount_source,
    "Sandbox.HotplugAddDevice": _other_kinds,
}
