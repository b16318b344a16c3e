"""Counts: a device is plugged once and unplugged at last, however often it is held."""

import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

from tests.kata.host import TTY, add_device, add_disks, disk, request
from tests.kata.machine import Machine, katas_calls
from tests.kata.vector import Adapter, Answer, Case, Refusal, error_of, kind_of
from tests.support.tree import HostTree
from vmplug.hypervisor.fake.monitor import Guest

_COUNT_MAX = (1 << 63) - 1
"""What a journal can count to."""


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
    acts: dict[str, Callable[[], Refusal | None]] = {
        "attach unknown id": lambda: error_of(machine.try_attach(request(disk("none")))),
        "detach unknown id": lambda: machine.try_detach("nowhere"),
        "remove unknown id": lambda: machine.try_detach("nowhere", whole=True),
        "attach": lambda: error_of(machine.try_attach(info)),
        "detach": lambda: machine.try_detach(info.container_path),
        "remove": lambda: machine.try_detach(info.container_path, whole=True),
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
    disks = add_disks(tree, ["sda"])
    machine = Machine(case, tree)
    machine.attach(request(disks["sda"]))
    machine.monitor.guest = Guest.REFUSES
    trace, counts = [], []
    for fact in case.expected["trace"]:
        if fact["step"] == "detach":
            machine.monitor.guest = Guest.ANSWERS
        whole = fact["step"].startswith("remove")
        error = machine.try_detach("/dev/sda", whole=whole)
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
    disks = add_disks(tree, ["sda"])
    machine = Machine(case, tree)
    for _ in range(int(case.setup["attach_count"])):
        machine.attach(request(disks["sda"]))
    before = machine.calls()
    if case.input["attach"]:
        error = error_of(machine.try_attach(request(disks["sda"])))
    else:
        error = machine.try_detach("/dev/sda")
    ours = {
        "attach_count": str(machine.count()),
        "error": error,
        "skip": machine.calls() == before,
    }
    return Answer(ours, {**case.expected, "error": kind_of(case.expected["error"])})


def _reference(case: Case) -> Answer:
    """One more, and in another life one less; a journal's own maximum stands for Kata's."""
    count = min(int(case.setup["ref_count"]), _COUNT_MAX)
    ours: dict[str, Any] = {}
    for word in ("reference_returns", "dereference_returns"):
        path = case.path / word
        tree = HostTree(path)
        add_device(tree, TTY)
        machine = Machine(replace(case, path=path), tree)
        if count:
            machine.attach(request(TTY))
            with closing(sqlite3.connect(path / "state/journal.db")) as journal, journal:
                journal.execute("UPDATE attachment SET count = ?", (count,))
        if word == "reference_returns":
            error = error_of(machine.try_attach(request(TTY)))
        else:
            error = machine.try_detach("/dev/tty2")
        ours[word] = error or str(machine.count())
    return Answer(ours, dict(case.expected))


ADAPTERS: dict[str, Adapter] = {
    "drivers.GenericDevice.bumpAttachCount": _bump,
    "drivers.GenericDevice.Reference / Dereference": _reference,
    "manager": _life,
    "manager.RemoveDevice": _failing_removal,
}
