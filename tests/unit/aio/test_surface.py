"""Everything of the library that can block is a coroutine, and none of it runs in the loop."""

import asyncio
import fcntl
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
from tests.test_public_closure import PUBLIC
from vmplug import DeviceManager, FakeHypervisor, HostRoot, RngInfo, Setup, Watch, aio
from vmplug.aio import AsyncDeviceManager, AsyncWatch

ONLY_COMPUTES = {"parse_config"}
"""Public functions that need no thread."""
OWN = {"in_thread"}
"""What only an event loop needs."""

FUNCTIONS = sorted(name for name, value in PUBLIC.items() if inspect.isfunction(value))
METHODS = sorted(
    name
    for name, value in vars(DeviceManager).items()
    if not name.startswith("_") and inspect.isroutine(value)
)


def same(one: Any, other: Any) -> bool:
    """Whether both take the same; what they return differs in its kind alone."""
    parameters = [inspect.signature(each).parameters for each in (one, other)]
    return [str(p) for p in parameters[0].values()] == [str(p) for p in parameters[1].values()]


def test_every_function_has_its_coroutine() -> None:
    names = {name for name in vars(aio) if inspect.isfunction(getattr(aio, name))}
    assert names - OWN == {*FUNCTIONS} - ONLY_COMPUTES, "vmplug/aio/calls.py has a row for each"


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - ONLY_COMPUTES))
def test_a_coroutine_takes_what_its_function_takes(name: str) -> None:
    function, coroutine = getattr(vmplug, name), getattr(aio, name)
    assert same(function, coroutine)
    assert inspect.iscoroutinefunction(coroutine) == (name != "watch")
    assert coroutine.__doc__


def test_every_method_of_the_manager_has_its_coroutine() -> None:
    found = {name for name in vars(AsyncDeviceManager) if not name.startswith("_")}
    assert found == {*METHODS}, "vmplug/aio/manager.py has a row for each"


@pytest.mark.parametrize("name", METHODS)
def test_a_coroutine_of_the_manager_takes_what_its_method_takes(name: str) -> None:
    method, coroutine = getattr(DeviceManager, name), getattr(AsyncDeviceManager, name)
    assert same(method, coroutine)
    assert inspect.iscoroutinefunction(coroutine)


def test_a_watch_has_what_a_watch_has() -> None:
    public = {name for name in vars(AsyncWatch) if not name.startswith("_")}
    assert public == {"close", "looked"}
    assert {name for name in vars(Watch) if not name.startswith("_")} == {"close", "take"}


# nothing of it runs in the thread of the loop


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


def run_watched(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        with watched() as found:
            await main()
        assert found == []

    asyncio.run(run())


class Nonsense:
    """Of no type that an argument has."""


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - ONLY_COMPUTES - {"watch"}))
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
