"""Runs the columns of the matrix that were chosen, two at a time."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future

import pytest

from tests.system.faults.columns import ColumnName, pool, run
from tests.system.faults.matrix import Cell

Columns = Mapping[ColumnName, Future[list[Cell]]]


@pytest.fixture(scope="module")
def columns(request: pytest.FixtureRequest) -> Iterator[Columns]:
    """The columns of a module, which run while its first tests wait for theirs."""
    mine = (item for item in request.session.items if isinstance(item, pytest.Function))
    specs = [getattr(item, "callspec", None) for item in mine if item.module is request.module]
    names = dict.fromkeys(spec.params["column"] for spec in specs if spec)
    chosen = [name for name in names if isinstance(name, ColumnName)]
    with pool() as workers:
        yield {column: workers.submit(run, column) for column in chosen}
