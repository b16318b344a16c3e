"""Saved state: what another manager knows of the devices that this one attached."""

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

from tests.kata.host import DISK, TTY, add_device, request
from tests.kata.machine import Machine, katas_drive
from tests.kata.vector import Adapter, Answer, Case, Refusal, attempt, kind_of
from tests.kata.vfio_life import saved_twice as saved_group
from tests.kata.vhost_user import saved_twice as saved_vhost_user
from tests.support.tree import HostTree
from vmplug.host.kind import DeviceType
from vmplug.journal.records import Attachment


def _saved_twice(case: Case) -> Answer:
    """Kata's device is as it was saved; ours is asked for, so that there is one to save."""
    katas_saved = json.loads(case.expected["saved_json"])
    if "VhostUserDev" in katas_saved:
        return saved_vhost_user(case)
    if "VFIODevs" in katas_saved:
        return saved_group(case)
    katas_again = json.loads(case.expected["saved_again_json"])
    drive = katas_saved.get("BlockDrive", {"File": "", "ReadOnly": False})
    name = drive["File"].removeprefix("/dev/") or "other"
    device = {"ContainerPath": f"/dev/{name}"} | {
        key: katas_saved[key] for key in ("DevType", "Major", "Minor")
    }
    tree = HostTree(case.path)
    add_device(tree, device)
    machine = Machine(case, tree)
    options = katas_saved["DriverOptions"] or {}
    if "never attached" not in case.name:
        machine.attach(request(device, driver_options=options, read_only=drive["ReadOnly"]))
    saved = _saved(machine)
    machine.restart()
    again = _saved(machine)
    ours = {
        "kind": again.get("kind", ""),
        "loaded": bool(again),
        "host_path_after_load": again.get("host_path", ""),
        "stable": saved == again,
        "saved": saved,
    }
    katas = {key: case.expected[key] for key in ours if key != "saved"}
    assert case.expected["stable"] == (katas_saved == katas_again)
    return Answer(ours, {**katas, "saved": _katas_saved(katas_saved)})


def _saved(machine: Machine) -> dict[str, Any]:
    """The only device, as it is saved; empty when there is none."""
    facts: dict[str, Any] = {}
    for hold in machine.manager.attachments():
        (record,) = machine.records()
        facts = {
            "kind": str(record.kind),
            "number": record.identity.key,
            "options": dict(record.options),
            "count": hold.count,
            "read_only": hold.read_only,
            "host_path": record.host_path,
            "pci_path": str(hold.guest_address.pci_path) if hold.guest_address else None,
        }
    return facts


def _katas_saved(state: dict[str, Any]) -> dict[str, Any]:
    """Kata's PCI path has no exported field, so that `{}` is all that is saved of it."""
    drive = state.get("BlockDrive", {"File": "", "ReadOnly": False, "PCIPath": None})
    return {
        "kind": state["Type"],
        "number": f"{state['Major']}:{state['Minor']}",
        "options": state["DriverOptions"] or {},
        "count": state["AttachCount"],
        "read_only": drive["ReadOnly"],
        "host_path": drive["File"],
        "pci_path": drive["PCIPath"] or None,
    }


def _attach_restored(case: Case) -> Answer:
    tree = HostTree(case.path)
    add_device(tree, DISK)
    machine = Machine(case, tree)
    machine.attach(request(DISK))
    machine.restart()
    answer = machine.try_attach(request(DISK))
    ours: dict[str, Any] = {"drive": None, "error": answer, "receiver_calls": machine.calls()}
    if isinstance(answer, Attachment):
        ours |= {"drive": machine.drive(answer), "error": None, "count": answer.count}
    katas = {
        "drive": katas_drive(case.expected["drive"], ""),
        "error": kind_of(case.expected["error"]),
    }
    return Answer(ours, katas)


def _find_restored_file(case: Case) -> Answer:
    path = case.input["HostPath"]
    assert dict(case.setup["restored"]) == {"HostPath at save time": path, "Major": -1}
    file = {"ContainerPath": "/data", "DevType": "b", "Major": case.input["Major"], "Minor": 0}
    tree = HostTree(case.path)
    add_device(tree, {**file, "HostPath": path})
    machine = Machine(case, tree)
    first = machine.attach(request({**file, "HostPath": path}))
    machine.restart()
    second = machine.attach(request({**file, "HostPath": path}))
    return Answer(
        {"found": first.device_id == second.device_id}, {"found": case.expected["found"]}
    )


def _host_path_restored(case: Case) -> Answer:
    """Kata's device has no request any more once it was restored."""
    assert case.setup["DeviceInfo"] is None
    tree = HostTree(case.path)
    add_device(tree, TTY)
    machine = Machine(case, tree)
    machine.attach(request(TTY))
    machine.restart()
    (hold,) = machine.manager.attachments()
    return Answer(hold.host_path, case.expected["result"])


def _load_kinds(case: Case) -> Answer:
    """Devices of every kind, as another version may have saved them; ids are letters."""
    letters, _, words = case.input["states"].removeprefix("ids ").partition(" with types ")
    assert letters == "a..i"
    kinds = ["" if word == "''" else word for word in words.split(", ")]
    states = dict(zip("abcdefghi", kinds, strict=True))
    katas = dict(state.split("=") for state in case.expected["loaded"])
    known = {letter: kind for letter, kind in states.items() if kind in set(DeviceType)}
    unknown = {letter: kind for letter, kind in states.items() if letter not in known}
    ours = {"known": _load(case, "known", known)}
    for letter, kind in unknown.items():
        ours[f"with {kind!r}"] = _load(case, letter, known | {letter: kind})
    return Answer(ours, dict.fromkeys(ours, katas))


def _load(case: Case, name: str, kinds: Mapping[str, str]) -> Any:
    """What a manager gives of devices of these kinds."""
    below = replace(case, path=case.path / name)
    tree = HostTree(below.path)
    machine = Machine(below, tree)
    for minor, letter in enumerate(kinds):
        device = {**TTY, "ContainerPath": f"/dev/{letter}", "Minor": minor}
        add_device(tree, device)
        machine.attach(request(device))
    with closing(sqlite3.connect(below.path / "state/journal.db")) as journal, journal:
        for letter, kind in kinds.items():
            place = f"/dev/{letter}"
            journal.execute("UPDATE device SET kind = ? WHERE host_path = ?", (kind, place))
    machine.restart()
    holds = attempt(machine.manager.attachments)
    if isinstance(holds, Refusal):
        return holds
    return {hold.host_path.removeprefix("/dev/"): str(hold.kind) for hold in holds}


ADAPTERS: dict[str, Adapter] = {
    "Save / json / LoadDevices / Save": _saved_twice,
    "drivers.BlockDevice after LoadDevices": _attach_restored,
    "drivers.GenericDevice.GetHostPath": _host_path_restored,
    "manager.FindDevice": _find_restored_file,
    "manager.LoadDevices": _load_kinds,
}
