"""The file of persistent memory has QEMU's lock for as long as a VM has the file."""

import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.contract.sandbox import Hooked
from tests.contract.world import memory_side_vm
from tests.qemu.conftest import opened_by_another_qemu
from tests.support.disks import disk_image
from tests.support.vm import QEMU, START_TIMEOUT_S, GuestVm
from vmplug.drivers.ports import Command, Endpoint
from vmplug.errors import CommandError, InUse
from vmplug.host.finding import Code
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.start.cold import ColdQemu
from vmplug.hypervisor.qemu.start.launch import launch
from vmplug.hypervisor.qemu.start.machine import VmSpec
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.manager.manager import DeviceManager
from vmplug.oci.info import DeviceInfo, DevType

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module", params=["running", "paused"])
def vm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuestVm]:
    is_paused = request.param == "paused"
    with memory_side_vm(tmp_path_factory.mktemp("vm"), guest=False, paused=is_paused) as vm:
        yield vm


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return disk_image(tmp_path / "memory.img", 2, "memory")


def nvdimm(path: Path, *, read_only: bool = False) -> DeviceInfo:
    return DeviceInfo(
        container_path="/dev/pmem0",
        dev_type=DevType.BLOCK,
        host_path=str(path),
        read_only=read_only,
        driver_options={"block-driver": "nvdimm"},
    )


def manager(
    vm: GuestVm,
    state_dir: Path,
    hook: Callable[[Command], None] = lambda _: None,
    name: str = "sandbox",
) -> DeviceManager:
    """Of a VM whose commands `hook` sees first."""
    monitor = QmpMonitor.connect(str(vm.qmp_path))
    return DeviceManager.open(
        vm=name,
        host=HostRoot("/"),
        hypervisor=Qemu(Hooked(monitor, hook), Endpoint(str(vm.qmp_path), monitor.peer_pid)),
        state_dir=state_dir,
    )


def refusal(path: Path, *, writes: bool) -> str:
    """What another QEMU says that is to have the file as a disk; empty where it starts."""
    file = {"driver": "file", "filename": str(path)}
    node = {"driver": "raw", "node-name": "n", "read-only": not writes, "file": file}
    command = [QEMU, "-nodefaults", "-display", "none", "-accel", "tcg", "-S", "-qmp", "stdio"]
    command += ["-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=n"]
    words = '{"execute": "qmp_capabilities"} {"execute": "quit"}'
    done = subprocess.run(command, input=words, capture_output=True, text=True, check=False)
    assert bool(done.returncode) == bool(done.stderr)
    return done.stderr


def files_of(vm: GuestVm) -> int:
    return len(list(Path(f"/proc/{vm.pid}/fd").iterdir()))


@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_another_qemu_does_not_open_it_even_by_another_name(
    vm: GuestVm, tmp_path: Path, image: Path, *, read_only: bool
) -> None:
    other = tmp_path / "hard-link.img"
    other.hardlink_to(image)
    assert not refusal(other, writes=True)
    with manager(vm, tmp_path / "state") as devices:
        attachment = devices.attach(nvdimm(image, read_only=read_only))
        devices.detach(attachment.id)  # QEMU never releases it
        assert attachment.device_id not in {r.device_id for r in devices.reconcile()}
    assert 'Failed to get "write" lock' in refusal(other, writes=True)
    assert bool(refusal(other, writes=False)) is not read_only


def test_readers_share_it_and_another_vm_does_not_get_it_for_writing(
    vm: GuestVm, tmp_path: Path, image: Path
) -> None:
    """They have journals of their own, as two programs may."""
    other = tmp_path / "hard-link.img"
    other.hardlink_to(image)
    with memory_side_vm(tmp_path, guest=False, paused=True) as second:
        with manager(vm, tmp_path / "state") as devices:
            devices.attach(nvdimm(image, read_only=True))
        with manager(second, tmp_path / "other") as devices:
            with pytest.raises(InUse) as caught:
                devices.attach(nvdimm(other))
            assert Code.IMAGE_LOCKED in caught.value.codes
            devices.attach(nvdimm(other, read_only=True))


def test_what_another_qemu_opens_after_the_check_is_refused(
    vm: GuestVm, tmp_path: Path, image: Path
) -> None:
    before = files_of(vm)
    with (
        opened_by_another_qemu(image, tmp_path),
        manager(vm, tmp_path / "state") as devices,
        pytest.raises(InUse, match=r"is open in process \d+ \(qemu-system") as caught,
    ):
        devices.attach(nvdimm(image), allow=[Code.IMAGE_LOCKED, Code.OPEN_BY_PROCESS])
    assert caught.value.codes == (Code.IMAGE_LOCKED,)
    assert files_of(vm) == before


@pytest.mark.parametrize("refused", ["object-add", "device_add"])
def test_nothing_is_locked_after_a_refusal(
    vm: GuestVm, tmp_path: Path, image: Path, refused: str
) -> None:
    def refuse(command: Command) -> None:
        if command.execute == refused:
            raise CommandError(refused, "GenericError", "refused by the test")

    with manager(vm, tmp_path / "state", refuse) as devices:
        with pytest.raises(CommandError, match="refused by the test"):
            devices.attach(nvdimm(image))
        assert not refusal(image, writes=True)


class Killed(BaseException):
    """The end of vmplug."""


@pytest.mark.parametrize("at", ["object-add", "device_add"])
def test_reconcile_takes_the_lock_of_an_attach_that_was_killed(
    vm: GuestVm, tmp_path: Path, image: Path, at: str
) -> None:
    def kill(command: Command) -> None:
        if command.execute == at:
            raise Killed

    with manager(vm, tmp_path / "state", kill) as devices, pytest.raises(Killed):
        devices.attach(nvdimm(image))
    assert refusal(image, writes=True)
    with manager(vm, tmp_path / "state") as devices:
        devices.reconcile()
    assert not refusal(image, writes=True)


def test_memory_that_no_journal_knows_goes_with_its_lock(
    vm: GuestVm, tmp_path: Path, image: Path
) -> None:
    def kill(command: Command) -> None:
        if command.execute == "device_add":
            raise Killed

    with manager(vm, tmp_path / "state", kill) as devices, pytest.raises(Killed):
        devices.attach(nvdimm(image))
    with manager(vm, tmp_path / "another") as devices:
        devices.reconcile()
        assert refusal(image, writes=True)
        devices.reconcile(take_over=True)
    assert not refusal(image, writes=True)


def test_a_proxy_that_passes_no_descriptors_on_leaves_it_without_a_lock(
    vm: GuestVm, tmp_path: Path, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def drop(command: Command) -> None:
        if command.execute == "getfd":
            why = "No file descriptor supplied via SCM_RIGHTS"
            raise CommandError(command.execute, "GenericError", why)

    with manager(vm, tmp_path / "state", drop) as devices:
        attachment = devices.attach(nvdimm(image))
        assert attachment.device_id in {held.device_id for held in devices.attachments()}
    assert "is plugged without a lock" in caplog.text
    assert str(image) not in "".join(
        record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG
    )
    assert not refusal(image, writes=True)


@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_a_vm_that_starts_with_it_has_the_lock_until_its_end(
    tmp_path: Path, image: Path, *, read_only: bool
) -> None:
    spec = VmSpec(name="cold", accel="tcg", memory_slots=1)
    with ColdQemu(spec, tmp_path / "vm") as started:
        started.directory.mkdir()
        with DeviceManager.open(
            vm="cold", host=HostRoot("/"), hypervisor=started, state_dir=tmp_path / "state"
        ) as devices:
            devices.attach(nvdimm(image)._replace(read_only=read_only))
        assert 'Failed to get "write" lock' in refusal(image, writes=True)
        pid = launch(started, lambda _: None, timeout_s=START_TIMEOUT_S)
        started.started()
        assert 'Failed to get "write" lock' in refusal(image, writes=True)
        assert bool(refusal(image, writes=False)) is not read_only
        with closing(Qemu.connect(str(started.qmp_socket))) as qemu:
            qemu.quit()
    os.waitpid(pid, 0)  # it has the lock until it has ended
    assert not refusal(image, writes=True)
