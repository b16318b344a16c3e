"""What a person sees: the screen of a terminal during and after a run, by an emulator of one."""

import codecs
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyte

from tests.cli.command import TIMEOUT_S, VMPLUG, Vmplug

WIDTHS = (60, 80, 100, 200)


@dataclass(frozen=True, slots=True)
class Screen:
    """The rows of the screen that have anything in them, and the colour of each place."""

    rows: tuple[str, ...]
    colours: tuple[tuple[str, ...], ...]

    @property
    def text(self) -> str:
        return "\n".join(self.rows)

    def row(self, word: str) -> str:
        """The one row with that word."""
        (row,) = (row for row in self.rows if word in row)
        return row

    def colour_of(self, word: str) -> str:
        """The colour of the first place where that word stands: `red`, `default`, ..."""
        at = next(number for number, row in enumerate(self.rows) if word in row)
        start = self.rows[at].index(word)
        (colour,) = set(self.colours[at][start : start + len(word)])
        return colour


def emulate(output: str, columns: int) -> Screen:
    """The screen of that width after this output, and high enough: a letter takes two columns."""
    rows_max = output.count("\n") + 2 * len(output) // columns + 1
    screen = pyte.Screen(columns, rows_max)
    pyte.Stream(screen).feed(output.replace("\n", "\r\n"))
    rows = [row.rstrip() for row in screen.display]
    while rows and not rows[-1]:
        rows.pop()
    colours = [
        tuple(str(screen.buffer[y][x].fg) for x in range(columns)) for y in range(len(rows))
    ]
    return Screen(tuple(rows), tuple(colours))


def on_screen(
    vmplug: Vmplug,
    *arguments: str | Path,
    columns: int,
    env: Mapping[str, str] | None = None,
) -> Screen:
    """What a run shows on a terminal of that width."""
    shown = vmplug.at_terminal(*arguments, columns=columns, env=env)
    assert shown.stderr == "", shown
    return emulate(shown.stdout, columns)


class Session:
    """A run with all its streams at a terminal; what it shows is read as it comes."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int, columns: int) -> None:
        self._process = process
        self._terminal = terminal
        self._columns = columns
        self._output = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    @property
    def screen(self) -> Screen:
        """What is shown now."""
        return emulate(self._output.replace("\r\n", "\n"), self._columns)

    def wait_for(self, is_shown: Callable[[Screen], bool]) -> Screen:
        """The first screen of which that is so."""
        deadline = time.monotonic() + TIMEOUT_S
        while not is_shown(screen := self.screen):
            assert self._read(deadline), f"it has ended: {screen.text}"
        return screen

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def end(self) -> tuple[Screen, int]:
        """The last screen and the exit status."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._read(deadline):
            pass
        return self.screen, self._process.wait(TIMEOUT_S)

    def _read(self, deadline: float) -> bool:
        """Whether there was more, which Linux tells as EIO for the end. Source: pty(7)."""
        ready, _, _ = select.select(
            [self._terminal], [], [], max(0.0, deadline - time.monotonic())
        )
        assert ready, f"nothing more is shown: {self.screen.text}"
        try:
            piece = os.read(self._terminal, 1 << 16)
        except OSError:
            return False
        self._output += self._decoder.decode(piece)
        return bool(piece)


@contextmanager
def session(
    vmplug: Vmplug,
    *arguments: str | Path,
    columns: int = 100,
    env: Mapping[str, str] | None = None,
) -> Iterator[Session]:
    """A run at a terminal, for as long as the `with` lasts."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    process = subprocess.Popen(
        [VMPLUG, *arguments],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**vmplug.environment, "TERM": "xterm-256color", **(env or {})},
    )
    os.close(terminal)
    try:
        yield Session(process, main, columns)
    finally:
        process.kill()
        process.wait(TIMEOUT_S)
        os.close(main)
