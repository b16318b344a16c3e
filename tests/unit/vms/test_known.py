"""When a VM is gone: its process says so, and its socket only where the process is unknown."""

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from vmplug.host.process import read_start_time
from vmplug.host.root import HostRoot
from vmplug.journal.records import VmRecord
from vmplug.vms.known import is_gone


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """The server of `qmp`; closed, it leaves a socket that refuses."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "qmp"))
        listening.listen()
        yield listening


@pytest.fixture
def record(tmp_path: Path, listener: socket.socket) -> VmRecord:
    """A VM whose process is that of the test."""
    del listener
    return VmRecord(
        name="sb1",
        qmp_socket=str(tmp_path / "qmp"),
        pid=os.getpid(),
        started_at=read_start_time(os.getpid(), HostRoot()),
        is_ours=False,
    )


def test_a_socket_that_refuses_is_no_end_while_the_process_runs(
    record: VmRecord, listener: socket.socket
) -> None:
    listener.close()
    assert not is_gone(record, HostRoot())


def test_a_process_that_has_ended_is_the_end_whoever_listens(record: VmRecord) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert is_gone(replace(record, pid=process.pid), HostRoot())
    assert record.started_at
    assert is_gone(replace(record, started_at=record.started_at - 1), HostRoot())


def test_without_a_process_the_socket_decides(record: VmRecord, listener: socket.socket) -> None:
    nobody = replace(record, pid=None, started_at=None)
    assert not is_gone(nobody, HostRoot())
    listener.close()
    assert is_gone(nobody, HostRoot())
    os.unlink(nobody.qmp_socket)
    assert not is_gone(nobody, HostRoot())
