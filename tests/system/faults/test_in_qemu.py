"""The matrix as tests: every kind and operation, against a real QEMU."""

import pytest

from tests.system.faults.columns import ColumnName
from tests.system.faults.conftest import Columns
from tests.system.faults.matrix import KINDS, Op, wrong_cells

COLUMNS = [
    ColumnName(kind.name, op, is_real=True, is_quick=True)
    for kind in KINDS
    for op in Op
    if not kind.is_vfio
]

pytestmark = [pytest.mark.root, pytest.mark.qemu]


@pytest.mark.parametrize("column", COLUMNS, ids=[f"{c.kind}-{c.op}" for c in COLUMNS])
def test_nothing_is_lost_and_nothing_leaks(column: ColumnName, columns: Columns) -> None:
    assert wrong_cells(columns[column].result()) == []
