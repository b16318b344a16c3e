"""QmpMonitor: turns on a QMP socket, with deadlines."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Self

from vmplug.drivers.ports import Command
from vmplug.errors import (
    CLOSED,
    BackendTimeout,
    CommandError,
    ConnectError,
    ProtocolError,
    StateError,
)
from vmplug.host.process import ProcessLock
from vmplug.host.use.silent import NO_ANSWER, REMEDY
from vmplug.hypervisor.qmp.defaults import sent_arguments
from vmplug.hypervisor.qmp.monitor import (
    COMMAND_TIMEOUT_S,
    MISSED,
    EventReceiver,
    Monitor,
    Talk,
    command_error,
    next_command,
)
from vmplug.hypervisor.qmp.schema import validate_reply
from vmplug.hypervisor.qmp.wire import Wire
from vmplug.log import Log
from vmplug.waiting import waiting

log = Log(__name__)

BACKEND_TIMEOUT_S = 10.0
"""A backend answers in milliseconds too; while QEMU waits for it, the guest is stopped."""

TURN_S = 0.25
"""How long one connection lasts. Then eight busy clients wait two seconds for each other, and a
new connection takes 1 % of it."""

IDLE_S = 0.003
"""How long a connection lasts without a command, unless a thread waits for events. A new one
costs 0.5 ms; an attach has no longer pause."""

_STOPPED = "if ps shows QEMU as stopped (T), resume it with kill -CONT"


class QmpMonitor(Monitor):
    """Connections on a QMP socket, one after the other, each opened when a command needs it.

    QEMU serves one client per socket, and the others wait in order. So one lasts for IDLE_S after
    its last command, or while a thread waits for events, and at most for TURN_S, except in
    `keep_turn`: a thread that waits for a guest does not block the VM for others. Commands of one
    `attempt` stay together. The thread that sends a command reads its answer; between commands a
    thread of the monitor passes events on, and leaves. `peer_pid` is the process at the other
    end; None if the kernel does not know it, as for one in another PID namespace.
    """

    def __init__(self, path: str, *, timeout_s: float, command_timeout_s: float) -> None:
        self._socket = path
        self._connect_timeout_s = timeout_s
        self._command_timeout_s = command_timeout_s
        self.peer_pid: int | None = None
        self._receivers: list[EventReceiver] = []
        self._numbers = count(1)
        self._alone = ProcessLock()
        """The thread that has it uses the connection."""
        self._closing = threading.RLock()  # a signal handler may close it
        self._closed = threading.Event()
        self._wire: Wire | None = None
        self._is_open = threading.Event()
        self._minder: threading.Thread | None = None
        self._begun = self._idle_since = 0.0
        self._keeping = self._hearing = 0

    @classmethod
    def connect(
        cls, path: str, *, timeout_s: float = 10.0, command_timeout_s: float = COMMAND_TIMEOUT_S
    ) -> Self:
        """Connect to the QMP socket at `path`; ConnectError has the reason for a failure.

        `timeout_s` is for the turn on the socket, `command_timeout_s` for each answer.
        """
        monitor = cls(path, timeout_s=timeout_s, command_timeout_s=command_timeout_s)
        with monitor._connection():
            return monitor

    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        """See Monitor. One batch at a time: QEMU runs one command at a time anyway."""
        answers: list[Any] = []
        with self._connection() as wire:
            try:
                for command in commands:
                    answer = self._execute(wire, command)
                    answers.append(answer)
            except CommandError as refusal:
                return answers, refusal
        return answers, None

    def converse(self, talk: Talk) -> None:
        """See Monitor. Also keep the turn in between."""
        with self._connection() as wire:
            command = next_command(talk)
            while command:
                answer, refusal = None, None
                try:
                    answer = validate_reply(command, self._execute(wire, command))
                except CommandError as error:
                    refusal = error
                command = next_command(talk, answer, refusal)

    @contextmanager
    def keep_turn(self) -> Iterator[None]:
        """See Monitor."""
        with self._alone:
            self._keeping += 1
        try:
            yield
        finally:
            with self._alone:
                self._keeping -= 1

    @contextmanager
    def hear_events(self) -> Iterator[None]:
        """See Monitor."""
        with self._alone:
            self._hearing += 1
        try:
            yield
        finally:
            with self._alone:
                self._hearing -= 1

    def listen(self, receive: EventReceiver) -> None:
        """See Monitor."""
        self._receivers.append(receive)

    def close(self) -> None:
        """See Monitor. A command that another thread waits for ends with StateError."""
        if not self._alone.is_ours:
            return  # it is the parent's
        with self._closing:
            self._closed.set()
            self._is_open.set()
            if self._wire:
                self._wire.hang_up()
        with self._alone:
            self._disconnect()
        if self._minder:
            self._minder.join()

    @contextmanager
    def _connection(self) -> Iterator[Wire]:
        """The connection, or a new one when it was closed, for this thread alone.

        It is closed after a ProtocolError: a late answer would have no receiver.
        """
        with self._alone:
            if self._closed.is_set():
                raise _closed(self._socket)
            if self._wire and not self._hears(self._wire):
                self._disconnect()
            wire = self._wire or self._connect()
            self._keeping += 1
            try:
                yield wire
            except ProtocolError:
                self._disconnect()
                raise
            finally:
                self._keeping -= 1
                self._idle_since = time.monotonic()
                if self._is_over(idle_s=0):
                    self._disconnect()

    def _connect(self) -> Wire:
        deadline = time.monotonic() + self._connect_timeout_s
        try:
            with waiting(f"QEMU to answer on {self._socket}", self._connect_timeout_s):
                wire = self._negotiated(deadline)
        except (OSError, EOFError, ValueError) as error:
            self._disconnect()
            if self._closed.is_set():
                raise _closed(self._socket) from None
            raise self._no_connection(error) from error
        except BaseException:
            self._disconnect()
            raise
        self._begun = self._idle_since = time.monotonic()
        self._is_open.set()
        if self._minder is None:
            self._minder = threading.Thread(target=self._mind, name="vmplug-qmp", daemon=True)
            self._minder.start()
        return wire

    def _negotiated(self, deadline: float) -> Wire:
        """A connection on which QEMU takes commands.

        QEMU may first send an answer or event for the previous client, which breaks the greeting:
        hence a second attempt. Source: measured on QEMU 7.2, after a backend that kept it waiting,
        and once in some thousand cycles of unplugging.
        """
        try:
            return self._greeted(deadline)
        except ValueError:
            self._disconnect()
            return self._greeted(deadline)

    def _greeted(self, deadline: float) -> Wire:
        wire = Wire.connect(self._socket, max(0.001, deadline - time.monotonic()))
        with self._closing:
            self._wire = wire
            if self._closed.is_set():
                raise EOFError
        self.peer_pid = wire.read_speaker(deadline)
        if not isinstance(wire.receive(deadline).get("QMP"), Mapping):
            raise ValueError("no greeting")  # noqa: TRY004  of the other end
        wire.send({"execute": "qmp_capabilities"})
        if "return" not in wire.receive(deadline):
            raise ValueError("no agreement")
        return wire

    def _disconnect(self) -> None:
        """Close the connection, if there is one, and wake the threads that wait for its events."""
        with self._closing:
            wire, self._wire = self._wire, None
            if not self._closed.is_set():
                self._is_open.clear()
        if wire:
            wire.close()
            for receive in self._receivers:
                receive(MISSED, {})

    def _mind(self) -> None:
        """Between commands pass on what arrives, and leave the socket to the next client.

        Our next command queues up behind it. A thread that has a command under way is not waited
        for: it may have to wait for this one, when its signal handler closes the monitor.
        """
        while self._is_open.wait() and not self._closed.wait(IDLE_S):
            if self._alone.take_if_free():
                try:
                    self._look()
                finally:
                    self._alone.release()

    def _look(self) -> None:
        idle_s = time.monotonic() - self._idle_since
        if self._wire and (self._is_over(idle_s) or not self._hears(self._wire)):
            self._disconnect()

    def _is_over(self, idle_s: float) -> bool:
        """Whether it is another client's turn, after that time without a command."""
        is_long = time.monotonic() - self._begun >= TURN_S
        is_idle = idle_s >= IDLE_S and not self._hearing
        return not self._keeping and (is_long or is_idle)

    def _hears(self, wire: Wire) -> bool:
        """Pass on what is there; False when the other end has gone, or never stops talking."""
        end = time.monotonic() + TURN_S
        try:
            while time.monotonic() < end:
                self._pass_on(wire.receive(deadline=0))
        except TimeoutError:
            return True
        except (OSError, EOFError, ValueError):
            return False
        return False

    def _pass_on(self, message: Mapping[str, Any]) -> None:
        event, data = message.get("event"), message.get("data", {})
        for receive in self._receivers if event and isinstance(data, Mapping) else ():
            receive(str(event), data)

    def _execute(self, wire: Wire, command: Command) -> Any:
        if log.is_debug:
            import json  # noqa: PLC0415  1.4 ms

            log.debug("QMP %s %s", command.execute, json.dumps(dict(command.shown)))
        timeout_s = self._command_timeout_s
        if command.backend:
            timeout_s = min(timeout_s, BACKEND_TIMEOUT_S)
        try:
            with waiting(f"QEMU's answer to {command.execute}", timeout_s):
                return self._answer(wire, command, time.monotonic() + timeout_s)
        except TimeoutError as error:
            raise _no_answer(command, timeout_s) from error
        except (OSError, EOFError, ValueError) as error:
            if self._closed.is_set():
                raise _closed(self._socket) from None
            raise ProtocolError(
                f"the QMP connection on {self._socket} was lost during {command.execute}",
                hint="if the VM died, vmplug reconcile frees what it held",
            ) from error

    def _answer(self, wire: Wire, command: Command, deadline: float) -> Any:
        """Send it, and pass on what comes before its answer.

        An answer with another number is for a command that was given up, maybe another client's.
        """
        number = next(self._numbers)
        said = sent_arguments(command)
        arguments = {"arguments": said} if said else {}
        wire.send({"execute": command.execute, **arguments, "id": number}, command.descriptor)
        while (message := wire.receive(deadline)).get("id") != number:
            self._pass_on(message)
            if time.monotonic() >= deadline:  # a QEMU that its guest has compromised may not stop
                raise TimeoutError
        match message:
            case {"error": {"class": str(error_class), "desc": str(desc)}}:
                raise command_error(command, error_class, desc)
            case {"return": answer}:
                return answer
            case _:
                raise ValueError("neither an answer nor an error")

    def _no_connection(self, error: Exception) -> ConnectError:
        if isinstance(error, TimeoutError):
            return ConnectError(
                self._socket,
                f"{self._socket} sent no QMP greeting within {self._connect_timeout_s:g} s: it "
                "is busy with another client, or QEMU hangs",
                hint="a QMP socket serves one client; give QEMU a -qmp socket for vmplug alone; "
                + _STOPPED,
            )
        reason = _reason(error)
        return ConnectError(
            self._socket,
            f"cannot open a QMP connection on {self._socket}: {reason}",
            hint=REMEDY
            if reason == NO_ANSWER
            else "start QEMU with a QMP socket for vmplug, -qmp unix:PATH,server=on,wait=off; if "
            "the VM is gone, vmplug reconcile frees what it held",
        )


def _no_answer(command: Command, timeout_s: float) -> ProtocolError:
    if command.backend:
        return BackendTimeout(
            command.backend,
            f"the vhost-user backend {command.backend} keeps QEMU waiting in "
            f"{command.execute} for more than {timeout_s:g} s",
            hint="restart or kill that backend: QEMU and its guest are stopped until "
            "then; afterwards run vmplug reconcile",
        )
    return ProtocolError(
        f"QEMU did not answer {command.execute} within {timeout_s:g} s",
        hint="once QEMU answers again, vmplug reconcile finds out what it did; " + _STOPPED,
    )


def _closed(path: str) -> StateError:
    return StateError(
        f"the connection to the QEMU on {path} was closed meanwhile",
        state=CLOSED,
        required="open",
        hint="vmplug reconcile finishes or undoes what was begun",
    )


def _reason(error: Exception) -> str:
    """Why there is no connection."""
    match error:
        case OSError():
            return error.strerror or str(error)
        case EOFError():
            return "the server closed the connection before its greeting"
        case _:
            return "the server does not speak QMP"
