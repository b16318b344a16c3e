"""Every row of `make bench` works, and proves that it did what it times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.qemu, pytest.mark.root]

TREE = Path(__file__).parents[2]
ROWS_MIN = 30


def test_every_row_runs_once() -> None:
    """However long it takes: a busy machine proves nothing about time."""
    ran = subprocess.run(
        [sys.executable, "-m", "bench"],
        cwd=TREE,
        env={**os.environ, "QUICK": "1", "PYTHONPATH": f"{TREE}:{TREE / 'src'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert len(ran.stdout.splitlines()) > ROWS_MIN, ran.stdout
