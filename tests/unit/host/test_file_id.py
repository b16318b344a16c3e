"""Is what a process has open what was checked?"""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmplug.errors import NoSuchDevice
from vmplug.host.file_id import check_path, file_id, has_open, pinned


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_text("the one that was checked")
    return path


@pytest.fixture
def reader(image: Path) -> Iterator[int]:
    """A process that has the image open."""
    with image.open() as file, subprocess.Popen(["sleep", "60"], stdin=file) as process:
        yield process.pid
        process.kill()


def replace(path: Path) -> None:
    """Another file comes to have that name."""
    other = path.with_suffix(".other")
    other.write_text("another one")
    other.rename(path)


def test_a_file_keeps_its_id_under_every_name_and_no_other_file_has_it(image: Path) -> None:
    link, hard, copy = (image.with_suffix(suffix) for suffix in (".link", ".hard", ".copy"))
    link.symlink_to(image)
    hard.hardlink_to(image)
    copy.write_bytes(image.read_bytes())
    assert file_id(link.stat()) == file_id(hard.stat()) == file_id(image.stat())
    assert file_id(copy.stat()) != file_id(image.stat())


@pytest.mark.root
def test_nodes_are_the_same_by_their_number(tmp_path: Path) -> None:
    nodes = {"one": (0o060600, 7, 3), "two": (0o060600, 7, 3), "char": (0o020600, 7, 3)}
    for name, (mode, major, minor) in nodes.items():
        os.mknod(tmp_path / name, mode, os.makedev(major, minor))
    ids = {name: file_id((tmp_path / name).stat()) for name in nodes}
    assert ids == {"one": "block 7:3", "two": "block 7:3", "char": "char 7:3"}


def test_a_path_that_leads_to_what_was_checked_passes(image: Path) -> None:
    check_path(str(image), file_id(image.stat()))


def test_a_file_that_was_put_in_its_place_is_refused(image: Path, reader: int) -> None:
    checked = file_id(image.stat())
    replace(image)
    for look in (check_path, hold):
        with pytest.raises(NoSuchDevice, match="was replaced after vmplug checked it") as refused:
            look(str(image), checked)
        assert refused.value.found == "a regular file"
        assert "try again" in (refused.value.hint or "")
    assert has_open(reader, checked), "by a name that it has no more"


def hold(path: str, checked: str) -> None:
    with pinned(path, checked):
        pass


def test_a_process_that_opened_another_one_meanwhile_is_found_out(image: Path) -> None:
    """The name leads to the right file again by the time one looks."""
    checked = file_id(image.stat())
    kept = image.with_suffix(".kept")
    image.rename(kept)
    image.write_text("another one")
    with image.open() as file, subprocess.Popen(["sleep", "60"], stdin=file) as process:
        kept.rename(image)
        check_path(str(image), checked)
        assert has_open(process.pid, checked) is False
        process.kill()


@pytest.mark.parametrize("look", [check_path, hold])
def test_a_file_that_is_gone_is_refused(image: Path, look: Callable[[str, str], None]) -> None:
    checked = file_id(image.stat())
    image.unlink()
    with pytest.raises(NoSuchDevice) as refused:
        look(str(image), checked)
    assert refused.value.found == "nothing"


def test_the_number_of_a_held_file_is_nobody_elses(image: Path) -> None:
    checked = file_id(image.stat())
    with pinned(str(image), checked):
        image.unlink()
        for name in range(50):
            other = image.with_suffix(f".{name}")
            other.write_text("a new one")
            assert file_id(other.stat()) != checked


def test_the_open_files_of_a_dead_process_are_unknown(image: Path, reader: int) -> None:
    checked = file_id(image.stat())
    assert has_open(reader, checked) is True
    assert has_open(None, checked) is None
    with subprocess.Popen(["true"]) as process:
        process.wait()
        assert has_open(process.pid, checked) is None
