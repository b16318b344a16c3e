"""What README, docs and the help of verbs tell a person to run is run, each in a fresh root."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

from tests.docs.blocks import HELP, PROJECT, RUN, Block, blocks, commands

HERE = Path(__file__).parent
SCENES = (HERE / "scenes.sh").read_text()

ALL = cache(blocks)


def runs() -> list[list[Block]]:
    """The blocks of a run each: one of a page, or the examples of all verbs in one scene.

    A guest takes long to boot: all that need one get one.
    """

    def together(block: Block) -> str | None:
        return block.scene if block.scene == "running_vm" else HELP.get(block.words, block.name)

    return [list(some) for _, some in groupby(filter(lambda b: b.scene, ALL()), key=together)]


@pytest.mark.parametrize("block", ALL(), ids=lambda block: block.name)
def test_a_block_is_run_or_says_why_it_cannot(block: Block) -> None:
    if block.language == "text":
        assert "vmplug " not in re.sub(r"(?m)^vmplug: ", "", block.text), "this can be run"
        return
    assert block.language in RUN, "it has no language; a picture has `text`"
    assert block.scene or block.why, "no comment above it says run: SCENE or not run: WHY"
    assert not block.scene or f"\n{block.scene}() {{" in SCENES
    assert block.language not in {"sh", "console"} or commands(block)


def test_no_page_has_commands_that_are_not_in_a_block() -> None:
    pages = [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")]
    found = [
        f"{page.name}: {line}"
        for page in pages
        for line in re.findall(r"(?m)^ {4}(?:vmplug|make|echo) .*$", page.read_text())
    ]
    assert found == []


@pytest.mark.root
@pytest.mark.qemu
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a root of its own")
@pytest.mark.parametrize("run", runs(), ids=lambda run: run[0].name)
def test_it_does_what_is_said(run: list[Block]) -> None:
    words = [str(HERE / "fresh-root"), str(PROJECT), sys.base_prefix, sys.executable]
    done = subprocess.run(
        [*words, "-m", "tests.docs.run_block", str(run[0].scene)],
        input=json.dumps([asdict(block) for block in run]),
        env={**os.environ, "PYTHONPATH": f"{PROJECT}/src:{PROJECT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{run[0].name}\n{done.stdout}"
