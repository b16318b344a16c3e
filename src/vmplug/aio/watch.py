"""Watch, as an asynchronous iterator."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from typing import Self

from vmplug.aio.threads import Ended, Threads
from vmplug.arguments import checked
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.manager.watching.notice import DeviceEvent
from vmplug.manager.watching.watch import Looked, Watch
from vmplug.vms import watch as watching
from vmplug.waiting import Caller

_open: Callable[..., Watch] = checked(watching.watch)
_Step = tuple[Future[list[DeviceEvent] | None], Ended]


class AsyncWatch(AsyncIterator[DeviceEvent]):
    """Iterates over notices; an asynchronous context manager.

    It opens with `async with`, or with the first notice that is asked for, and raises then what
    `vmplug.watch` raises. A wait that is cancelled loses no notice: the next one gets it.
    """

    def __init__(self, open_watch: Callable[[], Watch]) -> None:
        self._threads = Threads.of_loop()
        self._open = open_watch
        self._watch: Watch | None = None
        self._waiting: deque[DeviceEvent] = deque()
        self._step: _Step | None = None
        self._is_over = False
        self._closing: Future[None] | None = None

    @property
    def looked(self) -> Looked:
        """What the last check covered: no notice means that nothing of that is wrong."""
        return self._watch.looked if self._watch else Looked()

    async def close(self) -> None:
        """Stop: there are no more notices. It waits for a check that is in progress."""
        self._is_over = True
        if not self._threads.is_ours:
            return  # it is the parent's
        self._threads.check()
        await self._threads.result_of(self._finish())

    def _finish(self) -> Future[None]:
        """Close in a thread, when the step in progress has ended."""
        if self._closing is None:
            after = [self._step[0]] if self._step else []
            self._closing = self._threads.finish(self._close, after=after)
        return self._closing

    async def __aenter__(self) -> Self:
        try:
            await self._advance(self._begin)
        except asyncio.CancelledError:  # `__aexit__` is not called then
            self._finish()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def __anext__(self) -> DeviceEvent:
        """Wait for the next notice; StopAsyncIteration when the time is over."""
        self._threads.check()
        while not self._is_over and not self._waiting:
            await self._advance(self._take)
        if self._closing or not self._waiting:
            raise StopAsyncIteration
        return self._waiting.popleft()

    async def _advance(self, work: Callable[[], list[DeviceEvent] | None]) -> None:
        """Wait for the step in progress, or begin one."""
        self._threads.check()
        step = self._step = self._step or self._threads.start(work, Caller())
        await asyncio.wait([step[1]])  # what is cancelled here is taken up by the next turn
        if self._step is step:
            self._step = None
            taken = step[0].result()
            self._waiting.extend(taken or ())
            self._is_over = self._is_over or taken is None

    def _begin(self) -> list[DeviceEvent]:
        self._watch = self._watch or self._open()
        return []

    def _take(self) -> list[DeviceEvent] | None:
        self._begin()
        assert self._watch
        return self._watch.take()

    def _close(self) -> None:
        if self._watch:
            self._watch.close()


def watch(
    *, vm: str | None = None, timeout_s: float | None = None, setup: Setup = DEFAULT_SETUP
) -> AsyncWatch:
    """See vmplug.watch. Call it in a coroutine."""
    return AsyncWatch(partial(_open, vm=vm, timeout_s=timeout_s, setup=setup))
