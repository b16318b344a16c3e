"""Which process is the VM's: by its number and start time, behind a proxy and in a namespace."""

import os
from pathlib import Path

import pytest

from tests.support.tree import HostTree
from vmplug.drivers.ports import Endpoint
from vmplug.host.process import find_guest_process, read_start_time
from vmplug.host.root import THIS_HOST
from vmplug.hypervisor.fake.monitor import FakeMonitor
from vmplug.hypervisor.qemu.running import Qemu

PROXY, QEMU = 100, 200


def host(tmp_path: Path, *, program: str = "/usr/bin/qemu-system-x86_64") -> HostTree:
    """A proxy without other threads, and a QEMU with two that run its guest's CPUs."""
    tree = HostTree(tmp_path)
    for pid, threads in ((PROXY, [100]), (QEMU, [200, 201, 202])):
        for thread in threads:
            status = f"Name:\tx\nTgid:\t{pid}\nNSpid:\t{thread}\n"
            tree.file(f"/proc/{thread}/status", status)
            tree.file(f"/proc/{pid}/task/{thread}/status", status)
    return tree.link(f"/proc/{QEMU}/exe", program)


def test_a_reused_number_is_not_the_vms_process() -> None:
    started_at = read_start_time(os.getpid(), THIS_HOST)
    assert started_at
    own = Endpoint("/s", os.getpid(), started_at)
    assert Qemu(FakeMonitor(), own).endpoint == own
    other = Qemu(FakeMonitor(), Endpoint("/s", os.getpid(), started_at - 1))
    assert other.endpoint == Endpoint("/s", None, None)


@pytest.mark.parametrize("peer", [QEMU, PROXY, None])
def test_qemu_is_found_whoever_answers_for_it(tmp_path: Path, peer: int | None) -> None:
    assert find_guest_process([201, 202], peer, host(tmp_path).root) == QEMU


def test_a_qemu_in_a_pid_namespace_numbers_its_threads_itself(tmp_path: Path) -> None:
    tree = host(tmp_path)
    tree.file("/proc/300/task/301/status", "Tgid:\t300\nNSpid:\t301\t201\n")
    assert find_guest_process([201], 300, tree.root) == 300


@pytest.mark.parametrize("threads", [[], [201, 203], [301], [7]])
def test_numbers_that_no_qemu_here_has_name_nobody(tmp_path: Path, threads: list[int]) -> None:
    tree = host(tmp_path)
    inside = "Tgid:\t300\nNSpid:\t301\t7\n"  # the thread 7 of another namespace
    tree.file("/proc/301/status", inside).file("/proc/300/task/301/status", inside)
    assert find_guest_process(threads, PROXY, tree.root) is None


def test_a_thread_of_another_program_names_nobody(tmp_path: Path) -> None:
    tree = host(tmp_path, program="/usr/bin/python3")
    assert find_guest_process([201], PROXY, tree.root) is None


def test_a_qemu_names_no_other_vms_process(tmp_path: Path) -> None:
    tree = host(tmp_path).link(f"/proc/{PROXY}/exe", "/usr/bin/qemu-system-x86_64")
    assert find_guest_process([201, 202], PROXY, tree.root) is None
