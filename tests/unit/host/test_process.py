"""Processes: is it still the same one?"""

import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.locked_memory import locked_memory
from tests.support.tree import HostTree
from vmplug.host.process import (
    end_processes,
    find_marked,
    is_running,
    read_start_time,
    wait_for_end,
)
from vmplug.host.root import HostRoot
from vmplug.host.use.silent import answer_within


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


@pytest.mark.parametrize("timeout_s", [3e6, 1e18, math.inf])
def test_a_wait_may_be_longer_than_the_kernel_can_wait(timeout_s: float) -> None:
    with subprocess.Popen(["sleep", "0.2"]) as child:
        assert wait_for_end(child.pid, timeout_s)
        assert child.wait(30) == 0


def test_the_end_is_also_seen_where_a_thousand_files_are_open() -> None:
    """select(2) knows no descriptor above 1023."""
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(1200, former[0]), former[1]))
    null = os.open("/dev/null", os.O_RDONLY)
    copies = [os.dup(null) for _ in range(1050)]
    try:
        with subprocess.Popen(["sleep", "60"]) as child:
            assert not wait_for_end(child.pid, 0)
            end_processes([child.pid], 30)
            assert child.wait(30) == -signal.SIGTERM
    finally:
        for copy in [null, *copies]:
            os.close(copy)
        resource.setrlimit(resource.RLIMIT_NOFILE, former)


_DEAF = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(flush=True)
while True:
    signal.pause()
"""


def test_who_does_not_end_in_time_is_killed_alone() -> None:
    """The others of its group, this process among them, go on."""
    with (
        subprocess.Popen([sys.executable, "-c", _DEAF], stdout=subprocess.PIPE) as deaf,
        subprocess.Popen(["sleep", "60"]) as tame,
    ):
        assert deaf.stdout
        deaf.stdout.readline()
        end_processes([deaf.pid, tame.pid], 0.1)
        assert (deaf.wait(30), tame.wait(30)) == (-signal.SIGKILL, -signal.SIGTERM)
    end_processes([deaf.pid, tame.pid], 0.1)


def test_we_are_running() -> None:
    assert is_running(os.getpid(), read_start_time(os.getpid(), HostRoot()), HostRoot())


@pytest.mark.root
def test_no_process_of_another_user_keeps_the_search_for_marks_waiting(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"], env={"VMPLUG_TEST": "here"})
    try:
        with locked_memory(tmp_path):
            found = answer_within(30, lambda: find_marked("VMPLUG_TEST"))
            assert found == {child.pid: "here"}
    finally:
        child.kill()
        child.wait()
