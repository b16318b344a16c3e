"""The lock that keeps a journal in its place while it is read or written.

`reconcile --set-aside` puts another file in place of a damaged journal. A process that still has
the old file open must not write to it: VMs in two journals would get one disk. So every access
holds this lock shared, and finds out when its file is not the journal any more.
Source: flock(2). SQLite's own locks are of another kind, and gone with the damaged file.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vmplug.errors import StoreError
from vmplug.host.permissions import make_private
from vmplug.host.process import ProcessLock
from vmplug.waiting import waiting

BESIDE = ("-wal", "-shm", "-journal")
"""The ends of the names of the files that SQLite has beside a database.

Source: sqlite.org/tempfiles.html, sqlite.org/walformat.html."""
_READY = ".ready"
"""The end of the name of a complete journal that is about to be put in place of another one."""
_TIMEOUT_S, _AGAIN_S = 10.0, 0.01


class JournalLock(ProcessLock):
    """Held, no other thread uses this connection, and its file stays the journal at `path`.

    `opened` is that file's status, None for a journal in memory, which nothing can replace. Raises
    StoreError when another file has been put in its place.
    """

    def __init__(self, path: str, opened: os.stat_result | None) -> None:
        super().__init__()
        self._path = path
        self._opened = (opened.st_dev, opened.st_ino) if opened else None
        self._depth = 0
        self._descriptor = _open(path) if opened else -1

    @property
    def has_file(self) -> bool:
        """Whether the journal is a file, not in memory."""
        return self._opened is not None

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the connection inside the `with`; this closes too, for good."""
        super().acquire()
        try:
            yield
        finally:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1
            super().release()

    def acquire(self) -> None:
        """Wait until no process replaces the journal."""
        super().acquire()
        try:
            if self._depth == 0:
                self._enter()
            self._depth += 1
        except BaseException:
            super().release()
            raise

    def release(self) -> None:
        """Let others replace it."""
        self._depth -= 1
        if self._depth == 0 and self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        super().release()

    def _enter(self) -> None:
        if self._descriptor < 0:
            return  # in memory, or closed, which the connection reports
        _lock(self._descriptor, fcntl.LOCK_SH, self._path)
        try:
            now = os.stat(self._path)
        except FileNotFoundError:
            now = None
        is_same = now is not None and (now.st_dev, now.st_ino) == self._opened
        if not is_same or is_ready(self._path):
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            raise StoreError(
                self._path,
                f"another journal has been put in place of {self._path}, which was open here",
                hint="open it again; vmplug reconcile repairs what was in progress",
            )


@contextmanager
def in_place_of(path: str) -> Iterator[None]:
    """Replace the journal inside the `with`: no process reads or writes it meanwhile.

    What a killed process has left ready is in place before.
    """
    descriptor = _open(path)
    try:
        _lock(descriptor, fcntl.LOCK_EX, path)
        if is_ready(path):
            _finish(path)
        yield
    finally:
        os.close(descriptor)


def is_ready(path: str) -> bool:
    """Whether another journal is about to be put in place of the one at `path`."""
    return os.path.exists(path + _READY)


def put_in_place(draft: str, path: str) -> None:
    """Put a complete journal in place of the one at `path`; only inside `in_place_of`.

    It is several steps, since SQLite would take the files beside the former one for those of the
    new one, and read the former one without them as a sound one. Whatever process comes next does
    those that are left.
    """
    os.rename(draft, path + _READY)
    _finish(path)


def _finish(path: str) -> None:
    for more in BESIDE:
        with suppress(FileNotFoundError):
            os.unlink(path + more)
    os.replace(path + _READY, path)


def _open(path: str) -> int:
    name = os.path.join(os.path.dirname(path), "set-aside.lock")
    make_private(name)
    return os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def _lock(descriptor: int, kind: int, path: str) -> None:
    if _try_lock(descriptor, kind):
        return
    deadline = time.monotonic() + _TIMEOUT_S
    with waiting(f"another process to unlock the journal {path}", _TIMEOUT_S):
        while not _try_lock(descriptor, kind):
            if time.monotonic() >= deadline:
                raise StoreError(
                    path,
                    f"cannot use the journal {path}: another process has locked it",
                    hint="try again when that process has finished",
                )
            time.sleep(_AGAIN_S)  # flock(2) has no deadline, and held locks last milliseconds


def _try_lock(descriptor: int, kind: int) -> bool:
    """Lock it, unless another process has: returns whether it is ours now."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
