"""What a caller may cancel, and what is true after that."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import wraps
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, ParamSpec

import pytest

from vmplug import FakeHypervisor, HostRoot, NotAttached, RngInfo, State, StateError
from vmplug.aio import AsyncDeviceManager, in_thread, threads
from vmplug.aio.threads import Scope, Threads
from vmplug.hypervisor.fake.monitor import Guest

P = ParamSpec("P")
NEVER_S, SOON_S = 300.0, 60.0
RNG, OTHER = RngInfo(), RngInfo(label="other")


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test that is a coroutine; it leaves no thread and no task, and warns of nothing."""

    @wraps(test)
    def run(*args: P.args, **named: P.kwargs) -> None:
        async def main() -> None:
            async with asyncio.timeout(SOON_S):
                await test(*args, **named)

        asyncio.run(main())
        until(lambda: not aio_threads())

    return run


def aio_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("vmplug-aio")]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def soon(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(until, condition)


class Machine(FakeHypervisor):
    """A VM that can be stopped in the middle of an attach."""

    def __init__(self) -> None:
        super().__init__()
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        self.was_closed = threading.Event()
        self.may_go_on.set()

    def stop_at_plug(self) -> None:
        self.has_begun.clear()
        self.may_go_on.clear()

    def plug(self, *arguments: Any) -> None:
        self.has_begun.set()
        assert self.may_go_on.wait(SOON_S)
        super().plug(*arguments)

    def close(self) -> None:
        self.was_closed.set()
        super().close()


@asynccontextmanager
async def opened(machine: FakeHypervisor, state_dir: Path) -> AsyncIterator[AsyncDeviceManager]:
    async with await AsyncDeviceManager.open(
        vm="sb1", host=HostRoot("/"), hypervisor=machine, state_dir=state_dir
    ) as devices:
        yield devices


async def cancelled(call: Coroutine[Any, Any, object], begun: Callable[[], bool]) -> float:
    """Cancel a call once it has begun; returns the seconds until its caller went on."""
    task = asyncio.create_task(call)
    await soon(begun)
    start = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return time.monotonic() - start


@in_loop
async def test_a_cancelled_wait_for_a_guest_leaves_the_device_detaching(tmp_path: Path) -> None:
    machine = Machine()
    async with opened(machine, tmp_path) as devices:
        held = await devices.attach(RNG)
        machine.monitor.guest = Guest.SILENT
        detach, sent = devices.detach(held.id, timeout_s=NEVER_S), machine.monitor.sent
        await cancelled(detach, lambda: "device_del" in [each.execute for each in sent])
        assert [hold.state for hold in await devices.attachments()] == [State.DETACHING]
        machine.monitor.wake_guest()
        await devices.reconcile()
        assert await devices.attachments() == []
        assert not machine.find_drivers()


@in_loop
async def test_a_cancelled_attach_is_done_when_the_next_call_begins(tmp_path: Path) -> None:
    machine = Machine()
    async with opened(machine, tmp_path) as devices:
        machine.stop_at_plug()
        attach = devices.attach(RNG, owner="ctr1")
        assert await cancelled(attach, machine.has_begun.is_set) < SOON_S / 2
        release = asyncio.create_task(devices.detach_owner("ctr1"))
        await asyncio.sleep(0.05)
        assert not release.done()
        machine.may_go_on.set()
        assert [hold.owner for hold in await release] == ["ctr1"]
        assert await devices.attachments() == []
        assert not machine.find_drivers()


@in_loop
async def test_leaving_the_block_lets_a_cancelled_attach_end(tmp_path: Path) -> None:
    machine = Machine()

    async def work() -> None:
        async with opened(machine, tmp_path) as devices:
            machine.stop_at_plug()
            await devices.attach(RNG, owner="ctr1")

    task = asyncio.create_task(work())
    await soon(machine.has_begun.is_set)
    task.cancel()
    await asyncio.sleep(0.05)
    assert not machine.was_closed.is_set()
    machine.may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert machine.was_closed.is_set()
    async with opened(machine, tmp_path) as devices:
        assert [hold.state for hold in await devices.attachments()] == [State.ATTACHED]


@in_loop
async def test_closing_goes_on_when_it_is_cancelled_too(tmp_path: Path) -> None:
    machine = Machine()
    async with opened(machine, tmp_path) as devices:
        machine.stop_at_plug()
        await cancelled(devices.attach(RNG), machine.has_begun.is_set)
        await cancelled(devices.close(), lambda: True)
        await cancelled(devices.close(), lambda: devices._closing is not None)
        assert not machine.was_closed.is_set()
        machine.may_go_on.set()
    assert machine.was_closed.is_set()


@in_loop
async def test_closing_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmplug.aio.manager._GRACE_S", 0.1)
    machine = Machine()
    async with opened(machine, tmp_path) as devices:
        machine.stop_at_plug()
        await cancelled(devices.attach(RNG), machine.has_begun.is_set)
        closing = asyncio.create_task(devices.close())
        await soon(machine.was_closed.is_set)
        machine.may_go_on.set()
        await closing


@in_loop
async def test_a_closed_manager_takes_no_call(tmp_path: Path) -> None:
    async with opened(Machine(), tmp_path) as devices:
        pass
    with pytest.raises(StateError, match="the manager of VM sb1 is closed") as caught:
        await devices.attach(RNG)
    assert caught.value.state == "closed"
    await devices.close()


@in_loop
async def test_a_call_that_has_not_begun_does_not_begin(tmp_path: Path) -> None:
    machine, done = Machine(), list[int]()
    async with opened(machine, tmp_path):
        may_end = threading.Event()
        busy = asyncio.create_task(in_thread(may_end.wait, SOON_S))
        await asyncio.sleep(0)
        late = asyncio.create_task(in_thread(done.append, 1))
        await asyncio.sleep(0)
        late.cancel()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await late
        assert await busy
    assert done == []


@in_loop
async def test_an_open_that_is_cancelled_closes_what_it_has_opened(tmp_path: Path) -> None:
    for begins in (False, True):
        machine = Machine()
        opening = AsyncDeviceManager.open(
            vm="sb1", host=HostRoot("/"), hypervisor=machine, state_dir=tmp_path / str(begins)
        )
        task = asyncio.create_task(opening)
        for _ in range(3 if begins else 0):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if begins:
            await asyncio.to_thread(machine.was_closed.wait, SOON_S)


@in_loop
async def test_another_vm_waits_for_no_cancelled_call() -> None:
    threads, may_end = Threads.of_loop(), threading.Event()
    has_begun, order = threading.Event(), list[str]()

    def wait() -> None:
        has_begun.set()
        may_end.wait(SOON_S)
        order.append("one")

    await cancelled(threads.call(wait, concerns="one"), has_begun.is_set)
    await threads.call(lambda: order.append("two"), concerns="two")
    await threads.call(lambda: order.append("read"), concerns=Scope.NOTHING)
    later = [
        asyncio.create_task(threads.call(lambda: order.append("then"), concerns=concerns))
        for concerns in ("one", Scope.ALL_VMS)
    ]
    await asyncio.sleep(0.05)
    assert order == ["two", "read"]
    may_end.set()
    await asyncio.gather(*later)
    assert order == ["two", "read", "one", "then", "then"]


@in_loop
async def test_many_that_wait_leave_turns_to_others() -> None:
    """A hundred guests that say nothing keep nobody from another VM."""
    may_end = threading.Event()
    waiting = [asyncio.create_task(in_thread(may_end.wait, SOON_S)) for _ in range(20)]
    assert await in_thread(lambda: 7) == 7
    may_end.set()
    assert all(await asyncio.gather(*waiting))


@in_loop
async def test_no_more_threads_than_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "CALLS_MAX", 3)
    monkeypatch.setattr(threads, "_TURN_S", 0.0)
    may_end = threading.Event()
    calls = [asyncio.create_task(in_thread(may_end.wait, SOON_S)) for _ in range(9)]
    await soon(lambda: len(aio_threads()) == 3)
    await asyncio.sleep(0.05)
    assert len(aio_threads()) == 3
    may_end.set()
    assert all(await asyncio.gather(*calls))


@in_loop
async def test_the_context_and_the_notes_of_an_error_cross_the_threads(tmp_path: Path) -> None:
    who = ContextVar[str]("who")
    who.set("ctr1")
    assert await in_thread(who.get) == "ctr1"
    async with opened(Machine(), tmp_path) as devices:
        with pytest.raises(NotAttached) as caught:
            await devices.detach("none")
    assert caught.value.hint
    assert f"hint: {caught.value.hint}" in caught.value.__notes__


@in_loop
async def test_a_storm_of_cancelled_calls_loses_nothing(tmp_path: Path) -> None:
    machine = FakeHypervisor()
    async with opened(machine, tmp_path) as devices:
        for turn in range(30):
            task = asyncio.create_task(devices.attach(RNG, owner="ctr1"))
            await asyncio.sleep(0.001 * (turn % 7))
            task.cancel()
            await asyncio.wait([task])
        held = await devices.attachments()
        assert [hold.state for hold in held] in ([], [State.ATTACHED])
        assert len(machine.find_drivers()) == len(held)
        if held:
            await devices.detach_owner("ctr1")
        assert not machine.find_drivers()


@in_loop
async def test_a_cancelled_call_that_fails_is_logged(
    tmp_path: Path, logged: BufferingHandler
) -> None:
    logging.getLogger("vmplug").setLevel(logging.INFO)
    machine = Machine()
    async with opened(machine, tmp_path) as devices:
        machine.stop_at_plug()
        machine.monitor.fail_at = "device_add"
        await cancelled(devices.attach(RNG), machine.has_begun.is_set)
        machine.may_go_on.set()
        assert await devices.attachments() == []
    assert "a cancelled call has ended: command-failed" in [r.getMessage() for r in logged.buffer]
