"""Few descriptors are left: whatever is opened then fails with a sentence, or works; none leaks.

Without garbage collection, which would close some of them at an unknown time.
"""

import gc
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, suppress
from itertools import count
from pathlib import Path

import pytest

import vmplug
from tests.support.disks import disk_image
from vmplug import DeviceInfo, DevType, Qemu, Setup
from vmplug.errors import DeviceError
from vmplug.journal.journal import Journal

_MOST, _ENOUGH = 40, 3
"""More descriptors than anything needs; how often it must have worked before all is seen."""
_VM = """
import sys
from pathlib import Path
from tests.cli.monitors import MemoryVm
with MemoryVm(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""
"""A VM in a process of its own, as it has descriptors too."""

Open = Callable[[Setup, Path], AbstractContextManager[object]]


def leased(setup: Setup, directory: Path) -> AbstractContextManager[object]:
    image = str(directory / "a.img")
    info = DeviceInfo(container_path="/dev/x", dev_type=DevType.BLOCK, host_path=image)
    return vmplug.lease([info], owner="c1", setup=setup)


OPENERS: dict[str, Open] = {
    "journal": lambda setup, _: Journal.open(setup.state_dir),
    "manager": lambda setup, _: vmplug.connect_vm("sb1", setup=setup),
    "watch": lambda setup, _: vmplug.watch(setup=setup, timeout_s=0),
    "QEMU": lambda _, directory: closing(Qemu.connect(str(directory / "qmp.sock"))),
    "lease": leased,
}
if sys.version_info < (3, 11, 4):
    # pyudev finds its library with ldconfig, and there a Popen without room for its pipes leaves
    # /dev/null open. Source: github.com/python/cpython/issues/87474; seen with 3.11.2.
    del OPENERS["watch"]


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    disk_image(tmp_path / "a.img", 1, "a")
    setup, path = Setup(state_dir=tmp_path / "state"), str(tmp_path / "qmp.sock")
    command, pipe = [sys.executable, "-c", _VM, path], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdout
        assert process.stdout.readline() == b"\n"
        vmplug.adopt_vm("sb1", path, setup=setup)
        yield setup
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPENERS)
def test_an_open_that_fails_for_want_of_descriptors_leaks_none(
    setup: Setup, tmp_path: Path, name: str
) -> None:
    with OPENERS[name](setup, tmp_path):
        pass  # modules are loaded, and caches filled
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.disable()
    try:
        before, threads, worked = opened(), threading.active_count(), 0
        lowest = next(n for n in count() if str(n) not in before)
        for more in range(_MOST):
            if worked == _ENOUGH:
                break
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + more, hard))
            try:
                with suppress(DeviceError), OPENERS[name](setup, tmp_path):
                    worked += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert (opened() - before, more) == (set(), more)
        assert worked == _ENOUGH
        assert threading.active_count() <= threads
    finally:
        gc.enable()


def opened() -> set[str]:
    """What this process has open, by number, without the directory that is read here."""
    return {n for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}")}
