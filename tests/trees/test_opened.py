"""Is what a process has open what was checked?"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmplug.errors import NoSuchDevice
from vmplug.host.opened import check_opened, file_id, read_open_files


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


def test_what_is_open_and_in_its_place_is_what_was_checked(image: Path, reader: int) -> None:
    check_opened(str(image), file_id(image.stat()), read_open_files(reader))


def test_a_file_that_was_put_in_its_place_is_refused(image: Path, reader: int) -> None:
    checked = file_id(image.stat())
    replace(image)
    with pytest.raises(NoSuchDevice, match="replaced it meanwhile") as refused:
        check_opened(str(image), checked, read_open_files(reader))
    assert refused.value.found == "a regular file"
    assert "try again" in (refused.value.hint or "")


def test_a_process_that_opened_another_one_meanwhile_is_found_out(image: Path) -> None:
    """The name leads to the right file again by the time one looks."""
    checked = file_id(image.stat())
    kept = image.with_suffix(".kept")
    image.rename(kept)
    image.write_text("another one")
    with image.open() as file, subprocess.Popen(["sleep", "60"], stdin=file) as process:
        kept.rename(image)
        assert file_id(image.stat()) == checked
        with pytest.raises(NoSuchDevice):
            check_opened(str(image), checked, read_open_files(process.pid))
        process.kill()


def test_a_file_that_is_gone_is_refused(image: Path, reader: int) -> None:
    checked = file_id(image.stat())
    image.unlink()
    with pytest.raises(NoSuchDevice) as refused:
        check_opened(str(image), checked, read_open_files(reader))
    assert refused.value.found == "nothing"


def test_where_the_process_opened_nothing_the_name_must_do(image: Path) -> None:
    checked = file_id(image.stat())
    check_opened(str(image), checked, ())
    replace(image)
    with pytest.raises(NoSuchDevice):
        check_opened(str(image), checked, ())


def test_pipes_sockets_and_the_dead_have_no_names() -> None:
    assert not read_open_files(None)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        found = read_open_files(process.pid)
        process.kill()
    assert len(found) <= 1, "more than what it has from us as stderr"
    assert not read_open_files(process.pid)
