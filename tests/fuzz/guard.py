"""Whoever only reads changes nothing: every change of a file system that Python makes is seen.

Source: Python, library/audit_events.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {
    # the event, with which of its arguments are paths and which is a dir_fd
    "os.chmod": ((0,), 2),
    "os.chown": ((0,), 3),
    "os.link": ((1,), 3),
    "os.mkdir": ((0,), 2),
    "os.remove": ((0,), 1),
    "os.rename": ((0, 1), 2),
    "os.rmdir": ((0,), 1),
    "os.setxattr": ((0,), None),
    "os.symlink": ((1,), 2),
    "os.truncate": ((0,), None),
    "os.utime": ((0,), 3),
}
_NEVER = {"os.exec", "os.kill", "os.posix_spawn", "os.system", "subprocess.Popen", "os.fork"}


class _Guard:
    """What may be changed now; None while nobody watches."""

    allowed: tuple[str, ...] | None = None
    offences: list[str]


_guard = _Guard()


@contextmanager
def changes_only(*directories: str) -> Iterator[None]:
    """AssertionError when anything outside these directories is changed, or a program started."""
    _install()
    keeps_none, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # of what it imports late
    _guard.allowed, _guard.offences = directories, []
    try:
        yield
    finally:
        _guard.allowed = None
        sys.dont_write_bytecode = keeps_none
    assert not _guard.offences, _guard.offences


@contextmanager
def temporary_files_in(directory: str) -> Iterator[str]:
    """Have them below the sandbox, for a while."""
    before = tempfile.tempdir
    tempfile.tempdir = directory
    try:
        yield directory
    finally:
        tempfile.tempdir = before


def _look(event: str, arguments: tuple[object, ...]) -> None:
    allowed = _guard.allowed
    if allowed is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITING and not _is_below(path, None, allowed):
            _guard.offences.append(f"{event} {arguments}")
    elif event in _NEVER:
        _guard.offences.append(f"{event} {arguments}")
    elif event in _PATHS:
        paths, at = _PATHS[event]
        directory = arguments[at] if at is not None else None
        if not all(_is_below(arguments[index], directory, allowed) for index in paths):
            _guard.offences.append(f"{event} {arguments}")


def _is_below(path: object, directory: object, allowed: tuple[str, ...]) -> bool:
    """Whether the file lies there, its directory's links followed."""
    if isinstance(path, int):
        return True  # a descriptor, which was opened before
    if not isinstance(path, str | bytes):
        return False
    name = os.fsdecode(path)
    if isinstance(directory, int) and directory >= 0:
        name = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name)
    parent = os.path.realpath(os.path.dirname(os.path.abspath(name)))
    return any(f"{parent}/".startswith(f"{one}/") for one in allowed)


_installed: list[bool] = []


def _install() -> None:
    """A hook of this kind stays as long as the process."""
    if not _installed:
        _installed.append(True)
        sys.addaudithook(_look)
