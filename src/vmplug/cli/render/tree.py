"""An indented tree for people: aligned columns, and lines about each entry below it."""

import sys
from collections.abc import Sequence
from enum import StrEnum

import click
import msgspec

from vmplug.cli.render.text import one_line

_INDENT = "  "
_WIDTH_MIN = 40


class Style(StrEnum):
    """How a line looks at a terminal, in rich's words."""

    HEADING = "bold"
    PLAIN = ""
    DETAIL = "dim"
    WARNING = "yellow"


class Line(msgspec.Struct, frozen=True):
    """One line: `cells` stand in columns with those of the other lines of the section.

    A line of one cell stands by itself, however long it is.
    """

    depth: int
    cells: Sequence[str]
    style: Style = Style.PLAIN


def print_sections(sections: Sequence[Sequence[Line]]) -> None:
    """Sections with an empty line between; colour only at a terminal without NO_COLOR."""
    texts = [_align(section) for section in sections]
    if sys.stdout and sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415  30 ms that a pipe need not pay
        from rich.text import Text  # noqa: PLC0415  the same

        console = Console(highlight=False, markup=False)
        for number, section in enumerate(texts):
            if number:
                console.print()
            for text, style in section:
                console.print(Text(text, style=style), soft_wrap=True)
        return
    click.echo("\n\n".join("\n".join(text for text, _ in section) for section in texts))


def print_wrapped(lines: Sequence[Line]) -> None:
    """Lines that a terminal shows in its width, the rest of a long one below its beginning."""
    texts = [(line, "  ".join(map(one_line, line.cells))) for line in lines]
    if not (sys.stdout and sys.stdout.isatty()):
        click.echo("\n".join(_INDENT * line.depth + text for line, text in texts))
        return
    from textwrap import wrap  # noqa: PLC0415  2 ms that a pipe need not pay

    from rich.console import Console  # noqa: PLC0415  30 ms, the same
    from rich.text import Text  # noqa: PLC0415  the same

    console = Console(highlight=False, markup=False)
    for line, text in texts:
        pieces = wrap(
            text,
            width=max(console.width, _WIDTH_MIN),
            initial_indent=_INDENT * line.depth,
            subsequent_indent=_INDENT * (line.depth + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
        # A path that does not fit stays whole, to be copied: the terminal breaks it.
        console.print(Text("\n".join(pieces), style=line.style), soft_wrap=True)


def _align(lines: Sequence[Line]) -> list[tuple[str, Style]]:
    rows = [[one_line(cell) for cell in line.cells] for line in lines]
    for row, line in zip(rows, lines, strict=True):
        row[0] = _INDENT * line.depth + row[0]
    columns = [row for row in rows if len(row) > 1]
    widths = [
        max((len(row[column]) for row in columns if column < len(row)), default=0)
        for column in range(max((len(row) for row in rows), default=0))
    ]
    return [
        (
            _INDENT.join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=False)
            ).rstrip()
            if len(row) > 1
            else row[0],
            line.style,
        )
        for row, line in zip(rows, lines, strict=True)
    ]
