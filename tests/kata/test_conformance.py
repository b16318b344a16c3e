"""What Kata Containers' runtime, observed, answered to 474 inputs, and what vmplug answers.

Every vector either gets Kata's answer from vmplug, in vmplug's words, or stands in a table
DEVIATIONS with ours in full. Where Kata took for granted what a host does not have, MENDED says
what vmplug answers on a host that has it. Every life of a device is lived twice, the second time
with a new manager for each step, which knows only what was saved.

Functions whose vectors are left out, as no part of this stage:

    Container.createCDIAnnotation         CDI
    QEMU 7.2 QMP                          asked of QEMU itself: tests/contract, tests/qemu
    cdiKindForDevice                      CDI
    govmm qemu.VSOCKDevice.QemuParams     the agent's own channel, no host device
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kata import (
    addresses,
    ccw,
    command_lines,
    commands,
    counts,
    disks,
    guest_names,
    paths,
    pmem,
    qmp_client,
    requests,
    saved,
    sharing,
    vfio_cold,
    vfio_group,
    vfio_life,
    vfio_pci,
    vfio_plug,
    vfio_ports,
    vfio_sandbox,
    vhost_user,
    vhost_user_cold,
    vhost_user_hot,
)
from tests.kata.vector import Case, Deviation, Facts, Vector, full, load_vectors, plain

VECTOR_COUNT = 474
ANSWERED_ONCE = (
    *(paths, addresses, guest_names, ccw, command_lines),
    *(vfio_pci, vfio_group, vfio_cold, vfio_ports),
)
LIVED_TWICE = (
    *(requests, sharing, disks, counts, saved, commands),
    *(pmem, vhost_user, vhost_user_hot, vhost_user_cold, qmp_client),
    *(vfio_plug, vfio_life, vfio_sandbox),
)
PARTS = (*ANSWERED_ONCE, *LIVED_TWICE)

VECTORS = {vector.name: vector for vector in load_vectors()}
ADAPTERS = {function: run for part in PARTS for function, run in part.ADAPTERS.items()}
DEVIATIONS = {name: deviation for part in PARTS for name, deviation in part.DEVIATIONS.items()}
MENDED = {
    name: deviation
    for part in (paths, requests, sharing, pmem, vfio_group)
    for name, deviation in part.MENDED.items()
}
LIVES = {function for part in LIVED_TWICE for function in part.ADAPTERS}

MAKE_NODES = {
    "Sandbox.HotplugAddDevice",
    "cmdline: vhost-user-scsi microvm",
    "cmdline: vhost-user-scsi q35",
    "cold plug vhost-user-scsi-pci",
    "drivers.GetMajorMinorFromDevPath",
    "drivers.VhostUserBlkDevice.Attach / Detach",
    "qemu.hotplugVhostUserDevice",
    "state: vhost-user-blk device",
}
"""Functions and vectors whose adapter makes block nodes itself."""


class Run(NamedTuple):
    """One vector in one life."""

    vector: Vector
    restored: bool
    mended: bool


def _runs(names: Iterable[str], *, mended: bool = False) -> Iterator[object]:
    for name in names:
        vector = VECTORS[name]
        makes_nodes = not MAKE_NODES.isdisjoint({vector.name, vector.function})
        needs_root = mended or vector.node_types or makes_nodes
        marks = [pytest.mark.root] if needs_root else []
        lives = (False, True) if vector.function in LIVES else (False,)
        for restored in lives:
            label = name + (" [restored]" if restored else "")
            yield pytest.param(Run(vector, restored, mended), id=label, marks=marks)


def _check(run: Run, path: Path, deviation: Deviation | None) -> None:
    vector = run.vector
    assert vector.function in ADAPTERS, f"nothing answers {vector.function}"
    with ExitStack() as at_end:
        facts = (Facts(vector.setup), Facts(vector.input), Facts(vector.expected))
        case = Case(vector.name, *facts, path, at_end, run.restored, run.mended)
        answer = ADAPTERS[vector.function](case)
    ours, katas = plain(answer.ours), plain(answer.katas)
    assert case.unread() == [], "facts that nobody looked at"
    if deviation is None:
        assert ours == katas
    else:
        assert full(answer.ours, path) == deviation.ours
        assert ours != katas, "stale: this is Kata's answer"


@pytest.mark.parametrize("run", list(_runs(VECTORS)))
def test_answers_as_kata_or_as_the_table_says(run: Run, tmp_path: Path) -> None:
    _check(run, tmp_path, DEVIATIONS.get(run.vector.name))


@pytest.mark.parametrize("run", list(_runs(MENDED, mended=True)))
def test_answers_so_on_a_host_that_has_what_kata_took_for_granted(
    run: Run, tmp_path: Path
) -> None:
    _check(run, tmp_path, MENDED[run.vector.name])


def test_every_vector_is_here_once() -> None:
    assert len(load_vectors()) == len(VECTORS) == VECTOR_COUNT


def test_every_vector_has_an_adapter_and_every_adapter_a_vector() -> None:
    assert {vector.function for vector in VECTORS.values()} == set(ADAPTERS)


def test_no_function_is_answered_by_two_adapters_and_no_deviation_told_twice() -> None:
    for table in ("ADAPTERS", "DEVIATIONS"):
        names = Counter(name for part in PARTS for name in getattr(part, table))
        assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("table", [DEVIATIONS, MENDED], ids=["ours", "mended"])
def test_no_entry_of_a_table_is_stale(table: dict[str, object]) -> None:
    """That none is in fact Kata's answer, the vector's own test says."""
    assert sorted(set(table) - set(VECTORS)) == []


def test_only_what_deviates_is_mended() -> None:
    assert set(MENDED) <= set(DEVIATIONS)


@pytest.mark.parametrize("deviation", list(DEVIATIONS.values()), ids=list(DEVIATIONS))
def test_every_deviation_says_which_defect_and_why(deviation: Deviation) -> None:
    assert deviation.defect is None or 1 <= deviation.defect <= 42
    assert len(deviation.why.split()) >= 4
