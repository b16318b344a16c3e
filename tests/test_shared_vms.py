"""What several tests share ends with the first that fails in it."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import itertools
import pytest

numbers = itertools.count()

@pytest.fixture(scope="session")
def vm():
    return next(numbers)

@pytest.fixture
def clean(vm):
    yield
    assert vm != 1

@pytest.mark.qemu
@pytest.mark.parametrize("number", [0, 0, 1, 2, 2])
def test_it(vm, clean, request, number):
    assert vm == number
    assert request.node.name != "test_it[0_1]"
"""
"""The second test fails in itself, the third in its end; each gets the VM of its number."""


@pytest.mark.slow
def test_the_next_test_gets_another_vm(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    here = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        [*command, "--rootdir", str(here), "-c", str(here / "pyproject.toml")],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split()[0] == ".F.E..", done.stdout
