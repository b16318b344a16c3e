"""Tests of the lab: they take disks and drivers away from the machine they run on."""

import os
from pathlib import Path

import pytest

if "LAB_VM" not in os.environ:
    raise pytest.UsageError("these tests run in the lab VM alone: make test-lab")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them have the mark."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.lab)
