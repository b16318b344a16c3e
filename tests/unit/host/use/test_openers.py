"""Who has a node open on the running host: by number, whatever the node is called."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmplug.host.block.usage import read_usage
from vmplug.host.process import list_other_threads
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.host.use.openers import DeviceNode, Opener, read_open_files, wanted_node

NULL, FULL = "/dev/null", "/dev/full"
HOLD = "import sys; file = open(sys.argv[1], 'rb'); print(flush=True); sys.stdin.read()"


@contextmanager
def holding(path: Path | str) -> Iterator[int]:
    """A process that has a file open; its number."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.communicate()


def openers(path: str = FULL) -> list[Opener]:
    wanted = wanted_node(DeviceNode.of_char(path, THIS_HOST), THIS_HOST)
    return read_open_files(THIS_HOST).find(wanted)


def test_a_process_that_has_a_node_open_is_found_until_it_ends() -> None:
    with holding(FULL) as pid:
        assert (pid, FULL) in [(opener.pid, opener.path) for opener in openers()]
    assert pid not in [opener.pid for opener in openers()]


def test_a_process_that_has_another_node_open_is_not_found() -> None:
    with holding(NULL) as pid:
        assert pid not in [opener.pid for opener in openers()]


def test_a_node_that_is_not_there_is_open_nowhere() -> None:
    assert openers("/dev/absent") == []


@pytest.mark.root
def test_another_name_of_the_node_does_not_hide_it(tmp_path: Path) -> None:
    other = tmp_path / "other-name"
    os.mknod(other, 0o20600, os.stat(FULL).st_rdev)
    with holding(other) as pid:
        assert (pid, FULL) in [(opener.pid, opener.path) for opener in openers()]


@pytest.mark.root
def test_processes_that_cannot_be_looked_into_are_unknown() -> None:
    look = f"""
import os
import vmplug.host.use.statx  # which that user may not read
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.host.use.openers import read_open_files
os.setuid(65534)
unlisted = read_open_files(THIS_HOST).unlisted
print({os.getpid()} in unlisted and 2 not in unlisted)
"""
    done = subprocess.run([sys.executable, "-c", look], check=True, capture_output=True, text=True)
    assert done.stdout == "True\n"
    assert read_open_files(THIS_HOST).unlisted == ()


@pytest.mark.root
def test_namespaces_are_left_again_and_a_stranger_is_in_none() -> None:
    before = os.stat("/proc/thread-self/ns/net").st_ino
    with subprocess.Popen(["unshare", "--net", "sleep", "60"]) as process:
        assert "no-such-device" not in read_usage(THIS_HOST).moved_interfaces
        process.kill()
    assert os.stat("/proc/thread-self/ns/net").st_ino == before


def test_the_threads_of_a_process_with_only_one_are_not_listed() -> None:
    """Most processes without open files are the kernel's own."""

    class Counting(HostRoot):
        listed = 0

        def list_dir(self, path: str) -> list[str]:
            self.listed += 1
            return super().list_dir(path)

    root = Counting("/")
    with holding(NULL) as pid:
        assert (list_other_threads(pid, root), root.listed) == ([], 0)
    script = "import threading, sys; threading.Thread(target=sys.stdin.read).start(); print(1)"
    command = [sys.executable, "-u", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert (len(list_other_threads(process.pid, root)), root.listed) == (1, 1)
        process.communicate()
