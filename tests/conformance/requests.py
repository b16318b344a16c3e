"""Requests: what a manager makes of one, of two for one device, and of its options."""

from dataclasses import replace
from typing import Any

from tests.conformance.host import add_device, add_node, build_host, open_store, request
from tests.conformance.machine import Machine
from tests.conformance.vector import (
    Adapter,
    Answer,
    Case,
    Deviation,
    Refusal,
    attempt,
    kind_of,
    kinds_of,
    refusal,
)
from tests.support.tree import HostTree
from vmplug.host.device import BlockDevice
from vmplug.host.safety import Code
from vmplug.host.vhost_user import VhostUserStore
from vmplug.manager.records import Attachment
from vmplug.oci.info import DeviceInfo

_BLOCK = {"ContainerPath": "/dev/sda", "DevType": "b", "Major": 8, "Minor": 0}


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
    answer = attempt(lambda: machine.attach(info, allow=allow))
    facts: dict[str, Any] = {}
    if examined.device:
        facts |= {"kind": str(examined.device.kind), "host_path": examined.device.host_path}
    if isinstance(answer, Refusal):
        return {**facts, "error": answer}
    (record,) = machine.records()
    assert (record.kind, record.host_path) == (examined.device.kind, examined.device.host_path)
    return {
        **facts,
        "driver_options": dict(record.options) or None,
        "id_length": len(record.id),
        "saved_ref_count": machine.count(),
    }


def _callers_options(case: Case) -> Answer:
    """Also with options of ours, which are not refused."""
    tree = HostTree(case.path)
    add_device(tree, _BLOCK)
    machine = Machine(case, tree)
    katas_map = dict(case.input["DriverOptions"])
    our_map = {"block-driver": case.setup["block_driver"], "discard": "unmap"}
    error = refusal(lambda: machine.attach(request(_BLOCK, driver_options=katas_map)))
    machine.attach(request(_BLOCK, driver_options=our_map))
    return Answer(
        {"callers_map_after": katas_map, "error": error, "our_map_after": our_map},
        {"callers_map_after": dict(case.expected["callers_map_after"])},
    )


def _second_request(case: Case) -> Answer:
    first, second = dict(case.input["first"]), dict(case.input["second"])
    tree = HostTree(case.path)
    _add_both(tree, first, second, are_related=not case.mended)
    machine = Machine(case, tree)
    is_about_flag = "read-only flag" in case.name
    one = attempt(lambda: machine.attach(request(first), owner="first"))
    two = attempt(
        lambda: machine.attach(request(second, read_only=is_about_flag), owner="second")
    )
    ours: dict[str, Any] = {"devices": len(machine.records()), "errors": _errors(one, two)}
    if isinstance(one, Attachment) and isinstance(two, Attachment):
        holds = [h for h in machine.manager.attachments() if h.device_id == two.device_id]
        ours["ref_count"] = sum(hold.count for hold in holds)
        ours["same_device"] = one.device_id == two.device_id
        ours["second_kind"] = str(two.kind)
    katas = {**case.expected, "errors": kinds_of(case.expected["errors"])}
    if is_about_flag:
        ours |= {"read_only": _flags(one, two), "after_a_reader": _after_a_reader(case, tree)}
    return Answer(ours, katas)


def _errors(*answers: Attachment | Refusal) -> list[Refusal | None]:
    return [answer if isinstance(answer, Refusal) else None for answer in answers]


def _flags(*answers: Attachment | Refusal) -> list[bool]:
    return [answer.read_only for answer in answers if isinstance(answer, Attachment)]


def _add_both(
    tree: HostTree, first: dict[str, Any], second: dict[str, Any], *, are_related: bool
) -> None:
    """Both devices; `sda1` is a partition of `sda` unless the two are not related."""
    if are_related and (first["ContainerPath"], second["ContainerPath"]) == _DISK_AND_PART:
        tree.block_device("8:0", "sda", partitions={"8:1": "sda1"})
        return
    add_device(tree, first)
    if second != first:
        add_device(tree, second)


_DISK_AND_PART = ("/dev/sda", "/dev/sda1")


def _after_a_reader(case: Case, tree: HostTree) -> Refusal | None:
    """What a writer gets of a disk that a reader has, in a VM of their own."""
    machine = Machine(replace(case, path=case.path / "other"), tree)
    machine.attach(request(_BLOCK, read_only=True), owner="reader")
    error = refusal(lambda: machine.attach(request(_BLOCK), owner="writer"))
    assert machine.count() == 1
    return error


def _filtered(case: Case) -> Answer:
    """Kata drops every device of some numbers, whatever its type is."""
    number, minor = case.input["major"], 0
    tree = HostTree(case.path).block_device(f"{number}:{minor}", "disk")
    tree.char_device(f"{number}:{minor}", "tty")
    machine = Machine(case, tree)
    ours = {}
    for kind in ("b", "c"):
        device = {"ContainerPath": f"/dev/{kind}", "DevType": kind, "Major": number, "Minor": minor}
        answer = attempt(lambda asked=device: machine.attach(request(asked)))
        ours[kind] = answer if isinstance(answer, Refusal) else True
    return Answer(ours, dict.fromkeys("bc", case.expected["kept"]))


def _mount_source(case: Case) -> Answer:
    tree = HostTree(case.path).block_device("8:16", "sdb", ro=case.input.get("BLKROGET") == 1)
    machine = Machine(case, tree)
    if case.input["source"] == "missing":
        file = {"ContainerPath": "/data", "DevType": "b", "Major": -1, "HostPath": "/missing"}
        error = refusal(lambda: machine.attach(request({**file, "Minor": 0})))
        return Answer({"error": error}, {"error": kind_of(case.expected["error"])})
    assert case.input["source"] == "block 8:16"
    device = {"ContainerPath": "/data", "DevType": "b", "Major": 8, "Minor": 16}
    wish = case.input["readonly"]
    error = refusal(lambda: machine.attach(request(device, read_only=wish)))
    (examined,) = machine.manager.check([request(device, read_only=wish)])
    disk = examined.device
    assert isinstance(disk, BlockDevice)
    hold = machine.attach(request(device, read_only=True))
    ours = {
        "error": error,
        "DevType": str(examined.info.dev_type),
        "Major": disk.devnum.major,
        "Minor": disk.devnum.minor,
        "ReadOnly": disk.read_only,
        "asked_read_only": hold.read_only,
    }
    return Answer(ours, {**case.expected, "error": None, "asked_read_only": True})


def _block_driver(case: Case) -> Answer:
    tree = HostTree(case.path)
    add_device(tree, _BLOCK)
    machine = Machine(case, tree)
    options = {"block-driver": case.input["block_driver"]}
    answer = attempt(lambda: machine.attach(request(_BLOCK, driver_options=options)))
    ours: object = answer
    if isinstance(answer, Attachment):
        _, front_end = machine.changes
        ours = _DRIVERS[front_end.arguments["driver"]]
    return Answer(ours, case.expected["effective_block_driver"])


_DRIVERS = {"virtio-blk-pci": "virtio-blk", "scsi-hd": "virtio-scsi"}


def _other_kinds(case: Case) -> Answer:
    """A generic device, and one that nothing can plug."""
    assert case.input["device_type"] == "generic / vhost-user-scsi-pci / other"
    tree = HostTree(case.path).char_device("4:2", "tty2")
    tree.node("/vu/block/devices/s", "b", "242:0").node("/vu/block/sockets/s", "s")
    machine = Machine(case, tree, store=VhostUserStore("/vu", root=tree.root))
    generic = {"ContainerPath": "/dev/tty2", "DevType": "c", "Major": 4, "Minor": 2}
    scsi = {"ContainerPath": "/dev/vu", "DevType": "b", "Major": 242, "Minor": 0}
    errors = [refusal(lambda d=device: machine.attach(request(d))) for device in (generic, scsi)]
    return Answer(
        {"hypervisor_calls": machine.changes, "generic": errors[0], "vhost-user-scsi": errors[1]},
        {
            "hypervisor_calls": case.expected["hypervisor_calls"],
            **dict.fromkeys(("generic", "vhost-user-scsi"), kind_of(case.expected["error"])),
        },
    )


ADAPTERS: dict[str, Adapter] = {
    "manager.NewDevice": _new_device,
    "manager.NewDevice / FindDevice": _second_request,
    "manager.NewDeviceManager": _block_driver,
    "Container.filterDevices": _filtered,
    "Container.createDeviceInfo": _mount_source,
    "Sandbox.HotplugAddDevice": _other_kinds,
}

DEVIATIONS: dict[str, Deviation] = {}
