"""A short soak: what grows with every cycle shows soon."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.system.soak.cycles import Run, Say, soak_disks, soak_guest
from tests.system.soak.figures import MAY_GROW, Figures, grown, is_whole, table

CYCLES: Mapping[Callable[[Path, int, Say], Run], int] = {soak_disks: 60, soak_guest: 16}
NOTHING = Figures(**dict.fromkeys(Figures.__slots__, 0))


@pytest.mark.qemu
@pytest.mark.root
@pytest.mark.parametrize("soak", CYCLES, ids=["disks", "guest"])
def test_nothing_grows(soak: Callable[[Path, int, Say], Run], tmp_path: Path) -> None:
    said: list[str] = []
    run = soak(tmp_path, CYCLES[soak], said.append)
    assert grown(run.warm, run.end) == {}
    assert is_whole(tmp_path / "state")
    assert run.end.journal_rows == 1, "more than the VM is left"
    assert said


@pytest.mark.parametrize("name", asdict(NOTHING))
def test_growth_is_seen(name: str) -> None:
    much = MAY_GROW.get(name, 0) + 1
    assert grown(NOTHING, replace(NOTHING, **{name: much})) == {name: (0, much)}
    assert grown(NOTHING, replace(NOTHING, **{name: much - 1})) == {}
    assert grown(replace(NOTHING, **{name: much}), NOTHING) == {}


def test_the_table_has_a_line_for_everything_that_is_measured() -> None:
    lines = list(table("Disks", {"before": NOTHING, "after": replace(NOTHING, qemu_nodes=3)}))
    assert len(lines) == 1 + len(asdict(NOTHING))
    assert lines[0].split() == ["Disks", "before", "after"]
    assert ["qemu", "nodes", "0", "3"] in [line.split() for line in lines]
