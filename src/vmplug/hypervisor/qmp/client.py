"""QmpMonitor: the qemu.qmp library behind deadlines and a reconnect.

The library is asynchronous; its event loop runs on its own thread and is not visible outside.
"""

import asyncio
import contextlib
import logging
import re
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Self, TypeVar, cast

from qemu.qmp import ConnectError as QmpConnectError
from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.qmp_client import GreetingError, NegotiationError

from vmplug.drivers.ports import HIDDEN, VF_UUID, Command
from vmplug.errors import (
    CLOSED,
    BackendTimeout,
    CommandError,
    ConnectError,
    ProtocolError,
    StateError,
)
from vmplug.host.process import ProcessLock
from vmplug.hypervisor.listening import socket_address
from vmplug.hypervisor.qmp.monitor import (
    COMMAND_TIMEOUT_S,
    MISSED,
    EventReceiver,
    Monitor,
    Talk,
    command_error,
    next_command,
)
from vmplug.hypervisor.qmp.schema import MESSAGE_BYTES_MAX, validate_reply

T = TypeVar("T")

log = logging.getLogger(__name__)

BACKEND_TIMEOUT_S = 10.0
"""A backend answers in milliseconds too; while QEMU waits for it, the guest is stopped."""

TURN_S = 0.25
"""How long one connection lasts. Then eight busy clients wait two seconds for each other, and a
new connection takes 1 % of it."""

_END_TIMEOUT_S = 2.0
"""The timeout to close a connection to a QEMU that hangs."""

_STOPPED = "if ps shows QEMU as stopped (T), resume it with kill -CONT"


class QmpMonitor(Monitor):
    """Connections on a QMP socket, one after the other, each opened when a command needs it.

    QEMU serves one client per socket, and the others wait in order. So none is kept for longer
    than TURN_S, in use or not, except in `keep_turn`: a thread that waits for a guest does not
    block the VM for others. Commands of one `attempt` stay together. `peer_pid` is the process at
    the other end; None if the kernel does not know it, as for one in another PID namespace.
    """

    def __init__(self, path: str, *, timeout_s: float, command_timeout_s: float) -> None:
        self._socket = path
        self._connect_timeout_s = timeout_s
        self._command_timeout_s = command_timeout_s
        self.peer_pid: int | None = None
        self._receivers: list[EventReceiver] = []
        self._client: QMPClient | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._alone = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._lock = ProcessLock()
        self._keeping = 0
        self._is_closed = False
        self._waiting: set[Future[Any]] = set()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="vmplug-qmp", daemon=True
        )

    @classmethod
    def connect(
        cls, path: str, *, timeout_s: float = 10.0, command_timeout_s: float = COMMAND_TIMEOUT_S
    ) -> Self:
        """Connect to the QMP socket at `path`; ConnectError has the reason for a failure.

        `timeout_s` is for the turn on the socket, `command_timeout_s` for each answer.
        """
        monitor = cls(path, timeout_s=timeout_s, command_timeout_s=command_timeout_s)
        monitor._thread.start()
        try:
            monitor._run(monitor._connect())
        except BaseException:
            monitor.close()
            raise
        return monitor

    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        """See Monitor."""
        return self._run(self._attempt(commands))

    @contextlib.contextmanager
    def keep_turn(self) -> Iterator[None]:
        """See Monitor."""
        with self._lock:
            self._keeping += 1
        try:
            yield
        finally:
            with self._lock:
                self._keeping -= 1

    def converse(self, talk: Talk) -> None:
        """See Monitor."""
        self._run(self._converse(talk))

    def listen(self, receive: EventReceiver) -> None:
        """See Monitor."""
        self._receivers.append(receive)

    def close(self) -> None:
        """See Monitor. A command that another thread waits for ends with StateError."""
        if not self._lock.is_ours:
            return  # it is the parent's, and so is the thread
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            waiting = list(self._waiting)
        if was_closed:
            return
        for answer in waiting:
            answer.cancel()
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._stop()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            with self._lock:
                if self._is_closed:
                    raise _closed(self._socket)
                answer = asyncio.run_coroutine_threadsafe(work, self._loop)
                self._waiting.add(answer)
        except StateError:
            work.close()
            raise
        try:
            return answer.result()
        except CancelledError:
            raise _closed(self._socket) from None
        finally:
            with self._lock:
                self._waiting.discard(answer)

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
                f"{self._socket} sent no QMP greeting within {self._connect_timeout_s:g} s: it "
                "is busy with another client, or QEMU hangs",
                hint="a QMP socket serves one client; give QEMU a -qmp socket for vmplug alone; "
                + _STOPPED,
            ) from error
        except QmpConnectError as error:
            raise self._no_conversation(error) from error
        self._client = client
        relay, turn = self._relay_events(events), self._end_turn()
        self._tasks = [asyncio.create_task(relay), asyncio.create_task(turn)]

    async def _negotiate(self, events: EventListener) -> QMPClient:
        """A client that may send commands.

        QEMU may first send an answer or event for the previous client, which breaks the greeting:
        hence a second attempt. Source: measured on QEMU 7.2, after a backend that kept it waiting,
        and once in some thousand cycles of unplugging.
        """
        for attempts_left in (1, 0):
            client = QMPClient("vmplug", readbuflen=MESSAGE_BYTES_MAX)
            client.logger.addFilter(_hide_secrets)
            client.register_listener(events)
            try:
                await client.connect(await self._open_socket())
            except QmpConnectError as error:
                is_spoilt = isinstance(error.exc, GreetingError | NegotiationError)
                if not (attempts_left and is_spoilt):
                    raise
            except (
                AssertionError
            ) as error:  # the library's, when the connection closes at its start
                with contextlib.suppress(Exception):
                    await client.disconnect()
                raise QmpConnectError("closed", error) from error
            else:
                return client
        raise AssertionError("unreachable")

    async def _open_socket(self) -> socket.socket:
        """A connected socket on which QEMU has sent data, or closed.

        The kernel queues it until its turn. Source: unix(7).
        """
        connection = self._connected_socket()
        try:
            self.peer_pid = await _read_speaker(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connected_socket(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        whole_s = int(self._connect_timeout_s)
        deadline = struct.pack("ll", whole_s, int((self._connect_timeout_s - whole_s) * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, deadline)
        try:
            with socket_address(self._socket) as address:
                connection.connect(address)
        except BlockingIOError as error:
            connection.close()
            raise TimeoutError from error
        except OSError as error:
            connection.close()
            raise self._no_conversation(error) from error
        connection.settimeout(0)  # as asyncio needs it
        return connection

    def _no_conversation(self, error: Exception) -> ConnectError:
        return ConnectError(
            self._socket,
            f"cannot open a QMP connection on {self._socket}: {_reason(error)}",
            hint="start QEMU with a QMP socket for vmplug, -qmp unix:PATH,server=on,wait=off; if "
            "the VM is gone, vmplug reconcile frees what it held",
        )

    async def _relay_events(self, events: EventListener) -> None:
        async for event in events:
            data = event.get("data", {})
            for receive in self._receivers if isinstance(data, Mapping) else ():
                receive(str(event["event"]), cast("Mapping[str, Any]", data))

    async def _end_turn(self) -> None:
        """Leave the socket to the next client; our next command queues up behind it."""
        while True:
            await asyncio.sleep(TURN_S)
            async with self._alone:
                if not self._keeping:
                    await self._disconnect()
                    return

    async def _end(self) -> None:
        """Close the connection for good; the end of a turn may be closing it already."""
        await self._disconnect()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_TIMEOUT_S)

    async def _disconnect(self) -> None:
        """Close the connection, if there is one, and wake the threads that wait for its events."""
        if self._client is None:
            return
        client, self._client = self._client, None
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        # It raises the error that closed the connection, which was reported then.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_END_TIMEOUT_S):
                await client.disconnect()
        for receive in self._receivers:
            receive(MISSED, {})

    async def _attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        """One batch at a time, on one connection: QEMU runs one command at a time anyway."""
        answers: list[Any] = []
        async with self._alone:
            client = await self._connected()
            try:
                for command in commands:
                    answer = await self._execute(client, command)
                    answers.append(answer)
            except CommandError as refusal:
                return answers, refusal
            except ProtocolError:
                await self._disconnect()  # a late answer would have no receiver
                raise
        return answers, None

    async def _converse(self, talk: Talk) -> None:
        """Also keep the turn in between."""
        async with self._alone:
            client = await self._connected()
            command = next_command(talk)
            while command:
                answer, refusal = None, None
                try:
                    answer = validate_reply(command, await self._execute(client, command))
                except CommandError as error:
                    refusal = error
                except ProtocolError:
                    await self._disconnect()
                    raise
                command = next_command(talk, answer, refusal)

    async def _connected(self) -> QMPClient:
        """The client of this connection, or of a new one when it was closed."""
        if self._client is None or self._client.runstate is not Runstate.RUNNING:
            await self._disconnect()
            await self._connect()
        assert self._client
        return self._client

    async def _execute(self, client: QMPClient, command: Command) -> Any:
        log.debug("%s %s", command.execute, command.shown)
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
                    hint="restart or kill that backend: QEMU and its guest are stopped until "
                    "then; afterwards run vmplug reconcile",
                ) from error
            raise ProtocolError(
                f"QEMU did not answer {command.execute} within {timeout_s:g} s",
                hint="once QEMU answers again, vmplug reconcile finds out what it did; "
                + _STOPPED,
            ) from error
        except (QMPError, OSError, EOFError) as error:
            raise ProtocolError(
                f"the QMP connection on {self._socket} was lost during {command.execute}",
                hint="if the VM died, vmplug reconcile frees what it held",
            ) from error


_CREDENTIALS = struct.Struct("iII")


async def _read_speaker(connection: socket.socket) -> int | None:
    """The process that sent the first data on it, which remains unread.

    The process that created the socket (SO_PEERCRED) may be another one, such as libvirt, which
    passed it on.
    Source: unix(7), SO_PASSCRED and SCM_CREDENTIALS.
    """
    loop = asyncio.get_running_loop()
    spoken = asyncio.Event()
    loop.add_reader(connection, spoken.set)
    try:
        await spoken.wait()
    finally:
        loop.remove_reader(connection)
    room = socket.CMSG_SPACE(_CREDENTIALS.size)
    try:
        _, told, _, _ = connection.recvmsg(1, room, socket.MSG_PEEK)
    except ConnectionError:  # the client finds and reports it again
        return None
    pids = [
        _CREDENTIALS.unpack(data)[0] for _, kind, data in told if kind == socket.SCM_CREDENTIALS
    ]
    return pids[0] or None if pids else None


def _closed(path: str) -> StateError:
    return StateError(
        f"the connection to the QEMU on {path} was closed meanwhile",
        state=CLOSED,
        required="open",
        hint="vmplug reconcile finishes or undoes what was begun",
    )


def _reason(error: Exception) -> str:
    """Why there is no connection, from the innermost cause."""
    cause: BaseException = error
    while cause.__cause__:
        cause = cause.__cause__
    match cause:
        case OSError():
            return cause.strerror or str(cause)
        case EOFError():
            return "the server closed the connection before its greeting"
        case _:
            return "the server does not speak QMP"


_SECRET = re.compile(rf'("{VF_UUID}": )"[^"]*"')


def _hide_secrets(record: logging.LogRecord) -> bool:
    """Keep VF tokens out of the messages that qemu.qmp itself logs, of this program alone."""
    if VF_UUID in (words := record.getMessage()):
        record.msg, record.args = _SECRET.sub(rf'\1"{HIDDEN}"', words), ()
    return True
