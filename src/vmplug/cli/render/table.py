"""Tables that fit: paths give way first, then whole columns, and ids never."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vmplug.cli.render.terminal import (
    Style,
    columns_of,
    folded,
    paint,
    say,
    shorten,
    style_of,
    width_of,
    wrapped,
)
from vmplug.text import one_line

_GAP = "  "


class Column(NamedTuple):
    """A column. In a terminal that is too narrow, those of the highest `rank` are left out.

    Before that, cells become narrower, down to `least` columns of the terminal: sentences that
    `folds` break at words, others lose their middle. `least` is None for ids and other words
    that are of no use in part. `style` gives the style of a cell.
    """

    heading: str
    rank: int = 0
    least: int | None = None
    folds: bool = False
    style: Callable[[str], Style] | None = None


def path_column(heading: str, rank: int = 0) -> Column:
    """A column of paths."""
    return Column(heading, rank, least=14)


def name_column(heading: str, rank: int = 0) -> Column:
    """A column of names that somebody chose, such as a container's 64 letters."""
    return Column(heading, rank, least=12)


def state_column(heading: str, rank: int = 0) -> Column:
    """A column of states, with colours."""
    return Column(heading, rank, style=style_of)


def reason_column(heading: str) -> Column:
    """A column of sentences."""
    return Column(heading, least=20, folds=True)


def print_table(columns: Sequence[Column | str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, in the width of a terminal; a pipe gets all of it."""
    if not rows:
        return
    known = [Column(one) if isinstance(one, str) else one for one in columns]
    cells = [[one_line(cell) for cell in row] for row in rows]
    natural = [
        max(len(column.heading), *(columns_of(row[index]) for row in cells))
        for index, column in enumerate(known)
    ]
    widths = fit(known, natural, width_of(sys.stdout))
    say(_joined({i: known[i].heading for i in widths}, widths, {}), Style.HEADING)
    for row in cells:
        _print_row(row, widths, known)
    left_out = ", ".join(c.heading for index, c in enumerate(known) if index not in widths)
    for line in wrapped(f"not shown: {left_out} (--json has all)") if left_out else ():
        say(line, Style.DETAIL)


def _print_row(row: Sequence[str], widths: Mapping[int, int], columns: Sequence[Column]) -> None:
    pieces = {
        index: folded(row[index], width) if columns[index].folds else [shorten(row[index], width)]
        for index, width in widths.items()
    }
    styles = {i: style(row[i]) for i in widths if (style := columns[i].style)}
    for number in range(max(map(len, pieces.values()))):
        cells = {i: lines[number] if number < len(lines) else "" for i, lines in pieces.items()}
        say(_joined(cells, widths, styles))


def _joined(
    cells: Mapping[int, str], widths: Mapping[int, int], styles: Mapping[int, Style]
) -> str:
    """One line of the terminal, without spaces at its end."""
    last = max((index for index, cell in cells.items() if cell), default=0)
    return _GAP.join(
        paint(cell, styles.get(index, Style.PLAIN))
        + ("" if index == last else " " * (widths[index] - columns_of(cell)))
        for index, cell in cells.items()
        if index <= last
    )


def fit(columns: Sequence[Column], natural: Sequence[int], room: int | None) -> dict[int, int]:
    """The width of each column that is shown, by its index; None is room for all."""
    shown = list(range(len(columns)))
    least = [
        width if column.least is None else min(width, max(column.least, len(column.heading)))
        for column, width in zip(columns, natural, strict=True)
    ]
    if room is None:
        return dict(enumerate(natural))

    def excess(widths: Sequence[int]) -> int:
        return sum(widths[i] for i in shown) + len(_GAP) * (len(shown) - 1) - room

    while excess(least) > 0 and len(shown) > 1:
        shown.remove(max(shown, key=lambda index: (columns[index].rank, index)))
    return shrunk({i: natural[i] for i in shown}, dict(enumerate(least)), excess(natural))


def shrunk(widths: Mapping[int, int], least: Mapping[int, int], excess: int) -> dict[int, int]:
    """The widths less `excess` in all: the widest gives way first, none below its least."""
    narrowed = dict(widths)
    for _ in range(excess):
        able = [index for index, width in narrowed.items() if width > least[index]]
        if not able:
            break
        narrowed[max(able, key=lambda index: narrowed[index])] -= 1
    return narrowed
