"""Where files stand that need no disk, as journals do: a commit of SQLite waits for the disk."""

import atexit
import os
import shutil
import tempfile

_MEMORY = "/dev/shm"


def _memory() -> str:
    """A memory file system on which tests may start programs, if there is one."""
    try:
        flags = os.statvfs(_MEMORY).f_flag
    except FileNotFoundError:
        return "/tmp"
    may_be_used = os.access(_MEMORY, os.W_OK) and not flags & (os.ST_RDONLY | os.ST_NOEXEC)
    return _MEMORY if may_be_used else "/tmp"


MEMORY = _memory()
"""In memory if possible; its path is short, for the sockets below it."""


def directory_of_this_process(prefix: str) -> str:
    """A new directory, which is removed when the process ends."""
    directory = os.path.realpath(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
