"""A journal that cannot be made: no space for it, or a process that was killed on the way."""

import resource
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from vmplug.errors import StoreError
from vmplug.journal.journal import Journal

APART = get_context("fork")


def make_in_small_space(state_dir: str) -> None:
    """In a process of its own: no file may be larger than 8 KiB, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    with pytest.raises(StoreError, match="cannot use the journal"):
        Journal.open(state_dir)


def test_a_full_disk_leaves_no_draft_behind(tmp_path: Path) -> None:
    for _ in range(2):
        process = APART.Process(target=make_in_small_space, args=[str(tmp_path)])
        process.start()
        process.join()
        assert process.exitcode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"set-aside.lock"}


def test_what_killed_processes_left_is_removed_by_the_next(tmp_path: Path) -> None:
    names = ["journal.db.0123456789abcdef" + more for more in ("", "-wal", "-shm", "-journal")]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "set-aside-x").mkdir()
    (tmp_path / "set-aside-x/kept").touch()
    kept = tmp_path / "journal.db.damaged-20261125T141347Z"
    kept.touch()
    Journal.open(tmp_path).close()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"journal.db", "set-aside.lock", kept.name}
