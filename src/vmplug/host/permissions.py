"""Keep the state directory private, and check who may write to a file.

A user who can write to the journal could make root plug and bind any device; a user who can
connect to a VM's QMP socket controls that VM.
"""

import os
import stat

from vmplug.errors import StoreError

_OTHERS, _OTHERS_WRITE = 0o077, 0o022


def is_absent(path: str) -> bool:
    """Whether the path surely does not exist, not even as a symlink."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # a path that cannot be read may exist
        return False
    return False


def whose_link(path: str) -> str | None:
    """Why the symlink `path` is not trusted: its owner is not root or this user; None if it is."""
    link = os.lstat(path)
    if stat.S_ISLNK(link.st_mode) and not _is_trusted(link):
        return f"is a symlink that user {link.st_uid} made"
    return None


def who_writes(status: os.stat_result) -> str | None:
    """Why users other than root and this one can write to it; None if they cannot."""
    if not _is_trusted(status):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & _OTHERS_WRITE:
        return f"is writable by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def why_not_trusted(path: str) -> str | None:
    """Why what has that path is not root's or this user's word; None if it is."""
    try:
        return whose_link(path) or who_writes(os.stat(path))
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _is_trusted(status: os.stat_result) -> bool:
    return status.st_uid in {0, os.geteuid()}


def check_private(state_dir: str | os.PathLike[str], journal: str) -> None:
    """StoreError when others can read the state directory or write to files in it.

    Its files are created with mode 0600 (`make_private`); the directory protects older files with
    a wider mode.
    """
    directory = os.fspath(state_dir)
    status = os.stat(directory)
    why = whose_link(directory) or who_writes(status)
    if why is None and status.st_mode & _OTHERS:
        why = f"is accessible to others (mode {stat.S_IMODE(status.st_mode):04o})"
    if why:
        raise StoreError(
            directory,
            f"the state directory {directory} {why}: vmplug refuses to use it",
            hint=f"if everything in it is yours: chown -h $(id -u) {directory}; "
            f"chmod 700 {directory}; otherwise pass another --state-dir",
        )
    if os.path.lexists(journal) and (why := whose_link(journal) or who_writes(os.stat(journal))):
        raise StoreError(
            journal,
            f"the journal {journal} {why}: vmplug refuses to use it",
            hint="move it away, adopt each VM again (vmplug vm adopt) and reconcile",
        )


def can_all_connect(socket_path: str) -> bool:
    """Whether every user may connect to a socket, which requires write permission.

    Its directories may still keep them out. Source: unix(7).
    """
    try:
        return bool(os.stat(socket_path).st_mode & stat.S_IWOTH)
    except OSError:  # it has gone
        return False


def make_private(path: str) -> None:
    """Create an empty file for this user alone, unless it exists; never through a symlink.

    SQLite gives the files beside its database the same mode. Source: sqlite3 src/os_unix.c,
    findCreateFileMode.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    os.close(os.open(path, flags, 0o600))
