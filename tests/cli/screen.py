"""What a person sees: the screen of a terminal after a run, by an emulator of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyte

from tests.cli.command import Vmplug

WIDTHS = (60, 80, 100, 200)
_ROWS = 300


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
    """The screen of that width after this output."""
    screen = pyte.Screen(columns, _ROWS)
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
