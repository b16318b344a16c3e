"""While one device takes its time, the others of the VM come and go."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.contract.sandbox import Hooked, Sandbox
from tests.contract.world import journal_rows, qemu_parts
from tests.support.disks import disk_image
from tests.support.vm import root_ports, scsi_controller, start_vm
from tests.system.concurrency.crowd import request
from vmplug.drivers.place import Place
from vmplug.drivers.plug import Plug
from vmplug.drivers.ports import Command
from vmplug.errors import StateError, UnplugTimeout
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.monitor import Monitor
from vmplug.manager.manager import DeviceManager
from vmplug.manager.reconcile import RepairOutcome

SCSI = {"block-driver": "virtio-scsi"}
AT_ONCE_S, SOON_S, PATIENT_S = 0.05, 60.0, 300.0


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path / "sandbox")
    yield made
    made.close()


class Gate:
    """Something stops at it, once, until the test opens it."""

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self._is_open = threading.Event()

    def stop(self) -> None:
        """Wait; from the second time on pass by."""
        if not self.is_reached.is_set():
            self.is_reached.set()
            assert self._is_open.wait(SOON_S)

    def open(self) -> None:
        """Let it go on."""
        self._is_open.set()


class Slow(Qemu):
    """A VM whose first plug takes its time, as half a group does that waits for the guest."""

    def __init__(self, monitor: Monitor, gate: Gate) -> None:
        super().__init__(monitor)
        self._gate = gate

    def plug(self, plug: Plug, place: Place) -> None:
        """See Qemu."""
        self._gate.stop()
        super().plug(plug, place)


def test_reconcile_that_waits_for_a_guest_keeps_nobody_waiting(sandbox: Sandbox) -> None:
    asked = threading.Event()

    def notice(command: Command) -> None:
        if command.execute == "device_del":
            asked.set()

    stuck = sandbox.devices.attach(sandbox.disk("a.img"))
    sandbox.memory.silence()
    with pytest.raises(UnplugTimeout):
        sandbox.devices.detach(stuck.id, timeout_s=AT_ONCE_S)
    sandbox.talk_through(lambda monitor: Hooked(monitor, notice))
    manager = sandbox.devices
    with ThreadPoolExecutor(1) as pool:
        repaired = pool.submit(manager.reconcile, timeout_s=PATIENT_S)
        assert asked.wait(SOON_S)
        other = manager.attach(sandbox.disk("b.img", options=SCSI))
        manager.detach(other.id, timeout_s=SOON_S)
        assert [a.id for a in manager.attachments()] == [stuck.id]
        assert not repaired.done()
        sandbox.memory.wake()
        assert [repair.outcome for repair in repaired.result(SOON_S)] == [RepairOutcome.FINISHED]
    assert manager.attachments() == []
    assert not sandbox.vmplugs()


def test_a_plug_that_takes_its_time_keeps_nobody_waiting(sandbox: Sandbox) -> None:
    gate = Gate()
    with (
        DeviceManager.open(
            vm=sandbox.vm,
            host=sandbox.root,
            hypervisor=Slow(sandbox.side.monitor(), gate),
            state_dir=sandbox.state_dir,
        ) as manager,
        ThreadPoolExecutor(1) as pool,
    ):
        slow = pool.submit(manager.attach, sandbox.disk("a.img"))
        assert gate.is_reached.wait(SOON_S)
        other = manager.attach(sandbox.disk("b.img"))
        manager.detach(other.id, timeout_s=SOON_S)
        assert not slow.done()
        gate.open()
        assert str(slow.result(SOON_S).guest_address) == "PCI 10/00"
        assert str(other.guest_address) == "PCI 11/00"
        assert [a.container_path for a in manager.attachments()] == ["/dev/a.img"]


def test_who_wants_what_another_plugs_just_now_shares_it(sandbox: Sandbox) -> None:
    gate = Gate()

    def hold(command: Command) -> None:
        if command.execute == "device_add":
            gate.stop()

    sandbox.talk_through(lambda monitor: Hooked(monitor, hold))
    manager = sandbox.devices
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(manager.attach, sandbox.disk(), owner="c1")
        assert gate.is_reached.wait(SOON_S)
        second = pool.submit(manager.attach, sandbox.disk(), owner="c2")
        gate.open()
        assert first.result(SOON_S).device_id == second.result(SOON_S).device_id
    assert {a.owner for a in manager.attachments()} == {"c1", "c2"}


def during(sandbox: Sandbox, command: str, act: Callable[[], object]) -> None:
    """The next manager of the sandbox is interrupted at a command, once, by `act`."""
    todo = [act]

    def intrude(sent: Command) -> None:
        if sent.execute == command and todo:
            todo.pop()()

    sandbox.talk_through(lambda monitor: Hooked(monitor, intrude))


def another_manager(sandbox: Sandbox) -> DeviceManager:
    return DeviceManager.open(
        vm=sandbox.vm,
        host=sandbox.root,
        hypervisor=Qemu(sandbox.side.monitor()),
        state_dir=sandbox.state_dir,
    )


def test_who_counted_on_a_device_that_was_taken_away_gets_nothing(sandbox: Sandbox) -> None:
    """Another process lets go of it while a second device of the same request is plugged."""
    before = sandbox.picture()
    with another_manager(sandbox) as other:
        held = other.attach(sandbox.disk("a.img"), owner="c1")
        during(sandbox, "device_add", lambda: other.detach(held.id))
        with pytest.raises(StateError):
            sandbox.devices.attach_all([sandbox.disk("a.img"), sandbox.disk("b.img")], owner="c2")
        assert sandbox.picture() == before


def test_who_counts_on_a_device_that_is_leaving_is_told_so(sandbox: Sandbox) -> None:
    with another_manager(sandbox) as other:
        held = other.attach(sandbox.disk("a.img"), owner="c1")
        sandbox.memory.silence()

        def let_go() -> None:
            with suppress(UnplugTimeout):
                other.detach(held.id, timeout_s=AT_ONCE_S)

        during(sandbox, "device_add", let_go)
        with pytest.raises(StateError, match=r"a\.img is detaching"):
            sandbox.devices.attach_all(
                [sandbox.disk("a.img"), sandbox.disk("b.img", options=SCSI)], owner="c2"
            )
        assert [a.owner for a in other.attachments()] == ["c1"]
        assert sandbox.vmplugs() == {f"vmplug-{held.device_id}"}


def test_a_device_that_goes_while_the_vm_is_looked_at_is_no_failure(sandbox: Sandbox) -> None:
    with another_manager(sandbox) as other:
        held = other.attach(sandbox.disk("a.img", options=SCSI), owner="c1")

        def leave(sent: Command) -> None:
            is_listed = str(sent.arguments.get("path", "")).endswith("/scsi0.0")
            if is_listed and other.attachments():
                other.detach(held.id)

        sandbox.talk_through(lambda monitor: Hooked(monitor, leave))
        mine = sandbox.devices.attach(sandbox.disk("b.img", options=SCSI))
        assert other.attachments() == [mine]
    assert sandbox.vmplugs() == {f"vmplug-{mine.device_id}"}


@pytest.mark.qemu
def test_a_process_that_waits_for_a_silent_guest_keeps_no_other_from_the_vm(
    tmp_path: Path,
) -> None:
    """QEMU serves one client; who waits for a guest leaves the socket to the others."""
    vmplug = Vmplug(tmp_path / "state")
    devices = [*root_ports(2), *scsi_controller()]
    with start_vm(tmp_path, devices=devices, guest=False, paused=True) as vm:
        vmplug("vm", "adopt", "one", "--qmp", vm.qmp_path).answer()
        where = ("--vm", "one", "--owner", "c1")
        stuck_image = disk_image(tmp_path / "stuck.img", 1, "stuck")
        vmplug("attach", "--device", f"file:{stuck_image}", *where).answer()
        patience = ("--timeout", f"{PATIENT_S:g}")
        waiting = vmplug.begin("detach", "--vm", "one", "--owner", "c1", *patience)
        try:
            while "detaching" not in str(journal_rows(vmplug.state_dir)["device"]):
                assert waiting.poll() is None
            image = str(disk_image(tmp_path / "other.img", 1, "other"))
            with DeviceManager.open(
                vm="one",
                host=Sandbox(tmp_path / "host").root,
                hypervisor=Qemu.connect(str(vm.qmp_path)),
                state_dir=vmplug.state_dir,
            ) as manager:
                for _ in range(5):
                    manager.detach(manager.attach(request(image), owner="c2").id, timeout_s=SOON_S)
            (listed,) = vmplug("list", "--json").json()["attachments"]
            assert listed["host_path"] == str(stuck_image)
            assert waiting.poll() is None
        finally:
            waiting.terminate()
            waiting.communicate(timeout=SOON_S)
        assert qemu_parts(vm).vmplugs() == {name_of_only_device(vmplug.state_dir)}


def name_of_only_device(state_dir: Path) -> str:
    ((device_id, *_),) = journal_rows(state_dir)["device"]
    return f"vmplug-{device_id}"
