"""What a verb waits for, on the last line of a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vmplug.cli.render.terminal import knows_escapes

_ERASE = "\r\x1b[K"


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show at a terminal, on stderr, that something takes its time."""
    if not knows_escapes(sys.stderr):
        yield
        return
    sys.stderr.write(what)
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write(_ERASE)
