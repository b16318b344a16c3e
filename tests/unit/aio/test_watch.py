"""A watch in an event loop."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.unit.aio.test_cancel import SOON_S, in_loop
from vmplug import DeviceEvent, EventKind, Looked, Setup, StateError, StoreError, aio
from vmplug.aio.watch import AsyncWatch
from vmplug.manager.watching.watch import Watch


def event(message: str) -> DeviceEvent:
    return DeviceEvent(what=EventKind.GONE, message=message, meaning="", hint="")


class Scripted(Watch):
    """Gives what `say` says; a check takes until then."""

    def __init__(self) -> None:
        self.said = threading.Semaphore(0)
        self.number = 0
        self.checks = 0
        self.was_closed = threading.Event()
        self.looked = Looked(vms=7)

    def say(self, count: int) -> None:
        self.number += count
        self.said.release()

    def take(self) -> list[DeviceEvent] | None:
        self.checks += 1
        if not self.said.acquire(timeout=0.2):
            return []
        number, self.number = self.number, 0
        if number < 0:
            return None
        return [event(f"{n}") for n in range(number)]

    def close(self) -> None:
        self.was_closed.set()


@asynccontextmanager
async def watching(script: Scripted) -> AsyncIterator[AsyncWatch]:
    async with AsyncWatch(lambda: script) as events:
        yield events


@in_loop
async def test_notices_come_in_order_until_the_time_is_over() -> None:
    script = Scripted()
    script.say(3)
    async with watching(script) as events:
        assert [(await anext(events)).message for _ in range(3)] == ["0", "1", "2"]
        assert events.looked.vms == 7
        script.say(-1)
        assert [each async for each in events] == []
    assert script.was_closed.is_set()


@in_loop
async def test_a_timeout_loses_no_notice() -> None:
    script = Scripted()
    async with watching(script) as events:
        for turn in range(20):
            task = asyncio.create_task(anext(events))
            await asyncio.sleep(0.003 * (turn % 4))
            script.say(0 if turn else 5)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                assert task.result().message == "0"
                break
        else:
            assert (await anext(events)).message == "0"
        assert [(await anext(events)).message for _ in range(4)] == ["1", "2", "3", "4"]


@in_loop
async def test_two_tasks_share_what_comes() -> None:
    script = Scripted()
    async with watching(script) as events:
        tasks = [asyncio.create_task(anext(events)) for _ in range(4)]
        await asyncio.sleep(0)
        script.say(4)
        found = sorted(each.message for each in await asyncio.gather(*tasks))
        assert found == ["0", "1", "2", "3"]
        assert script.checks < 20


@in_loop
async def test_closing_ends_the_wait_of_another_task() -> None:
    script = Scripted()
    async with watching(script) as events:
        task = asyncio.create_task(anext(events, None))
        await asyncio.sleep(0.01)
        await events.close()
        assert await task is None
        assert await anext(events, None) is None


@in_loop
async def test_a_watch_that_is_dropped_stops_at_its_next_check() -> None:
    script = Scripted()
    events = AsyncWatch(lambda: script)
    script.say(1)
    async for _ in events:
        break
    checks = script.checks
    await asyncio.sleep(0.3)
    assert script.checks == checks


@in_loop
async def test_a_watch_that_is_cancelled_while_it_opens_is_closed() -> None:
    script, may_open = Scripted(), threading.Event()

    def open_slowly() -> Watch:
        assert may_open.wait(SOON_S)
        return script

    async def work() -> None:
        async with AsyncWatch(open_slowly):
            pass

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    may_open.set()
    assert await asyncio.to_thread(script.was_closed.wait, SOON_S)


def own_setup(directory: Path) -> Setup:
    directory.chmod(0o700)
    return Setup(state_dir=directory)


@in_loop
async def test_what_cannot_be_opened_says_so(tmp_path: Path) -> None:
    missing = Setup(state_dir=tmp_path / "none")
    with pytest.raises(StoreError):
        async with aio.watch(setup=missing):
            pass
    with pytest.raises(StoreError):
        await anext(aio.watch(setup=missing))
    with pytest.raises(StateError, match="no VM 'none' is known"):
        await anext(aio.watch(vm="none", setup=own_setup(tmp_path)))


@in_loop
async def test_a_real_one_ends_when_its_time_is_over(tmp_path: Path) -> None:
    async with aio.watch(timeout_s=0.1, setup=own_setup(tmp_path)) as events:
        assert [each async for each in events] == []
