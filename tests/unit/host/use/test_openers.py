"""Who has a node open on the running host: by number, whatever the node is called."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmplug.host.root import THIS_HOST
from vmplug.host.use.namespaces import find_moved
from vmplug.host.use.openers import DeviceNode, Openers, find_openers

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


def openers(path: str = FULL) -> Openers:
    return find_openers([DeviceNode.of_char(path, THIS_HOST)], THIS_HOST)


def test_a_process_that_has_a_node_open_is_found_until_it_ends() -> None:
    with holding(FULL) as pid:
        assert (pid, FULL) in [(opener.pid, opener.path) for opener in openers().found]
    assert pid not in [opener.pid for opener in openers().found]


def test_a_process_that_has_another_node_open_is_not_found() -> None:
    with holding(NULL) as pid:
        assert pid not in [opener.pid for opener in openers().found]


def test_a_node_that_is_not_there_is_open_nowhere() -> None:
    assert openers("/dev/absent").found == ()


@pytest.mark.root
def test_another_name_of_the_node_does_not_hide_it(tmp_path: Path) -> None:
    other = tmp_path / "other-name"
    os.mknod(other, 0o20600, os.stat(FULL).st_rdev)
    with holding(other) as pid:
        assert (pid, FULL) in [(opener.pid, opener.path) for opener in openers().found]


@pytest.mark.root
def test_processes_that_cannot_be_looked_into_are_unknown() -> None:
    look = f"""
import os
from vmplug.host.root import THIS_HOST
from vmplug.host.use.openers import DeviceNode, find_openers
node = DeviceNode.of_char({FULL!r}, THIS_HOST)
os.setuid(65534)
print({os.getpid()} in find_openers([node], THIS_HOST).unknown)
"""
    done = subprocess.run([sys.executable, "-c", look], check=True, capture_output=True, text=True)
    assert done.stdout == "True\n"
    assert os.getpid() not in openers().unknown


@pytest.mark.root
def test_namespaces_are_left_again_and_a_stranger_is_in_none() -> None:
    before = os.stat("/proc/thread-self/ns/net").st_ino
    with subprocess.Popen(["unshare", "--net", "sleep", "60"]) as process:
        assert find_moved(frozenset({"no-such-device"})) is None
        process.kill()
    assert os.stat("/proc/thread-self/ns/net").st_ino == before
