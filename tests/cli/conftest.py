"""Fixtures for the command line."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.cli.monitors import MemoryVm
from tests.support.journal import lay_journal
from tests.support.memory import MEMORY
from tests.support.tree import HostTree
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.records import record_vm


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
    """A VM in memory that vmplug knows as sb1, as `vm adopt` would make it known."""
    with MemoryVm(vmplug.state_dir.with_name("qmp.sock")) as made:
        with closing(Qemu.connect(str(made.socket_path))) as qemu:
            assert qemu.endpoint
            record = record_vm("sb1", qemu.endpoint)
        made.wait_idle()
        lay_journal(vmplug.state_dir)
        with Journal.open(vmplug.state_dir) as journal:
            journal.add_vm(record)
        yield made


@pytest.fixture
def tree(tmp_path: Path) -> HostTree:
    return HostTree(tmp_path / "host")
