"""Vhost-user disks: their options, their life, what is saved of it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tests.kata.host import request
from tests.kata.machine import Machine, index_of, memory_monitor
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    error_of,
    kind_of,
)
from tests.support.tree import HostTree
from vmplug.address import qemu_id
from vmplug.drivers.free_places import virtio_place
from vmplug.drivers.ports import NewPlug
from vmplug.drivers.vhost_user import VhostUserDriver
from vmplug.host.kind import DeviceType
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.steps.vhost_user import LINK
from vmplug.journal.records import Attachment
from vmplug.oci.info import DeviceInfo

SOCKET = "/vu/block/sockets/v0"
_NUMBERS = {DeviceType.VHOST_USER_BLK: 241, DeviceType.VHOST_USER_SCSI: 242}


def open_store(tree: HostTree, kind: DeviceType = DeviceType.VHOST_USER_BLK) -> VhostUserStore:
    """A store with one device."""
    tree.node("/vu/block/devices/v0", "b", f"{_NUMBERS[kind]}:0").node(SOCKET, "s")
    return VhostUserStore("/vu", root=tree.root)


def stored(
    kind: DeviceType = DeviceType.VHOST_USER_BLK, options: Mapping[str, str] | None = None
) -> DeviceInfo:
    """A request for it."""
    number = {"Major": _NUMBERS[kind], "Minor": 0}
    device = {"ContainerPath": "/dev/vu", "DevType": "b", **number}
    return request(device, driver_options=options or {})


def _our_options(options: Mapping[str, str]) -> dict[str, str]:
    """Kata writes the VM's driver for disks into them, too."""
    seconds = options.get("vhost-user-reconnect-timeout")
    return {} if seconds is None else {"reconnect": seconds}


def open_machine(case: Case, **options: Any) -> Machine:
    """A VM on a host that has a disk in its store."""
    tree = HostTree(case.path)
    return Machine(case, tree, store=open_store(tree), **options)


def _attach_and_detach(case: Case) -> Answer:
    case.input.skip("ours is drawn", "ID")
    assert case.setup["receiver"] == "accepts everything"
    assert case.input["HostPath"] == SOCKET
    machine = open_machine(case, scsi=False)
    is_refused = case.expected["attach_error"] is not None
    machine.monitor.fail_at = "device_add" if is_refused else None
    options = _our_options(case.input["DriverOptions"])
    case.input["DriverOptions"].skip("an option of disks", "block-driver")
    answer = machine.try_attach(stored(options=options))
    attrs, detach_error = None, None
    if isinstance(answer, Attachment):
        attrs = _attributes(machine, answer.device_id)
        detach_error = machine.try_detach(answer)
    ours = {
        "attach_count": machine.count(),
        "attach_error": error_of(answer),
        "attrs": attrs,
        "detach_error": detach_error,
        "receiver_calls": _calls(machine),
    }
    katas = {
        "attach_count": case.expected["attach_count"],
        "attach_error": kind_of(case.expected["attach_error"]),
        "attrs": {**case.expected["attrs"], "DevID": "its own"},
        "detach_error": kind_of(case.expected["detach_error"]),
        "receiver_calls": _katas_calls(case.expected["receiver_calls"]),
    }
    return Answer(ours, katas)


def _attributes(machine: Machine, device_id: str) -> dict[str, Any]:
    """A device as it was plugged, in the fields of Kata's VhostUserDeviceAttrs."""
    link, front = machine.changes
    data = link.arguments["backend"]["data"]
    ids = (link.arguments["id"], front.arguments["id"])
    assert ids == (qemu_id(device_id, LINK), qemu_id(device_id))
    return {
        "DevID": "its own",
        "Index": index_of(front),
        "ReconnectTime": data.get("reconnect", 0),
        "SocketPath": data["addr"]["data"]["path"],
        "Type": front.arguments["driver"],
    }


def _calls(machine: Machine) -> list[str]:
    """The commands so far as plugs and unplugs, each with the index of the place."""
    words: list[str] = []
    index = -1
    for command in machine.changes:
        match command.execute:
            case "device_add":
                index = index_of(command)
                words.append(f"plug at {index}")
            case "device_del":
                words.append(f"unplug from {index}")
            case "chardev-remove" if words[-1].startswith("plug"):
                words[-1] = f"refused at {index}"
    return words


def _katas_calls(calls: Sequence[str]) -> list[str]:
    words = []
    index = "-1"
    for call in calls:
        match call.split(" -> "):
            case ["GetAndSetSandboxBlockIndex", index]:
                pass
            case ["HotplugAddDevice(vhost-user-blk-pci)"]:
                words.append(f"plug at {index}")
            case ["HotplugAddDevice(vhost-user-blk-pci)", "boom"]:
                words.append(f"refused at {index}")
            case ["HotplugRemoveDevice(vhost-user-blk-pci)"]:
                words.append(f"unplug from {index}")
            case unset:
                assert unset == [f"UnsetSandboxBlockIndex({index})"]
    return words


def _reconnect(case: Case) -> Answer:
    """What the backend says of itself does not matter here, so it has not been asked."""
    kind = DeviceType.VHOST_USER_BLK
    options = VhostUserDriver.parse(kind, _our_options(case.input["driver_options"] or {}))
    device = VhostUserSocket(kind=kind, socket_path=SOCKET)
    offer = Qemu(memory_monitor(ports=1)).offer()
    new = NewPlug(id="0123456789abcdef", device=device, read_only=False)
    plug = options.plan(new, virtio_place(offer, (), "a disk"), offer)
    return Answer(plug.reconnect_s, case.expected["result"])


def saved_twice(case: Case) -> Answer:
    """The vhost-user disk of Save / json / LoadDevices / Save."""
    katas_saved = json.loads(case.expected["saved_json"])
    assert case.expected["stable"]
    assert katas_saved == json.loads(case.expected["saved_again_json"])
    machine = open_machine(case)
    options = _our_options(katas_saved["DriverOptions"])
    machine.attach(stored(options=options))
    saved = _saved(machine)
    machine.restart()
    again = _saved(machine)
    ours = {
        "kind": again["kind"],
        "loaded": True,
        "host_path_after_load": again["host_path"],
        "stable": saved == again,
        "saved": saved,
    }
    attrs = katas_saved["VhostUserDev"]
    assert str(attrs["ReconnectTime"]) == options["reconnect"]
    assert attrs["SocketPath"]
    katas = {
        "kind": katas_saved["Type"],
        "number": f"{katas_saved['Major']}:{katas_saved['Minor']}",
        "options": options,
        "count": katas_saved["AttachCount"],
        "host_path": SOCKET,
        "pci_path": attrs["PCIPath"] or None,
    }
    facts = {key: case.expected[key] for key in ours if key != "saved"}
    return Answer(ours, {**facts, "saved": katas})


def _saved(machine: Machine) -> dict[str, Any]:
    """The only device, as it is saved."""
    (hold,) = machine.manager.attachments()
    (record,) = machine.records()
    return {
        "kind": str(record.kind),
        "number": record.identity.key,
        "options": dict(record.options),
        "count": hold.count,
        "host_path": record.host_path,
        "pci_path": str(hold.guest_address.pci_path) if hold.guest_address else None,
    }


ADAPTERS: dict[str, Adapter] = {
    "drivers.VhostUserBlkDevice.Attach / Detach": _attach_and_detach,
    "drivers.vhostUserReconnect": _reconnect,
}

TOLD_TO_FAIL = (
    "CommandError(command=device_add, error_class=GenericError, "
    "desc=device_add fails as set by fail_at)"
)
