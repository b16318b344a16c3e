"""Time two things in turn, so that a machine whose speed drifts slows both."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Work = Callable[[], object]


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


def compare(
    name: str, ours: Work, other: Work, *, target: float, rounds: int = 31, repeat: int = 200
) -> Ratio:
    """Each round runs one chunk of `repeat` calls of either, in turn."""
    pairs = [(_chunk(ours, repeat), _chunk(other, repeat)) for _ in range(rounds + 1)][1:]
    return of_pairs(name, pairs, target=target)


def of_pairs(name: str, pairs: list[tuple[float, float]], *, target: float) -> Ratio:
    """The row of measured pairs of seconds, ours first."""
    return Ratio(
        name=name,
        target=target,
        ratio=statistics.median(ours / other for ours, other in pairs),
        ours_us=statistics.median(ours for ours, _ in pairs) * 1e6,
        other_us=statistics.median(other for _, other in pairs) * 1e6,
    )


def timed(work: Work) -> float:
    """Seconds that one call takes, without the garbage collector in it."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    finally:
        gc.enable()


def _chunk(work: Work, repeat: int) -> float:
    def many() -> None:
        for _ in range(repeat):
            work()

    return timed(many) / repeat
