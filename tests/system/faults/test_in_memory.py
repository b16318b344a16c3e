"""The matrix as tests: every kind and operation, against the hypervisor in memory."""

from pathlib import Path

import pytest

from tests.system.faults.columns import ColumnName
from tests.system.faults.conftest import Columns
from tests.system.faults.matrix import KINDS, step_lines, wrong_cells

COLUMNS = [
    ColumnName(kind.name, op, is_real=False, is_quick=True) for kind in KINDS for op in kind.ops
]
LISTED = Path(__file__).with_name("steps.txt").read_text().splitlines()
"""Every step, as `python -m tests.system.faults --steps` prints them."""

pytestmark = [pytest.mark.root, pytest.mark.qemu]


@pytest.mark.parametrize("column", COLUMNS, ids=[f"{c.kind}-{c.op}" for c in COLUMNS])
def test_nothing_is_lost_and_nothing_leaks(column: ColumnName, columns: Columns) -> None:
    assert wrong_cells(columns[column].result()) == []


@pytest.mark.parametrize("column", COLUMNS, ids=[f"{c.kind}-{c.op}" for c in COLUMNS])
def test_no_step_disappears_and_no_new_one_is_unlisted(
    column: ColumnName, columns: Columns
) -> None:
    listed = [line for line in LISTED if line.startswith(f"{column.kind} | {column.op} | ")]
    steps = [cell.step for cell in columns[column].result()]
    assert step_lines(column.kind, column.op, steps) == listed


def test_every_listed_step_is_of_a_column() -> None:
    columns = {f"{column.kind} | {column.op}" for column in COLUMNS}
    assert {line.rpartition(" | ")[0] for line in LISTED} == columns
