"""docs/support.md: what it says is proven has a test, and what has none says so."""

import re
from pathlib import Path

PROJECT = Path(__file__).parents[1]
TABLE = (PROJECT / "docs" / "support.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TABLE)))


def devices() -> list[list[str]]:
    """The cells of each row of the table of devices."""
    _, _, table = TABLE.partition("| device | machine | hot | cold |\n")
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_test_that_is_named_is_there() -> None:
    functions = {
        file: set(re.findall(r"(?m)^def (\w+)\(", (PROJECT / "tests" / file).read_text()))
        for file in {file for file, _ in NAMED}
    }
    assert NAMED
    assert [f"{file}::{name}" for file, name in NAMED if name not in functions[file]] == []


def test_every_cell_is_proven_or_says_that_it_was_not_run() -> None:
    said = [cell for _, machine, *cells in devices() for cell in cells if machine != "pc" or cell]
    honest = re.compile(r"`[\w/]+\.py::\w+`$|never|not run$")
    assert said
    assert [cell for cell in said if not honest.match(cell)] == []
