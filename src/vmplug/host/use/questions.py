"""What one request asks of things that may never answer: each is asked once.

A tenant chooses how often a request mentions a thing, and how many silent things it mentions. So
the answers are kept, and all waiting in vain together has one limit.
"""

import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE_S = 2.0
"""A backend answers in a millisecond; one that serves another client does not answer at all."""


class Questions:
    """The questions of one request, and the time that it may still wait for silent things."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._left_s = patience_s
        self._answers: dict[Hashable, Any] = {}  # by the question, whose type says the answer's

    def once(self, question: Hashable, ask: Callable[[], T]) -> T:
        """The answer to `question`, which only the first call asks."""
        answers: dict[Hashable, T] = self._answers
        if question not in answers:
            answers[question] = ask()
        return answers[question]

    @property
    def patience_s(self) -> float:
        """How long it may still wait in vain; 0 when that time is spent."""
        return self._left_s

    def within(
        self, ask: Callable[[float], T], most_s: float, *, is_vain: Callable[[T], bool]
    ) -> T:
        """What `ask` answers in its time, `most_s` or less; only a wait in vain is counted."""
        began = time.monotonic()
        answer = ask(min(most_s, self._left_s))
        if is_vain(answer):
            self._left_s = max(self._left_s - (time.monotonic() - began), 0.0)
        return answer
