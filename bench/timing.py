"""Time two things in turn, so that a machine whose speed drifts slows both."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

IS_QUICK = bool(os.environ.get("QUICK"))
"""Run every row once, to see that it works: its time says nothing then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One row of the table: the median over rounds of `ours / other`, and its target."""

    name: str
    target: float
    ratio: float
    ours_us: float
    other_us: float

    @property
    def is_met(self) -> bool:
        """Whether the target is reached."""
        return self.ratio <= self.target


def scaled(count: int) -> int:
    """So many of what grows, and a few where time does not matter."""
    return max(10, count // 100) if IS_QUICK else count


def rounds(count: int) -> Iterator[int]:
    """So many rounds, and one before them that warms up; one in all where time does not matter."""
    return iter(range(1 if IS_QUICK else count + 1))


def compare(
    name: str,
    ours: Callable[[], A],
    other: Callable[[], B],
    proof: Callable[[A, B], object],
    *,
    target: float,
    size: tuple[int, int] = (31, 200),
) -> Ratio:
    """Each round runs one chunk of calls of either, in turn: `size` is rounds, and calls in each.

    `proof` of the last results of both is true if both did their work.
    """
    count, repeat = (1, 1) if IS_QUICK else size
    pairs = []
    for _ in rounds(count):
        (ours_s, did), (other_s, done) = _chunk(ours, repeat), _chunk(other, repeat)
        assert proof(did, done), f"{name}: {did!r}, {done!r}"
        pairs.append((ours_s, other_s))
    return of_pairs(name, pairs, target=target)


def of_pairs(name: str, pairs: list[tuple[float, float]], *, target: float) -> Ratio:
    """The row of measured pairs of seconds, ours first; the first pair was to warm up."""
    pairs = pairs[1:] or pairs
    return Ratio(
        name=name,
        target=target,
        ratio=statistics.median(ours / other for ours, other in pairs),
        ours_us=statistics.median(ours for ours, _ in pairs) * 1e6,
        other_us=statistics.median(other for _, other in pairs) * 1e6,
    )


def timed(work: Callable[[], A]) -> tuple[float, A]:
    """Seconds that one call takes, without the garbage collector in it, and its result."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        done = work()
        return time.perf_counter() - start, done
    finally:
        gc.enable()


def _chunk(work: Callable[[], A], repeat: int) -> tuple[float, A]:
    def many() -> A:
        for _ in range(repeat - 1):
            work()
        return work()

    seconds, done = timed(many)
    return seconds / repeat, done
