"""What another thread closes, what a child of fork(2) inherits, and what fails to open."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.cli.monitors import MemoryVm
from tests.support.tree import HostTree
from vmplug.drivers.ports import Command
from vmplug.errors import ConnectError, StateError, StoreError
from vmplug.host.events import HostEvents
from vmplug.host.root import HostRoot
from vmplug.hypervisor.fake.monitor import Guest
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp import client
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.journal.journal import Journal
from vmplug.journal.state import State
from vmplug.manager.manager import DeviceManager
from vmplug.manager.watching.watch import Watch
from vmplug.oci.requests import RngInfo

NEVER_S, SOON_S = 300.0, 60.0


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[MemoryVm]:
    with MemoryVm(tmp_path / "qmp") as vm:
        yield vm


def opened(vm: MemoryVm, state_dir: Path) -> DeviceManager:
    return DeviceManager.open(
        vm="sb1",
        host=HostRoot(),
        hypervisor=Qemu.connect(str(vm.socket_path)),
        state_dir=state_dir,
    )


# closed by another thread


class Hung(MemoryVm):
    """A QEMU that answers no command."""

    def __init__(self, socket_path: Path) -> None:
        super().__init__(socket_path)
        self.asked = threading.Event()

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request["execute"] == "qmp_capabilities":
            return super()._answer(request)
        self.asked.set()
        assert self._client
        while self._client.recv(1 << 16):
            pass
        raise ConnectionError


def test_closing_ends_a_command_that_another_thread_waits_for(tmp_path: Path) -> None:
    with Hung(tmp_path / "qmp") as vm, ThreadPoolExecutor(1) as waiting:
        monitor = QmpMonitor.connect(str(vm.socket_path), command_timeout_s=NEVER_S)
        answer = waiting.submit(monitor.execute, Command("query-status", {}))
        assert vm.asked.wait(SOON_S)
        monitor.close()
        with pytest.raises(StateError, match="closed") as caught:
            answer.result(SOON_S)
        assert caught.value.state == "closed"
        assert caught.value.hint
        monitor.close()
        with pytest.raises(StateError, match="closed"):
            monitor.execute(Command("query-status", {}))


def test_a_signal_handler_may_close_what_its_thread_uses(tmp_path: Path) -> None:
    """The thread that minds the connection is not waited for while it waits for this one."""
    with Hung(tmp_path / "qmp") as vm, ThreadPoolExecutor(1) as other:
        monitor = QmpMonitor.connect(str(vm.socket_path), command_timeout_s=NEVER_S)

        def interrupt() -> None:
            assert vm.asked.wait(SOON_S)
            time.sleep(10 * client.IDLE_S)  # so that it would have begun to wait
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        former = signal.signal(signal.SIGUSR1, lambda *_: monitor.close())
        try:
            done = other.submit(interrupt)
            with pytest.raises(StateError, match="closed"):
                monitor.execute(Command("query-status", {}))
            done.result(SOON_S)
        finally:
            signal.signal(signal.SIGUSR1, former)


def test_a_journal_is_closed_when_its_devices_are_given_up(tmp_path: Path) -> None:
    """Else they would be in progress for as long as this process lives."""
    journal = Journal.open(tmp_path / "state")
    has_begun, may_end = threading.Event(), threading.Event()

    def work() -> None:
        with journal.in_progress([]):
            has_begun.set()
            may_end.wait(SOON_S)
            assert journal.device_ids() == set()

    with ThreadPoolExecutor(2) as threads:
        working = threads.submit(work)
        assert has_begun.wait(SOON_S)
        closing_it = threads.submit(journal.close)
        time.sleep(0.05)
        assert not closing_it.done()
        may_end.set()
        working.result(SOON_S)
        closing_it.result(SOON_S)


def test_closing_ends_the_wait_for_a_guest_and_reconcile_finishes(
    vm: MemoryVm, tmp_path: Path
) -> None:
    manager = opened(vm, tmp_path / "state")
    held = manager.attach(RngInfo())
    vm.machine.guest = Guest.SILENT
    with ThreadPoolExecutor(1) as waiting:
        detached = waiting.submit(manager.detach, held.id, timeout_s=NEVER_S)
        wait_until(lambda: "device_del" in [c.execute for c in vm.machine.sent])
        manager.close()
        with pytest.raises(StateError, match="closed"):
            detached.result(SOON_S)
    vm.machine.wake_guest()
    vm.machine.guest = Guest.ANSWERS
    with closing(opened(vm, tmp_path / "state")) as later:
        assert [hold.state for hold in later.attachments()] == [State.DETACHING]
        later.reconcile()
        assert later.attachments() == []


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_closing_ends_a_watch_in_another_thread(tmp_path: Path) -> None:
    tree = HostTree(tmp_path / "host")
    watch = Watch(Journal.open(tmp_path / "state"), HostEvents(), host=tree.root)
    with ThreadPoolExecutor(1) as waiting:
        notices = waiting.submit(list, watch)
        wait_until(lambda: watch._rows is not None)
        watch.close()
        assert notices.result(SOON_S) == []


# after fork(2)


def in_child(act: Callable[[], object]) -> str:
    """What the call raises in a child, whose only thread is the one that forks."""
    ours, childs = socket.socketpair()
    with ours, childs:
        ours.settimeout(SOON_S)
        pid = os.fork()
        if pid == 0:
            try:
                act()
                said = "done"
            except BaseException as error:  # noqa: BLE001  told to the parent
                said = f"{type(error).__name__}: {error}"
            childs.sendall(said.encode())
            os._exit(0)
        childs.close()
        try:
            return ours.recv(1 << 12).decode()
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_uses_what_its_parent_opened_is_told(vm: MemoryVm, tmp_path: Path) -> None:
    with closing(opened(vm, tmp_path / "state")) as manager:
        held = manager.attach(RngInfo())
        calls: list[Callable[[], object]] = [
            manager.attachments,
            manager.reconcile,
            lambda: manager.check([RngInfo()]),
            lambda: manager.attach(RngInfo(label="other")),
            lambda: manager.detach(held.id),
            manager._hypervisor.status,
            lambda: manager._journal.forget_vm("sb1"),
        ]
        for call in calls:
            said = in_child(call)
            assert said.startswith("StateError: process ")
            assert f"process {os.getpid()} opened this" in said
        assert in_child(manager.close) == "done"
        assert [hold.id for hold in manager.attachments()] == [held.id]
        manager.detach(held.id)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_lock_that_a_thread_had_at_the_fork_does_not_hold_a_child(
    vm: MemoryVm, tmp_path: Path
) -> None:
    with closing(opened(vm, tmp_path / "state")) as manager:
        taken, done = threading.Event(), threading.Event()

        def keep() -> None:
            with manager._lock, manager._journal._lock:
                taken.set()
                done.wait(SOON_S)

        keeping = threading.Thread(target=keep)
        keeping.start()
        assert taken.wait(SOON_S)
        try:
            assert in_child(manager.attachments).startswith("StateError")
            assert in_child(manager.reconcile).startswith("StateError")
        finally:
            done.set()
            keeping.join()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_does_not_keep_the_connection_that_it_inherited(
    vm: MemoryVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TURN_S", NEVER_S)
    with closing(QmpMonitor.connect(str(vm.socket_path))) as monitor:
        with monitor.hear_events():
            monitor.execute(Command("query-status", {}))
            child = os.fork()
            if child == 0:
                signal.pause()
        try:
            vm.wait_idle()
            assert monitor.execute(Command("query-status", {}))["status"] == "running"
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


# what fails to open


def descriptors() -> set[str]:
    """Those of this process that stay open, by what they lead to."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:  # the directory itself
            continue
    return found


def test_an_open_that_fails_leaves_no_thread_and_no_descriptor(
    vm: MemoryVm, tmp_path: Path
) -> None:
    state_dir = tmp_path / "state"
    state_dir.mkdir(mode=0o700)
    (state_dir / "journal.db").write_text("no journal " * 100)
    (state_dir / "journal.db").chmod(0o600)
    threads, before = threading.active_count(), descriptors()
    for _ in range(5):
        with pytest.raises(StoreError):
            opened(vm, state_dir)
        with pytest.raises(ConnectError):
            Qemu.connect(str(tmp_path / "not-there"))
    vm.wait_idle()
    assert threading.active_count() == threads
    assert descriptors() == before
