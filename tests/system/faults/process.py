"""A process under test: forked, halted at each of its steps, and killed when the plan says so."""

import json
import os
import select
import signal
import socket
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from tests.system.faults.steps import StepKind
from vmplug.errors import DeviceError

END_TIMEOUT_S = 30.0
Answer = dict[str, Any]

GO, REFUSE = "go", "refuse"
_WRITES = ("INSERT", "UPDATE", "DELETE")


class Hooks:
    """The process's end of the line to the conductor."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def ask(self, **message: object) -> str:
        """Tell the conductor something and wait for its word."""
        self._line.send(json.dumps(message).encode())
        word = self._line.recv(1 << 12).decode()
        if not word:
            raise SystemExit  # the conductor has given up
        return word

    @contextmanager
    def step(self, kind: StepKind, name: str) -> Iterator[str]:
        """A step; the word is REFUSE when it is not to succeed."""
        yield self.ask(begin=[kind, name])
        self.ask(end=[kind, name])


Work = Callable[[Hooks], None]


class Process:
    """A fork of this process that does some work and ends, with nothing open but its line.

    `words` is the file that holds whatever it prints.
    """

    def __init__(self, work: Work, words: Path) -> None:
        self.words = words
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            _run(work, theirs.fileno(), words)
        theirs.close()
        self.pidfd = os.pidfd_open(self.pid)

    def kill(self) -> None:
        """SIGKILL; it is dead when this comes back."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)

    def reap(self) -> None:
        """End it if it has not ended, and free what is left of it."""
        self.line.close()
        if not select.select([self.pidfd], [], [], END_TIMEOUT_S)[0]:
            self.kill()
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)


def _run(work: Work, line: int, words: Path) -> None:
    """In the child; never comes back. What it inherited would keep others' sockets open."""
    try:
        output = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) != line:
                with suppress(OSError):  # the listing's own
                    os.close(int(name))
        hooks = Hooks(socket.socket(fileno=line))
        hooks.ask(ended=_answer(work, hooks))
    finally:
        os._exit(0)


def _answer(work: Work, hooks: Hooks) -> Answer:
    try:
        work(hooks)
    except DeviceError as error:
        return {"error": error.message, "code": error.code, "hint": error.hint}
    except BaseException:  # noqa: BLE001  whatever it is, it is told
        return {"bug": traceback.format_exc()}
    return {}


class TracedConnection:
    """A journal's connection, of which each COMMIT that writes is a step."""

    def __init__(self, inner: sqlite3.Connection, hooks: Hooks) -> None:
        self._inner = inner
        self._hooks = hooks
        self._written: list[str] = []

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        """See sqlite3."""
        if sql != "COMMIT" or not self._written:
            self._note(sql)
            return self._inner.execute(sql, *values)
        with self._hooks.step(StepKind.JOURNAL, " + ".join(dict.fromkeys(self._written))):
            return self._inner.execute(sql)

    def executemany(self, sql: str, values: Any) -> sqlite3.Cursor:
        """See sqlite3."""
        self._note(sql)
        return self._inner.executemany(sql, values)

    def _note(self, sql: str) -> None:
        words = sql.split()
        if words[0] == "BEGIN":
            self._written = []
        if words[0] in _WRITES:
            table = (
                words[1]
                if words[0] == "UPDATE"
                else words[words.index("INTO") + 1]
                if "INTO" in words
                else words[2]
            )
            state = sql.partition("SET state = '")[2].partition("'")[0]
            self._written.append(f"{table} {state}" if state else f"{words[0].lower()} {table}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def trace_programs(hooks: Hooks) -> None:
    """Make the start of each program in this process a step. Source: Python's audit events."""

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            with hooks.step(StepKind.DAEMON, f"start {Path(arguments[1][0]).name}"):
                pass

    sys.addaudithook(note)


def trace(journal: Any, hooks: Hooks) -> None:
    """Make the transactions of an open journal steps."""
    if isinstance(journal._db, TracedConnection):
        return
    traced = cast(sqlite3.Connection, TracedConnection(journal._db, hooks))
    journal._db = journal.bindings._db = journal.leases._db = traced
