"""Fixtures for other hosts' trees."""

import os
from pathlib import Path

import pytest

from tests.support.tree import HostTree


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root: mknod, loop devices, mounts")


@pytest.fixture
def tree(tmp_path: Path) -> HostTree:
    return HostTree(tmp_path / "host")
