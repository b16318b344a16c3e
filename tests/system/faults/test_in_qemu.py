"""The matrix as tests: every kind and operation, against a real QEMU."""

import pytest

from tests.system.faults.columns import ColumnName
from tests.system.faults.conftest import Columns
from tests.system.faults.matrix import KINDS, wrong_cells
from tests.system.faults.steps import Op

COLUMNS = [
    ColumnName(kind.name, op, is_real=True, is_quick=True)
    for kind in KINDS
    for op in (Op.ATTACH, Op.DETACH)
    if not (kind.is_vfio or kind.own)
]

pytestmark = [pytest.mark.root, pytest.mark.qemu]


@pytest.mark.parametrize("column", COLUMNS, ids=[f"{c.kind}-{c.op}" for c in COLUMNS])
def test_nothing_is_lost_and_nothing_leaks(column: ColumnName, columns: Columns) -> None:
    assert wrong_cells(columns[column].result()) == []
