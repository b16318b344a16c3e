"""Tests of the lab: they take disks and drivers away from the machine they run on."""

import os
import platform
from pathlib import Path

import pytest

if "LAB_VM" not in os.environ:
    raise pytest.UsageError("these tests run in the lab VM alone: make test-lab")

HERE = Path(__file__).parent

_SPECIAL = {
    "test_cdev.py": platform.release().startswith("6.12"),
    "test_no_remapping.py": "IR-" not in Path("/proc/interrupts").read_text(),
}
"""Tests of a lab with another kernel, or another IOMMU, and whether it is that."""

collect_ignore = (
    [path.name for path in HERE.glob("test_*.py") if path.name not in _SPECIAL]
    if any(_SPECIAL.values())
    else []
) + [name for name, is_that in _SPECIAL.items() if not is_that]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them have the mark."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.lab)
