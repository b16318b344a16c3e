"""What guests and QEMU print is bounded, and what the last of them printed outlives a crash."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from guest.console import GuestConsole

from tests.cli.command import Vmplug
from tests.cli.started import END_S, booted, ending, started
from vmplug.host.process import find_marked, wait_for_end
from vmplug.hypervisor.keeper import KEEPER_MARK, LOG_BYTES

pytestmark = [pytest.mark.root, pytest.mark.qemu]

PRINT_S = 120.0


def keepers(directory: Path) -> set[int]:
    """The processes that keep the consoles of VMs below the directory."""
    found = find_marked(KEEPER_MARK)
    return {pid for pid, vm in found.items() if vm.startswith(f"{directory}/")}


def crash(pid: int) -> None:
    with ending({pid}):
        os.kill(pid, signal.SIGKILL)


def ended(vmplug: Vmplug) -> list[dict[str, Any]]:
    listed = vmplug("vm", "list", "--json").json()
    assert listed["vms"] == []
    return list(listed["ended"])


def print_numbers(console: GuestConsole, last: int) -> None:
    console.run(f"seq 1 {last} >/dev/ttyS0 && stty -F /dev/ttyS0 -a >/dev/null", PRINT_S)


def test_what_a_guest_prints_is_bounded_and_outlives_its_vm(vmplug: Vmplug) -> None:
    with started(vmplug, "sb1", flavour="cloud") as vm:
        directory = Path(vm.told["vm"]["directory"])
        (known,) = vmplug("vm", "list", "--json").json()["vms"]
        assert known["logs"] == str(directory)
        with booted(vm) as console:
            print_numbers(console, 285_000)  # 2.1 MiB
            console.run("echo the last words >/dev/ttyS0")
        crash(vm.pid)
        (known,) = vmplug("vm", "list", "--json").json()["vms"]
        assert (known["state"], known["logs"]) == ("gone", str(directory))
        repaired = vmplug("reconcile", "--json").json()
        (logs,) = ended(vmplug)
        assert repaired["logs"] == [logs]
        assert logs["vm"] == "sb1"
        assert not directory.exists()
        assert keepers(vmplug.state_dir) == set()
    kept = Path(logs["directory"])
    assert {path.name for path in kept.iterdir()} == {"console.log", "console.log.1", "qemu.log"}
    assert (kept / "console.log").stat().st_size < LOG_BYTES
    assert (kept / "console.log.1").stat().st_size == LOG_BYTES
    printed = (kept / "console.log.1").read_text() + (kept / "console.log").read_text()
    lines = printed.splitlines()
    assert lines[-1] == "the last words"
    numbers = list(map(int, lines[1:-1]))  # the first one may be cut
    assert numbers == list(range(numbers[0], 285_001))
    assert f"in {kept}\n" in vmplug("vm", "list").answer()


def test_what_qemu_prints_is_bounded(vmplug: Vmplug) -> None:
    """Some output is longer than any pipe; a VM that is stopped leaves nothing of it."""
    with started(vmplug, "sb1", extra=["-d", "in_asm,op"]) as vm:  # prints all of the firmware
        vm.oracle.execute("cont")
        directory = Path(vm.told["vm"]["directory"])
        older, deadline = directory / "qemu.log.1", time.monotonic() + PRINT_S
        while not older.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert older.stat().st_size == LOG_BYTES
        crash(vm.pid)
        vmplug("reconcile").answer()
    (logs,) = ended(vmplug)
    kept = {path.name: path.stat().st_size for path in Path(logs["directory"]).iterdir()}
    assert {"qemu.log", "qemu.log.1"} <= kept.keys()
    assert max(kept.values()) == LOG_BYTES


def test_the_logs_of_the_last_two_crashes_are_kept(vmplug: Vmplug) -> None:
    seen = list[str]()
    for _ in range(3):
        with started(vmplug, "sb1") as vm:
            Path(vm.told["vm"]["directory"], "console.log").write_text(f"process {vm.pid}")
            crash(vm.pid)
            seen.append(f"process {vm.pid}")
            vmplug("reconcile").answer()
    kept = [Path(logs["directory"], "console.log").read_text() for logs in ended(vmplug)]
    assert kept == seen[1:]


def test_a_new_vm_of_the_name_keeps_the_logs_and_a_stopped_one_leaves_none(vmplug: Vmplug) -> None:
    with started(vmplug, "sb1") as vm:
        crash(vm.pid)
        vmplug("vm", "stop", "sb1").answer()
        assert len(ended(vmplug)) == 1
    with started(vmplug, "sb1") as vm:
        crash(vm.pid)
        with started(vmplug, "sb1"):
            assert len(vmplug("vm", "list", "--json").json()["ended"]) == 2
            first = ended_names(vmplug)
            vmplug("vm", "stop", "sb1", "--timeout", "0").answer()
    assert ended_names(vmplug) == first
    assert keepers(vmplug.state_dir) == set()


def ended_names(vmplug: Vmplug) -> list[str]:
    return [logs["directory"] for logs in vmplug("vm", "list", "--json").json()["ended"]]


def test_a_guest_goes_on_when_the_keeper_of_its_console_dies(vmplug: Vmplug) -> None:
    with started(vmplug, "sb1", flavour="cloud") as vm, booted(vm) as console:
        while pids := keepers(vmplug.state_dir):  # the shell may start a dd after a look
            for pid in sorted(pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                assert wait_for_end(pid, END_S)
        print_numbers(console, 20_000)
        assert console.run("echo fine").strip() == "fine"
        assert vm.oracle.execute("query-status")["status"] == "running"
        vmplug("vm", "stop", "sb1", "--timeout", "0").answer()
    assert ended(vmplug) == []
