"""vmplug's own files in a directory of specs: a process that writes them may be killed."""

import os
import resource
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from vmplug.cdi.own import OwnFiles
from vmplug.errors import HostError

PREFIX = "vmplug.org-"
ROUNDS, ATTEMPTS = 12, 10
TEXTS = {
    f"{PREFIX}{name}.yaml": f"kind: vmplug.org/{name}\n" + "devices: []\n" * 2000
    for name in ("disk", "vfio-8086-0108", "vhost-user-blk")
}


def other(text: str) -> str:
    return text.replace("[]", "[{}]")


def begin_to_write(directory: Path) -> int:
    """A process that writes again and again; it has begun."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        with suppress(BaseException), OwnFiles(str(directory), PREFIX) as own:
            own.update(TEXTS)
            os.write(writing, b"begun")
            while True:
                own.update(TEXTS)
                own.update({name: other(TEXTS[name]) for name in [*TEXTS][1:]})
        os._exit(1)  # it must never go on with the tests
    os.close(writing)
    begun = os.read(reading, 16)
    os.close(reading)
    assert begun == b"begun"
    return child


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_writer_leaves_whole_files(tmp_path: Path) -> None:
    directory = tmp_path / "cdi"
    drafts = 0
    for number in range(ROUNDS):
        writer = begin_to_write(directory)
        time.sleep(number / 1000)  # each at another moment of its work
        os.kill(writer, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
        for path in directory.iterdir():
            if path.suffix == ".tmp":
                drafts += 1
                continue
            below = path.read_text().partition("\n")[2].partition("\n")[2]
            assert below in {TEXTS[path.name], other(TEXTS[path.name])}
        with OwnFiles(str(directory), PREFIX) as own:
            own.update(TEXTS)
        assert sorted(os.listdir(directory)) == sorted(TEXTS)
    assert drafts, "no writer was killed while it wrote"


def test_what_goes_is_removed_though_nothing_can_be_written(tmp_path: Path) -> None:
    gone, kept, *_ = TEXTS
    with OwnFiles(str(tmp_path), PREFIX) as own:
        own.update(dict.fromkeys((gone, kept), "a"))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(HostError, match="File too large"):
                own.update({kept: TEXTS[kept]})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == [kept]
    assert (tmp_path / kept).read_text().endswith("a")


def test_a_file_that_others_make_in_that_moment_stays(tmp_path: Path) -> None:
    """Between the look at what is there and the end of the writing, which takes its time."""
    name = f"{PREFIX}disk.yaml"
    for number in range(ATTEMPTS):
        directory = tmp_path / str(number)
        directory.mkdir()
        made = threading.Thread(target=make_when_written, args=(directory, name))
        made.start()
        said = None
        try:
            with OwnFiles(str(directory), PREFIX) as own:
                own.update({name: "a" * (30 << 20)})
        except HostError as error:
            said = error.message
        made.join()
        if said:
            assert "File exists" in said
            assert (os.listdir(directory), (directory / name).read_text()) == ([name], "theirs")
            return
    pytest.fail("nobody was in time")


def make_when_written(directory: Path, name: str) -> None:
    while not os.listdir(directory):
        pass
    with suppress(FileExistsError), (directory / name).open("x") as file:
        file.write("theirs")
