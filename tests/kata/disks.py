"""Disks: how one is plugged, and where; and what is left when a step fails."""

import re
from collections.abc import Mapping
from typing import Any

from tests.kata.host import add_device, add_disks, disk, request
from tests.kata.machine import Machine, index_of, katas_calls, katas_drive
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Refusal,
    error_of,
    kind_of,
    kinds_of,
)
from tests.support.tree import HostTree
from vmplug.journal.records import Attachment

_ADDRESSES = 1 << 16
"""On one SCSI controller."""


def _attach_one(case: Case) -> Answer:
    """Kata's id is given from outside, ours is drawn; both name the drive."""
    options = dict(case.input["DriverOptions"] or {})
    if case.input["DiscardUnmap"]:
        options["discard"] = "unmap"
    ours = _attach_with(case, options)
    calls = katas_calls(case.expected["receiver_calls"])
    katas = {
        "attach_count": case.expected["attach_count"],
        "drive": katas_drive(case.expected["drive"], case.input["ID"]),
        "error": kind_of(case.expected["error"]),
        "receiver_calls": calls,
    }
    if "index_after" in ours:
        katas["index_after"] = int(calls[-1].removeprefix("refused at "))
    return Answer(ours, katas)


def _attach_with(case: Case, options: Mapping[str, str]) -> dict[str, Any]:
    case.input.skip("whether it is memory says the driver", "Pmem")
    assert case.setup["receiver"] == "accepts everything"
    name = case.input["HostPath"].removeprefix("/dev/")
    tree = HostTree(case.path)
    add_device(tree, disk(name))
    used = case.setup["indices_already_used"]
    is_scsi = options.get("block-driver") == "virtio-scsi"
    places = {"ports": 0} if is_scsi else {"ports": used + 1, "used_ports": used}
    if "index allocation failure" in case.name:
        places = {"ports": 1, "used_ports": 1, "used_scsi": _ADDRESSES}
    machine = Machine(case, tree, **{"used_scsi": used, **places})
    is_refused = "hot-plug failure" in case.name
    machine.monitor.fail_at = "device_add" if is_refused else None
    info = request(disk(name), driver_options=options, read_only=case.input["ReadOnly"])
    answer = machine.try_attach(info)
    is_held = isinstance(answer, Attachment)
    ours = {
        "attach_count": machine.count(),
        "drive": machine.drive(answer) if isinstance(answer, Attachment) else None,
        "error": None if is_held else answer,
        "receiver_calls": machine.calls(),
    }
    if is_refused:
        ours["index_after"] = index_of(machine.manager.plan([info])[-1].do)
    return ours


def _index_reuse(case: Case) -> Answer:
    if "driver" not in case.setup:
        return _attach_and_detach(case)
    tree = HostTree(case.path)
    disks = add_disks(tree, "abc")
    machine = Machine(case, tree)
    options = {"block-driver": case.setup["driver"]}
    ours: dict[str, Any] = {}
    for step in case.input["steps"]:
        verb, name = step.split(" ")
        if verb == "attach":
            hold = machine.attach(request(disks[name], driver_options=options))
            ours[name] = machine.drive(hold)
        else:
            assert machine.try_detach(f"/dev/{name}") is None
    katas = {name: katas_drive(case.expected[name], name) for name in disks}
    return Answer(
        {**ours, "receiver_calls": machine.calls()},
        {**katas, "receiver_calls": katas_calls(case.expected["receiver_calls"])},
    )


def _attach_and_detach(case: Case) -> Answer:
    """Steps with one disk."""
    tree = HostTree(case.path)
    disks = add_disks(tree, ["sda"])
    machine = Machine(case, tree)
    if "receiver" in case.setup:
        assert case.setup["receiver"] == "first HotplugRemoveDevice fails"
        machine.monitor.fail_at = "device_del"
    errors: list[Refusal | None] = []
    counts = []
    for step in case.input["steps"]:
        if step == "attach":
            errors.append(error_of(machine.try_attach(request(disks["sda"]))))
        else:
            errors.append(machine.try_detach("/dev/sda"))
            counts.append(machine.count())
    ours: dict[str, Any] = {"receiver_calls": machine.calls()}
    katas: dict[str, Any] = {"receiver_calls": katas_calls(case.expected["receiver_calls"])}
    if "attach_count" in case.expected:
        ours |= {"attach_count": machine.count(), "errors": errors}
        katas |= {"attach_count": case.expected["attach_count"]}
    else:
        assert errors[0] is None
        ours |= {"count_after_failure": counts[0], "errors": errors[1:]}
        katas |= {"count_after_failure": case.expected["count_after_failure"]}
    return Answer(ours, {**katas, "errors": kinds_of(case.expected["errors"])})


def _last_index(case: Case) -> Answer:
    """Addresses of a SCSI controller, of which the first are in use."""
    last = re.fullmatch(r"0\.\.(\d+)", case.setup["used"])
    assert last
    tree = HostTree(case.path)
    disks = add_disks(tree, "ab")
    machine = Machine(case, tree, ports=0, used_scsi=int(last[1]) + 1)
    error = error_of(machine.try_attach(request(disks["a"])))
    ours: dict[str, Any] = {"error": error, "index": index_of(machine.changes[-1])}
    katas = {"error": kind_of(case.expected["error"]), "index": case.expected["index"]}
    if katas["error"]:
        ours["next"] = error_of(machine.try_attach(request(disks["b"])))
    return Answer(ours, katas)


def _slot_allocation(case: Case) -> Answer:
    """Ports are to us what slots are to Kata's bridge, counted from 1."""
    assert case.setup["bridge"] == "PCI, empty"
    case.expected.skip("in words only", "note")
    steps: list[dict[str, Any]] = case.expected["steps"]
    tree = HostTree(case.path)
    disks = add_disks(tree, "abcde")
    machine = Machine(case, tree, ports=8, scsi=False)
    ours = []
    for step in steps:
        name = step["id"]
        if step["op"] == "add":
            device_id = machine.attach(request(disks[name])).device_id
            (record,) = (r for r in machine.records() if r.id == device_id)
            port = re.fullmatch(r"rp(\d)/00", record.place or "")
            assert port
            ours.append(f"{name}: {int(port[1]) + 1}")
        else:
            error = machine.try_detach(f"/dev/{name}")
            ours.append(f"{name}: {error.kind if error else 'removed'}")
    katas = [
        f"{step['id']}: {step.get('addr') or kind_of(step['error']) or 'removed'}"
        for step in steps
    ]
    return Answer(ours, katas)


ADAPTERS: dict[str, Adapter] = {
    "drivers.BlockDevice.Attach": _attach_one,
    "drivers.BlockDevice": _index_reuse,
    "drivers.BlockDevice.Detach": _attach_and_detach,
    "Sandbox.getAndSetSandboxBlockIndex": _last_index,
    "types.Bridge.AddDevice / RemoveDevice": _slot_allocation,
}
