"""The smallest QMP client: one blocking socket. Reads beside the product, and is its baseline."""

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

TIMEOUT_S = 120.0


class QmpError(Exception):
    """QEMU refused a command, with this class and description."""

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"{command}: {error_class}: {desc}")
        self.command = command
        self.error_class = error_class
        self.desc = desc


class RawQmp:
    """A QMP session; made by `connect`, a context manager. Nothing waits beyond its deadline.

    `greeting` is QEMU's first message; `events` has those nobody waited for yet, oldest first; an
    answer may take `timeout_s`. Answers are what JSON holds, hence Any. ConnectionError when QEMU
    ends.
    """

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._socket = connection
        self.timeout_s = timeout_s
        self._received = b""
        self._last_id = 0
        self.events: list[dict[str, Any]] = []
        self.greeting = self._read_message(time.monotonic() + timeout_s)["QMP"]
        self.execute("qmp_capabilities")

    @classmethod
    def connect(cls, path: Path, timeout_s: float = TIMEOUT_S) -> Self:
        """Connects and negotiates. TimeoutError if somebody else has the monitor."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            return cls(connection, timeout_s)
        except BaseException:
            connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session; QEMU takes the next client."""
        self._socket.close()

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, /, **more: object
    ) -> Any:
        """What a command returns. Arguments with a hyphen go in the mapping. Raises QmpError."""
        self._last_id += 1
        message = {"execute": command, "id": self._last_id}
        if arguments or more:
            message["arguments"] = {**(arguments or {}), **more}
        self._socket.settimeout(self.timeout_s)
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        return self._read_answer(command, time.monotonic() + self.timeout_s)

    def wait_event(
        self, name: str, timeout_s: float = TIMEOUT_S, **data: object
    ) -> dict[str, Any]:
        """The data of the first event of this name that has these members, past or to come.

        It is taken out of `events`. Raises TimeoutError.
        """
        deadline = time.monotonic() + timeout_s
        seen = 0
        while True:
            for index, event in enumerate(self.events[seen:], seen):
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    del self.events[index]
                    found: dict[str, Any] = event.get("data", {})
                    return found
            seen = len(self.events)
            self.events.append(self._read_message(deadline))

    def _read_answer(self, command: str, deadline: float) -> Any:
        while "event" in (message := self._read_message(deadline)):
            self.events.append(message)
        if "error" in message:
            raise QmpError(command, message["error"]["class"], message["error"]["desc"])
        assert message["id"] == self._last_id, f"{command}: an answer to somebody else: {message}"
        return message["return"]

    def _read_message(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._received:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise TimeoutError("QMP: no message before the deadline")
            self._socket.settimeout(remaining_s)
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("QMP: QEMU closed the connection")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
