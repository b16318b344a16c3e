"""The journal's SQLite file: its tables, how it is created and opened, its transactions.

WAL with synchronous=FULL: a committed transaction survives a crash of the process and of the
machine, and readers never wait. Source: sqlite.org/wal.html, sqlite.org/pragma.html.
"""

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

from vmplug.address import JOURNAL_ID_DIGITS, new_id
from vmplug.errors import SpecError, StoreError
from vmplug.host.permissions import check_private, make_private
from vmplug.host.process import ProcessLock
from vmplug.journal import StateDir, has_journal, journal_path
from vmplug.journal.lock import BESIDE, JournalLock, in_place_of, is_ready

VERSION = 11
"""The version of the tables, kept in `user_version`."""

_BUSY_TIMEOUT_S = 10.0
SALVAGE_PREFIX = "set-aside-"
"""With this the name of a directory begins in which a new journal is made from a damaged one."""
_DRAFT = r"journal\.db\.[0-9a-f]{16}(-[a-z]+)?"
_JOURNAL_ID = re.compile(f"[0-9a-f]{{{JOURNAL_ID_DIGITS}}}")

_SCHEMA = """
CREATE TABLE vm (
    name TEXT PRIMARY KEY,
    qmp_socket TEXT NOT NULL,
    pid INTEGER,
    started_at INTEGER,
    is_ours INTEGER NOT NULL,
    boot_id TEXT,
    worker TEXT
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
    thing TEXT,
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
"""`device` is not a foreign key: a function may be given back after its device is gone."""
_FUNCTION = "ALTER TABLE binding ADD COLUMN thing TEXT;"
"""Which function had the address (see `vmplug.host.check.thing`)."""
_VF_UUIDS = """
CREATE TABLE vf_token (
    bdf TEXT PRIMARY KEY,
    device TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    token TEXT NOT NULL
) STRICT;
"""
"""`device` is not a foreign key here either: virtual functions may be in use for longer."""
_OWNER = """
CREATE TABLE journal (id TEXT NOT NULL) STRICT;
INSERT INTO journal VALUES (lower(hex(randomblob(3))));
"""
"""One row: the digits with which the id of each new device begins."""
_POD_DEVICE = """
CREATE TABLE pod_device (
    resource TEXT NOT NULL,
    id TEXT NOT NULL,
    state TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    thing TEXT NOT NULL,
    named TEXT NOT NULL,
    serial TEXT,
    PRIMARY KEY (resource, id)
) STRICT;
"""
_FILES = "ALTER TABLE device ADD COLUMN files TEXT;"
"""The other files of an image, which QEMU has open too."""
_INDEX = """
CREATE INDEX device_identity ON device (identity);
CREATE INDEX device_thing ON device (thing);
"""
"""A device is looked for among those of all VMs before each attach."""
_SCHEMA += _BINDING + _FUNCTION + _VF_UUIDS + _OWNER + _POD_DEVICE + _FILES + _INDEX


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
    4: """
ALTER TABLE device ADD COLUMN thing TEXT;
""",
    5: _VF_UUIDS
    + """
ALTER TABLE vm ADD COLUMN worker TEXT;
""",
    6: _OWNER,
    7: _FUNCTION,
    8: _POD_DEVICE,
    9: _FILES,
    10: _INDEX,
}
"""The statements that turn a journal of that version into one of the next."""


def migrate(connection: sqlite3.Connection, path: str) -> int:
    """Upgrade the tables to VERSION if they are older, and return their version.

    0 means that it is not a journal of vmplug. Raises StoreError.
    """
    while True:
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in _MIGRATIONS:
            return version
        with Transaction(connection, ProcessLock(), path) as db:
            # Another process may have been faster.
            if db.execute("PRAGMA user_version").fetchone()[0] == version:
                for statement in _MIGRATIONS[version].split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {version + 1}")


Opened = tuple[sqlite3.Connection, JournalLock, str]
"""A connection to a journal, its lock, and its path."""


def open_existing(state_dir: StateDir) -> Opened:
    """The journal below `state_dir`, or an empty one in memory where vmplug never ran.

    Raises StoreError when it cannot be opened, and as `has_journal`.
    """
    if has_journal(state_dir):
        return open_database(state_dir)
    path = journal_path(state_dir)
    if os.path.isdir(state_dir):
        check_private(state_dir, path)
    connection = connect(":memory:")
    _make_tables(connection)
    return connection, JournalLock(path, None), path


def open_database(state_dir: StateDir) -> Opened:
    """The journal below `state_dir`, created if absent.

    Raises StoreError when it cannot be opened or created.
    """
    path = journal_path(state_dir)
    try:
        os.makedirs(state_dir, mode=0o700, exist_ok=True)
        check_private(state_dir, path)
        if not os.path.exists(path) or is_ready(path):
            with in_place_of(path):
                _create(path)
        with ExitStack() as undo:
            connection = undo.enter_context(closing(connect(path)))
            lock = JournalLock(path, os.stat(path))
            undo.pop_all()
    except (OSError, sqlite3.Error, UnicodeDecodeError) as error:
        raise store_error(path, error) from error
    return connection, lock, path


def connect(path: str) -> sqlite3.Connection:
    """A connection to the journal at `path`, whose commits survive any crash."""
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


def make_journal(path: str) -> None:
    """A complete empty journal at `path`, or nothing when that fails, as on a full disk."""
    try:
        make_private(path)
        with closing(connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            _make_tables(connection)
    except BaseException:
        for more in ("", *BESIDE):
            with suppress(FileNotFoundError):
                os.unlink(path + more)
        raise


def _make_tables(connection: sqlite3.Connection) -> None:
    connection.executescript(_SCHEMA)
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _create(path: str) -> None:
    """Create an empty journal and then give it its name, unless another process was faster.

    No other process creates one meanwhile.
    """
    remove_remains(path)
    if not os.path.exists(path):
        make_journal(draft := f"{path}.{new_id()}")
        os.rename(draft, path)


def remove_remains(path: str) -> None:
    """Remove the drafts that killed processes left beside the journal at `path`.

    Only inside `in_place_of`: then no other process is making one.
    """
    for entry in list(os.scandir(os.path.dirname(path))):
        if re.fullmatch(_DRAFT, entry.name):
            os.unlink(entry)
        elif entry.name.startswith(SALVAGE_PREFIX) and entry.is_dir(follow_symlinks=False):
            for file in list(os.scandir(entry)):
                os.unlink(file)
            os.rmdir(entry)


@contextmanager
def alone(path: str, timeout_s: float) -> Iterator[None]:
    """Hold the lock of `path`, an empty database, alone on this host.

    It ends with the process, even by a crash. Raises StoreError after `timeout_s`.
    """
    try:
        make_private(path)
        connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise store_error(path, error) from error
    with closing(connection), Transaction(connection, ProcessLock(), path):
        yield


class Transaction:
    """BEGIN IMMEDIATE to COMMIT, or ROLLBACK; a class because a generator takes twice as long."""

    __slots__ = ("_db", "_lock", "_path")

    def __init__(self, db: sqlite3.Connection, lock: ProcessLock, path: str) -> None:
        self._db = db
        self._lock = lock
        self._path = path

    def __enter__(self) -> sqlite3.Connection:
        self._lock.acquire()
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except BaseException as error:
            self._lock.release()
            if isinstance(error, sqlite3.Error | UnicodeDecodeError):
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
            if self._db.in_transaction:  # SQLite itself rolls back when the disk is full
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
            self._lock.release()
        if isinstance(error, UnicodeEncodeError):
            raise not_text(error) from error
        if isinstance(error, sqlite3.Error | UnicodeDecodeError):
            raise store_error(self._path, error) from error


_WRITABLE = "pass a writable --state-dir, or become root"
_REMEDIES = {
    sqlite3.SQLITE_CANTOPEN: _WRITABLE,
    sqlite3.SQLITE_READONLY: _WRITABLE,
    sqlite3.SQLITE_FULL: "free space there; then vmplug reconcile finishes or "
    "undoes what was begun",
    sqlite3.SQLITE_IOERR: "the kernel log (dmesg) has the error of the disk",
    sqlite3.SQLITE_BUSY: "try again when that process has finished",
}
"""By SQLite's code. Source: sqlite.org/rescode.html."""
_OF_ERRNO = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _REMEDIES[sqlite3.SQLITE_FULL]),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), None),
}
"""For other reasons than that the directory may not be written to."""
_DAMAGE = {
    sqlite3.SQLITE_ERROR,  # a table or column is missing
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_SCHEMA,
    sqlite3.SQLITE_MISMATCH,
}


_SENSELESS = (
    ValueError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,  # JSON may hold 1e400
    RecursionError,
)
JOURNAL_ERRORS = (sqlite3.Error, *_SENSELESS)
"""What reading a damaged journal raises: a table may lack a column, or have NULL where none can
be. SQLite's messages quote the tables: UnicodeDecodeError where that is not UTF-8."""


def means_damage(error: Exception) -> bool:
    """Whether an error means that the contents make no sense, not that a read failed.

    For a text that is not UTF-8 Python's module raises an error without a code of SQLite.
    """
    is_senseless_row = isinstance(error, _SENSELESS)
    return is_senseless_row or _code(error) in _DAMAGE or "decode" in str(error)


def _code(error: Exception) -> int:
    """SQLite's primary code: the lowest byte of the extended one.

    A reader too needs 32 KiB for the index of the WAL, and gets an I/O error on a full disk.
    Source: sqlite.org/walformat.html, chapter 2; SQLite src/os_unix.c, unixShmMap.
    """
    extended: int = getattr(error, "sqlite_errorcode", None) or 0
    return sqlite3.SQLITE_FULL if extended == sqlite3.SQLITE_IOERR_SHMSIZE else extended & 0xFF


def is_locked(error: StoreError) -> bool:
    """Whether another process kept it locked until the deadline."""
    return isinstance(error.__cause__, sqlite3.Error) and _code(error.__cause__) == (
        sqlite3.SQLITE_BUSY
    )


def store_error(path: str, error: Exception) -> StoreError:
    """The error to report for an error of the file or of a row."""
    why, hint = str(error), _REMEDIES.get(_code(error))
    if isinstance(error, OSError):
        why = os.strerror(error.errno or 0)
        hint = _OF_ERRNO.get(error.errno or 0, _WRITABLE)
    elif _code(error) == sqlite3.SQLITE_FULL:
        why = "the disk is full"
    elif _code(error) == sqlite3.SQLITE_BUSY:
        why = "another process has locked it"
    elif means_damage(error):
        return damaged(path, why)
    return StoreError(path, f"cannot use the journal {path}: {why}", hint=hint)


def read_journal_id(db: sqlite3.Connection) -> str:
    """The id of a journal. Raises ValueError for one without, or with two."""
    ids = [str(row[0]) for row in db.execute("SELECT id FROM journal")]
    if len(ids) != 1 or not _JOURNAL_ID.fullmatch(ids[0]):
        raise ValueError(f"{ids!r} is not the id of a journal")
    return ids[0]


def not_text(error: UnicodeEncodeError) -> SpecError:
    """The error for a name that the journal cannot hold; nothing is damaged."""
    name = os.fsencode(error.object).decode(errors="backslashreplace")
    return SpecError(name, "it is not UTF-8, and vmplug keeps names as text")


def damaged(path: str, why: str) -> StoreError:
    """The error for a journal that makes no sense."""
    return StoreError(
        path,
        f"the journal {path} is damaged: {why}",
        hint="vmplug reconcile --set-aside keeps it under another name, and copies what can be "
        "read from it",
    )


def written_too_fast(path: str) -> StoreError:
    """The error for a journal that others changed between each read and write."""
    return StoreError(
        path,
        f"other processes change the journal {path} faster than vmplug can decide",
        hint="try again",
    )


def check_version(version: int, path: str) -> None:
    """StoreError for a file that is not a journal, or a newer vmplug's, which stays as it is."""
    if version == 0:
        raise StoreError(
            path,
            f"{path} is not a journal of vmplug",
            hint="vmplug reconcile --set-aside keeps it under another name; or pass another "
            "--state-dir",
        )
    if version != VERSION:
        raise StoreError(
            path,
            f"{path} has version {version}; this vmplug supports version {VERSION}",
            hint="use the vmplug that wrote it, or pass another --state-dir",
        )
