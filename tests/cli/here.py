"""A verb in the process of the tests, which finds everything as a process of its own would."""

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedWriter, BytesIO, FileIO, TextIOWrapper
from pathlib import Path

from tests.cli.result import Result
from vmplug.cli.answer import answer

_ALONE = threading.Lock()
"""What a run changes meanwhile belongs to the whole process."""


def answered_here(
    words: Sequence[str | Path],
    stdin: str,
    environment: Mapping[str, str],
    *,
    terminal: int | None = None,
) -> Result:
    """Run it to its end; nothing of the tests' process is changed afterwards.

    `terminal` is the descriptor of one that stdout goes to.
    """
    assert _ALONE.acquire(blocking=False), "one verb at a time: others are run by `begin`"
    try:
        with (
            _environment(environment),
            _streams(stdin, terminal) as (stdout, stderr),
            _own_logging(),
        ):
            threads = set(threading.enumerate())
            status = answer([os.fspath(word) for word in words])
            left = set(threading.enumerate()) - threads
            assert not left, f"vmplug {words}: {left} go on"
        return Result(stdout.getvalue().decode(), stderr.getvalue().decode(), status)
    finally:
        _ALONE.release()


@contextmanager
def _environment(environment: Mapping[str, str]) -> Iterator[None]:
    before, directory = dict(os.environ), tempfile.tempdir
    _replace_environment(before, environment)
    tempfile.tempdir = None  # what TMPDIR was, when it was first asked for
    try:
        yield
    finally:
        _replace_environment(dict(os.environ), before)
        tempfile.tempdir = directory


def _replace_environment(before: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Change only what differs from `before`: each look into `os.environ` encodes and decodes."""
    for name in before.keys() - environment.keys():
        del os.environ[name]
    for name, _ in environment.items() - before.items():
        os.environ[name] = environment[name]


@contextmanager
def _streams(stdin: str, terminal: int | None) -> Iterator[tuple[BytesIO, BytesIO]]:
    """What the verb reads, and where it writes: with UTF-8, as Python opens them."""
    before = sys.stdin, sys.stdout, sys.stderr
    stdout, stderr = BytesIO(), BytesIO()
    sys.stdin = TextIOWrapper(BytesIO(stdin.encode()), "utf-8", "surrogateescape")
    if terminal is None:
        sys.stdout = TextIOWrapper(stdout, "utf-8", "surrogateescape")
    else:
        screen = BufferedWriter(FileIO(terminal, "w", closefd=False))
        sys.stdout = TextIOWrapper(screen, "utf-8", "surrogateescape", line_buffering=True)
    sys.stderr = TextIOWrapper(stderr, "utf-8", "backslashreplace", line_buffering=True)
    opened = sys.stdin, sys.stdout, sys.stderr
    try:
        yield stdout, stderr
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        for stream in opened:
            stream.detach()  # else it closes what is still to be read


@contextmanager
def _own_logging() -> Iterator[None]:
    """Without the handlers of the tests a warning goes to stderr, as in a process."""
    before = logging.root.handlers
    logging.root.handlers = []
    try:
        yield
    finally:
        logging.root.handlers = before
