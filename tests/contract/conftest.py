"""The sides of the contract: in memory, QEMU with a guest, and QEMU before its boot."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.world import MemorySide, QemuSide, Side, memory_side_vm
from tests.support.vm import GuestVm

real = pytest.mark.qemu


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    with memory_side_vm(tmp_path_factory.mktemp("booted")) as vm:
        vm.console.run("true")
        yield vm


@pytest.fixture
def memory_side() -> MemorySide:
    return MemorySide()


@pytest.fixture
def guest_side(booted: GuestVm) -> Iterator[QemuSide]:
    side = QemuSide(booted)
    yield side
    side.clean()


@pytest.fixture
def lost_side(tmp_path: Path) -> Iterator[QemuSide]:
    """A guest of the test's own, for what cannot be undone."""
    with memory_side_vm(tmp_path) as vm:
        vm.console.run("true")
        yield QemuSide(vm)


@pytest.fixture
def prelaunch_side(tmp_path: Path) -> Iterator[QemuSide]:
    with memory_side_vm(tmp_path, guest=False, paused=True) as vm:
        yield QemuSide(vm)


def chosen(request: pytest.FixtureRequest) -> Side:
    """The side that a parameter names."""
    side: Side = request.getfixturevalue(f"{request.param}_side")
    return side


@pytest.fixture(
    params=["memory", pytest.param("guest", marks=real), pytest.param("prelaunch", marks=real)]
)
def side(request: pytest.FixtureRequest) -> Side:
    return chosen(request)


@pytest.fixture(params=["memory", pytest.param("guest", marks=real)])
def awake(request: pytest.FixtureRequest) -> Side:
    """A side whose guest answers until it is told not to."""
    return chosen(request)


@pytest.fixture(
    params=["memory", pytest.param("lost", marks=real), pytest.param("prelaunch", marks=real)]
)
def throwaway(request: pytest.FixtureRequest) -> Side:
    """A side that no other test uses."""
    return chosen(request)


@pytest.fixture(params=["memory", pytest.param("lost", marks=real)])
def awake_throwaway(request: pytest.FixtureRequest) -> Side:
    """One whose guest answers until it is told not to."""
    return chosen(request)
