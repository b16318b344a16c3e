"""Wire: one connection on a QMP socket; JSON objects go both ways, each on a line.

Source: QEMU docs/interop/qmp-spec.rst.
"""

import _socket as socket  # what `socket` adds takes 7 % of the time that importing click takes
import errno
import select
import struct
import time
from collections.abc import Mapping
from typing import Any, Self

import msgspec

from vmplug.hypervisor.listening import socket_address
from vmplug.waiting import LONGEST_S

MESSAGE_BYTES_MAX = 10 << 20
"""The longest message, as libvirt's limit."""

_CREDENTIALS = struct.Struct("iII")


class Wire:
    """Messages in and out. Each call may wait until its deadline, a time of `time.monotonic`.

    Then it raises TimeoutError; EOFError when the other end has gone, or `hang_up` was called;
    ValueError for what is not QMP; or another OSError.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._received = bytearray()
        self._looked_at = 0
        self._ready = select.poll()  # not select(2), which knows no descriptor above 1023
        self._ready.register(connection, select.POLLIN)

    @classmethod
    def connect(cls, path: str, timeout_s: float) -> Self:
        """Connect to the socket at `path`, where the kernel queues clients. Source: unix(7)."""
        connection = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + timeout_s
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            with socket_address(path) as address:
                _limit_sending(connection, deadline)
                connection.connect(address)
                while not _is_connected(connection):
                    _limit_sending(connection, deadline)
                    connection.connect(address)
        except BlockingIOError as error:  # the deadline
            connection.close()
            raise TimeoutError from error
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    def hang_up(self) -> None:
        """End the connection; a thread that waits for a message gets EOFError."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other end was faster
            return

    def close(self) -> None:
        """End the connection, also where a child of fork(2) has a copy of it, and close it."""
        self.hang_up()
        self._socket.close()

    def read_speaker(self, deadline: float) -> int | None:
        """The process that sent the next data, which remains unread; None where unknown.

        The process that created the socket (SO_PEERCRED) may be another one, such as libvirt,
        which passed it on. Source: unix(7), SO_PASSCRED and SCM_CREDENTIALS.
        """
        self._wait(deadline)
        room = socket.CMSG_SPACE(_CREDENTIALS.size)
        try:
            _, told, _, _ = self._socket.recvmsg(1, room, socket.MSG_PEEK)
        except ConnectionError:  # `receive` finds and reports it again
            return None
        pids = [
            _CREDENTIALS.unpack(data)[0]
            for _, kind, data in told
            if kind == socket.SCM_CREDENTIALS
        ]
        return pids[0] or None if pids else None

    def send(self, message: Mapping[str, Any], descriptor: int | None = None) -> None:
        """Send it as few bytes: QEMU 7.2 to 11 take one in each turn of their main loop."""
        try:
            data = msgspec.json.encode(message)
        except UnicodeEncodeError as error:
            raise ValueError(str(error)) from error
        passed = [] if descriptor is None else [struct.pack("i", descriptor)]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, number) for number in passed]
        try:
            sent = self._socket.sendmsg([data], rights)
            if rest := data[sent:]:  # else a peer that obeyed, as to quit, may have gone
                self._socket.sendall(rest)
        except BlockingIOError as error:
            raise TimeoutError from error

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message; with a deadline that is over, one that is there already."""
        while (end := self._received.find(b"\n", self._looked_at)) < 0:
            self._looked_at = len(self._received)
            if self._looked_at > MESSAGE_BYTES_MAX:
                raise ValueError("a message is too long")
            self._wait(deadline)
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._looked_at = 0
        try:
            message = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(str(error)) from error
        if not isinstance(message, dict):
            raise ValueError("a message is not an object")  # noqa: TRY004  of the other end
        return message

    def _wait(self, deadline: float) -> None:
        left_s = min(max(0.0, deadline - time.monotonic()), LONGEST_S)
        if not self._ready.poll(left_s * 1000):
            raise TimeoutError


def _limit_sending(connection: socket.socket, deadline: float) -> None:
    left_s = min(max(0.001, deadline - time.monotonic()), LONGEST_S)
    whole_s = int(left_s)
    limit = struct.pack("ll", whole_s, int((left_s - whole_s) * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _is_connected(connection: socket.socket) -> bool:
    """False after a connect(2) that a signal or a stop of this process interrupted.

    Python takes it for one that goes on; a unix socket has then left the queue. Source: signal(7).
    """
    try:
        connection.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return False
    return True
