"""Nothing of the library that can block runs in the thread of the loop."""

import asyncio
import fcntl
import gc
import inspect
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import vmplug
from tests.support.loop_thread import watched
from tests.test_asyncio_names import COROUTINES, METHODS
from vmplug import FakeHypervisor, HostRoot, RngInfo, Setup, aio
from vmplug.aio import AsyncDeviceManager
from vmplug.drivers.ports import Command, Step
from vmplug.hypervisor.qemu.transaction import transaction


def test_what_would_block_is_seen(tmp_path: Path) -> None:
    blocking: list[Callable[[], object]] = [
        lambda: time.sleep(0),
        lambda: (tmp_path / "a").write_text("a"),
        lambda: os.stat(tmp_path),
        lambda: os.listdir(tmp_path),
        lambda: sqlite3.connect(":memory:").close(),
        lambda: threading.Lock().acquire(),
        lambda: fcntl.flock(1, fcntl.LOCK_UN),
        lambda: HostRoot("/").stat("/"),
    ]
    for act in blocking:
        with watched() as found:
            act()
        assert found


def test_what_an_earlier_test_left_is_not_seen() -> None:
    """A talk that nobody ends is ended by the collector of garbage, in whatever thread runs."""
    talk = transaction([Step(Command("device_add", {}), undo=None)])
    next(talk)
    left: list[object] = [talk]
    left.append(left)
    del talk, left
    with watched() as found:
        assert [[] for _ in range(3 * gc.get_threshold()[0])]
    assert found == []


def run_watched(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        with watched() as found:
            await main()
        assert found == []

    asyncio.run(run())


class Nonsense:
    """Of no type that an argument has."""


@pytest.mark.parametrize("name", sorted({*COROUTINES} - {"watch"}))
def test_a_function_runs_in_another_thread(name: str) -> None:
    """Also its check of arguments, which may import."""
    coroutine = getattr(aio, name)
    parameters = inspect.signature(coroutine).parameters.values()
    wrong = {
        one.name: Nonsense()
        for index, one in enumerate(parameters)
        if index == 0 or one.default is one.empty
    }

    async def main() -> None:
        with pytest.raises(TypeError, match=r"must be .*, not Nonsense"):
            await coroutine(**wrong)

    run_watched(main)


@pytest.mark.parametrize("name", sorted({*METHODS} - {"close", "open"}))
def test_a_method_runs_in_another_thread(name: str, tmp_path: Path) -> None:
    machine, host = FakeHypervisor(), HostRoot("/")
    request, other = RngInfo(), RngInfo(label="other")

    async def main() -> None:
        devices = await AsyncDeviceManager.open(
            vm="sb1", host=host, hypervisor=machine, state_dir=tmp_path
        )
        async with devices:
            held = await devices.attach(request)
            arguments: dict[str, tuple[object, ...]] = {
                "attach": (other,),
                "attach_all": ([other],),
                "check": ([request],),
                "check_places": ([request],),
                "detach": (held.id,),
                "detach_all": ([held.id],),
                "detach_owner": ("sb1",),
                "plan": ([other],),
                "resize": (held.id,),
            }
            try:
                await getattr(devices, name)(*arguments.get(name, ()))
            except vmplug.NotAttached:
                assert name == "resize"  # it is not a disk

    run_watched(main)


def test_a_watch_runs_in_another_thread(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    setup = Setup(state_dir=tmp_path)

    async def main() -> None:
        async with aio.watch(setup=setup, timeout_s=0.1) as events:
            assert [event async for event in events] == []
            assert events.looked == vmplug.Looked()

    run_watched(main)
