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
from vmplug.host.permissions import check_private, make_private
from vmplug.journal import StateDir, journal_path

VERSION = 4
"""Of the tables, kept in `user_version`."""

_BUSY_TIMEOUT_S = 10.0

_SCHEMA = """
CREATE TABLE vm (
    name TEXT PRIMARY KEY,
    qmp_socket TEXT NOT NULL,
    pid INTEGER,
    started_at INTEGER,
    is_ours INTEGER NOT NULL,
    boot_id TEXT
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
    worker TEXT,
    parts TEXT,
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
    3: """
ALTER TABLE vm ADD COLUMN boot_id TEXT;
ALTER TABLE device ADD COLUMN worker TEXT;
ALTER TABLE device ADD COLUMN parts TEXT;
""",
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


def open_database(state_dir: StateDir) -> tuple[sqlite3.Connection, str]:
    """A connection to the journal below `state_dir`, made when it is not there, and its path.

    Raises StoreError when it cannot be opened or made.
    """
    path = journal_path(state_dir)
    try:
        os.makedirs(state_dir, mode=0o700, exist_ok=True)
        check_private(state_dir, path)
        if not os.path.exists(path):
            _create(path)
        return connect(path), path
    except (OSError, sqlite3.Error) as error:
        raise store_error(path, error) from error


def connect(path: str) -> sqlite3.Connection:
    """A connection to the journal at `path` that keeps what was committed through any crash."""
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


def make_draft(path: str) -> str:
    """An empty journal, whole, beside `path` under a name of its own."""
    draft = f"{path}.{new_id()}"
    make_private(draft)
    with closing(connect(draft)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    return draft


def _create(path: str) -> None:
    """Make an empty journal and then give it its name; who is quicker wins."""
    draft = make_draft(path)
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
        make_private(path)
        connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
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


_WRITABLE = "name a writable --state-dir, or become root"
_REMEDIES = {
    sqlite3.SQLITE_CANTOPEN: _WRITABLE,
    sqlite3.SQLITE_READONLY: _WRITABLE,
    sqlite3.SQLITE_FULL: "make room there; vmplug reconcile then finishes or "
    "takes back what was begun",
    sqlite3.SQLITE_IOERR: "the kernel's log says what is the matter with the disk below it",
    sqlite3.SQLITE_BUSY: "try again when it has finished",
}
"""By SQLite's code. Source: sqlite.org/rescode.html."""
_DAMAGE = {
    sqlite3.SQLITE_ERROR,  # a table or column is not there
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_SCHEMA,
    sqlite3.SQLITE_MISMATCH,
}


def means_damage(error: Exception) -> bool:
    """Whether an error says that what is in the file makes no sense, not that it cannot be read.

    A text that is no UTF-8 is told by Python's module, without a code of SQLite's.
    """
    is_senseless_row = isinstance(error, ValueError | TypeError)
    return is_senseless_row or _code(error) in _DAMAGE or "decode" in str(error)


def _code(error: Exception) -> int:
    """SQLite's primary code: the lowest byte of the extended one."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def is_locked(error: StoreError) -> bool:
    """Whether somebody else kept it locked until the deadline."""
    return isinstance(error.__cause__, sqlite3.Error) and _code(error.__cause__) == (
        sqlite3.SQLITE_BUSY
    )


def store_error(path: str, error: Exception) -> StoreError:
    """What an error of the file or of a row means to whoever asked."""
    why, hint = str(error), _REMEDIES.get(_code(error))
    if isinstance(error, OSError):
        why, hint = os.strerror(error.errno or 0), _WRITABLE
    elif _code(error) == sqlite3.SQLITE_BUSY:
        why = "another process keeps it locked"
    elif means_damage(error):
        return damaged(path, why)
    return StoreError(path, f"cannot use the journal {path}: {why}", hint=hint)


def damaged(path: str, why: str) -> StoreError:
    """The error for a journal that makes no sense."""
    return StoreError(
        path,
        f"the journal {path} is damaged: {why}",
        hint="vmplug reconcile --set-aside keeps it under another name, and carries over what can "
        "be read of it",
    )


def written_too_fast(path: str) -> StoreError:
    """The error for a journal that somebody else wrote to between every look and act."""
    return StoreError(
        path,
        f"others write to the journal {path} faster than it can be decided on",
        hint="try again",
    )


def check_version(version: int, path: str) -> None:
    """StoreError for a file that is no journal, or a newer vmplug's, which is left as it is."""
    if version == 0:
        raise StoreError(
            path,
            f"{path} is not a journal of vmplug",
            hint="vmplug reconcile --set-aside keeps it under another name; or name another "
            "--state-dir",
        )
    if version != VERSION:
        raise StoreError(
            path,
            f"{path} is of version {version}; this vmplug knows {VERSION}",
            hint="use the vmplug that wrote it, or name another --state-dir",
        )
