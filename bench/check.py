"""Whole checks of one disk, with more and more processes on the host to ask."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.timing import Ratio, of_pairs, rounds, scaled, timed

_FEW = 10
_ROUNDS = 7
_TARGETS = {100: 1.3, 1000: 3.0}


def rows() -> Iterator[Ratio]:
    """`vmplug check` with 100 and with 1 000 more processes / with 10."""
    with TemporaryDirectory(prefix="vmplug-bench-") as directory:
        os.mkdir(f"{directory}/state", 0o700)
        image = Path(directory, "a.img")
        with image.open("wb") as file:
            file.truncate(1 << 20)
        yield from _growth("one image", f"file:{image}", directory)
        if os.geteuid() == 0:
            losetup = ["losetup", "--find", "--show", str(image)]
            node = subprocess.run(
                losetup, capture_output=True, text=True, check=True
            ).stdout.strip()
            try:
                yield from _growth("one block device", node, directory)
            finally:
                subprocess.run(["losetup", "--detach", node], check=True)


def _growth(what: str, device: str, directory: str) -> Iterator[Ratio]:
    """`directory` has an empty state directory, so that no journal of this host counts."""
    vmplug = str(Path(sys.executable).with_name("vmplug"))
    command = [vmplug, "check", "--state-dir", f"{directory}/state", "--device", device]
    for count, target in _TARGETS.items():
        pairs = [_pair(command, count) for _ in rounds(_ROUNDS)]
        name = f"vmplug check of {what}, {count} idle processes / {_FEW}"
        yield of_pairs(name, pairs, target=target)


def _pair(command: Sequence[str], count: int) -> tuple[float, float]:
    with _idle(_FEW):
        few_s = _check(command)
    with _idle(scaled(count)):
        return _check(command), few_s


def _check(command: Sequence[str]) -> float:
    seconds, done = timed(lambda: subprocess.run(command, stdout=subprocess.PIPE, check=True))
    assert command[-1].removeprefix("file:").encode() in done.stdout
    return seconds


@contextmanager
def _idle(count: int) -> Iterator[None]:
    """That many processes which do nothing."""
    # One forks the others: to start a thousand from here takes longer than what is measured.
    script = "i=0; while [ $i -lt $0 ]; do sleep 600 & i=$((i+1)); done; echo; read line; kill 0"
    with subprocess.Popen(
        ["setsid", "sh", "-c", script, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as shell:
        assert shell.stdout
        shell.stdout.readline()
        yield
        assert shell.stdin
        shell.stdin.close()
        shell.wait()
