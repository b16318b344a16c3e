"""Run calls of the synchronous library in threads, for one event loop.

The threads are vmplug's own: others may fill asyncio's default executor. They end when no call is
in progress and no manager is open.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from enum import Enum
from functools import partial
from typing import Any, TypeVar

from vmplug.errors import DeviceError
from vmplug.host.process import ProcessLock
from vmplug.waiting import CALLER, Caller

log = logging.getLogger(__name__)

T = TypeVar("T")
Ended = asyncio.Future[None]
"""Done in the loop when a call has ended in its thread, with or without an error."""

CALLS_MAX = 256
"""Calls of one loop that run at once. More wait until one of these has ended."""
_TURN_S = 0.05
"""One call begins at a time. After this time it waits for a guest or a disk, and the next begins.

Each thread that computes keeps the loop from running for 5 ms (sys.getswitchinterval). With two
turns the loop stood still for twice as long, and a hundred VMs took twice as long too.
"""
_NAME = "vmplug-aio"


class Scope(Enum):
    """What a call may change, where that is not one VM."""

    NOTHING = "nothing"
    DRIVERS = "what drives the functions of the host"
    ALL_VMS = "any VM"


Concerns = str | Scope
"""The name of the VM that a call concerns, or what else it may change."""


class Threads:
    """The threads of one event loop. Everything but the calls themselves is done by the loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._process = ProcessLock()
        self._turns = asyncio.Lock()
        self._left: dict[Future[Any], tuple[Concerns, Ended]] = {}
        self._users = 0
        self._pool: ThreadPoolExecutor | None = None

    @staticmethod
    def of_loop() -> "Threads":
        """Those of the loop that runs. Raises StateError in a child of fork(2)."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            for threads in _THREADS.values():  # asyncio says only that no loop runs
                threads.check()
            raise
        if loop not in _THREADS:
            for closed in [other for other in _THREADS if other.is_closed()]:
                _THREADS.pop(closed).end()
            _THREADS[loop] = Threads(loop)
        return _THREADS[loop]

    @property
    def is_ours(self) -> bool:
        """Whether this process made them."""
        return self._process.is_ours

    def check(self) -> None:
        """Raise StateError in a child of fork(2), RuntimeError in another event loop."""
        self._process.check()
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this was opened in another event loop")

    def hold(self) -> None:
        """Keep the threads until `release`."""
        self._users += 1

    def release(self) -> None:
        """Let the threads end, unless another user needs them."""
        self._users -= 1
        if not self._users:
            self.end()

    def end(self) -> None:
        """Let the threads end when they have nothing to do."""
        pool, self._pool = self._pool, None
        if pool and self.is_ours:
            pool.shutdown(wait=False)

    async def call(
        self,
        work: Callable[[], T],
        *,
        concerns: Concerns = Scope.NOTHING,
        dispose: Callable[[T], None] | None = None,
    ) -> T:
        """Return the result of `work`, which a thread does.

        Cancelled before `work` has begun, it does not begin. Cancelled later, the thread finishes
        it, but waits for no guest; `dispose` gets the result. The next call for the same VM begins
        after that.
        """
        self.check()
        while earlier := [ended for left, ended in self._left.values() if _meet(concerns, left)]:
            await asyncio.wait(earlier)
        await self._turns.acquire()
        caller, turn = Caller(), _Turn(self._turns, self._loop)
        running, ended = self.start(work, caller, then=turn.end)
        try:
            await asyncio.shield(ended)
        except BaseException:  # cancelled, or the coroutine is closed
            caller.has_left = True
            if not running.cancel():
                self._leave(running, ended, concerns)
                if dispose:
                    self.finish(partial(_dispose, running, dispose), after=[running])
            raise
        try:
            return running.result()
        finally:
            del running  # its error has this frame in its traceback

    def start(
        self, work: Callable[[], T], caller: Caller, *, then: Callable[[], None] = lambda: None
    ) -> tuple[Future[T], Ended]:
        """Let a thread do `work`, in the context of this task, and the loop do `then`."""

        def end(_: Ended) -> None:
            then()
            self.release()

        context = copy_context()
        context.run(CALLER.set, caller)
        self.hold()
        ended = self._loop.create_future()
        ended.add_done_callback(end)
        try:
            self._pool = self._pool or ThreadPoolExecutor(CALLS_MAX, thread_name_prefix=_NAME)
            running = self._pool.submit(context.run, _do, work, caller)
        except BaseException:
            caller.has_left = True  # the pool may keep it for a later thread
            ended.set_result(None)
            raise
        running.add_done_callback(lambda _: self._tell(ended))
        return running, ended

    def _leave(self, running: Future[T], ended: Ended, concerns: Concerns) -> None:
        """Keep a cancelled call in mind until it has ended."""
        self._left[running] = concerns, ended
        ended.add_done_callback(lambda _: self._left.pop(running))

    def finish(
        self,
        work: Callable[[], None],
        *,
        after: Collection[Future[Any]],
        grace_s: float | None = None,
    ) -> Future[None]:
        """Do `work` when the calls in `after` have ended, at the latest after `grace_s`.

        A thread of its own does it, and nothing stops it: it may be what ends calls that hang.
        """

        def run() -> None:
            wait(after, grace_s)
            work()

        pool = ThreadPoolExecutor(1, thread_name_prefix=_NAME)
        running = pool.submit(run)
        pool.shutdown(wait=False)
        return running

    async def result_of(self, running: Future[None]) -> None:
        """Wait for what `finish` does; to be cancelled does not stop it."""
        ended = self._loop.create_future()
        running.add_done_callback(lambda _: self._tell(ended))
        await asyncio.shield(ended)
        running.result()

    def left_for(self, concerns: Concerns) -> list[Future[Any]]:
        """The cancelled calls that come before one that concerns this."""
        return [call for call, (left, _) in self._left.items() if _meet(concerns, left)]

    def _tell(self, ended: Ended) -> None:
        """Make it done, from any thread."""
        try:
            self._loop.call_soon_threadsafe(ended.set_result, None)
        except RuntimeError:  # the loop is closed
            self.end()


_THREADS: dict[asyncio.AbstractEventLoop, Threads] = {}
"""A coroutine knows its loop only while it runs."""


class _Turn:
    """A turn that was taken, until the call ends or has taken too long."""

    def __init__(self, turns: asyncio.Lock, loop: asyncio.AbstractEventLoop) -> None:
        self._turns = turns
        self._is_over = False
        self._timer = loop.call_later(_TURN_S, self.end)

    def end(self) -> None:
        """Give the turn to the next call."""
        if not self._is_over:
            self._is_over = True
            self._timer.cancel()
            self._turns.release()


def _meet(one: Concerns, other: Concerns) -> bool:
    """Whether one call must not overtake the other."""
    both = {one, other}
    return Scope.NOTHING not in both and (len(both) == 1 or Scope.ALL_VMS in both)


def _do(work: Callable[[], T], caller: Caller) -> T:
    """Do it, and log what nobody hears of any more."""
    if caller.has_left:
        raise asyncio.CancelledError
    try:
        return work()
    except DeviceError as error:
        if caller.has_left:
            log.info("a cancelled call has ended: %s", error.code)
        raise


def _dispose(running: Future[T], dispose: Callable[[T], None]) -> None:
    """Dispose of the result of a call that has ended, if it has one."""
    if running.exception() is None:
        dispose(running.result())
