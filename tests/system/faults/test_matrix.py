"""The matrix as tests: every kind and operation, in memory and against a real QEMU."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future

import pytest

from tests.system.faults.columns import ColumnName, pool, run
from tests.system.faults.matrix import KINDS, Cell, Op

Columns = Mapping[ColumnName, Future[list[Cell]]]

COLUMNS = [
    ColumnName(kind.name, op, is_real=is_real, is_quick=True)
    for is_real in (False, True)
    for kind in KINDS
    for op in Op
    if not (is_real and kind.is_vfio)
]

pytestmark = [pytest.mark.root, pytest.mark.qemu]


@pytest.fixture(scope="module")
def columns(request: pytest.FixtureRequest) -> Iterator[Columns]:
    """The columns that were chosen, two at a time."""
    mine = (item for item in request.session.items if isinstance(item, pytest.Function))
    params = [item.callspec.params for item in mine if item.module is request.module]
    chosen = [name for param in params if isinstance(name := param["column"], ColumnName)]
    with pool() as workers:
        yield {column: workers.submit(run, column) for column in chosen}


@pytest.mark.parametrize(
    "column",
    COLUMNS,
    ids=[f"{'qemu' if c.is_real else 'memory'}-{c.kind}-{c.op}" for c in COLUMNS],
)
def test_nothing_is_lost_and_nothing_leaks(column: ColumnName, columns: Columns) -> None:
    cells = columns[column].result()
    assert cells
    wrong = [f"{cell.step}, {cell.fault}: {cell.problem}" for cell in cells if cell.problem]
    assert wrong == []
