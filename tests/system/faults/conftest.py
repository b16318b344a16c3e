"""Runs the columns of the matrix that were chosen, two at a time."""

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack

import pytest

from tests.system.faults.columns import ColumnName, pool, run
from tests.system.faults.matrix import Cell

Columns = Mapping[ColumnName, Future[list[Cell]]]

_STARTED = pytest.StashKey[dict[str, Columns]]()


@pytest.fixture(scope="module")
def columns(request: pytest.FixtureRequest) -> Columns:
    """The columns of a module, which run while its first tests wait for theirs.

    Once for all tests, also those after one that has failed: they share nothing in a VM.
    """
    started = request.config.stash.setdefault(_STARTED, {})
    name = request.module.__name__
    if name not in started:
        started[name] = _start(request)
    return started[name]


def _start(request: pytest.FixtureRequest) -> Columns:
    mine = (item for item in request.session.items if isinstance(item, pytest.Function))
    specs = [getattr(item, "callspec", None) for item in mine if item.module is request.module]
    names = dict.fromkeys(spec.params["column"] for spec in specs if spec)
    chosen = [name for name in names if isinstance(name, ColumnName)]
    stack = ExitStack()
    request.config.add_cleanup(stack.close)
    workers = stack.enter_context(pool())
    return {column: workers.submit(run, column) for column in chosen}
