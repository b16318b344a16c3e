"""Waits, as the caller of vmplug can show them: what for, and how long at most."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from vmplug.log import Log

log = Log(__name__)

LONGEST_S = 1e6
"""Of a wait that a caller chose: poll(2) takes no more than 24 days. This is 11."""


@contextmanager
def waiting(what: str, timeout_s: float) -> Iterator[None]:
    """Log at debug that a wait for `what` begins, and how long it took.

    Both records have `wait_for` and `deadline`, a time of time.monotonic(), and the second one
    `waited_s`.
    """
    began = time.monotonic()
    told = {"wait_for": what, "deadline": began + timeout_s}
    log.debug("waiting for %s, at most %g s", what, timeout_s, extra=told)
    try:
        yield
    finally:
        waited_s = time.monotonic() - began
        log.debug("waited %.1f s for %s", waited_s, what, extra={**told, "waited_s": waited_s})


class Caller:
    """The waiting end of a call that runs in another thread; it may leave before that ends."""

    has_left = False


CALLER: ContextVar[Caller | None] = ContextVar("CALLER", default=None)
"""That of the call which the thread runs; None where it runs for itself."""
_ASK_AGAIN_S = 0.1


def caller_has_left() -> bool:
    """Whether nobody waits any more for what this thread waits for."""
    caller = CALLER.get()
    return caller is not None and caller.has_left


def next_pause_s(left_s: float) -> float:
    """How long a wait may last before `caller_has_left` is asked again, of what is left."""
    left_s = min(left_s, LONGEST_S)
    return left_s if CALLER.get() is None else min(left_s, _ASK_AGAIN_S)
