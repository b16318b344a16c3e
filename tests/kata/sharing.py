"""Sharing: two requests, which may be for one device."""

from dataclasses import replace
from typing import Any

from tests.kata.host import DISK, add_device, request
from tests.kata.machine import Machine
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Refusal,
    attempt,
    error_of,
    kinds_of,
)
from tests.support.tree import HostTree
from vmplug.journal.records import Attachment
from vmplug.oci.info import DeviceInfo


def _second_request(case: Case) -> Answer:
    first, second = dict(case.input["first"]), dict(case.input["second"])
    tree = HostTree(case.path)
    _add_both(tree, first, second, are_related=not case.mended)
    machine = Machine(case, tree)
    is_about_flag = "read-only flag" in case.name
    one = attempt(lambda: machine.attach(request(first), owner="first"))
    two = attempt(lambda: machine.attach(request(second, read_only=is_about_flag), owner="second"))
    ours: dict[str, Any] = {
        "devices": len(machine.records()),
        "errors": [error_of(one), error_of(two)],
    }
    if isinstance(one, Attachment) and isinstance(two, Attachment):
        holds = [h for h in machine.manager.attachments() if h.device_id == two.device_id]
        ours["ref_count"] = sum(hold.count for hold in holds)
        ours["same_device"] = one.device_id == two.device_id
        ours["second_kind"] = str(two.kind)
    katas = {**case.expected, "errors": kinds_of(case.expected["errors"])}
    if is_about_flag:
        ours["read_only"] = [hold.read_only for hold in (one, two) if isinstance(hold, Attachment)]
        ours["then_to_write"] = _asks_again(machine, request(second), owner="first")
        ours["after_a_reader"] = _after_a_reader(case, tree)
    return Answer(ours, katas)


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


def _asks_again(machine: Machine, info: DeviceInfo, *, owner: str) -> dict[str, bool]:
    """Whether a hold is read-only: what its owner is told who asks once more, what is saved."""
    told = machine.attach(info, owner=owner)
    (saved,) = (hold for hold in machine.manager.attachments() if hold.id == told.id)
    assert saved.count == 2
    return {"told": told.read_only, "saved": saved.read_only}


def _after_a_reader(case: Case, tree: HostTree) -> Refusal | None:
    """What a writer gets of a disk that a reader has, in a VM of their own."""
    machine = Machine(replace(case, path=case.path / "other"), tree)
    machine.attach(request(DISK, read_only=True), owner="reader")
    error = error_of(attempt(lambda: machine.attach(request(DISK), owner="writer")))
    assert machine.count() == 1
    return error


ADAPTERS: dict[str, Adapter] = {"manager.NewDevice / FindDevice": _second_request}
