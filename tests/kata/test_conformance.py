"""What Kata Containers' runtime, observed, answered to 474 inputs, and what vmplug answers.

For every vector vmplug gives Kata's answer, in vmplug's words, or deviations.txt has a line for
it: the vector, the number of Kata's defect (`-` for none: by design), why, and the test that holds
what vmplug does instead. MENDED are deviations because Kata took for granted what a host does not
have: on a host that has it, vmplug gives Kata's answer. Every life of a device is lived twice, the
second time with a new manager for each step, which knows only what was saved: slow, as
tests/unit/manager/test_manager.py and test_managed.py do the same.

Functions whose vectors are left out, as no part of this stage:

    Container.createCDIAnnotation         CDI
    QEMU 7.2 QMP                          asked of QEMU itself: tests/contract, tests/qemu
    cdiKindForDevice                      CDI
    govmm qemu.VSOCKDevice.QemuParams     the agent's own channel, no host device
"""

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
from tests.kata.vector import Case, Facts, Vector, load_deviations, load_vectors, plain

TESTS = Path(__file__).parents[1]
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
DEVIATIONS = {deviation.name: deviation for deviation in load_deviations()}
MENDED = (
    "no sysfs entry falls back to container path",
    "fuse-like char device without sysfs entry",
    "type b does not look in char",
    "dangling sysfs symlink counts as missing",
    "fifo type p: unsupported, relative uevent absent, falls back",
    "241 with store disabled uses sysfs, then the container path",
    "241 as char device is not vhost-user",
    "240 is an ordinary block device",
    "several nodes: exact major:minor chosen",
    "minor above 255 is decoded fully",
    "symlink to a device node matches, socket takes the link name",
    "new device: /dev/vfio/vfio is generic",
    "new device: tty is generic",
    "new device: plain block device",
    (
        "new device: block device with container path under /dev/vfio"
        " and no sysfs entry is taken for VFIO (quirk)"
    ),
    "dedup: different minor: two devices",
    "pmem: good; source is not itself a mount point so fstype defaults to ext4",
    "pmem: good; source is a mount point (/proc) so fstype comes from /proc/mounts",
    "mount source: directory on a PFN-signed loop file",
    "vfio details 0000:02:10.0",
    "vfio details 10000:e1:00.0",
)
IS_MENDED = " [mended]"
"""Marks a deviation that stays one on such a host."""

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
            life = [*marks, pytest.mark.slow] if restored else marks
            yield pytest.param(Run(vector, restored, mended), id=label, marks=life)


def _check(run: Run, path: Path, *, deviates: bool) -> None:
    vector = run.vector
    assert vector.function in ADAPTERS, f"nothing answers {vector.function}"
    with ExitStack() as at_end:
        facts = (Facts(vector.setup), Facts(vector.input), Facts(vector.expected))
        case = Case(vector.name, *facts, path, at_end, run.restored, run.mended)
        answer = ADAPTERS[vector.function](case)
    ours, katas = plain(answer.ours), plain(answer.katas)
    assert case.unread() == [], "facts that nobody read"
    if deviates:
        assert ours != katas, "stale: this is Kata's answer"
    else:
        assert ours == katas


@pytest.mark.parametrize("run", list(_runs(VECTORS)))
def test_vmplug_answers_as_kata_unless_the_table_has_the_vector(run: Run, tmp_path: Path) -> None:
    _check(run, tmp_path, deviates=run.vector.name in DEVIATIONS)


@pytest.mark.parametrize("run", list(_runs(MENDED, mended=True)))
def test_vmplug_answers_as_kata_on_a_host_that_has_what_kata_took_for_granted(
    run: Run, tmp_path: Path
) -> None:
    _check(run, tmp_path, deviates=run.vector.name + IS_MENDED in DEVIATIONS)


def test_every_vector_is_here_once() -> None:
    assert len(load_vectors()) == len(VECTORS) == VECTOR_COUNT


def test_every_vector_has_an_adapter_and_every_adapter_a_vector() -> None:
    assert {vector.function for vector in VECTORS.values()} == set(ADAPTERS)


def test_each_function_has_one_adapter_and_each_deviation_one_line() -> None:
    functions = [function for part in PARTS for function in part.ADAPTERS]
    assert len(functions) == len(set(functions))
    assert len(load_deviations()) == len(DEVIATIONS)


def test_every_deviation_is_of_a_vector() -> None:
    assert set(MENDED) <= set(DEVIATIONS)
    mended = {name + IS_MENDED for name in MENDED}
    assert set(DEVIATIONS) - mended <= set(VECTORS)


def test_every_deviation_names_a_defect_and_a_reason() -> None:
    for deviation in DEVIATIONS.values():
        assert deviation.defect is None or 1 <= deviation.defect <= 42
        assert len(deviation.why.split()) >= 4


def test_every_deviation_names_a_test_that_holds_what_vmplug_does() -> None:
    names = {deviation.test for deviation in DEVIATIONS.values()}
    files = {file: (TESTS.parent / file).read_text() for file in {n.split("::")[0] for n in names}}
    assert [n for n in names if f"def {n.split('::')[1]}(" not in files[n.split("::")[0]]] == []
