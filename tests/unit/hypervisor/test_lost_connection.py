"""What a conversation that breaks off while somebody waits for a guest comes to."""

import queue
import signal
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.cli.monitors import MemoryVm
from tests.contract.sandbox import Through
from vmplug.address import PciPath, PciSlot
from vmplug.drivers.place import PciPlace
from vmplug.drivers.plug import RNGDevice
from vmplug.drivers.ports import Command, UnplugFailure
from vmplug.errors import BackendTimeout, CommandError, ProtocolError
from vmplug.hypervisor.fake.monitor import FakeMonitor, Guest
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp import client
from vmplug.hypervisor.qmp.client import IDLE_S, QmpMonitor
from vmplug.hypervisor.qmp.monitor import MISSED, EventReceiver, Monitor, command_error
from vmplug.hypervisor.qmp.wire import Wire

ID, OTHER_ID = "00000000000000a1", "00000000000000b2"
PLACE = PciPlace(bus="rp0", slot=PciSlot(0), path=PciPath.parse("10/00"))
OTHER_PLACE = PciPlace(bus="rp1", slot=PciSlot(0), path=PciPath.parse("11/00"))
NEVER_S, SOON_S, AT_ONCE_S = 300.0, 30.0, 0.1


class Deaf(Through):
    """A conversation whose events are lost, and then itself."""

    def __init__(self, inner: Monitor) -> None:
        super().__init__(inner)
        self._receivers: list[EventReceiver] = []

    def listen(self, receive: EventReceiver) -> None:
        """See Monitor."""
        self._receivers.append(receive)

    def tell(self, event: str, **data: str) -> None:
        """Tell of one event."""
        for receive in self._receivers:
            receive(event, data)

    def break_off(self) -> None:
        """Tell that nothing more is heard."""
        self.tell(MISSED)


def test_a_device_whose_event_was_lost_is_not_waited_for() -> None:
    machine = FakeMonitor()
    monitor = Deaf(machine)
    vm = Qemu(monitor)
    vm.plug(RNGDevice(id=ID, filename="/dev/urandom"), PLACE)
    machine.guest = Guest.SILENT
    assert not vm.request_unplug([ID])
    with ThreadPoolExecutor(1) as waiting:
        left = waiting.submit(vm.wait_unplugged, [ID], NEVER_S)
        machine.wake_guest()
        while not wait([left], timeout=0.01).done:
            monitor.break_off()
    assert left.result() == {}
    assert vm.find_devices() == {}


def test_a_device_that_remains_after_a_lost_connection_is_waited_for() -> None:
    machine = FakeMonitor(guest=Guest.SILENT)
    monitor = Deaf(machine)
    vm = Qemu(monitor)
    vm.plug(RNGDevice(id=ID, filename="/dev/urandom"), PLACE)
    assert not vm.request_unplug([ID])
    with ThreadPoolExecutor(1) as waiting:
        left = waiting.submit(vm.wait_unplugged, [ID], 0.5)
        while not wait([left], timeout=0.01).done:
            monitor.break_off()
    assert left.result() == {ID: UnplugFailure.TIMEOUT}
    assert vm.find_devices() == {ID: True}


def test_a_refusal_does_not_end_the_wait_for_another_device() -> None:
    machine = FakeMonitor()
    monitor = Deaf(machine)
    vm = Qemu(monitor)
    vm.plug(RNGDevice(id=ID, filename="/dev/urandom"), PLACE)
    vm.plug(RNGDevice(id=OTHER_ID, filename="/dev/urandom"), OTHER_PLACE)
    machine.guest = Guest.REFUSES
    assert not vm.request_unplug([ID])
    machine.guest = Guest.SILENT
    assert not vm.request_unplug([OTHER_ID])
    monitor.tell("DEVICE_UNPLUG_GUEST_ERROR", device=f"vmplug-{ID}")
    with ThreadPoolExecutor(1) as waiting:
        left = waiting.submit(vm.wait_unplugged, [ID, OTHER_ID], NEVER_S)
        for _ in range(20):
            monitor.break_off()
            assert not wait([left], timeout=0.01).done
        machine.wake_guest()
        while not wait([left], timeout=0.01).done:
            monitor.break_off()
    assert left.result() == {ID: "refused"}


class Holding(Through):
    """QEMU still has the source of random numbers when its device has left the tree."""

    def __init__(self, inner: Monitor, words: str, times: int) -> None:
        super().__init__(inner)
        self.words, self.times = words, times

    def answer(self, command: Command) -> Any:
        """See Through."""
        if command.execute == "object-del" and self.times:
            self.times -= 1
            raise command_error(command, "GenericError", self.words)
        return super().answer(command)


HELD = [
    "object 'x' is in use, can not be deleted",
    "Cannot delete host memory backend 'x' which is mapped",
    "Cannot delete throttle group 'x' with active references",
]
"""In the words of QEMU 7.2 and 10, then of QEMU 11. Source: measured on each."""


@pytest.mark.parametrize("words", HELD)
def test_an_object_that_qemu_still_uses_is_removed_on_another_try(words: str) -> None:
    monitor = Holding(FakeMonitor(), words, times=3)
    vm = Qemu(monitor)
    vm.plug(RNGDevice(id=ID, filename="/dev/urandom"), PLACE)
    assert not vm.request_unplug([ID])
    assert vm.wait_unplugged([ID], NEVER_S) == {}
    assert (monitor.times, vm.find_devices()) == (0, {})


def test_an_object_that_qemu_never_releases_is_an_error() -> None:
    monitor = Holding(FakeMonitor(), HELD[0], times=10_000)
    vm = Qemu(monitor)
    vm.release_timeout_s = 0.2
    vm.plug(RNGDevice(id=ID, filename="/dev/urandom"), PLACE)
    assert not vm.request_unplug([ID])
    with pytest.raises(CommandError, match="is in use"):
        vm.wait_unplugged([ID], NEVER_S)
    assert vm.find_devices() == {ID: False}


def test_a_broken_socket_is_an_error(tmp_path: Path) -> None:
    told: queue.Queue[str] = queue.Queue()

    def receive(event: str, _: Mapping[str, Any]) -> None:
        told.put(event)

    with MemoryVm(tmp_path / "qmp") as vm:
        monitor = QmpMonitor.connect(str(vm.socket_path))
        monitor.listen(receive)
        assert vm._client
        vm._client.shutdown(socket.SHUT_RDWR)
        assert told.get(timeout=SOON_S) == MISSED
        monitor.close()


def test_a_connection_closed_as_its_turn_ends_leaves_no_client(
    tmp_path: Path,
) -> None:
    def converse(late_ms: int) -> None:
        with (
            MemoryVm(tmp_path / f"qmp{late_ms}") as vm,  # which waits for the last client to go
            closing(QmpMonitor.connect(str(vm.socket_path))),
        ):
            time.sleep(IDLE_S + late_ms / 1000)

    with ThreadPoolExecutor(8) as talking:
        list(talking.map(converse, range(-3, 5)))


def connected(vm: MemoryVm) -> QmpMonitor:
    return QmpMonitor.connect(str(vm.socket_path))


def test_a_connection_without_a_command_is_left_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TURN_S", NEVER_S)
    with MemoryVm(tmp_path / "qmp") as vm, closing(connected(vm)) as one:
        vm.wait_idle()
        assert one.execute(Command("query-status", {}))["status"] == "running"


def test_a_connection_in_use_is_left_after_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "IDLE_S", NEVER_S)
    has_left = threading.Event()
    with MemoryVm(tmp_path / "qmp") as vm, closing(connected(vm)) as one:
        one.listen(lambda event, _: has_left.set() if event == MISSED else None)
        while not has_left.is_set():
            one.execute(Command("query-status", {}))


def test_a_thread_that_waits_for_events_keeps_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TURN_S", NEVER_S)
    told: queue.Queue[str] = queue.Queue()
    with MemoryVm(tmp_path / "qmp") as vm, closing(connected(vm)) as one:
        one.listen(lambda event, _: told.put(event))
        with one.hear_events():
            one.execute(Command("query-status", {}))
            while not told.empty():  # the connection before
                told.get()
            time.sleep(5 * IDLE_S)
            vm._tell("RESUME", {})
            assert told.get(timeout=SOON_S) == "RESUME"
        assert told.get(timeout=SOON_S) == MISSED


class Numbering(MemoryVm):
    """Answers each query twice: first to somebody who has gone, then as its count."""

    count = 0

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request["execute"] == "qmp_capabilities":
            return super()._answer(request)
        self.count += 1
        self._send({"return": {"status": "late"}, "id": request["id"] - 1})
        return {"return": {"status": str(self.count)}}


def test_an_answer_to_somebody_else_is_not_taken(tmp_path: Path) -> None:
    with (
        Numbering(tmp_path / "qmp") as vm,
        closing(QmpMonitor.connect(str(vm.socket_path))) as one,
    ):
        for count in ("1", "2"):
            assert one.execute(Command("query-status", {}))["status"] == count


class Interrupting(Numbering):
    """Interrupts the client's thread before the first answer."""

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request["execute"] != "qmp_capabilities" and not self.count:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return super()._answer(request)


def test_the_answer_to_an_interrupted_command_is_not_taken_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "IDLE_S", NEVER_S)
    monkeypatch.setattr(client, "TURN_S", NEVER_S)
    with (
        Interrupting(tmp_path / "qmp") as vm,
        closing(QmpMonitor.connect(str(vm.socket_path))) as monitor,
    ):
        with pytest.raises(KeyboardInterrupt):
            monitor.execute(Command("query-status", {}))
        assert monitor.execute(Command("query-status", {}))["status"] == "2"


class Late(MemoryVm):
    """A QEMU that says first what it had for the client before."""

    has_said = False

    def _converse(self, client: socket.socket) -> None:
        if not self.has_said:
            self.has_said = True
            client.sendall(
                b'{"event": "RESUME", "timestamp": {"seconds": 0, "microseconds": 0}}\r\n'
            )
        super()._converse(client)


def test_an_answer_for_an_earlier_client_does_not_break_the_connection(tmp_path: Path) -> None:
    with Late(tmp_path / "qmp") as vm, closing(QmpMonitor.connect(str(vm.socket_path))) as monitor:
        assert monitor.execute(Command("query-status", {}))["status"] == "running"
        assert vm.has_said


class Hung(MemoryVm):
    """A QEMU that answers no command of its first client, but says hello to it."""

    def __init__(self, socket_path: Path) -> None:
        super().__init__(socket_path)
        self.was_left = threading.Event()

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        answer = super()._answer(request)
        if request["execute"] != "qmp_capabilities" and not self.was_left.is_set():
            assert self._client
            while self._client.recv(1 << 16):
                pass
            self.was_left.set()
            raise ConnectionError
        return answer


def test_a_client_without_an_answer_disconnects_and_gets_one_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late answer would be taken for that to the next command."""
    monkeypatch.setattr(client, "IDLE_S", NEVER_S)
    monkeypatch.setattr(client, "TURN_S", NEVER_S)
    with (
        Hung(tmp_path / "qmp") as vm,
        closing(QmpMonitor.connect(str(vm.socket_path), command_timeout_s=AT_ONCE_S)) as monitor,
    ):
        with pytest.raises(ProtocolError, match=r"did not answer query-status within 0\.1 s"):
            monitor.execute(Command("query-status", {}))
        assert vm.was_left.wait(SOON_S)
        monitor._command_timeout_s = SOON_S
        assert monitor.execute(Command("query-status", {}))["status"] == "running"


@pytest.mark.parametrize(("command_s", "backend_s"), [(SOON_S, AT_ONCE_S), (AT_ONCE_S, SOON_S)])
def test_a_backend_is_waited_for_no_longer_than_it_or_a_command_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_s: float, backend_s: float
) -> None:
    monkeypatch.setattr(client, "BACKEND_TIMEOUT_S", backend_s)
    with (
        Hung(tmp_path / "qmp") as vm,
        closing(QmpMonitor.connect(str(vm.socket_path), command_timeout_s=command_s)) as monitor,
        pytest.raises(BackendTimeout, match=r"/run/b\.sock .* for more than 0\.1 s"),
    ):
        monitor.execute(Command("query-status", {}, backend="/run/b.sock"))


EVENT = {"event": "RTC_CHANGE", "data": {"offset": 1}}


class Endless(Wire):
    """A connection on which there is always one more event, for a long time."""

    def __init__(self) -> None:
        self._end = time.monotonic() + SOON_S

    def send(self, message: Mapping[str, Any], descriptor: int | None = None) -> None:
        """See Wire."""

    def receive(self, deadline: float) -> dict[str, Any]:
        """See Wire."""
        if time.monotonic() >= self._end:
            raise EOFError(deadline)
        return EVENT


def test_events_without_end_do_not_put_a_deadline_off() -> None:
    monitor = QmpMonitor("/run/qmp", timeout_s=SOON_S, command_timeout_s=AT_ONCE_S)
    with pytest.raises(ProtocolError, match="did not answer query-status"):
        monitor._execute(Endless(), Command("query-status", {}))


def test_a_connection_whose_events_have_no_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TURN_S", AT_ONCE_S)
    monitor = QmpMonitor("/run/qmp", timeout_s=SOON_S, command_timeout_s=SOON_S)
    assert not monitor._hears(Endless())


def test_a_signal_while_it_waits_for_its_turn_does_not_spoil_the_connection(
    tmp_path: Path,
) -> None:
    address = str(tmp_path / "qmp")
    main = threading.main_thread().ident or 0

    def signal_and_accept(listener: socket.socket) -> None:
        for _ in range(20):
            signal.pthread_kill(main, signal.SIGUSR1)
            time.sleep(0.01)
        listener.accept()[0].close()
        with listener.accept()[0] as connection:
            connection.sendall(b'{"QMP": {}}\r\n')

    former = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with (
            socket.socket(socket.AF_UNIX) as listener,
            socket.socket(socket.AF_UNIX) as first,
            ThreadPoolExecutor(1) as serving,
        ):
            listener.bind(address)
            listener.listen(0)
            listener.settimeout(SOON_S)
            first.connect(address)
            served = serving.submit(signal_and_accept, listener)
            with closing(Wire.connect(address, SOON_S)) as wire:
                assert wire.receive(time.monotonic() + SOON_S) == {"QMP": {}}
            served.result(SOON_S)
    finally:
        signal.signal(signal.SIGUSR1, former)
