"""Real VMs from the command line: started, adopted, plugged into, killed, cleaned up after."""

import json
import os
import re
import select
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from guest.console import GuestConsole, GuestDisk, running_time

from tests.cli.command import (
    Vmplug,
    device,
    ended,
    first_in_path,
    number_of,
    write_bundle,
)
from tests.cli.monitors import Gate, MemoryVm, Talker
from tests.cli.started import ending, no_qemu_left
from tests.cli.world import (
    loops_below,
    names_in_qemu,
    processes_below,
    qemus_below,
    take_picture,
)
from tests.contract.world import journal_rows
from tests.support.disks import disk_image, loop_device
from tests.support.raw_qmp import RawQmp
from tests.support.vm import BUILT_GUEST, BUSY_HOST, GuestVm, root_ports, scsi_controller, start_vm
from vmplug.host.process import read_start_time
from vmplug.host.root import HostRoot

pytestmark = [pytest.mark.root, pytest.mark.qemu]

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
END_S = 60.0

ATTACHMENT_KEYS = {
    "id",
    "device_id",
    "vm",
    "owner",
    "name",
    "container_path",
    "host_path",
    "kind",
    "read_only",
    "count",
    "state",
    "guest",
}
"""Of one attachment, version 1."""

GUEST_KEYS = {
    "pci_path",
    "scsi_address",
    "ccw_devno",
    "virt_path",
    "nvdimm_id",
    "nvdimm_handle",
    "mount_tag",
    "mac_address",
    "functions",
    "ap_queues",
    "agent",
}
"""Where the guest sees it, version 1; what does not apply is null."""

AGENT_KEYS = {"type", "vm_path", "id", "options"}


@dataclass(frozen=True, slots=True)
class Running:
    """A VM that `vmplug vm start` started with the tiny guest, and two ways to look into it."""

    vmplug: Vmplug
    name: str
    pid: int
    oracle: RawQmp
    console: GuestConsole
    directory: Path

    def attach(self, node: Path, owner: str = "ctr1", *more: str) -> dict[str, Any]:
        """The one attachment of a loop device."""
        asked = ("--device", f"b:{number_of(node)}:/dev/xvda", "--vm", self.name)
        document = self.vmplug("attach", *asked, "--owner", owner, *more, "--json").json()
        (attachment,) = document["attachments"]
        return dict(attachment)

    def listed(self) -> list[dict[str, Any]]:
        """What another process says is attached."""
        document = self.vmplug("list", "--vm", self.name, "--json").json()
        return list(document["attachments"])

    def names(self) -> frozenset[str]:
        """Everything in QEMU that has a name."""
        return names_in_qemu(self.oracle)

    def vmplugs_names(self) -> set[str]:
        """The names in QEMU that vmplug gave."""
        return {name for name in self.names() if name.startswith("vmplug-")}


def start_words(name: str, directory: Path, *, guest: bool = True, ports: int = 4) -> list[str]:
    """The words that start a VM with a second monitor, and the tiny guest's second serial port."""
    words = ["vm", "start", name, "--accel", "tcg", "--memory", "256", "--ports", str(ports)]
    if guest:
        words += ["--kernel", str(BUILT_GUEST / "vmlinuz")]
        words += ["--initrd", str(BUILT_GUEST / "initrd.img")]
        words += ["--append", f"console=ttyS0 quiet panic=-1 {BUSY_HOST}"]
    words += ["--json", "--"]
    for channel in ("oracle", "guest"):
        path = directory / f"{name}-{channel}.sock"
        words += ["-chardev", f"socket,id={channel},path={path},server=on,wait=off"]
    return [*words, "-qmp", "chardev:oracle", "-serial", "chardev:guest"]


@contextmanager
def started(vmplug: Vmplug, name: str) -> Iterator[Running]:
    """A VM with a booted guest, of the test's own."""
    directory = vmplug.state_dir.parent
    with ExitStack() as stack:
        stack.enter_context(no_qemu_left(directory))
        told = vmplug(*start_words(name, directory)).json()["vm"]
        oracle = stack.enter_context(RawQmp.connect(directory / f"{name}-oracle.sock"))
        clock = running_time(told["pid"])
        path = directory / f"{name}-guest.sock"
        console = stack.enter_context(GuestConsole.connect(path, clock=clock))
        yield Running(vmplug, name, told["pid"], oracle, console, directory)


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with (
        tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp") as directory,
        started(Vmplug(Path(directory) / "state"), "sb1") as vm,
    ):
        yield vm


@pytest.fixture
def vm(shared: Running) -> Iterator[Running]:
    """The VM that most tests share; each leaves it as it was."""
    first = shared.names()
    yield shared
    assert shared.names() == first
    assert shared.console.wait_for_disks(0) == []
    assert shared.listed() == []


@pytest.fixture
def make_loop(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes loop devices of 8 MiB that begin with their name."""
    with ExitStack() as stack:

        def make(name: str) -> Path:
            image = disk_image(tmp_path / f"{name}.img", 8, name)
            return stack.enter_context(loop_device(image))

        yield make


def only_disk(vm: Running) -> GuestDisk:
    (disk,) = vm.console.wait_for_disks(1)
    return disk


# vm start, adopt, list, stop


def machine_of(oracle: RawQmp) -> str:
    """The machine's name, with QEMU's version in it."""
    name: str = oracle.execute("qom-get", path="/machine", property="type")
    return name.removesuffix("-machine")


def test_a_started_vm_is_known_and_outlives_the_command(vm: Running) -> None:
    (known,) = vm.vmplug("vm", "list", "--json").json()["vms"]
    assert known == {
        "name": "sb1",
        "state": "running",
        "pid": vm.pid,
        "machine": machine_of(vm.oracle),
        "free_ports": 4,
        "scsi_controllers": 1,
        "shared_memory": True,
        "foreign_devices": 0,
        "attachments": 0,
        "failed_disks": [],
        "qmp": str(vm.vmplug.state_dir / "vm" / "sb1" / "qmp.sock"),
        "logs": str(vm.vmplug.state_dir / "vm" / "sb1"),
    }
    assert qemus_below(vm.vmplug.state_dir) == [vm.pid]
    directory = vm.vmplug.state_dir / "vm" / "sb1"
    assert {path.name for path in directory.iterdir()} >= {"qmp.sock", "console.log"}
    assert vm.console.run("echo alive") == "alive"
    lines = vm.vmplug("vm", "list").answer().splitlines()
    assert lines[0].startswith("VM ")
    assert lines[1].split()[:2] == ["sb1", "running"]


def test_the_list_of_vms_says_what_each_is_doing(vm: Running) -> None:
    for command, state in (("stop", "paused"), ("cont", "running")):
        vm.oracle.execute(command)
        _, line = vm.vmplug("vm", "list").answer().splitlines()
        assert line.split()[:3] == ["sb1", state, str(vm.pid)]


def test_a_vm_gets_what_the_options_say(vmplug: Vmplug, tmp_path: Path) -> None:
    directory = vmplug.state_dir.parent
    disk = disk_image(tmp_path / "a disk, with a comma.raw", 1, "boot")
    words = start_words("sb2", directory, guest=False, ports=2)
    more = ("--cpus", "2", "--disk", str(disk))
    with no_qemu_left(directory):
        told = vmplug(*words[:3], *more, *words[3:]).json()["vm"]
        assert told.keys() == {"name", "qmp", "pid", "directory", "accel", "why_not_kvm"}
        with RawQmp.connect(directory / "sb2-oracle.sock") as oracle:
            assert len(oracle.execute("query-cpus-fast")) == 2
            memory = oracle.execute("query-memory-size-summary")
            assert memory["base-memory"] == 256 * MIB
            nodes = oracle.execute("query-named-block-nodes", flat=True)
            assert str(disk) in {node["file"] for node in nodes}
            names = names_in_qemu(oracle)
        assert {"rp0", "rp1", "scsi0"} <= names
        assert "rp2" not in names
        assert vmplug("vm", "stop", "sb2", "--timeout", "0").status == 0
    assert disk.read_bytes().startswith(b"boot.")


def test_stopping_ends_a_vm_and_gives_back_what_it_held(
    vmplug: Vmplug, make_loop: Callable[[str], Path], tmp_path: Path
) -> None:
    node = make_loop("held")
    directory = vmplug.state_dir.parent
    loops = loops_below(tmp_path)
    with no_qemu_left(directory):
        vmplug(*start_words("sb2", directory, guest=False)).json()
        asked = ("--device", f"b:{number_of(node)}")
        attached = vmplug("attach", *asked, "--vm", "sb2", "--owner", "ctr1", "--json").json()
        told = vmplug("vm", "stop", "sb2", "--timeout", "0", "--json").json()
        assert told["vm"] == {"name": "sb2"}
        assert told["released"] == [attached["attachments"][0]["id"]]
        assert processes_below(directory) == []
    assert not any(journal_rows(vmplug.state_dir).values())
    assert not (vmplug.state_dir / "vm" / "sb2").exists()
    assert loops_below(tmp_path) == loops
    assert vmplug("check", *asked).answer().endswith("may be handed over\n")
    assert vmplug("vm", "list").answer() == "no VM is known\n"


def test_a_guest_that_ignores_the_power_button_is_ended_in_time(vmplug: Vmplug) -> None:
    directory = vmplug.state_dir.parent
    with no_qemu_left(directory):
        pid = vmplug(*start_words("sb2", directory, guest=False)).json()["vm"]["pid"]
        stopped = vmplug("vm", "stop", "sb2", "--timeout", "0.5").answer()
        assert stopped == "VM sb2 is stopped\n"
        assert pid not in processes_below(directory)


def test_a_guest_that_powers_down_is_waited_for(vmplug: Vmplug) -> None:
    with started(vmplug, "sb2") as vm:
        stopping = vmplug.begin("vm", "stop", "sb2", "--timeout", "60")
        vm.oracle.wait_event("POWERDOWN")
        with pytest.raises(ConnectionError):  # the guest is off before it could answer
            vm.console.run("sync; poweroff -f")
        assert ended(stopping).answer() == "VM sb2 is stopped\n"
        assert processes_below(vm.directory) == []


def test_an_adopted_vm_is_left_running_and_keeps_what_it_holds(
    vmplug: Vmplug, tmp_path: Path, make_loop: Callable[[str], Path]
) -> None:
    node = make_loop("held")
    with start_vm(tmp_path, devices=[*root_ports(2), *scsi_controller()]) as vm:
        vm.console.run("true")
        told = vmplug("vm", "adopt", "sb3", "--qmp", vm.qmp_path, "--json").json()["vm"]
        assert told == {
            "name": "sb3",
            "qmp": str(vm.qmp_path),
            "pid": vm.pid,
            "machine": machine_of(vm.oracle),
            "qmp_open_to_all": False,
            "foreign_devices": 0,
        }
        asked = ("--device", f"b:{number_of(node)}", "--vm", "sb3", "--owner", "ctr1")
        vmplug("attach", *asked).answer()
        before = take_picture(vmplug.state_dir, [vm.oracle], tmp_path)
        refused = vmplug("vm", "stop", "sb3", "--json")
        assert (refused.status, refused.error()["code"]) == (6, "still-attached")
        assert take_picture(vmplug.state_dir, [vm.oracle], tmp_path) == before
        vmplug("detach", "--owner", "ctr1").answer()
        assert vmplug("vm", "stop", "sb3").answer() == "VM sb3 is forgotten\n"
        assert vm.oracle.execute("query-status")["running"] is True
        assert vm.console.wait_for_disks(0) == []
    assert not any(journal_rows(vmplug.state_dir).values())


def test_a_vm_whose_monitor_is_taken_is_busy(vmplug: Vmplug, tmp_path: Path) -> None:
    with start_vm(tmp_path, devices=root_ports(1), guest=False) as vm:
        vmplug("vm", "adopt", "sb3", "--qmp", vm.qmp_path).answer()
        with RawQmp.connect(vm.qmp_path):
            (known,) = vmplug("vm", "list", "--json").json()["vms"]
            assert (known["name"], known["state"], known["machine"]) == ("sb3", "busy", None)
        (known,) = vmplug("vm", "list", "--json").json()["vms"]
        assert known["state"] == "running"


@pytest.mark.parametrize("attempt", range(3))  # who comes first is up to the scheduler
def test_one_of_two_starts_of_one_name_wins(vmplug: Vmplug, attempt: int) -> None:
    directory = vmplug.state_dir.parent
    words = ("vm", "start", "sb2", "--accel", "tcg", "--ports", "1", "--json")
    with no_qemu_left(directory):
        vmplug("list").answer()
        begun = [vmplug.begin(*words) for _ in range(2)]
        results = sorted((ended(process) for process in begun), key=lambda done: done.status)
        assert [done.status for done in results] == [0, 6], results
        assert qemus_below(directory) == [results[0].json()["vm"]["pid"]]
        assert results[1].error()["code"] == "wrong-state"
        (known,) = vmplug("vm", "list", "--json").json()["vms"]
        assert known["state"] == "running"
        assert vmplug("vm", "stop", "sb2", "--timeout", "0").status == 0


@pytest.mark.parametrize("words", [("reconcile",), ("vm", "stop", "sb2")])
def test_a_start_that_was_killed_is_undone_with_its_qemu(
    vmplug: Vmplug, tmp_path: Path, words: tuple[str, ...]
) -> None:
    with silent_start(vmplug, tmp_path) as (starting, qemu):
        refused = vmplug("vm", "stop", "sb2", "--json")
        assert (refused.status, refused.error()["facts"]["state"]) == (6, "starting")
        assert vmplug("reconcile").status == 0
        (known,) = vmplug("vm", "list", "--json").json()["vms"]
        assert (known["state"], known["pid"]) == ("starting", qemu)
        starting.kill()
        assert ended(starting).status == -signal.SIGKILL
        (known,) = vmplug("vm", "list", "--json").json()["vms"]
        assert known["state"] == "interrupted"
        assert vmplug("attach", "--device", "rng", "--vm", "sb2", "--owner", "c").status == 6
        with ending({qemu}):
            assert vmplug(*words).status == 0
        assert vmplug("vm", "list").answer() == "no VM is known\n"
    assert not any(journal_rows(vmplug.state_dir).values())
    assert list((vmplug.state_dir / "vm").iterdir()) == []


@pytest.mark.parametrize("again", [False, True])
def test_a_start_that_is_interrupted_leaves_no_qemu(
    vmplug: Vmplug, tmp_path: Path, *, again: bool
) -> None:
    """As by Ctrl-C, at the moment that waits for QEMU."""
    with silent_start(vmplug, tmp_path) as (starting, qemu):
        with ending({qemu}):
            starting.send_signal(signal.SIGINT)
            assert ended(starting).status == 130
        assert vmplug("vm", "list").answer() == "no VM is known\n"
        assert list((vmplug.state_dir / "vm").iterdir()) == []
        if again:
            vmplug(*start_words("sb2", tmp_path, guest=False)).answer()
            assert vmplug("vm", "stop", "sb2", "--timeout", "0").status == 0


def test_a_qemu_that_hangs_is_ended_in_time(vmplug: Vmplug) -> None:
    directory = vmplug.state_dir.parent
    with no_qemu_left(directory):
        pid = vmplug(*start_words("sb2", directory, guest=False)).json()["vm"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        (known,) = vmplug("vm", "list", "--json").json()["vms"]
        assert (known["state"], known["pid"]) == ("busy", pid)
        with ending({pid}):
            assert vmplug("vm", "stop", "sb2", "--timeout", "1").status == 0
    assert not any(journal_rows(vmplug.state_dir).values())


def set_process(vmplug: Vmplug, name: str, pid: int, started_at: int | None) -> None:
    """Give a VM another process in the journal."""
    with closing(sqlite3.connect(vmplug.state_dir / "journal.db")) as db, db:
        db.execute("UPDATE vm SET pid = ?, started_at = ? WHERE name = ?", (pid, started_at, name))


@pytest.mark.parametrize("row", ["is of another time", "is of a process that runs"])
def test_a_vm_is_not_forgotten_while_its_qemu_answers(
    vmplug: Vmplug, make_loop: Callable[[str], Path], row: str
) -> None:
    """Its row names another process, which nobody harms."""
    asked = f"b:{number_of(make_loop('a'))}:/dev/xvda"
    words = ("--device", asked, "--vm", "sb2", "--owner", "ctr1")
    idle = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True)
    with no_qemu_left(vmplug.state_dir.parent), idle as other:
        told = vmplug(*start_words("sb2", vmplug.state_dir.parent, guest=False)).json()["vm"]
        vmplug("attach", *words).answer()
        began = read_start_time(other.pid, HostRoot()) if "runs" in row else 1
        for verb in ("vm list", "list", "reconcile", "vm stop sb2"):
            set_process(vmplug, "sb2", other.pid, began)
            with ending({told["pid"]} if verb == "vm stop sb2" else set()):
                assert vmplug(*verb.split()).status == 0
            assert len(journal_rows(vmplug.state_dir)["vm"]) == (verb != "vm stop sb2"), verb
            assert other.poll() is None


def test_a_vm_that_hangs_is_not_forgotten_where_its_process_is_unknown(vmplug: Vmplug) -> None:
    directory = vmplug.state_dir.parent
    with no_qemu_left(directory):
        told = vmplug(*start_words("sb2", directory, guest=False)).json()["vm"]
        set_process(vmplug, "sb2", told["pid"], 1)
        os.kill(told["pid"], signal.SIGSTOP)
        refused = vmplug("vm", "stop", "sb2", "--timeout", "1")
        assert (refused.status, "VM sb2 still runs" in refused.stderr) == (5, True)
        assert vmplug("reconcile").status == 5
        assert len(journal_rows(vmplug.state_dir)["vm"]) == 1
        os.kill(told["pid"], signal.SIGCONT)
        with ending({told["pid"]}):
            assert vmplug("vm", "stop", "sb2", "--timeout", "1").status == 0


@contextmanager
def silent_start(vmplug: Vmplug, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`vm start sb2`, with a program for QEMU that says when it runs and then hangs; its pid."""
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    fake = tmp_path / "bin" / "qemu-system-x86_64"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$$" >{ready}\nexec sleep 600\n')
    fake.chmod(0o755)
    path = first_in_path(fake.parent)
    with no_qemu_left(vmplug.state_dir.parent):
        starting = vmplug.begin("vm", "start", "sb2", "--accel", "tcg", env=path)
        try:
            yield starting, int(ready.read_text())
        finally:
            starting.kill()
            starting.communicate()


# plan, attach, list, detach


def test_a_bundles_disk_goes_into_the_guest_and_comes_back(
    vm: Running, make_loop: Callable[[str], Path], tmp_path: Path
) -> None:
    node = make_loop("from the host")
    vmplug = vm.vmplug
    wanted = device("/dev/xvda", number_of(node))
    bundle = write_bundle(tmp_path / "ctr1", wanted, device("/dev/null", "1:3", "c"))
    assert vmplug("check", bundle).status == 0
    document = vmplug("attach", bundle, "--vm", "sb1", "--json").json()
    assert document.keys() == {"vm", "attachments"}
    disk, null = document["attachments"]
    assert disk.keys() == null.keys() == ATTACHMENT_KEYS
    wanted = {
        "vm": "sb1",
        "owner": "ctr1",
        "name": "/dev/xvda",
        "container_path": "/dev/xvda",
        "host_path": str(node),
        "kind": "block",
        "read_only": False,
        "count": 1,
        "state": "attached",
    }
    assert wanted.items() <= disk.items()
    assert (null["host_path"], null["guest"]) == ("/dev/null", None)

    seen = only_disk(vm)
    assert (seen.marker, seen.size_bytes, seen.read_only) == ("from the host", 8 * MIB, False)
    assert seen.pci_path == disk["guest"]["pci_path"]
    assert disk["guest"]["agent"] == {
        "type": "blk",
        "id": seen.pci_path,
        "vm_path": "",
        "options": [],
    }
    vm.console.write(seen.name, 0, b"from the guest")
    assert node.read_bytes().startswith(b"from the guest")

    present = {"host": {"state": "present", "detail": None}}
    assert vm.listed() == [hold | present for hold in document["attachments"]]
    assert disk["id"] in vmplug("list").answer()
    refused = vmplug("check", bundle, "--json")
    assert (refused.status, refused.json()["problems"][0]["code"]) == (4, "in-use-by-vm")
    assert vmplug("reconcile").answer() == "the journal and the VMs agree\n"

    detached = vmplug("detach", "--owner", "ctr1", "--json").json()["detached"]
    assert {hold["id"] for hold in detached} == {disk["id"], null["id"]}
    assert vm.console.wait_for_disks(0) == []
    assert vmplug("list").answer() == "nothing is attached\n"
    assert vmplug("check", bundle).status == 0
    assert vmplug("reconcile", "--json").json() == {"repairs": [], "bindings": [], "errors": []}


def test_where_the_guest_sees_it_has_every_key_of_the_contract(
    vm: Running, make_loop: Callable[[str], Path]
) -> None:
    guest = vm.attach(make_loop("a"))["guest"]
    vm.vmplug("detach", "--owner", "ctr1").answer()
    assert guest.keys() == GUEST_KEYS
    assert guest["agent"].keys() == AGENT_KEYS


def test_what_plan_tells_can_be_done_and_undone_by_hand(
    vm: Running, make_loop: Callable[[str], Path]
) -> None:
    node = make_loop("by hand")
    asked = ("plan", "--device", f"b:{number_of(node)}", "--vm", "sb1", "-o", "bps-total=10M")
    before = take_picture(vm.vmplug.state_dir, [vm.oracle], node.parent)
    document = vm.vmplug(*asked, "--json").json()
    assert take_picture(vm.vmplug.state_dir, [vm.oracle], node.parent) == before
    assert document.keys() == {"vm", "steps"}
    steps = document["steps"]
    assert [step["do"]["execute"] for step in steps] == [
        "object-add",
        "blockdev-add",
        "blockdev-add",
        "device_add",
    ]
    for step in steps:
        vm.oracle.execute(step["do"]["execute"], step["do"]["arguments"])
    assert only_disk(vm).marker == "by hand"
    for step in reversed(steps):
        vm.oracle.execute(step["undo"]["execute"], step["undo"]["arguments"])
        if step["undo"]["execute"] == "device_del":
            vm.oracle.wait_event("DEVICE_DELETED", device=step["undo"]["arguments"]["id"])


def test_plan_is_sentences_and_with_v_the_commands_too(
    vm: Running, make_loop: Callable[[str], Path]
) -> None:
    node = make_loop("a")
    asked = ("plan", "--device", f"b:{number_of(node)}", "--vm", "sb1")
    told = [
        f" 1  open {node} for writing, direct I/O",
        "    undo: close it",
        " 2  show it to the guest at port rp0, PCI path 04/00",
        "    undo: ask the guest to release it, and take it out",
    ]
    assert vm.vmplug(*asked).answer().splitlines() == told
    lines = vm.vmplug(*asked, "-v").stdout.splitlines()
    assert lines[::2] == told
    commands = [line.strip().partition(" ")[::2] for line in lines[1::2]]
    steps = ["blockdev-add", "blockdev-del", "device_add", "device_del"]
    assert [execute for execute, _ in commands] == steps
    node_name = json.loads(commands[0][1])["node-name"]
    assert json.loads(commands[1][1]) == {"node-name": node_name}


def test_options_reach_the_guest(vm: Running, make_loop: Callable[[str], Path]) -> None:
    options = ("-o", "block-driver=virtio-scsi", "-o", "serial=DATA-1", "-o", "cache=directsync")
    attached = vm.attach(make_loop("a"), "ctr1", "--read-only", *options)
    disk = only_disk(vm)
    guest = attached["guest"]
    assert disk.scsi_address == guest["scsi_address"]
    assert disk.pci_path == guest["pci_path"]
    assert guest["agent"] == {
        "type": "scsi",
        "id": disk.scsi_address,
        "vm_path": "",
        "options": ["ro"],
    }
    assert (disk.serial, disk.read_only, disk.write_cache) == ("DATA-1", True, "write through")
    vm.vmplug("detach", attached["id"]).answer()


def test_attaching_twice_counts_and_the_last_detach_unplugs(
    vm: Running, make_loop: Callable[[str], Path]
) -> None:
    node = make_loop("a")
    first, again = vm.attach(node), vm.attach(node)
    assert (again["id"], again["count"]) == (first["id"], 2)
    assert " x2 " in vm.vmplug("list").answer()
    held = vm.vmplugs_names()
    assert vm.vmplug("detach", first["id"]).answer().startswith(f"still held {first['id']} ")
    assert vm.vmplugs_names() == held
    assert only_disk(vm).marker == "a"
    assert vm.vmplug("detach", first["id"]).answer().startswith(f"detached {first['id']} ")
    assert vm.console.wait_for_disks(0) == []


def test_a_shared_disk_stays_until_its_last_owner_lets_go(
    vm: Running, make_loop: Callable[[str], Path]
) -> None:
    node = make_loop("a")
    for owner in ("ctr1", "ctr1", "ctr2"):
        vm.attach(node, owner)
    assert [(hold["owner"], hold["count"]) for hold in vm.listed()] == [("ctr1", 2), ("ctr2", 1)]
    vm.vmplug("detach", "--owner", "ctr1").answer()
    assert [hold["owner"] for hold in vm.listed()] == ["ctr2"]
    assert only_disk(vm).marker == "a"
    vm.vmplug("detach", "--owner", "ctr2").answer()
    assert vm.console.wait_for_disks(0) == []


def test_a_device_that_is_only_counted_is_never_in_the_vm(vm: Running) -> None:
    before = vm.names()
    asked = ("--device", "c:1:3:/dev/null", "--vm", "sb1", "--owner", "ctr1")
    assert "counted, not given to the VM" in vm.vmplug("attach", *asked).answer()
    assert vm.names() == before
    vm.vmplug("detach", "--owner", "ctr1").answer()


def test_two_processes_may_attach_at_the_same_time(
    vm: Running, make_loop: Callable[[str], Path]
) -> None:
    numbers = [number_of(make_loop(name)) for name in ("one", "two")]
    begun = [
        vm.vmplug.begin("attach", "-d", f"b:{number}", "--vm", "sb1", "--owner", f"of-{number}")
        for number in [*numbers, *numbers]
    ]
    results = [ended(process) for process in begun]
    assert [done.status for done in results] == [0] * 4, results
    assert {disk.marker for disk in vm.console.wait_for_disks(2)} == {"one", "two"}
    assert [hold["count"] for hold in vm.listed()] == [2, 2]
    for number in numbers:
        vm.vmplug("detach", "--owner", f"of-{number}").answer()


def test_a_file_grows_while_the_guest_runs(vm: Running, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "grows.img", 8, "grows")
    asked = ("--device", f"file:{image}", "--vm", "sb1", "--owner", "ctr1", "--json")
    (attached,) = vm.vmplug("attach", *asked).json()["attachments"]
    disk = only_disk(vm)
    told = vm.vmplug("resize", attached["id"], "--size", "16M", "--json").json()
    ids = {key: attached[key] for key in ("id", "device_id")}
    assert told == {**ids, "size_bytes": 16 * MIB}
    wait_for_size(vm, disk.name, 16 * MIB)
    assert image.stat().st_size == 16 * MIB
    assert vm.vmplug("resize", attached["id"]).answer() == f"{image} has 16 MiB in VM sb1\n"
    vm.vmplug("detach", "--owner", "ctr1").answer()


def test_a_device_that_grew_on_the_host_grows_in_the_guest(
    vm: Running, make_loop: Callable[[str], Path], tmp_path: Path
) -> None:
    node = make_loop("grows")
    attached = vm.attach(node)
    disk = only_disk(vm)
    os.truncate(tmp_path / "grows.img", 12 * MIB)
    subprocess.run(["losetup", "--set-capacity", node], check=True)
    assert vm.vmplug("resize", attached["id"]).answer() == f"{node} has 12 MiB in VM sb1\n"
    wait_for_size(vm, disk.name, 12 * MIB)
    vm.vmplug("detach", "--owner", "ctr1").answer()


def wait_for_size(vm: Running, name: str, size_bytes: int) -> None:
    """The guest waits until its disk has that size."""
    size = f"cat /sys/block/{name}/size"
    vm.console.run(f'until [ "$({size})" = {size_bytes // 512} ]; do usleep 10000; done')


def test_a_disk_that_qemu_refuses_takes_the_others_with_it(
    vm: Running, make_loop: Callable[[str], Path], tmp_path: Path
) -> None:
    """The second disk is open in another QEMU, which the operator allows and QEMU does not."""
    good, foreign = make_loop("good"), disk_image(tmp_path / "foreign.img", 1, "foreign")
    (tmp_path / "other").mkdir()
    node = {"driver": "file", "node-name": "foreign", "filename": str(foreign)}
    disk = {"driver": "virtio-blk-pci", "drive": "foreign"}
    extra = ["-blockdev", json.dumps(node), "-device", json.dumps(disk)]
    with start_vm(tmp_path / "other", extra=extra, guest=False):
        before = take_picture(vm.vmplug.state_dir, [vm.oracle], tmp_path)
        asked = ("-d", f"b:{number_of(good)}", "-d", f"file:{foreign}", "--allow", "image-locked")
        refused = vm.vmplug("attach", *asked, "--vm", "sb1", "--owner", "ctr1", "--json")
        assert (refused.status, refused.error()["code"]) == (5, "command-failed")
        assert take_picture(vm.vmplug.state_dir, [vm.oracle], tmp_path) == before


def test_two_vms_never_get_one_disk_for_writing(
    vm: Running, make_loop: Callable[[str], Path], tmp_path: Path
) -> None:
    number = number_of(make_loop("a"))
    with start_vm(tmp_path, devices=root_ports(1), guest=False) as other:
        vm.vmplug("vm", "adopt", "other", "--qmp", other.qmp_path).answer()
        begun = [
            vm.vmplug.begin("attach", "-d", f"b:{number}", "--vm", name, "--owner", f"in-{name}")
            for name in ("sb1", "other")
        ]
        statuses = sorted(ended(process).status for process in begun)
        assert statuses in ([0, 4], [0, 5])
        (hold,) = vm.vmplug("list", "--json").json()["attachments"]
        if hold["vm"] == "sb1":
            vm.vmplug("detach", "--owner", "in-sb1").answer()
        other.kill()
        assert vm.vmplug("reconcile").status == 0
    assert vm.vmplug("list").answer() == "nothing is attached\n"


# a guest that does not answer


def test_a_guest_that_does_not_answer_leaves_the_disk_detaching(
    vm: Running, make_loop: Callable[[str], Path]
) -> None:
    node = make_loop("a")
    attached = vm.attach(node)
    only_disk(vm)
    vm.oracle.execute("stop")
    refused = vm.vmplug("detach", attached["id"], "--timeout", "0.3")
    assert (refused.stdout, refused.status) == ("", 5)
    assert refused.stderr == (
        f"vmplug: the guest did not release {node} within 0.3 s\n"
        "hint: the VM is paused: the guest can answer only while the VM runs; detach again then\n"
    )
    assert [hold["state"] for hold in vm.listed()] == ["detaching"]
    assert "detaching" in vm.vmplug("list").answer()
    told = vm.vmplug("detach", attached["id"], "--timeout", "0.3", "--json")
    assert (told.status, told.error()["code"]) == (5, "unplug-timeout")
    again = ("--device", f"b:{number_of(node)}", "--vm", "sb1", "--owner", "ctr2", "--json")
    refused = vm.vmplug("attach", *again)
    assert (refused.status, refused.error()["facts"]["state"]) == (6, "detaching")
    told = vm.vmplug("reconcile", "--timeout", "0.3", "--json")
    (repair,) = json.loads(told.stdout)["repairs"]
    assert (repair["host_path"], repair["outcome"]) == (str(node), "still detaching")
    error = json.loads(told.stderr)["error"]
    assert (told.status, error["code"]) == (5, "unplug-timeout")
    vm.oracle.execute("cont")
    assert vm.vmplug("detach", attached["id"]).answer().startswith("detached ")


def test_what_was_detaching_is_finished_by_reconcile(
    vm: Running, make_loop: Callable[[str], Path]
) -> None:
    node = make_loop("a")
    vm.attach(node)
    only_disk(vm)
    vm.oracle.execute("stop")
    assert vm.vmplug("detach", "--owner", "ctr1", "--timeout", "0.1").status == 5
    vm.oracle.execute("cont")
    (repair,) = vm.vmplug("reconcile", "--vm", "sb1", "--json").json()["repairs"]
    assert repair.keys() == {"vm", "device", "host_path", "outcome", "reason"}
    assert (repair["vm"], repair["host_path"], repair["outcome"]) == (
        "sb1",
        str(node),
        "detached",
    )


# killed processes


@dataclass(frozen=True, slots=True)
class Gated:
    """A VM with a booted guest that vmplug reaches through a gate."""

    vmplug: Vmplug
    vm: GuestVm
    gate: Gate

    def kill_at(self, count: int, *words: str, is_sent: bool) -> None:
        """Run a command line and kill it at its count-th change of the VM."""
        self.gate.shut_at(count, is_sent=is_sent)
        process = self.vmplug.begin(*words)
        try:
            self.gate.wait_shut()
        finally:
            process.kill()
        assert ended(process).status == -signal.SIGKILL


@pytest.fixture(scope="module")
def shared_gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gated]:
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp"))
        )
        vm = stack.enter_context(start_vm(tmp_path_factory.mktemp("vm"), devices=root_ports(3)))
        vm.console.run("true")
        gate = stack.enter_context(Gate(directory / "gate.sock", vm.qmp_path))
        vmplug = Vmplug(directory / "state")
        vmplug("vm", "adopt", "sb1", "--qmp", gate.socket_path).answer()
        yield Gated(vmplug, vm, gate)


@pytest.fixture
def gated(shared_gate: Gated, tmp_path: Path) -> Iterator[Gated]:
    """Whatever a test kills, at its end nothing is left."""
    state_dir, oracle = shared_gate.vmplug.state_dir, shared_gate.vm.oracle
    before = take_picture(state_dir, [oracle], Path("/nowhere"))
    yield shared_gate
    assert take_picture(state_dir, [oracle], Path("/nowhere")) == before
    assert shared_gate.vm.console.wait_for_disks(0) == []


LIMITED = ("-o", "bps-total=10M", "-o", "iothread=on")
LIMITED_CHANGES = 5
"""Two objects, two block nodes, a device."""

SENT = pytest.mark.parametrize("is_sent", [False, True], ids=["before", "after"])


def attach_words(*nodes: Path) -> list[str]:
    devices = [word for node in nodes for word in ("--device", f"b:{number_of(node)}")]
    return ["attach", *devices, "--vm", "sb1", "--owner", "ctr1"]


@SENT
@pytest.mark.parametrize("count", range(1, LIMITED_CHANGES + 1))
def test_an_attach_killed_at_any_moment_is_undone_by_reconcile(
    gated: Gated, make_loop: Callable[[str], Path], count: int, *, is_sent: bool
) -> None:
    node = make_loop("a")
    words = attach_words(node)
    gated.kill_at(count, *words, *LIMITED, is_sent=is_sent)
    (hold,) = gated.vmplug("list", "--json").json()["attachments"]
    assert hold["state"] == "plugging"
    refused = gated.vmplug(*words, "--json")
    assert (refused.status, refused.error()["facts"]["state"]) == (6, "plugging")
    (repair,) = gated.vmplug("reconcile", "--json").json()["repairs"]
    assert (repair["host_path"], repair["outcome"]) == (str(node), "undone")
    assert gated.vmplug("list").answer() == "nothing is attached\n"
    assert gated.vmplug("check", "--device", f"b:{number_of(node)}").status == 0


@SENT
@pytest.mark.parametrize("count", [3, 4])
def test_of_several_disks_none_stays_when_attach_is_killed(
    gated: Gated, make_loop: Callable[[str], Path], count: int, *, is_sent: bool
) -> None:
    nodes = [make_loop(name) for name in ("one", "two", "three")]
    gated.kill_at(count, *attach_words(*nodes), is_sent=is_sent)
    repairs = gated.vmplug("reconcile", "--json").json()["repairs"]
    assert {repair["host_path"] for repair in repairs} == {str(node) for node in nodes}
    assert {repair["outcome"] for repair in repairs} == {"undone"}


@SENT
@pytest.mark.parametrize("count", range(1, LIMITED_CHANGES + 1))
def test_a_detach_killed_at_any_moment_is_finished_by_reconcile(
    gated: Gated, make_loop: Callable[[str], Path], count: int, *, is_sent: bool
) -> None:
    node = make_loop("a")
    gated.vmplug(*attach_words(node), *LIMITED).answer()
    gated.vm.console.wait_for_disks(1)
    gated.kill_at(count, "detach", "--owner", "ctr1", is_sent=is_sent)
    (hold,) = gated.vmplug("list", "--json").json()["attachments"]
    assert hold["state"] == "detaching"
    (repair,) = gated.vmplug("reconcile", "--json").json()["repairs"]
    assert (repair["host_path"], repair["outcome"]) == (str(node), "detached")


def test_an_interrupted_attach_says_what_finishes_it_and_is_undone(
    gated: Gated, make_loop: Callable[[str], Path]
) -> None:
    gated.gate.shut_at(2, is_sent=True)
    node = make_loop("a")
    process = gated.vmplug.begin(*attach_words(node))
    gated.gate.wait_shut()
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert (done.stdout, done.status) == ("", 130)
    assert done.stderr == (
        f"vmplug: interrupted: {node} may be plugged into VM sb1 in part\n"
        "hint: vmplug reconcile takes it out again\n"
    )
    (repair,) = gated.vmplug("reconcile", "--json").json()["repairs"]
    assert repair["outcome"] == "undone"


def test_a_killed_attach_that_is_only_counted_leaves_the_disk_where_it_is(
    gated: Gated, make_loop: Callable[[str], Path]
) -> None:
    """Killed in the middle of a request for a disk that already exists and for a new one."""
    old, new = make_loop("old"), make_loop("new")
    gated.vmplug(*attach_words(old)).answer()
    gated.kill_at(1, *attach_words(old, new), is_sent=True)
    (repair,) = gated.vmplug("reconcile", "--json").json()["repairs"]
    assert (repair["host_path"], repair["outcome"]) == (str(new), "undone")
    (hold,) = gated.vmplug("list", "--json").json()["attachments"]
    assert (hold["host_path"], hold["count"]) == (str(old), 1)
    gated.vmplug("detach", "--owner", "ctr1").answer()


def test_what_another_journal_has_in_a_vm_stays_until_it_is_taken_over(
    gated: Gated, make_loop: Callable[[str], Path]
) -> None:
    node = make_loop("a")
    gated.vmplug(*attach_words(node)).answer()
    gated.vm.console.wait_for_disks(1)
    before = gated.vmplug("list", "--json").json()
    elsewhere = Vmplug(gated.vmplug.state_dir.with_name("new"))
    socket = gated.gate.socket_path
    said = elsewhere("vm", "adopt", "sb1", "--qmp", socket).answer()
    told = "VM sb1 has 1 device of another journal: vmplug reconcile --vm sb1 lists them\n"
    assert said.endswith(told)
    assert elsewhere("vm", "list").answer().endswith(told)
    for _ in range(2):
        (repair,) = elsewhere("reconcile", "--json").json()["repairs"]
        assert (repair["host_path"], repair["outcome"]) == (None, "another journal")
        assert f"virtio-blk-pci of journal {repair['device'][:6]}" in repair["reason"]
    assert gated.vmplug("reconcile", "--json").json()["repairs"] == []
    assert gated.vmplug("list", "--json").json() == before
    assert len(gated.vm.console.wait_for_disks(1)) == 1
    (repair,) = elsewhere("reconcile", "--take-over", "--json").json()["repairs"]
    assert (repair["host_path"], repair["outcome"]) == (None, "removed")
    (repair,) = gated.vmplug("reconcile", "--json").json()["repairs"]
    assert (repair["host_path"], repair["outcome"]) == (str(node), "forgotten")


def kill(pid: int) -> None:
    """End a process as a crash would, and wait for its end."""
    descriptor = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([descriptor], [], [], END_S)[0]
    finally:
        os.close(descriptor)


def test_what_a_killed_vm_held_is_free_after_reconcile(
    vmplug: Vmplug, make_loop: Callable[[str], Path], tmp_path: Path
) -> None:
    node = make_loop("a")
    directory = vmplug.state_dir.parent
    asked = ("--device", f"b:{number_of(node)}")
    with no_qemu_left(directory):
        pid = vmplug(*start_words("sb2", directory, guest=False)).json()["vm"]["pid"]
        vmplug("attach", *asked, "--vm", "sb2", "--owner", "ctr1").answer()
        kill(pid)
        (known,) = vmplug("vm", "list", "--json").json()["vms"]
        assert (known["state"], known["attachments"], known["pid"]) == ("gone", 1, None)
        listed = vmplug("list", "--json").json()
        assert [hold["vm"] for hold in listed["attachments"]] == listed["ended_vms"] == ["sb2"]
        assert "VM sb2 seems to have ended: vmplug reconcile" in vmplug("list").answer()
        assert vmplug("check", *asked).status == 4
        (repair,) = vmplug("reconcile", "--json").json()["repairs"]
        assert (repair["host_path"], repair["outcome"]) == (str(node), "forgotten")
        assert "not running" in repair["reason"]
    assert vmplug("check", *asked).status == 0
    assert vmplug("list").answer() == "nothing is attached\n"
    assert vmplug("vm", "list").answer().startswith("no VM is known\n")
    assert not any(journal_rows(vmplug.state_dir).values())
    assert len(loops_below(tmp_path)) == 1


def test_a_killed_vm_may_be_started_again_after_reconcile(vmplug: Vmplug) -> None:
    directory = vmplug.state_dir.parent
    words = ("vm", "start", "sb2", "--accel", "tcg", "--json")
    with no_qemu_left(directory):
        kill(vmplug(*words).json()["vm"]["pid"])
        agreed, logs = vmplug("reconcile").answer().splitlines()
        assert agreed == "the journal and the VMs agree"
        assert logs.startswith("VM sb2 has ended; its last logs are in ")
        assert vmplug(*words).status == 0
        assert vmplug("vm", "stop", "sb2", "--timeout", "0").status == 0


def test_one_vm_that_does_not_answer_keeps_no_other_from_repair(
    vmplug: Vmplug, make_loop: Callable[[str], Path], tmp_path: Path
) -> None:
    node = make_loop("a")
    directory = vmplug.state_dir.parent
    socket = directory / "odd.sock"
    with MemoryVm(socket):
        vmplug("vm", "adopt", "a-odd", "--qmp", socket).answer()
    socket.unlink()
    with Talker(socket, b"SSH-2.0-OpenSSH_9\r\n"), no_qemu_left(directory):
        pid = vmplug(*start_words("b-dead", directory, guest=False)).json()["vm"]["pid"]
        asked = ("--device", f"b:{number_of(node)}")
        vmplug("attach", *asked, "--vm", "b-dead", "--owner", "ctr1").answer()
        kill(pid)
        told = vmplug("reconcile")
        again = vmplug("reconcile", "--json")
        assert vmplug("list").answer() == "nothing is attached\n"
        assert vmplug("check", *asked).status == 0
        assert str(node) in told.stdout
        assert told.status == 5
        assert told.stderr.startswith("vmplug: ")
        assert str(socket) in told.stderr
        (error,) = json.loads(again.stdout)["errors"]
        assert error.keys() == {"vm", "code", "message", "hint"}
        assert (again.status, error["vm"], error["code"]) == (5, "a-odd", "cannot-connect")
        (known,) = vmplug("vm", "list", "--json").json()["vms"]
        assert known["name"] == "a-odd"


# the demo


def test_the_demo_runs_and_leaves_nothing() -> None:
    """It finds `vmplug` and `python3` on the path, as `make demo` arranges."""
    before = loops_below(Path("/tmp"))
    done = subprocess.run(
        [ROOT / "examples" / "demo.sh"],
        capture_output=True,
        text=True,
        env=Vmplug(Path("/nowhere")).environment,
        timeout=300,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert "\x1b" not in done.stdout
    assert "written in the guest" in done.stdout
    found = re.search(r"its files are in (/tmp/vmplug-demo-\w+)/", done.stdout)
    assert found
    directory = Path(found[1])
    assert not directory.exists()
    assert processes_below(directory) == []
    assert not [loop for loop in loops_below(Path("/tmp")) - before if str(directory) in loop[1]]
    words = done.stdout.splitlines()
    assert words[-1] == "Nothing is left: no VM, no process, no loop device, no journal."
