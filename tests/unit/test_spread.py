"""The tests of `make test-fast` run in forked processes: nothing that they find may be lost."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.spread import _Times

PROJECT = Path(__file__).parents[2]
CONFTEST = """
from tests.support.spread import Spread

def pytest_configure(config):
    config.pluginmanager.register(Spread())
"""
TESTS = """
import os
import pytest

@pytest.mark.parametrize("number", range(100))
def test_many(number, tmp_path):
    tmp_path.joinpath("file").touch()
    assert number != 50
    if number == 60:
        pytest.skip("there is no 60")

@pytest.fixture
def broken():
    yield
    raise ValueError("broken at its end")

def test_at_its_end(broken): pass

def test_at_its_start(unknown): pass

@pytest.mark.xfail
def test_that_fails(): assert False
"""
DYING = """
import os

def test_that_dies():
    os._exit({status})
"""

HANGING = """
import time

def test_that_hangs():
    while True:
        time.sleep(1)
"""


def run(directory: Path, tests: str, *arguments: str) -> str:
    directory.joinpath("conftest.py").write_text(CONFTEST)
    directory.joinpath("test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-qra", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        [*command, directory],
        cwd=PROJECT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_everything_is_reported_once(tmp_path: Path) -> None:
    told = run(tmp_path, TESTS)
    assert "1 failed, 99 passed, 1 skipped, 1 xfailed, 2 errors in" in told
    assert "::test_many[50] - assert 50 != 50" in told
    assert "there is no 60" in told
    assert "ValueError: broken at its end" in told


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 1, 9])
def test_a_process_that_dies_fails_the_test_that_it_ran(tmp_path: Path, status: int) -> None:
    told = run(tmp_path, DYING.format(status=status))
    assert f"::test_that_dies - the process that ran it last ended with status {status}" in told


@pytest.mark.slow
def test_a_test_that_hangs_is_shown_and_fails(tmp_path: Path) -> None:
    limit = ("faulthandler_timeout=2", "faulthandler_exit_on_timeout=true")
    told = run(tmp_path, HANGING, *(word for option in limit for word in ("-o", option)))
    assert "Timeout" in told
    assert "in test_that_hangs" in told
    assert "::test_that_hangs - the process that ran it last ended with status 1" in told


@pytest.mark.slow
def test_the_run_can_end_with_the_first_failure(tmp_path: Path) -> None:
    told = run(tmp_path, TESTS.replace("range(100)", "range(9999)"), "-x")
    assert "1 failed" in told
    passed = re.search(r"(\d+) passed", told)
    assert passed
    assert int(passed[1]) < 9990


@pytest.mark.together("pair")
@pytest.mark.parametrize("number", [1, 2])
def test_what_stays_together_is_run_by_one_process(
    request: pytest.FixtureRequest, tmp_path: Path, number: int
) -> None:
    """Also if it takes so long that other tests would be run one by one."""
    times, own = _Times(tmp_path), request.node
    tests = [item for item in request.session.items if item.path == own.path]
    times.add(own.path, 100)
    times.note()
    chunks = [[item.name for _, item in chunk] for chunk in times.sort(tests)]
    (pair,) = (names for names in chunks if own.name in names)
    assert pair == [f"{own.originalname}[1]", f"{own.originalname}[2]"]
    assert all(len(names) == 1 for names in chunks if names != pair)
