"""Disks: plugged once, counted, unplugged at last, and what is undone when a step fails."""

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
from vmplug.manager.store import Attachment

_OPTIONS_OF_KATA = ("Pmem", "ReadOnly", "DiscardUnmap")


def _disk(minor: int, name: str) -> dict[str, Any]:
    return {"ContainerPath": f"/dev/{name}", "DevType": "b", "Major": 8, "Minor": minor}


def _attach(case: Case) -> Answer:
    """One disk where the first places are in use; and without `fstype`, which is no option."""
    used = case.setup["indices_already_used"]
    assert case.setup["receiver"] == "accepts everything"
    ours = _attach_one(case, used, case.input["DriverOptions"] or {})
    if "fstype" in ours:
        pass
    return ours
