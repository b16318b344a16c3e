"""QMP sockets for processes under test: a VM in memory, and a gate in front of a real QEMU."""

import json
import select
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from vmplug.drivers.ports import Command
from vmplug.hypervisor.fake.monitor import FakeMonitor

CHANGING = frozenset(
    {"blockdev-add", "blockdev-del", "object-add", "object-del", "device_add", "device_del"}
)
"""Commands that change what a VM holds."""

TIMEOUT_S = 30.0

_GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""},
        "capabilities": [],
    }
}


class QmpServer(ABC):
    """A thread that serves one client at a time on a unix socket, as QEMU does."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self._listener = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._serve, name=str(socket_path))
        self._is_idle = threading.Event()

    def __enter__(self) -> Self:
        self._listener.bind(str(self.socket_path))
        self._listener.listen()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        """Nobody listens any more; waits until the last client has gone."""
        if self._thread.is_alive():
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join(TIMEOUT_S)
            assert not self._thread.is_alive(), f"a client stays on {self.socket_path}"
        self._listener.close()

    def wait_idle(self) -> None:
        """Wait until it has hung up on the client that has gone."""
        assert self._is_idle.wait(TIMEOUT_S), f"a client stays on {self.socket_path}"

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # `end`
                return
            self._is_idle.clear()
            with client, suppress(ConnectionError):  # the client was killed
                self._converse(client)
            self._is_idle.set()

    @abstractmethod
    def _converse(self, client: socket.socket) -> None:
        """Serve one client until it goes."""


class Messages:
    """The JSON objects in a stream; a client of QMP need not end them with a newline."""

    def __init__(self) -> None:
        self._received = b""

    def take(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The messages that are complete now."""
        self._received = (self._received + data).lstrip()
        while self._received:
            try:
                message, end = json.JSONDecoder().raw_decode(self._received.decode())
            except ValueError:  # not all of it, or of a character, is there yet
                return
            self._received = self._received.decode()[end:].lstrip().encode()
            yield message


class MemoryVm(QmpServer):
    """FakeHypervisor's machine: a VM that needs neither QEMU nor root.

    `machine` may be looked at and told what to do, as in the unit tests; a second socket of the
    same VM is given the machine of the first.
    """

    def __init__(
        self,
        socket_path: Path,
        *,
        root_ports: int = 4,
        scsi: bool = True,
        machine: FakeMonitor | None = None,
    ) -> None:
        super().__init__(socket_path)
        self.machine = machine or FakeMonitor(root_ports=root_ports, scsi=scsi)
        self.machine.listen(self._tell)
        self._client: socket.socket | None = None

    def names(self) -> frozenset[str]:
        """Everything in the VM that has a name."""
        return frozenset([*self.machine.devices, *self.machine.nodes, *self.machine.objects])

    def _converse(self, client: socket.socket) -> None:
        self._client, messages = client, Messages()
        try:
            self._send(_GREETING)
            while data := client.recv(1 << 16):
                for request in messages.take(data):
                    id_of = {key: request[key] for key in request.keys() & {"id"}}
                    self._send({**self._answer(request), **id_of})
        finally:
            self._client = None

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request["execute"] == "qmp_capabilities":
            return {"return": {}}
        command = Command(request["execute"], request.get("arguments", {}))
        answers, refusal = self.machine.attempt([command])
        if refusal:
            return {"error": {"class": refusal.error_class, "desc": refusal.desc}}
        return {"return": answers[0]}

    def _tell(self, event: str, data: Mapping[str, Any]) -> None:
        timestamp = {"seconds": 0, "microseconds": 0}
        with suppress(OSError):  # the client has just gone: as with QEMU, nobody hears it
            self._send({"event": event, "data": dict(data), "timestamp": timestamp})

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._client:
            self._client.sendall(json.dumps(message).encode() + b"\r\n")


class Talker(QmpServer):
    """Something else than QMP: says `words` to who connects, and hangs up unless it `stays`."""

    def __init__(self, socket_path: Path, words: bytes, *, stays: bool = True) -> None:
        super().__init__(socket_path)
        self._words = words
        self._stays = stays

    def _converse(self, client: socket.socket) -> None:
        client.sendall(self._words)
        while self._stays and client.recv(1 << 16):
            pass


class Gate(QmpServer):
    """Passes conversations on to QEMU, until the command at which it is told to shut.

    Then the client gets no answer any more, whatever it does, until it goes.
    """

    def __init__(self, socket_path: Path, qemu: Path) -> None:
        super().__init__(socket_path)
        self._qemu = qemu
        self._shut_at: int | None = None
        self._is_sent = False
        self._is_shut = threading.Event()

    def shut_at(self, count: int, *, is_sent: bool) -> None:
        """Shut at the count-th changing command from now on, 1 being the next.

        `is_sent` lets QEMU carry it out and keeps the answer back.
        """
        self._is_shut.clear()
        self._shut_at, self._is_sent = count, is_sent

    def wait_shut(self) -> None:
        """Wait until QEMU has carried out all that it will."""
        assert self._is_shut.wait(TIMEOUT_S), "no such command came"

    def _converse(self, client: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as qemu:
            qemu.connect(str(self._qemu))
            if self._pass_on(client, qemu):
                while client.recv(1 << 16):
                    pass

    def _pass_on(self, client: socket.socket, qemu: socket.socket) -> bool:
        """Whether the gate has shut; else one of the two has gone."""
        requests = Messages()
        while True:
            for ready in select.select([client, qemu], [], [])[0]:
                data = ready.recv(1 << 16)
                if not data:
                    return False
                if ready is qemu:
                    client.sendall(data)
                    continue
                for request in requests.take(data):
                    if self._is_last(request):
                        self._shut(request, qemu)
                        return True
                    qemu.sendall(json.dumps(request).encode() + b"\n")

    def _is_last(self, request: Mapping[str, Any]) -> bool:
        if self._shut_at is None or request["execute"] not in CHANGING:
            return False
        self._shut_at -= 1
        return self._shut_at == 0

    def _shut(self, request: Mapping[str, Any], qemu: socket.socket) -> None:
        self._shut_at = None
        if self._is_sent:
            qemu.sendall(json.dumps(request).encode() + b"\n")
            answers = Messages()
            while not any("event" not in answer for answer in answers.take(qemu.recv(1 << 16))):
                pass
        self._is_shut.set()
