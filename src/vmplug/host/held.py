"""A file that is held while somebody else opens it by its name: did that one get the same file?

Held, because the number of a file that is gone may be that of the next one at once.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager


class HeldFile:
    """What a name led to when it was taken; `descriptor` is None when that was nothing."""

    def __init__(self, path: str, descriptor: int | None) -> None:
        self._path = path
        self._descriptor = descriptor

    def is_same(self) -> bool:
        """Whether the name leads to that file now."""
        if self._descriptor is None:
            return False
        try:
            now = os.stat(self._path)
        except OSError:
            return False
        return os.path.samestat(now, os.fstat(self._descriptor))


@contextmanager
def hold(path: str) -> Iterator[HeldFile]:
    """Hold what is at `path`, without opening it for anything. Source: open(2), O_PATH."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        yield HeldFile(path, None)
        return
    try:
        yield HeldFile(path, descriptor)
    finally:
        os.close(descriptor)
