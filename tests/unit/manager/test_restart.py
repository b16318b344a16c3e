"""Who works on what, which boot a claim is of, and which life of a VM: across processes."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.contract.sandbox import Breaking, Hooked, Sandbox
from tests.contract.world import journal_rows
from tests.support.tree import HostTree
from tests.unit.journal.test_journal import DISK, SCSI_DISK, hold
from vmplug.drivers.ports import Command, Endpoint
from vmplug.errors import NotAttached, ProtocolError, UnplugTimeout
from vmplug.host.root import HostRoot
from vmplug.hypervisor.fake.monitor import FakeHypervisor, Guest
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.process import ProcessIdentity
from vmplug.journal.records import VmRecord
from vmplug.journal.state import State
from vmplug.manager.manager import DeviceManager
from vmplug.manager.reconcile import RepairOutcome
from vmplug.oci.info import DeviceInfo, DevType

AT_ONCE_S = 0.1

WORKER = """
import sys
from tests.unit.manager.test_restart import begin_work
begin_work(sys.argv[1], sys.argv[2])
"""


def begin_work(state_dir: str, state: str) -> None:
    """What another process does: bring a device on its way, and then stay at it."""
    device = replace(DISK, vm="sandbox-1")
    with Journal.open(state_dir) as journal:
        journal.add_devices([device], [hold(device)])
        if state == State.DETACHING:
            journal.set_state([device.id], State.DETACHING)
        sys.stdout.write("begun\n")
        sys.stdout.flush()
        sys.stdin.read()


@contextmanager
def at_work(state_dir: Path, state: State) -> Iterator[subprocess.Popen[str]]:
    """A living process that has a device in progress."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(state_dir), str(state)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path)
    yield made
    made.close()


# work in progress


def test_a_worker_comes_back_as_it_was_written() -> None:
    for worker in (
        ProcessIdentity(pid=1, started_at=2, boot_id="b-1"),
        ProcessIdentity(pid=2**22, started_at=None, boot_id=""),
    ):
        assert ProcessIdentity.parse(str(worker)) == worker
    with pytest.raises(ValueError):  # noqa: PT011  whatever it says
        ProcessIdentity.parse("nonsense")


def test_a_worker_lives_as_the_process_of_that_number_start_and_boot() -> None:
    host = HostRoot()
    own = ProcessIdentity.own(host)
    assert own.is_alive(host)
    assert own.started_at
    assert not replace(own, started_at=own.started_at + 1).is_alive(host)
    assert not replace(own, boot_id="another boot").is_alive(host)


@pytest.mark.slow
@pytest.mark.parametrize("state", [State.PLUGGING, State.DETACHING])
def test_reconcile_leaves_work_in_progress_to_its_process(sandbox: Sandbox, state: State) -> None:
    node = Command("blockdev-add", {"node-name": f"vmplug-{DISK.id}", "driver": "null-co"})
    sandbox.side.ask(node)
    with at_work(sandbox.state_dir, state) as worker:
        before = sandbox.picture()
        (repair,) = sandbox.devices.reconcile()
        assert (repair.device_id, repair.outcome) == (DISK.id, RepairOutcome.IN_PROGRESS)
        assert repair.reason == f"process {worker.pid} is working on it"
        assert not repair.is_gone
        assert sandbox.picture() == before
    outcome = RepairOutcome.UNDONE if state is State.PLUGGING else RepairOutcome.FINISHED
    assert [repair.outcome for repair in sandbox.devices.reconcile()] == [outcome]
    assert journal_rows(sandbox.state_dir)["device"] == []
    assert not sandbox.vmplugs()


def test_an_attach_that_runs_in_another_thread_is_left_to_it(sandbox: Sandbox) -> None:
    seen: list[RepairOutcome] = []

    def look(command: Command) -> None:
        if command.execute != "device_add":
            return
        with DeviceManager.open(
            vm=sandbox.vm,
            host=HostRoot(),
            hypervisor=Qemu(sandbox.side.monitor()),
            state_dir=sandbox.state_dir,
        ) as other:
            seen.extend(repair.outcome for repair in other.reconcile())

    sandbox.talk_through(lambda monitor: Hooked(monitor, look))
    attachment = sandbox.devices.attach(sandbox.disk())
    assert seen == [RepairOutcome.IN_PROGRESS]
    assert attachment.state is State.ATTACHED
    assert sandbox.devices.reconcile() == []


def test_an_attach_that_broke_off_can_be_undone_while_its_process_lives(sandbox: Sandbox) -> None:
    sandbox.talk_through(lambda monitor: Breaking(monitor, 2, is_sent=True))
    with pytest.raises(ProtocolError):
        sandbox.devices.attach(sandbox.disk())
    sandbox.talk_plainly()
    assert [repair.outcome for repair in sandbox.devices.reconcile()] == [RepairOutcome.UNDONE]


def test_any_process_can_finish_a_detach_that_timed_out(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk())
    sandbox.machine.guest = Guest.SILENT
    with pytest.raises(UnplugTimeout):
        sandbox.devices.detach(attachment.id, timeout_s=AT_ONCE_S)
    (repair,) = sandbox.devices.reconcile(timeout_s=AT_ONCE_S)
    assert repair.outcome is RepairOutcome.STILL_DETACHING
    (repair,) = sandbox.devices.reconcile(timeout_s=AT_ONCE_S)  # the first has let go of it
    assert repair.outcome is RepairOutcome.STILL_DETACHING
    sandbox.machine.wake_guest()
    sandbox.devices.detach(attachment.id)
    assert sandbox.devices.attachments() == []


# the host's boot


def tree_with_boot(tmp_path: Path, boot_id: str) -> HostRoot:
    host = HostTree(tmp_path / boot_id)
    return host.file("/proc/sys/kernel/random/boot_id", f"{boot_id}\n").root


VM = VmRecord(name="vm-1", qmp_socket="/s", pid=os.getpid(), started_at=None, is_ours=False)


def test_a_claim_is_one_of_the_boot_in_which_it_was_made(tmp_path: Path) -> None:
    first, second = (tree_with_boot(tmp_path, name) for name in ("boot-1", "boot-2"))
    state_dir = tmp_path / "state"
    with Journal.open(state_dir, host=first) as journal:
        journal.add_vm(VM)
        journal.add_devices([DISK], [hold(DISK)])
        journal.add_devices([replace(SCSI_DISK, vm="in memory")], [])
        assert len(journal.find_claims("vm-2", DISK.identity, [])) == 1
        assert not journal.vms()[0].is_of_earlier_boot
    with Journal.open(state_dir, host=second) as journal:
        assert journal.find_claims("vm-2", DISK.identity, []) == []
        assert len(journal.find_claims("vm-2", SCSI_DISK.identity, [])) == 1
        assert journal.vms()[0].is_of_earlier_boot
        assert len(journal.devices("vm-1")) == 1  # for reconcile to tell
    with Journal.open(state_dir, host=first) as journal:
        assert len(journal.find_claims("vm-2", DISK.identity, [])) == 1


def test_where_the_boot_is_not_known_every_claim_counts(tmp_path: Path) -> None:
    nameless = HostTree(tmp_path / "nameless").root
    state_dir = tmp_path / "state"
    with Journal.open(state_dir, host=tree_with_boot(tmp_path, "boot-1")) as journal:
        journal.add_vm(VM)
        journal.add_devices([DISK], [])
    with Journal.open(state_dir, host=nameless) as journal:
        assert len(journal.find_claims("vm-2", DISK.identity, [])) == 1
        assert not journal.vms()[0].is_of_earlier_boot


# a VM of the same name


class Adopted(FakeHypervisor):
    """A VM in memory that other processes could reach; its process may have ended."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self.pid = pid

    @property
    def endpoint(self) -> Endpoint:
        """See Hypervisor."""
        return Endpoint("/run/sb1/qmp.sock", self.pid)


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


Open = Callable[[FakeHypervisor], DeviceManager]


@pytest.fixture
def open_manager(tmp_path: Path) -> Open:
    def made(hypervisor: FakeHypervisor) -> DeviceManager:
        return DeviceManager.open(
            vm="sb1", host=HostRoot(), hypervisor=hypervisor, state_dir=tmp_path / "state"
        )

    return made


def disk_in(tmp_path: Path) -> DeviceInfo:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(1 << 20))
    return DeviceInfo(container_path="/dev/a", dev_type=DevType.BLOCK, host_path=str(image))


def test_holds_of_a_former_vm_of_the_name_are_released_first(
    open_manager: Open, tmp_path: Path, ended: int
) -> None:
    with open_manager(Adopted(ended)) as former:
        old = former.attach(disk_in(tmp_path))
    again = Adopted(os.getpid())
    with open_manager(again) as devices:
        assert devices.attachments() == []
        with pytest.raises(NotAttached, match="has ended, and another VM has its name"):
            devices.detach(old.id)
        new = devices.attach(disk_in(tmp_path))
        assert (new.count, new.device_id != old.device_id) == (1, True)
        assert f"vmplug-{new.device_id}" in again.monitor.devices
        told = devices.reconcile()
        assert [(r.device_id, r.outcome) for r in told] == [
            (old.device_id, RepairOutcome.FORGOTTEN)
        ]
        assert "another QEMU has its name" in told[0].reason
        assert devices.reconcile() == []
    with open_manager(again) as devices:
        assert [hold.id for hold in devices.attachments()] == [new.id]


def test_the_same_qemu_behind_a_launcher_that_has_ended_keeps_its_devices(
    open_manager: Open, tmp_path: Path, ended: int
) -> None:
    """An older vmplug wrote the launcher down; the device in QEMU tells that it is the same."""
    machine = Adopted(ended)
    with open_manager(machine) as devices:
        old = devices.attach(disk_in(tmp_path))
    machine.pid = os.getpid()
    with open_manager(machine) as devices:
        assert [hold.id for hold in devices.attachments()] == [old.id]
        assert devices.reconcile() == []
    with Journal.open(tmp_path / "state") as journal:
        assert [vm.pid for vm in journal.vms()] == [os.getpid()]


def test_a_vm_of_an_earlier_boot_is_another_one_whatever_its_pid(
    open_manager: Open, tmp_path: Path
) -> None:
    earlier = tree_with_boot(tmp_path, "boot-1")
    device = replace(DISK, vm="sb1")
    with Journal.open(tmp_path / "state", host=earlier) as journal:
        journal.add_vm(replace(VM, name="sb1", qmp_socket="/run/sb1/qmp.sock"))
        journal.add_devices([device], [hold(device)])
    with open_manager(Adopted(os.getpid())) as devices:
        assert devices.attachments() == []
        assert [repair.device_id for repair in devices.reconcile()] == [device.id]
    with Journal.open(tmp_path / "state") as journal:
        assert not journal.vms()[0].is_of_earlier_boot


def test_a_vm_of_an_earlier_boot_is_another_one_whatever_it_has(
    open_manager: Open, tmp_path: Path
) -> None:
    """A guest that was saved before the boot and restored has devices of the same ids."""
    machine = Adopted(os.getpid())
    with open_manager(machine) as devices:
        old = devices.attach(disk_in(tmp_path))
    with closing(sqlite3.connect(tmp_path / "state" / "journal.db")) as db, db:
        db.execute("UPDATE vm SET boot_id = 'an earlier boot'")
    with open_manager(machine) as devices:
        assert devices.attachments() == []
        assert [(r.device_id, r.outcome) for r in devices.reconcile()] == [
            (old.device_id, RepairOutcome.FORGOTTEN),
            (old.device_id, RepairOutcome.ANOTHER_JOURNAL),
        ]
    with Journal.open(tmp_path / "state") as journal:
        assert not journal.vms()[0].is_of_earlier_boot
