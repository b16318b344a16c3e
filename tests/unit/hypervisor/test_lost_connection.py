"""What a conversation that breaks off while somebody waits for a guest comes to."""

import queue
import socket
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
from vmplug.errors import CommandError
from vmplug.hypervisor.fake.monitor import FakeMonitor, Guest
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.client import TURN_S, QmpMonitor
from vmplug.hypervisor.qmp.monitor import MISSED, EventReceiver, Monitor, command_error

ID = "00000000000000a1"
PLACE = PciPlace(bus="rp0", slot=PciSlot(0), path=PciPath.parse("10/00"))
NEVER_S, SOON_S = 300.0, 30.0


class Deaf(Through):
    """A conversation whose events are lost, and then itself."""

    def __init__(self, inner: Monitor) -> None:
        super().__init__(inner)
        self._receivers: list[EventReceiver] = []

    def listen(self, receive: EventReceiver) -> None:
        """See Monitor."""
        self._receivers.append(receive)

    def break_off(self) -> None:
        """Tell that nothing more is heard."""
        for receive in self._receivers:
            receive(MISSED, {})


def test_a_device_whose_event_was_lost_is_not_waited_for() -> None:
    machine = FakeMonitor()
    monitor = Deaf(machine)
    vm = Qemu(monitor)
    vm.plug(RNGDevice(id=ID, filename="/dev/urandom"), PLACE)
    machine.guest = Guest.SILENT
    vm.request_unplug(ID)
    with ThreadPoolExecutor(1) as waiting:
        left = waiting.submit(vm.wait_unplugged, [ID], NEVER_S)
        machine.wake_guest()
        while not wait([left], timeout=0.01).done:
            monitor.break_off()
    assert left.result() == {}
    assert vm.find_devices() == {}


def test_what_is_still_there_after_a_break_is_waited_for() -> None:
    machine = FakeMonitor(guest=Guest.SILENT)
    monitor = Deaf(machine)
    vm = Qemu(monitor)
    vm.plug(RNGDevice(id=ID, filename="/dev/urandom"), PLACE)
    vm.request_unplug(ID)
    with ThreadPoolExecutor(1) as waiting:
        left = waiting.submit(vm.wait_unplugged, [ID], 0.5)
        while not wait([left], timeout=0.01).done:
            monitor.break_off()
    assert left.result() == {ID: UnplugFailure.TIMEOUT}
    assert vm.find_devices() == {ID: True}


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
def test_what_qemu_still_holds_for_a_moment_is_taken_away(words: str) -> None:
    monitor = Holding(FakeMonitor(), words, times=3)
    vm = Qemu(monitor)
    vm.plug(RNGDevice(id=ID, filename="/dev/urandom"), PLACE)
    vm.request_unplug(ID)
    assert vm.wait_unplugged([ID], NEVER_S) == {}
    assert (monitor.times, vm.find_devices()) == (0, {})


def test_what_qemu_never_lets_go_is_told() -> None:
    monitor = Holding(FakeMonitor(), HELD[0], times=10_000)
    vm = Qemu(monitor)
    vm.release_timeout_s = 0.2
    vm.plug(RNGDevice(id=ID, filename="/dev/urandom"), PLACE)
    vm.request_unplug(ID)
    with pytest.raises(CommandError, match="is in use"):
        vm.wait_unplugged([ID], NEVER_S)
    assert vm.find_devices() == {ID: False}


def test_a_socket_that_breaks_is_told(tmp_path: Path) -> None:
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


def test_a_conversation_closed_as_its_turn_ends_leaves_nobody_there(
    tmp_path: Path,
) -> None:
    def converse(late_ms: int) -> None:
        with (
            MemoryVm(tmp_path / f"qmp{late_ms}") as vm,  # which waits for the last client to go
            closing(QmpMonitor.connect(str(vm.socket_path))),
        ):
            time.sleep(TURN_S + late_ms / 1000)

    with ThreadPoolExecutor(8) as talking:
        list(talking.map(converse, range(-3, 5)))


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


def test_what_was_for_the_client_before_spoils_no_conversation(tmp_path: Path) -> None:
    with Late(tmp_path / "qmp") as vm, closing(QmpMonitor.connect(str(vm.socket_path))) as monitor:
        assert monitor.execute(Command("query-status", {}))["status"] == "running"
        assert vm.has_said
