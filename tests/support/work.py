"""How much work is a call? Counted, so that a busy machine changes nothing."""

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

LOOKS = frozenset(
    {"open", "stat", "lstat", "listdir", "scandir", "readlink", "execute", "sendmsg"}
)
"""The names of the calls of Python that ask the kernel or the journal something."""


def count_lines(work: Callable[[], object]) -> int:
    """How many lines of Python it runs in this thread; each turn of a loop counts."""
    lines = 0

    def trace(_frame: FrameType, event: str, _what: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(former)
    return lines


def count_looks(work: Callable[[], object]) -> Counter[str]:
    """How often it looks at the host and the journal in this thread, by the name of the call."""
    looks = Counter[str]()

    def profile(_frame: FrameType, event: str, what: Any) -> None:
        if event == "c_call" and what.__name__ in LOOKS:
            looks[what.__name__] += 1

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return looks
