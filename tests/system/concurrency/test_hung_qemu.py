"""A QEMU that is stopped at every moment, and a QMP socket that somebody else keeps."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.contract.sandbox import Noticed
from tests.contract.world import Rows, journal_rows, qemu_parts
from tests.support.disks import disk_image
from tests.support.raw_qmp import RawQmp
from tests.support.vm import GuestVm, root_ports, scsi_controller, start_vm
from tests.system.concurrency.crowd import request
from vmplug import Attachment, DeviceInfo, DeviceManager, DevType, HostRoot
from vmplug.drivers.ports import Command
from vmplug.errors import ConnectError, ProtocolError
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.hypervisor.qmp.monitor import Monitor
from vmplug.journal.state import State
from vmplug.manager.reconcile import RepairOutcome

pytestmark = pytest.mark.qemu

DEADLINE_S, PATIENT_S = 0.4, 60.0
REASON_TO_WAIT_S = 300.0


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    devices = [*root_ports(1), *scsi_controller()]
    logs = tmp_path_factory.mktemp("vm")
    with start_vm(logs, devices=devices, guest=False, paused=True) as started:
        yield started


@pytest.fixture
def image(tmp_path: Path) -> str:
    return str(disk_image(tmp_path / "a.img", 1, "hung"))


def stop(vm: GuestVm) -> None:
    """It has stopped when this comes back."""
    os.kill(vm.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, vm.pid, os.WSTOPPED | os.WNOWAIT)


@contextmanager
def stopped(vm: GuestVm) -> Iterator[None]:
    stop(vm)
    try:
        yield
    finally:
        os.kill(vm.pid, signal.SIGCONT)


def connected(vm: GuestVm) -> QmpMonitor:
    return QmpMonitor.connect(str(vm.qmp_path), timeout_s=PATIENT_S)


@contextmanager
def hurrying(monitor: QmpMonitor) -> Iterator[None]:
    """Nobody answers it: only here may it give up at once, as a busy QEMU takes its time."""
    hurry(monitor, DEADLINE_S)
    try:
        yield
    finally:
        hurry(monitor, PATIENT_S)


def hurry(monitor: QmpMonitor, timeout_s: float = DEADLINE_S) -> None:
    monitor._connect_timeout_s = monitor._command_timeout_s = timeout_s


def opened(vm: GuestVm, state_dir: Path, monitor: Monitor | None = None) -> DeviceManager:
    hypervisor = Qemu(monitor or connected(vm))
    return DeviceManager.open(
        vm="one", host=HostRoot("/"), hypervisor=hypervisor, state_dir=state_dir
    )


def picture(vm: GuestVm, state_dir: Path) -> tuple[Rows, object]:
    return journal_rows(state_dir), qemu_parts(vm)


def states(held: list[Attachment]) -> list[State]:
    return [attachment.state for attachment in held]


def test_before_its_greeting(vm: GuestVm) -> None:
    with (
        stopped(vm),
        pytest.raises(ConnectError, match=r"within 0\.4 s.* or QEMU hangs") as caught,
    ):
        QmpMonitor.connect(str(vm.qmp_path), timeout_s=DEADLINE_S)
    assert "kill -CONT" in (caught.value.hint or "")
    qemu = Qemu(connected(vm))
    assert qemu.status() == "prelaunch"
    qemu.close()


def test_between_two_commands(vm: GuestVm) -> None:
    qemu = Qemu(monitor := connected(vm))
    with monitor.keep_turn():
        assert qemu.status() == "prelaunch"
        with stopped(vm), hurrying(monitor):
            with pytest.raises(ProtocolError, match=r"not answer query-status within 0\.4 s"):
                qemu.status()
            with pytest.raises(ConnectError, match="sent no QMP greeting"):
                qemu.status()
    assert qemu.status() == "prelaunch"
    qemu.close()


@pytest.mark.parametrize("execute", ["blockdev-add", "device_add"])
def test_in_the_middle_of_an_attach(vm: GuestVm, tmp_path: Path, image: str, execute: str) -> None:
    """It takes the next command when it goes on, which nobody waits for any more."""

    def stop_at(command: Command) -> None:
        if command.execute == execute:
            stop(vm)
            hurry(monitor)

    state_dir = tmp_path / "state"
    opened(vm, state_dir).close()
    before = picture(vm, state_dir)
    try:
        monitor = connected(vm)
        with (
            opened(vm, state_dir, Noticed(monitor, stop_at)) as manager,
            monitor.keep_turn(),
            pytest.raises(ProtocolError),
        ):
            manager.attach_all([request(image), pci_disk(tmp_path)])
    finally:
        os.kill(vm.pid, signal.SIGCONT)
    with opened(vm, state_dir) as manager:
        assert states(manager.attachments()) == [State.PLUGGING] * 2
        assert {repair.outcome for repair in manager.reconcile(timeout_s=REASON_TO_WAIT_S)} == {
            RepairOutcome.UNDONE
        }
        assert picture(vm, state_dir) == before
        manager.detach(manager.attach(request(image)).id)
    assert picture(vm, state_dir) == before


def pci_disk(directory: Path) -> DeviceInfo:
    image = disk_image(directory / "b.img", 1, "hung")
    return DeviceInfo(container_path="/dev/b", dev_type=DevType.BLOCK, host_path=str(image))


def test_while_a_guest_is_waited_for(vm: GuestVm, tmp_path: Path, image: str) -> None:
    """It is told after the deadline of the socket, and not after that of the guest."""

    def stop_at(command: Command) -> None:
        if command.execute == "device_del":
            stop(vm)
            hurry(monitor)

    state_dir = tmp_path / "state"
    opened(vm, state_dir).close()
    before = picture(vm, state_dir)
    try:
        monitor = connected(vm)
        with opened(vm, state_dir, Noticed(monitor, stop_at)) as manager:
            attachment = manager.attach(request(image))
            with pytest.raises((ConnectError, ProtocolError)):
                manager.detach(attachment.id, timeout_s=REASON_TO_WAIT_S)
            assert states(manager.attachments()) == [State.DETACHING]
    finally:
        os.kill(vm.pid, signal.SIGCONT)
    with opened(vm, state_dir) as manager:
        manager.detach(attachment.id)
    assert picture(vm, state_dir) == before


@pytest.mark.parametrize(
    "verb",
    [
        lambda manager, image: manager.attach(request(image)),
        lambda manager, image: manager.plan([request(image)]),
        lambda manager, _: manager.reconcile(),
    ],
    ids=["attach", "plan", "reconcile"],
)
def test_a_socket_that_another_client_keeps_is_not_waited_for(
    vm: GuestVm, tmp_path: Path, image: str, verb: Callable[[DeviceManager, str], object]
) -> None:
    state_dir = tmp_path / "state"
    monitor = connected(vm)
    with opened(vm, state_dir, monitor) as manager:
        before = picture(vm, state_dir)
        # Connected when the manager's turn is over.
        with RawQmp.connect(vm.qmp_path), hurrying(monitor):
            with pytest.raises(ConnectError, match="busy with another client") as caught:
                verb(manager, image)
            assert caught.value.hint
            assert picture(vm, state_dir) == before
        assert verb(manager, image) is not None
        manager.detach_all([hold.id for hold in manager.attachments()])
        assert picture(vm, state_dir) == before


def test_a_manager_that_is_idle_keeps_nobody_from_the_socket(vm: GuestVm, tmp_path: Path) -> None:
    with opened(vm, tmp_path / "state"), RawQmp.connect(vm.qmp_path) as other:
        assert other.execute("query-status")["status"] == "prelaunch"
