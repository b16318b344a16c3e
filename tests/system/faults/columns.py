"""Columns of the matrix: in memory, or against a real QEMU with a guest that lets devices go."""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from tests.contract.world import memory_side_vm
from tests.system.faults.kinds import Kind
from tests.system.faults.machine import QemuMachine
from tests.system.faults.matrix import KINDS, Cell, Column, Pictures, Table, cells, faults_at
from tests.system.faults.steps import (
    AGAINST_QEMU,
    FAULTS,
    QUICK,
    QUICK_AGAINST_QEMU,
    Fault,
    Op,
    Step,
)
from tests.system.faults.world import world


class ColumnName(NamedTuple):
    """One kind and operation; `is_quick` leaves out what another fault comes to the same as."""

    kind: str
    op: Op
    is_real: bool
    is_quick: bool


def run(column: ColumnName) -> list[Cell]:
    """All cells of one kind and operation, in memory or against a real QEMU."""
    kind = next(kind for kind in KINDS if kind.name == column.kind)
    if column.is_real:
        table = QUICK_AGAINST_QEMU if column.is_quick else AGAINST_QEMU
        return list(real_cells(kind, column.op, table))
    return list(cells(kind, column.op, QUICK if column.is_quick else FAULTS))


def pool() -> ProcessPoolExecutor:
    """Two columns at a time, each in a process that has nothing open and no threads."""
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1)


def real_cells(kind: Kind, op: Op, table: Table) -> Iterator[Cell]:
    """Every cell of one kind and operation; a QEMU serves many, until one has gone wrong.

    What cannot be taken out again needs a QEMU for each cell, and no guest.
    """
    right: Pictures | None = None
    if kind.is_retained:
        with _machine(kind) as machine, world(kind, machine) as made:
            right = Column(made, op).right
    plans: list[tuple[Step, Fault]] | None = None
    while plans is None or plans:
        with _machine(kind) as machine, world(kind, machine) as made:
            column, is_usable = Column(made, op, right), True
            if plans is None:
                steps = column.steps()
                plans = [(s, fault) for s in steps for fault in faults_at(kind, op, s, table)]
                is_usable = not kind.is_retained
            while plans and is_usable:
                done = column.cell(*plans.pop(0))
                yield done
                is_usable = not (done.problem or kind.is_retained)


@contextmanager
def _machine(kind: Kind) -> Iterator[QemuMachine]:
    with tempfile.TemporaryDirectory() as directory:
        is_alone = kind.is_retained
        with memory_side_vm(Path(directory), guest=not is_alone, paused=is_alone) as vm:
            if not is_alone:
                vm.console.run("true")
            yield QemuMachine(vm)
