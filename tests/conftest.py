"""What is collected: the tests of the lab only in the lab. What tests note is below build."""

import os
import tempfile

import pytest

from tests.support.memory import MEMORY

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", "build/hypothesis")
collect_ignore = [] if "LAB_VM" in os.environ else ["lab"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--in-memory", action="store_true", help="keep temporary files in memory, if possible"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("in_memory"):
        tempfile.tempdir = os.environ["TMPDIR"] = os.environ["PYTEST_DEBUG_TEMPROOT"] = MEMORY
