"""What is nobody else's: the state directory with what is in it, and who may write to a file.

Whoever could write to the journal could make root plug and bind what they like; whoever can
connect to a VM's QMP socket is that VM's master.
"""

import os
import stat

from vmplug.errors import StoreError

_OTHERS, _OTHERS_WRITE = 0o077, 0o022


def is_absent(path: str) -> bool:
    """Whether there surely is nothing, not even a symlink."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # what may not be looked at may be there
        return False
    return False


def whose_link(path: str) -> str | None:
    """That `path` is a symlink that somebody else than root or this user made; None if not."""
    link = os.lstat(path)
    if stat.S_ISLNK(link.st_mode) and not _is_trusted(link):
        return f"is a symlink that user {link.st_uid} made"
    return None


def who_writes(status: os.stat_result) -> str | None:
    """Why others than root and this user can write to it; None if they cannot."""
    if not _is_trusted(status):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & _OTHERS_WRITE:
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _is_trusted(status: os.stat_result) -> bool:
    return status.st_uid in {0, os.geteuid()}


def check_private(state_dir: str | os.PathLike[str], journal: str) -> None:
    """StoreError when others can look into the state directory or write to what is in it.

    The files in it are made with mode 0600 (`make_private`); of an older one that others could
    read, were it anywhere else, the directory takes care.
    """
    directory = os.fspath(state_dir)
    status = os.stat(directory)
    why = whose_link(directory) or who_writes(status)
    if why is None and status.st_mode & _OTHERS:
        why = f"is open to others (mode {stat.S_IMODE(status.st_mode):04o})"
    if why:
        raise StoreError(
            directory,
            f"the state directory {directory} {why}, and is not used",
            hint=f"if nothing in it is from anybody else: chown -h $(id -u) {directory}; "
            f"chmod 700 {directory}; else name another --state-dir",
        )
    if os.path.lexists(journal) and (why := whose_link(journal) or who_writes(os.stat(journal))):
        raise StoreError(
            journal,
            f"the journal {journal} {why}, and is not used",
            hint="move it away, adopt each VM again (vmplug vm adopt) and reconcile",
        )


def can_all_connect(socket_path: str) -> bool:
    """Whether a socket lets every user connect, which takes the right to write to it.

    Directories on the way may still keep them out. Source: unix(7).
    """
    try:
        return bool(os.stat(socket_path).st_mode & stat.S_IWOTH)
    except OSError:  # it has gone
        return False


def make_private(path: str) -> None:
    """An empty file for this user alone, if there is none; nothing through a symlink.

    SQLite gives the files that it makes beside its database the mode of that. Source:
    sqlite3 src/os_unix.c, findCreateFileMode.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    os.close(os.open(path, flags, 0o600))
