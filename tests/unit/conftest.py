"""Fixtures for other hosts' trees."""

import os
import shutil
from pathlib import Path

import pytest

from tests.support.tree import HostTree


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root: mknod, loop devices, mounts")
    if item.get_closest_marker("qemu") and not shutil.which("qemu-system-x86_64"):
        pytest.skip("needs qemu-system-x86_64")


@pytest.fixture
def tree(tmp_path: Path) -> HostTree:
    return HostTree(tmp_path / "host")
