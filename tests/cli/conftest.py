"""Fixtures for the command line."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.cli.monitors import MemoryVm
from tests.support.memory import MEMORY
from tests.support.tree import HostTree


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root: mknod, loop devices, mounts")


@pytest.fixture
def vmplug() -> Iterator[Vmplug]:
    """A command line whose journal is not there yet; sockets below it need a short path."""
    with tempfile.TemporaryDirectory(prefix="vmplug-", dir=MEMORY) as directory:
        yield Vmplug(Path(directory) / "state")


@pytest.fixture
def vm(vmplug: Vmplug) -> Iterator[MemoryVm]:
    """A VM in memory that vmplug knows as sb1."""
    with MemoryVm(vmplug.state_dir.with_name("qmp.sock")) as made:
        vmplug("vm", "adopt", "sb1", "--qmp", made.socket_path).answer()
        yield made


@pytest.fixture
def tree(tmp_path: Path) -> HostTree:
    return HostTree(tmp_path / "host")
