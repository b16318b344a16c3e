"""No space for a journal, or for what is written to it; a process that was killed on the way."""

import resource
import signal
import subprocess
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.contract.world import journal_rows
from vmplug.errors import StoreError
from vmplug.journal.journal import Journal
from vmplug.journal.records import VmRecord

APART = get_context("fork")
KIB = 1 << 10
NEW = VmRecord(name="v" * 9000, qmp_socket="/v", pid=None, started_at=None, is_ours=False)


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


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 1 MiB."""
    directory = tmp_path / "state"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", str(directory)]
    subprocess.run(mount, check=True)
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


def fill(directory: Path, left_bytes: int) -> Path:
    """Leave so much room, in whole pages."""
    path = directory / "fill"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4 * KIB)):
                pass
        except OSError:
            file.truncate(file.tell() - left_bytes)
    return path


@pytest.mark.root
@pytest.mark.parametrize("left", range(0, 32, 4))
def test_a_full_disk_is_named_whatever_needs_room(state_dir: Path, left: int) -> None:
    Journal.open(state_dir).close()
    before = journal_rows(state_dir)
    filling = fill(state_dir, left * KIB)
    with (
        pytest.raises(StoreError, match="the disk is full") as caught,
        Journal.open(state_dir) as store,
    ):
        store.add_vm(NEW)
    assert "free space" in (caught.value.hint or "")
    filling.unlink()
    assert journal_rows(state_dir) == before
    with Journal.open(state_dir) as store:
        store.add_vm(NEW)


@pytest.mark.root
@pytest.mark.parametrize("left", [0, 4, 16, 32, 64])
def test_a_journal_that_cannot_be_made_for_want_of_room_leaves_nothing(
    state_dir: Path, left: int
) -> None:
    filling = fill(state_dir, left * KIB)
    with pytest.raises(StoreError, match=r"the disk is full|No space left") as caught:
        Journal.open(state_dir)
    assert "free space" in (caught.value.hint or "")
    filling.unlink()
    assert not list(state_dir.glob("journal.db*"))
    Journal.open(state_dir).close()
