"""Whole processes: the command line and the import."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.timing import Ratio, of_pairs, timed

_ROUNDS = 25


def rows() -> Iterator[Ratio]:
    """Start-up ratios, with byte-compiled modules as pip installs them."""
    number = min(os.listdir("/sys/dev/block"))
    vmplug = str(Path(sys.executable).with_name("vmplug"))
    yield _compare(
        "vmplug resolve --device, whole process / python -c 'import click'",
        [vmplug, "resolve", "--device", f"b:{number}"],
        [sys.executable, "-c", "import click"],
        target=1.25,
    )
    yield _compare(
        "import vmplug / python -c pass",
        [sys.executable, "-c", "import vmplug"],
        [sys.executable, "-c", "pass"],
        target=2.5,
    )


def _compare(name: str, ours: Sequence[str], other: Sequence[str], *, target: float) -> Ratio:
    pairs = [(_run(ours), _run(other)) for _ in range(_ROUNDS + 1)][1:]
    return of_pairs(name, pairs, target=target)


def _run(command: Sequence[str]) -> float:
    def process() -> None:
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)

    return timed(process)
