"""Processes: is it still the same one?"""

import os
import subprocess
import sys

import pytest

from tests.support.tree import HostTree
from vmplug.host.process import is_running, read_start_time, wait_for_end
from vmplug.host.root import HostRoot


def stat_line(name: str, state: str, started: int) -> str:
    fields = " ".join(str(field) for field in range(4, 22))
    return f"42 ({name}) {state} {fields} {started} 23 24\n"


@pytest.mark.parametrize("name", ["qemu", "a b", "a) S 1 (b", "(", ")", "\udcff", "a\nb"])
def test_the_start_is_read_past_any_name(tree: HostTree, name: str) -> None:
    tree.file("/proc/42/stat", stat_line(name, "S", 777))
    assert read_start_time(42, tree.root) == 777


@pytest.mark.parametrize("state", ["Z", "X"])
def test_a_zombie_is_not_a_process(tree: HostTree, state: str) -> None:
    tree.file("/proc/42/stat", stat_line("qemu", state, 777))
    assert read_start_time(42, tree.root) is None
    assert not is_running(42, None, tree.root)


def test_another_process_of_the_same_number_is_not_the_same(tree: HostTree) -> None:
    tree.file("/proc/42/stat", stat_line("qemu", "R", 777))
    assert is_running(42, 777, tree.root)
    assert is_running(42, None, tree.root)
    assert not is_running(42, 776, tree.root)
    assert not is_running(43, None, tree.root)


def test_a_child_is_running_until_it_ends_also_while_nobody_has_reaped_it() -> None:
    root = HostRoot()
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        started = read_start_time(child.pid, root)
        assert is_running(child.pid, started, root)
        assert not wait_for_end(child.pid, 0)
        assert child.stdin
        child.stdin.close()
        assert wait_for_end(child.pid, 30)
        assert not is_running(child.pid, started, root)
    assert wait_for_end(child.pid, 0)


def test_we_are_running() -> None:
    assert is_running(os.getpid(), read_start_time(os.getpid(), HostRoot()), HostRoot())
