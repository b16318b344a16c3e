"""The life of VMs by library calls alone, on real QEMUs."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

import vmplug
from tests.cli.command import Vmplug
from tests.support.disks import disk_image
from tests.support.vm import guest_files
from vmplug import DetachOutcome, DeviceInfo, DevType, InUse, NotAttached, Setup, VmSpec
from vmplug.drivers.ports import Command
from vmplug.host.file_id import CheckedFile, file_id
from vmplug.hypervisor.qemu.handover import Handover, OpenedFile, RunState, held_open
from vmplug.hypervisor.qmp.client import TURN_S, QmpMonitor
from vmplug.hypervisor.qmp.monitor import MISSED, Talk

pytestmark = [pytest.mark.root, pytest.mark.qemu]

SOON_S = 60.0
EXAMPLE = Path(__file__).parents[2] / "examples/two_vms.py"


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    setup = Setup(state_dir=tmp_path / "state")
    (tmp_path / "state").mkdir(mode=0o700)
    yield setup
    for vm in vmplug.list_vms(setup=setup):
        vmplug.stop_vm(vm.name, timeout_s=0, setup=setup)


@pytest.fixture
def disk(tmp_path: Path) -> DeviceInfo:
    image = disk_image(tmp_path / "disk.img", 1, "of two VMs")
    return DeviceInfo(container_path="/dev/xvda", dev_type=DevType.BLOCK, host_path=str(image))


def spec(name: str) -> VmSpec:
    """A machine that stands still in its firmware."""
    return VmSpec(name=name, accel="tcg", memory_mib=64)


def states(setup: Setup) -> dict[str, str]:
    return {vm.name: vm.state for vm in vmplug.list_vms(setup=setup)}


def end(pid: int) -> None:
    descriptor = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PIDFD, descriptor, os.WEXITED)
    os.close(descriptor)


def test_the_example_runs_as_written(tmp_path: Path) -> None:
    image = disk_image(tmp_path / "disk.img", 1, "of the example")
    words = [*map(str, guest_files()), str(image), str(tmp_path / "state")]
    words += ["-serial", "null"]  # what the guest listens on
    done = subprocess.run(
        [sys.executable, EXAMPLE, *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("one sees the disk at PCI ")
    assert lines[1].startswith("two is refused: ")
    assert "VM 'one'" in lines[1]
    assert lines[2] == f"one {image} forgotten because the VM is not running any more"
    assert lines[3].startswith("two sees the disk at PCI ")
    assert lines[4:] == ["two is stopped"]


def test_what_a_dead_vm_held_is_free_after_library_calls_alone(
    setup: Setup, disk: DeviceInfo
) -> None:
    dead = vmplug.start_vm(spec("dead"), [disk], owner="c1", setup=setup)
    vmplug.start_vm(spec("next"), setup=setup)
    end(dead.pid)
    with vmplug.connect_vm("next", setup=setup) as devices:
        with pytest.raises(InUse):
            devices.attach(disk)
        done = vmplug.reconcile_host(setup=setup)
        assert [(repair.vm, repair.repair.outcome) for repair in done.repairs] == [
            ("dead", vmplug.RepairOutcome.FORGOTTEN)
        ]
        assert not done.failures
        assert states(setup) == {"next": "running"}
        devices.attach(disk)
    assert vmplug.reconcile_host(setup=setup).repairs == ()


def test_an_owner_is_detached_from_all_vms(setup: Setup, disk: DeviceInfo, tmp_path: Path) -> None:
    other = disk_image(tmp_path / "other.img", 1, "another")
    requests = {"a": disk, "b": disk._replace(host_path=str(other))}
    for name, request in requests.items():
        vmplug.start_vm(spec(name), setup=setup)
        with vmplug.connect_vm(name, setup=setup) as devices:
            devices.attach(request, owner="ctr1")
            devices.attach(request, owner="ctr2")
    detached = vmplug.detach_owner("ctr1", setup=setup)
    assert [(done.attachment.vm, done.outcome) for done in detached] == [
        ("a", DetachOutcome.RELEASED),
        ("b", DetachOutcome.RELEASED),
    ]
    left = vmplug.list_attachments(setup=setup).attachments
    assert [(hold.vm, hold.owner) for hold in left] == [("a", "ctr2"), ("b", "ctr2")]
    with pytest.raises(NotAttached, match="nothing is attached for owner 'ctr1'"):
        vmplug.detach_owner("ctr1", setup=setup)
    with pytest.raises(NotAttached, match="no attachment or device has the id 'ffff'"):
        vmplug.detach_attachments([left[0].id, "ffff"], setup=setup)
    assert vmplug.list_attachments(setup=setup).attachments == left


def test_a_file_that_was_handed_over_stays_however_long_its_plugging_takes(
    setup: Setup, disk: DeviceInfo
) -> None:
    """QEMU 7.2 forgets fd sets when its last monitor is left."""
    vmplug.start_vm(spec("slow"), setup=setup)
    socket, path = vmplug.list_vms(setup=setup)[0].qmp_socket, str(disk.host_path)
    has_left = threading.Event()

    def plug(handover: Handover, files: Sequence[OpenedFile]) -> Talk:
        names = yield from handover.give(files)
        assert not has_left.wait(3 * TURN_S)
        file = {"driver": "file", "filename": names[path]}
        yield Command("blockdev-add", {"node-name": "n", "driver": "raw", "file": file})
        yield from handover.finish()

    with closing(QmpMonitor.connect(socket, timeout_s=SOON_S)) as monitor:
        monitor.listen(lambda event, _: has_left.set() if event == MISSED else None)
        with held_open([CheckedFile(path, file_id(os.stat(path)))]) as files:
            handover = Handover("0123456789abcdef", None, RunState(monitor))
            monitor.converse(plug(handover, files))
        assert has_left.wait(SOON_S), "then others have their turn"
        monitor.execute(Command("blockdev-del", {"node-name": "n"}))
        assert monitor.execute(Command("query-fdsets", {})) == []


def test_what_was_detached_is_told_beside_the_error_of_another_vm(
    setup: Setup, disk: DeviceInfo, tmp_path: Path
) -> None:
    other = disk_image(tmp_path / "other.img", 1, "another")
    held = {}
    for name, path in {"dead": str(disk.host_path), "next": str(other)}.items():
        started = vmplug.start_vm(spec(name), setup=setup)
        with vmplug.connect_vm(name, setup=setup) as devices:
            held[name] = devices.attach(disk._replace(host_path=path), owner="ctr1")
            devices.attach(disk._replace(host_path=path), owner="ctr2")
        if name == "dead":
            end(started.pid)
    told = Vmplug(tmp_path / "state")("detach", "--owner", "ctr1", "--json")
    assert [done["id"] for done in json.loads(told.stdout)["detached"]] == [held["next"].id]
    assert "VM dead is not running any more" in told.stderr
    assert told.status == 5
    again = Vmplug(tmp_path / "state")("detach", "--owner", "ctr1")
    assert (again.stdout, again.status) == ("", 5)
    assert "VM dead is not running any more" in again.stderr


def test_a_refused_start_leaves_nothing(setup: Setup, disk: DeviceInfo, tmp_path: Path) -> None:
    vmplug.start_vm(spec("first"), [disk], owner="c1", setup=setup)
    with pytest.raises(InUse):
        vmplug.start_vm(spec("second"), [disk], owner="c2", setup=setup)
    assert states(setup) == {"first": "running"}
    assert [path.name for path in (tmp_path / "state/vm").iterdir()] == ["first"]
    with pytest.raises(vmplug.StateError):
        vmplug.start_vm(spec("first"), setup=setup)
    assert states(setup) == {"first": "running"}


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("../up", {}, "is made of letters"),
        ("many", {"ports": 20, "bridges": 8}, "more than 27"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(
    setup: Setup, tmp_path: Path, name: str, changes: dict[str, int], why: str
) -> None:
    with pytest.raises(vmplug.SpecError, match=why):
        vmplug.start_vm(VmSpec(name=name, accel="tcg", **changes), setup=setup)  # type: ignore[arg-type]
    assert states(setup) == {}
    assert not (tmp_path / "state/vm").exists()


def test_an_adopted_vm_is_forgotten_and_still_runs(setup: Setup, tmp_path: Path) -> None:
    started = vmplug.start_vm(spec("own"), setup=setup)
    foreign = Setup(state_dir=tmp_path / "other")
    adopted = vmplug.adopt_vm("theirs", started.qmp_socket, setup=foreign)
    assert (adopted.pid, adopted.free_pci_places) == (started.pid, 8)
    assert "q35" in adopted.machine
    assert not adopted.is_open_to_all
    stopped = vmplug.stop_vm("theirs", setup=foreign)
    assert (stopped.was_adopted, stopped.released) == (True, ())
    assert states(foreign) == {}
    assert states(setup) == {"own": "running"}
