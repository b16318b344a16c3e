"""Waits, as the caller of vmplug can show them: what for, and how long at most."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = "vmplug.waiting"


@contextmanager
def waiting(what: str, timeout_s: float) -> Iterator[None]:
    """Log at debug that a wait for `what` begins, and how long it took.

    Both records have `wait_for` and `deadline`, a time of time.monotonic(), and the second one
    `waited_s`.
    """
    import logging  # noqa: PLC0415  5 ms that reading need not pay

    log, began = logging.getLogger(LOGGER), time.monotonic()
    told = {"wait_for": what, "deadline": began + timeout_s}
    log.debug("waiting for %s, at most %g s", what, timeout_s, extra=told)
    try:
        yield
    finally:
        waited_s = time.monotonic() - began
        log.debug("waited %.1f s for %s", waited_s, what, extra={**told, "waited_s": waited_s})
