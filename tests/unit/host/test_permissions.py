"""The state directory is nobody else's: what vmplug makes, and what it refuses to use."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmplug.errors import StoreError
from vmplug.host.permissions import can_all_connect, is_absent
from vmplug.journal.journal import Journal

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: chown")
STRANGER = 12345


@pytest.fixture
def lax_umask() -> Iterator[None]:
    """Everybody may do everything with what a careless process makes."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(directory: Path) -> dict[str, int]:
    return {
        path.name: stat.S_IMODE(path.lstat().st_mode)
        for path in [directory, *directory.rglob("*")]
    }


@pytest.mark.usefixtures("lax_umask")
def test_new_files_are_private_with_any_umask(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    with Journal.open(directory) as store, store.bindings.alone():
        found = modes(directory)
    assert found.keys() >= {"state", "journal.db", "journal.db-wal", "binding.lock"}
    assert found.pop("state") == 0o700
    assert set(found.values()) == {0o600}, found


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o770, 0o1777])
def test_a_directory_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(StoreError) as caught:
        Journal.open(directory)
    assert f"the state directory {directory} " in caught.value.message
    assert f"(mode {mode:04o})" in caught.value.message
    assert f"chmod 700 {directory}" in (caught.value.hint or "")
    assert list(directory.iterdir()) == []
    directory.chmod(0o700)
    Journal.open(directory).close()


@needs_root
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    os.chown(directory, STRANGER, STRANGER)
    with pytest.raises(StoreError, match=f"belongs to user {STRANGER}: vmplug refuses to use it"):
        Journal.open(directory)
    assert list(directory.iterdir()) == []


@needs_root
def test_a_symlink_is_followed_only_when_nobody_else_made_it(tmp_path: Path) -> None:
    directory, link = tmp_path / "real", tmp_path / "state"
    directory.mkdir(mode=0o700)
    link.symlink_to(directory)
    Journal.open(link).close()
    os.lchown(link, STRANGER, STRANGER)
    with pytest.raises(StoreError, match=f"is a symlink that user {STRANGER} made"):
        Journal.open(link)


@needs_root
def test_a_journal_of_somebody_else_is_refused(tmp_path: Path) -> None:
    Journal.open(tmp_path / "state").close()
    journal = tmp_path / "state/journal.db"
    os.chown(journal, STRANGER, STRANGER)
    before = journal.read_bytes()
    with pytest.raises(StoreError, match=f"journal.db belongs to user {STRANGER}"):
        Journal.open(tmp_path / "state")
    assert journal.read_bytes() == before


def test_a_journal_that_others_can_write_is_refused(tmp_path: Path) -> None:
    Journal.open(tmp_path / "state").close()
    (tmp_path / "state/journal.db").chmod(0o666)
    with pytest.raises(StoreError, match=r"is writable by others \(mode 0666\)"):
        Journal.open(tmp_path / "state")


def test_a_journal_that_only_the_directory_keeps_others_from_is_still_read(
    tmp_path: Path,
) -> None:
    """As they were made before: readable, in a directory that is not."""
    Journal.open(tmp_path / "state").close()
    (tmp_path / "state/journal.db").chmod(0o644)
    Journal.open(tmp_path / "state").close()


def test_a_lock_is_not_made_through_a_symlink(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with Journal.open(tmp_path / "state") as store:
        (tmp_path / "state/binding.lock").symlink_to(target)
        with pytest.raises(StoreError, match=r"binding\.lock"), store.bindings.alone():
            pass
    assert not target.exists()


def test_only_a_file_that_certainly_does_not_exist_is_absent(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    assert is_absent(str(tmp_path / "nothing"))
    assert is_absent(str(tmp_path / "file/below"))
    assert not is_absent(str(tmp_path / "dangling"))
    assert not is_absent(str(tmp_path / "file"))


def test_an_unreadable_path_may_exist(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert not is_absent(str(tmp_path / "loop/policy.toml"))


@pytest.mark.parametrize(("mode", "is_open"), [(0o777, True), (0o602, True), (0o755, False)])
def test_a_socket_is_connected_to_by_whoever_may_write_to_it(
    tmp_path: Path, mode: int, *, is_open: bool
) -> None:
    path = tmp_path / "qmp.sock"
    os.mknod(path, stat.S_IFSOCK)
    path.chmod(mode)
    assert can_all_connect(str(path)) is is_open
    assert not can_all_connect(str(tmp_path / "gone.sock"))
