"""The journal's SQLite file: its tables, how it is made and opened, what a transaction is.

WAL with synchronous=FULL: a committed transaction survives a crash of the process and of the
machine, and readers never wait. Source: sqlite.org/wal.html, sqlite.org/pragma.html.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from vmplug.address import new_id
from vmplug.errors import StoreError

VERSION = 3
"""Of the tables, kept in `user_version`."""

_BUSY_TIMEOUT_S = 10.0

_SCHEMA = """
CREATE TABLE vm (
    name TEXT PRIMARY KEY,
    qmp_socket TEXT NOT NULL,
    pid INTEGER,
    started_at INTEGER,
    is_ours INTEGER NOT NULL
) STRICT;
CREATE TABLE device (
    id TEXT PRIMARY KEY,
    vm TEXT NOT NULL,
    identity TEXT NOT NULL,
    kind TEXT NOT NULL,
    host_path TEXT NOT NULL,
    state TEXT NOT NULL,
    read_only INTEGER NOT NULL,
    share_rw INTEGER NOT NULL,
    options TEXT NOT NULL,
    place TEXT,
    guest TEXT,
    UNIQUE (vm, identity),
    UNIQUE (vm, place)
) STRICT;
CREATE TABLE attachment (
    id TEXT PRIMARY KEY,
    device TEXT NOT NULL REFERENCES device (id) ON DELETE CASCADE,
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    read_only INTEGER NOT NULL,
    count INTEGER NOT NULL CHECK (count > 0),
    UNIQUE (device, owner, name)
) STRICT;
"""
_BINDING = """
CREATE TABLE binding (
    bdf TEXT PRIMARY KEY,
    driver TEXT,
    driver_override TEXT,
    state TEXT NOT NULL,
    device TEXT,
    boot_id TEXT NOT NULL
) STRICT;
"""
"""`device` refers to no row: what was bound for a device may be given back after that is gone."""
_SCHEMA += _BINDING


_MIGRATIONS = {
    1: """
ALTER TABLE device ADD COLUMN guest TEXT;
UPDATE device SET guest = json_patch('{}', json_object(
    'pci_path', pci_path, 'scsi_address', scsi_address)) WHERE place IS NOT NULL;
ALTER TABLE device DROP COLUMN pci_path;
ALTER TABLE device DROP COLUMN scsi_address;
ALTER TABLE attachment RENAME COLUMN container_path TO name;
""",
    2: _BINDING,
}
"""What turns a journal of that version into one of the next."""


def migrate(connection: sqlite3.Connection, path: str) -> int:
    """Bring the tables up to VERSION if they are older; their version then.

    0 is no journal of vmplug. Raises StoreError.
    """
    while True:
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in _MIGRATIONS:
            return version
        with Transaction(connection, threading.RLock(), path) as db:
            # Another process may have been quicker.
            if db.execute("PRAGMA user_version").fetchone()[0] == version:
                for statement in _MIGRATIONS[version].split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {version + 1}")


def open_database(state_dir: str | os.PathLike[str]) -> tuple[sqlite3.Connection, str]:
    """A connection to the journal below `state_dir`, made when it is not there, and its path.

    Raises StoreError when it cannot be opened or made.
    """
    path = os.path.join(state_dir, "journal.db")
    try:
        os.makedirs(state_dir, mode=0o700, exist_ok=True)
        if not os.path.exists(path):
            _create(path)
        return _connect(path), path
    except (OSError, sqlite3.Error) as error:
        raise store_error(path, error) from error


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _create(path: str) -> None:
    """Make an empty journal whole and then give it its name; who is quicker wins."""
    draft = f"{path}.{new_id()}"
    connection = _connect(draft)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    finally:
        connection.close()
    try:
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)


@contextmanager
def alone(path: str, timeout_s: float) -> Iterator[None]:
    """Nobody else on the host is inside with that path, which is that of an empty database.

    It ends with the process, however that ends. Raises StoreError after `timeout_s`.
    """
    try:
        connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None)
    except sqlite3.Error as error:
        raise store_error(path, error) from error
    with closing(connection), Transaction(connection, threading.RLock(), path):
        yield


class Transaction:
    """BEGIN IMMEDIATE to COMMIT, or ROLLBACK; a class because a generator takes twice the time."""

    __slots__ = ("_db", "_lock", "_path")

    def __init__(self, db: sqlite3.Connection, lock: threading.RLock, path: str) -> None:
        self._db = db
        self._lock = lock
        self._path = path

    def __enter__(self) -> sqlite3.Connection:
        self._lock.acquire()
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except BaseException as error:
            self._lock.release()
            if isinstance(error, sqlite3.Error):
                raise store_error(self._path, error) from error
            raise
        return self._db

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        except sqlite3.Error as failure:
            raise store_error(self._path, failure) from failure
        finally:
            if self._db.in_transaction:  # SQLite itself takes it back when the disk is full
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
            self._lock.release()
        if isinstance(error, sqlite3.Error):
            raise store_error(self._path, error) from error


def store_error(path: str, error: Exception) -> StoreError:
    """What an error of the file or of a row means to whoever asked."""
    if isinstance(error, OSError):
        why, hint = os.strerror(error.errno or 0), "name a writable --state-dir, or become root"
    elif "unable to open" in str(error) or "readonly" in str(error):
        why, hint = str(error), "name a writable --state-dir, or become root"
    elif "is full" in str(error):
        why = str(error)
        hint = "make room there; vmplug reconcile then finishes or takes back what was begun"
    elif "locked" in str(error):
        why, hint = "another process keeps it locked", "try again when it has finished"
    else:
        why, hint = (
            str(error),
            "it may be damaged: move it away, adopt each VM again (vmplug vm adopt) and reconcile",
        )
    return StoreError(path, f"cannot use the journal {path}: {why}", hint=hint)
