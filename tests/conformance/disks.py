"""Disks: plugged once, counted, unplugged at last; and what is left when a step fails."""

import re
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

from tests.conformance.host import add_device, request
from tests.conformance.machine import Machine, index_of, katas_calls, katas_drive
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
from vmplug.hypervisor.memory import Guest
from vmplug.manager.records import Attachment

_UNKNOWN = "0123456789abcdef"
_COUNT_MAX = (1 << 63) - 1
"""What a journal can count to."""


def _disk(name: str, minor: int = 0) -> dict[str, Any]:
    return {"ContainerPath": f"/dev/{name}", "DevType": "b", "Major": 8, "Minor": minor}


def _disks(tree: HostTree, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    disks = {name: _disk(name, 16 * index) for index, name in enumerate(names)}
    for disk in disks.values():
        add_device(tree, disk)
    return disks


def _detach(machine: Machine, container_path: str, *, whole: bool = False) -> Refusal | None:
    """Let go of what is held at a path; of an unknown id if that is nothing."""
    held = {hold.container_path: hold.id for hold in machine.manager.attachments()}
    attachment_id = held.get(container_path, _UNKNOWN)
    return refusal(lambda: machine.manager.detach(attachment_id, timeout_s=0.01, whole=whole))


def _attach_one(case: Case) -> Answer:
    """Kata's id is given from outside, ours is drawn; both name the drive."""
    options = dict(case.input["DriverOptions"] or {})
    if case.input["DiscardUnmap"]:
        options["discard"] = "unmap"
    ours = _attach_with(case, options)
    if options.pop("fstype", None):
        other = replace(case, path=case.path / "without_fstype")
        ours["without_fstype"] = _attach_with(other, options)["drive"]
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
    case.input.skip("not of this stage; the vector that has it is refused for another", "Pmem")
    assert case.setup["receiver"] == "accepts everything"
    name = case.input["HostPath"].removeprefix("/dev/")
    tree = HostTree(case.path)
    add_device(tree, _disk(name))
    used = case.setup["indices_already_used"]
    is_scsi = options.get("block-driver") == "virtio-scsi"
    places = {"ports": 0} if is_scsi else {"ports": used + 1, "used_ports": used}
    machine = Machine(case, tree, **places, used_scsi=used)
    if "index allocation failure" in case.name:
        machine = Machine(case, tree, ports=1, used_ports=1, scsi=False)
    is_refused = "hot-plug failure" in case.name
    machine.monitor.fail_at = "device_add" if is_refused else None
    info = request(_disk(name), driver_options=options, read_only=case.input["ReadOnly"])
    answer = attempt(lambda: machine.attach(info))
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
    disks = _disks(tree, "abc")
    machine = Machine(case, tree)
    options = {"block-driver": case.setup["driver"]}
    ours: dict[str, Any] = {}
    for step in case.input["steps"]:
        verb, name = step.split(" ")
        if verb == "attach":
            hold = machine.attach(request(disks[name], driver_options=options))
            ours[name] = machine.drive(hold)
        else:
            assert _detach(machine, f"/dev/{name}") is None
    katas = {name: katas_drive(case.expected[name], name) for name in disks}
    return Answer(
        {**ours, "receiver_calls": machine.calls()},
        {**katas, "receiver_calls": katas_calls(case.expected["receiver_calls"])},
    )


def _attach_and_detach(case: Case) -> Answer:
    """Steps with one disk."""
    tree = HostTree(case.path)
    disks = _disks(tree, ["sda"])
    machine = Machine(case, tree)
    if "receiver" in case.setup:
        assert case.setup["receiver"] == "first HotplugRemoveDevice fails"
        machine.monitor.fail_at = "device_del"
    errors: list[Refusal | None] = []
    counts = []
    for step in case.input["steps"]:
        if step == "attach":
            errors.append(refusal(lambda: machine.attach(request(disks["sda"]))))
        else:
            errors.append(_detach(machine, "/dev/sda"))
            counts.append(machine.count())
    ours = {"receiver_calls": machine.calls()}
    katas = {"receiver_calls": katas_calls(case.expected["receiver_calls"])}
    if "attach_count" in case.expected:
        ours |= {"attach_count": machine.count(), "errors": errors}
        katas |= {"attach_count": case.expected["attach_count"]}
    else:
        ours |= {"count_after_failure": counts[0], "errors": errors[1:]}
        katas |= {"count_after_failure": case.expected["count_after_failure"]}
    return Answer(ours, {**katas, "errors": kinds_of(case.expected["errors"])})


def _trace_line(step: str, error: Refusal | str | None, state: str, count: int) -> str:
    kind = error.kind if isinstance(error, Refusal) else error
    return f"{step}: {kind or 'done'}, {state} {count}"


def _our_line(machine: Machine, step: str, error: Refusal | None) -> str:
    holds = machine.manager.attachments()
    state = str(holds[0].state) if holds else "unknown"
    return _trace_line(step, error, state, machine.count())


def _katas_trace(trace: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = []
    for fact in trace:
        known = "known" if fact["known"] else "unknown"
        state = "attached" if fact["is_attached"] else known
        error = kind_of(fact["error"])
        lines.append(_trace_line(fact["step"], error, state, fact["attach_count"] or 0))
    return lines


def _life(case: Case) -> Answer:
    """Kata makes a device known before it attaches it, and removes it after; ours does both."""
    tree = HostTree(case.path)
    add_device(tree, case.input["device"])
    machine = Machine(case, tree)
    info = request(
        case.input["device"], driver_options={"block-driver": case.setup["block_driver"]}
    )
    acts = {
        "attach unknown id": lambda: refusal(lambda: machine.attach(request(_disk("none")))),
        "detach unknown id": lambda: _detach(machine, "nowhere"),
        "remove unknown id": lambda: _detach(machine, "nowhere", whole=True),
        "attach": lambda: refusal(lambda: machine.attach(info)),
        "detach": lambda: _detach(machine, info.container_path),
        "remove": lambda: _detach(machine, info.container_path, whole=True),
    }
    trace = []
    for fact in case.expected["trace"]:
        step = fact["step"]
        act = acts.get(step) or acts[step.split(" ")[0]]
        trace.append(_our_line(machine, step, act()))
    return Answer(
        {"trace": trace, "receiver_calls": machine.calls()},
        {
            "trace": _katas_trace(case.expected["trace"]),
            "receiver_calls": katas_calls(case.expected["receiver_calls"]),
        },
    )


def _failing_removal(case: Case) -> Answer:
    """A removal that cannot be done; ours fails when the guest does not let go."""
    tree = HostTree(case.path)
    disks = _disks(tree, ["sda"])
    machine = Machine(case, tree)
    machine.attach(request(disks["sda"]))
    machine.monitor.guest = Guest.REFUSES
    trace, counts = [], []
    for fact in case.expected["trace"]:
        if fact["step"] == "detach":
            machine.monitor.guest = Guest.ANSWERS
        whole = fact["step"].startswith("remove")
        error = _detach(machine, "/dev/sda", whole=whole)
        trace.append(_our_line(machine, fact["step"], error))
        counts.append(machine.count())
    katas_count = case.expected["ref_count_after_first_failure"]
    return Answer(
        {"trace": trace, "ref_count_after_first_failure": counts[0]},
        {
            "trace": _katas_trace(case.expected["trace"]),
            "ref_count_after_first_failure": katas_count,
        },
    )


def _bump(case: Case) -> Answer:
    """`skip` says that only the count changes."""
    tree = HostTree(case.path)
    disks = _disks(tree, ["sda"])
    machine = Machine(case, tree)
    for _ in range(int(case.setup["attach_count"])):
        machine.attach(request(disks["sda"]))
    before = machine.calls()
    if case.input["attach"]:
        error = refusal(lambda: machine.attach(request(disks["sda"])))
    else:
        error = _detach(machine, "/dev/sda")
    ours = {
        "attach_count": str(machine.count()),
        "error": error,
        "skip": machine.calls() == before,
    }
    return Answer(ours, {**case.expected, "error": kind_of(case.expected["error"])})


_TTY = {"ContainerPath": "/dev/tty2", "DevType": "c", "Major": 4, "Minor": 2}


def _reference(case: Case) -> Answer:
    """One more, and in another life one less; a journal's own maximum stands for Kata's."""
    count = min(int(case.setup["ref_count"]), _COUNT_MAX)
    ours: dict[str, Any] = {}
    for word in ("reference_returns", "dereference_returns"):
        path = case.path / word
        tree = HostTree(path)
        add_device(tree, _TTY)
        machine = Machine(replace(case, path=path), tree)
        if count:
            machine.attach(request(_TTY))
            with closing(sqlite3.connect(path / "state/journal.db")) as journal, journal:
                journal.execute("UPDATE attachment SET count = ?", (count,))
        if word == "reference_returns":
            error = refusal(lambda m=machine: m.attach(request(_TTY)))
        else:
            error = _detach(machine, "/dev/tty2")
        ours[word] = error or str(machine.count())
    return Answer(ours, dict(case.expected))


def _last_index(case: Case) -> Answer:
    """Addresses of a SCSI controller, of which the first are in use."""
    last = re.fullmatch(r"0\.\.(\d+)", case.setup["used"])
    assert last
    tree = HostTree(case.path)
    disks = _disks(tree, "ab")
    machine = Machine(case, tree, ports=0, used_scsi=int(last[1]) + 1)
    error = refusal(lambda: machine.attach(request(disks["a"])))
    ours: dict[str, Any] = {"error": error, "index": index_of(machine.changes[-1])}
    katas = {"error": kind_of(case.expected["error"]), "index": case.expected["index"]}
    if katas["error"]:
        ours["next"] = refusal(lambda: machine.attach(request(disks["b"])))
    return Answer(ours, katas)


def _slot_allocation(case: Case) -> Answer:
    """Ports are to us what slots are to Kata's bridge, counted from 1."""
    assert case.setup["bridge"] == "PCI, empty"
    case.expected.skip("in words only", "note")
    steps: list[dict[str, Any]] = case.expected["steps"]
    tree = HostTree(case.path)
    disks = _disks(tree, "abcde")
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
            error = _detach(machine, f"/dev/{name}")
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
    "drivers.GenericDevice.bumpAttachCount": _bump,
    "drivers.GenericDevice.Reference / Dereference": _reference,
    "manager": _life,
    "manager.RemoveDevice": _failing_removal,
    "Sandbox.getAndSetSandboxBlockIndex": _last_index,
    "types.Bridge.AddDevice / RemoveDevice": _slot_allocation,
}

DEVIATIONS: dict[str, Deviation] = {}
