"""The journal that a manager or a binder has."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.journal import lay_journal
from vmplug.journal.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    lay_journal(tmp_path / "state")
    with Journal.open(tmp_path / "state") as store:
        yield store
