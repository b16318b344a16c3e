"""An indented tree for people: aligned columns, and lines about each entry below it."""

import sys
from collections.abc import Iterator, Sequence

import msgspec

from vmplug.cli.render.terminal import Style, columns_of, padded, say, width_of, wrapped
from vmplug.text import one_line

_INDENT = "  "


class Line(msgspec.Struct, frozen=True):
    """One line: `cells` stand in columns with those of the other lines of the section.

    A line of one cell is a sentence. In a narrow terminal it goes on below its beginning, and so
    do the last cells of a line, in all lines of the section.
    """

    depth: int
    cells: Sequence[str]
    style: Style = Style.PLAIN


def print_sections(sections: Sequence[Sequence[Line]]) -> None:
    """Sections with an empty line between."""
    for number, section in enumerate(sections):
        if number:
            say("")
        widths = _widths(section)
        for line in section:
            for text in _texts(line, widths):
                say(text, line.style)


def _texts(line: Line, widths: Sequence[int]) -> Iterator[str]:
    indent, further = _INDENT * line.depth, _INDENT * (line.depth + 2)
    if len(line.cells) == 1:
        yield from wrapped(one_line(line.cells[0]), first=indent, rest=further)
        return
    cells = _indented(line)
    yield _INDENT.join(map(padded, cells, widths)).rstrip()
    if below := _INDENT.join(filter(None, cells[len(widths) :])):
        yield from wrapped(below, first=further, rest=further)


def _indented(line: Line) -> list[str]:
    first, *others = map(one_line, line.cells)
    return [_INDENT * line.depth + first, *others]


def _widths(section: Sequence[Line]) -> list[int]:
    """The widths of the columns that the terminal has room for, at least of the first."""
    rows = [_indented(line) for line in section if len(line.cells) > 1]
    widths = [
        max(columns_of(row[column]) for row in rows if column < len(row))
        for column in range(max(map(len, rows), default=0))
    ]
    room = width_of(sys.stdout)
    while room and len(widths) > 1 and sum(widths) + len(_INDENT) * (len(widths) - 1) > room:
        widths.pop()
    return widths
