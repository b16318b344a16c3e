"""QmpMonitor: the qemu.qmp library behind deadlines and a reconnect.

The library is asynchronous; its event loop runs on a thread of its own and never shows outside.
"""

import asyncio
import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Self, TypeVar, cast

from qemu.qmp import ConnectError as QmpConnectError
from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.qmp_client import NegotiationError

from vmplug.drivers.base import Command
from vmplug.errors import BackendTimeout, CommandError, ConnectError, ProtocolError
from vmplug.hypervisor.monitor import CONVERSATION_LOST, EventReceiver, Monitor, command_error

T = TypeVar("T")

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 30.0
"""QEMU answers in milliseconds; only a dead disk can make it think."""

BACKEND_TIMEOUT_S = 10.0
"""A backend answers in milliseconds too; while QEMU waits for it, the guest stands still."""


class QmpMonitor(Monitor):
    """One conversation on a QMP socket; lost ones are taken up again at the next command.

    QEMU serves one client a socket, so that connecting waits for others to finish. `peer_pid` is
    the process that made the socket: QEMU, or who started it and passed the socket on; None if
    the kernel does not say.
    """

    def __init__(
        self, path: str, *, timeout_s: float, command_timeout_s: float = COMMAND_TIMEOUT_S
    ) -> None:
        self._socket = path
        self._connect_timeout_s = timeout_s
        self._command_timeout_s = command_timeout_s
        self.peer_pid: int | None = None
        self._receivers: list[EventReceiver] = []
        self._client: QMPClient | None = None
        self._relay: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="vmplug-qmp", daemon=True
        )

    @classmethod
    def connect(
        cls, path: str, *, timeout_s: float = 10.0, command_timeout_s: float = COMMAND_TIMEOUT_S
    ) -> Self:
        """A conversation on the QMP socket at `path`; ConnectError says why there is none."""
        monitor = cls(path, timeout_s=timeout_s, command_timeout_s=command_timeout_s)
        monitor._thread.start()
        try:
            monitor._run(monitor._connect())
        except BaseException:
            monitor._stop()
            raise
        return monitor

    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        """See Monitor."""
        return self._run(self._attempt(commands))

    def listen(self, receive: EventReceiver) -> None:
        """See Monitor."""
        self._receivers.append(receive)

    def close(self) -> None:
        """See Monitor."""
        if self._thread.is_alive():
            self._run(self._disconnect())
            self._stop()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _connect(self) -> None:
        events = EventListener()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                client = await self._negotiate(events)
        except TimeoutError as error:
            raise ConnectError(
                self._socket,
                f"{self._socket} gives no QMP greeting within {self._connect_timeout_s:g} s: "
                "it is busy with another client, or QEMU hangs",
                hint="a QMP socket serves one client; give vmplug a -qmp socket of its own",
            ) from error
        except QmpConnectError as error:
            raise self._no_conversation(error) from error
        self._client = client
        self._relay = asyncio.create_task(self._relay_all(client, events))

    async def _negotiate(self, events: EventListener) -> QMPClient:
        """A client that may send commands.

        QEMU may first answer what the client before left unanswered, which spoils the beginning:
        hence a second one. Source: measured on QEMU 7.2, after a backend that kept it waiting.
        """
        for attempts_left in (1, 0):
            client = QMPClient("vmplug")
            client.register_listener(events)
            try:
                await client.connect(self._open_socket())
            except QmpConnectError as error:
                if not (attempts_left and isinstance(error.exc, NegotiationError)):
                    raise
            else:
                return client
        raise AssertionError("unreachable")

    def _open_socket(self) -> socket.socket:
        """A connected socket; the kernel lets it wait for its turn. Source: unix(7)."""
        connection = socket.socket(socket.AF_UNIX)
        whole_s = int(self._connect_timeout_s)
        deadline = struct.pack("ll", whole_s, int((self._connect_timeout_s - whole_s) * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, deadline)
        try:
            connection.connect(self._socket)
        except BlockingIOError as error:
            connection.close()
            raise TimeoutError from error
        except OSError as error:
            connection.close()
            raise self._no_conversation(error) from error
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.peer_pid = struct.unpack("iII", credentials)[0] or None
        connection.settimeout(0)  # as asyncio wants it
        return connection

    def _no_conversation(self, error: Exception) -> ConnectError:
        return ConnectError(
            self._socket,
            f"cannot talk QMP on {self._socket}: {_reason(error)}",
            hint="QEMU needs a QMP socket for vmplug, -qmp unix:PATH,server=on,wait=off; "
            "if the VM is gone, vmplug reconcile frees what it held",
        )

    async def _relay_all(self, client: QMPClient, events: EventListener) -> None:
        """Events as they come, and then that no more will come."""
        relaying = asyncio.create_task(self._relay_events(events))
        try:
            while client.runstate is Runstate.RUNNING:
                await client.runstate_changed()
        finally:
            relaying.cancel()
        self._tell(CONVERSATION_LOST, {})

    async def _relay_events(self, events: EventListener) -> None:
        async for event in events:
            self._tell(str(event["event"]), cast(Mapping[str, Any], event.get("data", {})))

    def _tell(self, event: str, data: Mapping[str, Any]) -> None:
        for receive in self._receivers:
            receive(event, data)

    async def _disconnect(self) -> None:
        if self._relay:
            self._relay.cancel()
        if self._client:
            with contextlib.suppress(QMPError, OSError, EOFError):
                await self._client.disconnect()
        self._client = self._relay = None

    async def _attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        answers: list[Any] = []
        try:
            for command in commands:
                answer = await self._execute(command)
                answers.append(answer)
        except CommandError as refusal:
            return answers, refusal
        return answers, None

    async def _connected(self) -> QMPClient:
        """The client of this conversation, or of a new one when it broke off."""
        async with self._connecting:
            if self._client is None or self._client.runstate is not Runstate.RUNNING:
                await self._disconnect()
                await self._connect()
            assert self._client
            return self._client

    async def _execute(self, command: Command) -> Any:
        client = await self._connected()
        log.debug("%s %s", command.execute, command.arguments)
        timeout_s = self._command_timeout_s
        if command.backend:
            timeout_s = min(timeout_s, BACKEND_TIMEOUT_S)
        try:
            if command.descriptor is not None:
                client.send_fd_scm(command.descriptor)
            async with asyncio.timeout(timeout_s):
                return await client.execute(command.execute, dict(command.arguments))
        except ExecuteError as error:
            refusal = error.error.error
            raise command_error(command, refusal.class_, refusal.desc) from error
        except TimeoutError as error:
            if command.backend:
                raise BackendTimeout(
                    command.backend,
                    f"the vhost-user backend {command.backend} keeps QEMU waiting in "
                    f"{command.execute} for more than {timeout_s:g} s",
                    hint="restart or kill that backend, as QEMU and its guest stand still until "
                    "then; afterwards vmplug reconcile",
                ) from error
            raise ProtocolError(
                f"QEMU did not answer {command.execute} within {timeout_s:g} s",
                hint="vmplug reconcile finds out what it did, once it answers again",
            ) from error
        except (QMPError, OSError, EOFError) as error:
            raise ProtocolError(
                f"the QMP conversation on {self._socket} broke off during {command.execute}",
                hint="if the VM died, vmplug reconcile frees what it held",
            ) from error


def _reason(error: Exception) -> str:
    """Why there is no conversation, from the innermost cause."""
    cause: BaseException = error
    while cause.__cause__:
        cause = cause.__cause__
    match cause:
        case OSError():
            return cause.strerror or str(cause)
        case EOFError():
            return "it closed the connection before its greeting"
        case _:
            return "what listens there does not speak QMP"
