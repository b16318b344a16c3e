"""Choices out of bytes, so that both engines can make trees and answers and not only text."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Takes its choices from the front of `data`; at the end everything is the first choice."""

    def __init__(self, data: bytes) -> None:
        self._left = data

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self, length: int) -> bytes:
        """Up to so many bytes."""
        taken, self._left = self._left[:length], self._left[length:]
        return taken

    def number(self, most: int) -> int:
        """0 up to and with `most`, at most 65535."""
        return int.from_bytes(self.take(1 if most < 256 else 2), "little") % (most + 1)

    def pick(self, choices: Sequence[T]) -> T:
        """One of them."""
        return choices[self.number(len(choices) - 1)]

    def some(self) -> bytes:
        """A few bytes."""
        return self.take(self.number(40))
