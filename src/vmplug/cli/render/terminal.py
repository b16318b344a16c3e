"""What a terminal shows: its width, colours where they are wanted, and sentences in its width."""

import os
import sys
from enum import StrEnum
from typing import TextIO

import click

_WIDTH_MIN = 40
_WITHOUT_SIZE = 80
_KNOW_NO_ESCAPES = {"dumb", "unknown"}
_LEFT_OUT = "..."


class Style(StrEnum):
    """How text looks, as the numbers of an escape sequence. Source: ECMA-48, SGR."""

    HEADING = "1"
    PLAIN = ""
    DETAIL = "2"
    OK = "32"
    WARNING = "33"
    ERROR = "31"


_GOOD = {"attached", "back", "ok", "present", "running", "vm-resumed"}
_NEUTRAL = {"-", "resized"}
_FOR_NOW = {"busy", "detaching", "paused", "plugging", "retained", "starting", "unidentified"}


def style_of(state: str) -> Style:
    """The colour of a state or of an event: what is not known to be good is an error."""
    word = state.partition(" x")[0]
    if word in _NEUTRAL:
        return Style.PLAIN
    if word in _GOOD:
        return Style.OK
    return Style.WARNING if word in _FOR_NOW else Style.ERROR


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads it; there is no stream where its descriptor was closed."""
    return stream is not None and stream.isatty()


def wants_colour(stream: TextIO | None) -> bool:
    """Whether colours are wanted there. Source: no-color.org, force-color.org."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or knows_escapes(stream)


def knows_escapes(stream: TextIO | None) -> bool:
    """Whether it is a terminal that can do more than print."""
    return is_terminal(stream) and os.environ.get("TERM") not in _KNOW_NO_ESCAPES


def width_of(stream: TextIO | None) -> int | None:
    """The columns of a terminal; None for a pipe, which takes lines of any length."""
    if stream is None or not is_terminal(stream):
        return None
    return os.get_terminal_size(stream.fileno()).columns or _WITHOUT_SIZE


def paint(text: str, style: Style, stream: TextIO | None = None) -> str:
    """`text` in that style, if stdout or the other stream wants colours."""
    if style is Style.PLAIN or not wants_colour(stream or sys.stdout):
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def say(text: str, style: Style = Style.PLAIN, *, err: bool = False) -> None:
    """Print a line; click would take its colours away again in a pipe."""
    click.echo(paint(text, style, sys.stderr if err else sys.stdout), err=err, color=True)


def wrapped(text: str, *, first: str = "", rest: str = "") -> list[str]:
    """The lines of a sentence on stdout, broken at words to its width.

    `first` begins the first line, and `rest` the others. A pipe gets one line.
    """
    width = width_of(sys.stdout)
    if width is None:
        return [first + text]
    return folded(text, max(width, _WIDTH_MIN), first=first, rest=rest)


def folded(text: str, width: int, *, first: str = "", rest: str = "") -> list[str]:
    """The lines of a sentence in that width.

    A path that does not fit stays whole, to be copied: the terminal breaks it.
    """
    if columns_of(first + text) <= width:
        return [first + text]
    from textwrap import wrap  # noqa: PLC0415  1.4 ms, 3 % of importing click

    return wrap(
        text,
        width=width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def columns_of(text: str) -> int:
    """The columns that it takes: letters of East Asia two, accents of their own none."""
    return len(text) if text.isascii() else sum(map(_columns_of_letter, text))


def _columns_of_letter(letter: str) -> int:
    from unicodedata import combining, east_asian_width  # noqa: PLC0415  for few texts

    if combining(letter):
        return 0
    return 2 if east_asian_width(letter) in {"F", "W"} else 1


def shorten(text: str, width: int) -> str:
    """`text` in `width` columns, without its middle: what tells paths apart is at their end."""
    if columns_of(text) <= width:
        return text
    room = width - len(_LEFT_OUT)
    end = _fitting(text[::-1], room - room // 3)[::-1]
    return _fitting(text, room - columns_of(end)) + _LEFT_OUT + end


def _fitting(text: str, width: int) -> str:
    """Its beginning that fits."""
    if text.isascii():
        return text[:width]
    end = 0
    while end < len(text) and columns_of(text[: end + 1]) <= width:
        end += 1
    return text[:end]


def padded(text: str, width: int) -> str:
    """`text` with spaces to that width."""
    return text + " " * (width - columns_of(text))
