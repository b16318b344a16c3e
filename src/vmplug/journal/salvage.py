"""Salvage: keep a damaged journal under another name, and copy its readable rows to a new one.

vmplug never writes to a damaged file. It reads a copy of the file, and then replaces the file in
one step by a complete journal. A row is copied when it can be read, makes sense, and refers to
rows that do; every other row is reported as lost. The new journal has an id of its own: what VMs
have and it does not know is another journal's, and stays in them.
"""

import os
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from functools import partial

import msgspec

from vmplug.address import new_id
from vmplug.errors import StoreError
from vmplug.host.root import THIS_HOST
from vmplug.host.use.claim import LEASE_PREFIX, is_lease, spoken_holder
from vmplug.journal import StateDir, journal_path
from vmplug.journal.bindings import read_binding
from vmplug.journal.database import (
    JOURNAL_ERRORS,
    SALVAGE_PREFIX,
    VERSION,
    check_version,
    connect,
    damaged,
    make_journal,
    means_damage,
    migrate,
    read_journal_id,
    remove_remains,
    store_error,
)
from vmplug.journal.lock import BESIDE, in_place_of, put_in_place
from vmplug.journal.pod_devices import read_pod_device
from vmplug.journal.process import read_pid_namespace
from vmplug.journal.records import read_device, read_vm
from vmplug.journal.vf_tokens import read_vf_token

_MOST_SKIPPED = 1000
"""Row numbers to try on an unreadable page: it has room for 40 rows, and deleted ones had numbers
too."""

UNKNOWN_OWNER = "unknown"
"""The owner of a device whose holds were lost, so that it is listed and can be detached."""


def _read_attachment(row: sqlite3.Row) -> object:
    if not (row["owner"] and row["name"] and row["count"] > 0):
        raise ValueError("it names neither an owner nor a device")
    return row


_TABLES: Mapping[str, Callable[[sqlite3.Row], object]] = {
    "vm": partial(read_vm, boot_id=""),
    "device": read_device,
    "attachment": _read_attachment,
    "binding": read_binding,
    "vf_token": read_vf_token,
    "pod_device": read_pod_device,
}
"""The tables in the order of their references, each with the parser that validates a row."""


class Salvage(msgspec.Struct, kw_only=True):
    """The result for a damaged journal: `carried` rows by table, and in words the `lost` ones."""

    kept_as: str
    damage: str
    carried: Counter[str] = msgspec.field(default_factory=Counter)
    lost: list[str] = msgspec.field(default_factory=list)


def check_journal(path: str) -> None:
    """Check every page and row. Raises StoreError for damage, and for every other failure."""
    if damage := find_damage(path):
        raise damaged(path, damage)


def find_damage(path: str, *, copy: str | None = None) -> str | None:
    """The damage in the contents of the file, or of its `copy`; None when all of it makes sense.

    Raises StoreError, which names `path`, when it cannot be read or is a newer vmplug's.
    """
    try:
        with closing(connect(copy or path)) as db:
            return _find_damage(db, path)
    except JOURNAL_ERRORS as error:
        if means_damage(error):
            return str(error)
        raise store_error(path, error) from error


def _find_damage(db: sqlite3.Connection, path: str) -> str | None:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        check_version(version, path)
    if version <= 0:
        return "it is not a vmplug journal"
    told = [str(row[0]) for row in db.execute("PRAGMA integrity_check(3)")]
    if told != ["ok"]:
        return "; ".join(" ".join(line.split()) for line in told)
    if db.execute("PRAGMA foreign_key_check").fetchone():
        return "an attachment refers to a device that does not exist"
    for table, parse in _TABLES.items() if version == VERSION else ():
        for row in db.execute(f"SELECT * FROM {table}"):  # noqa: S608  ours
            parse(row)
    if version == VERSION:
        read_journal_id(db)
    return None


def set_aside(state_dir: StateDir) -> Salvage | None:
    """Replace a damaged journal with a complete one; None when there is no damage.

    Raises StoreError, and then the damaged one stays in place.
    """
    path = journal_path(state_dir)
    if not os.path.exists(path):
        return None
    try:
        with in_place_of(path):
            remove_remains(path)
            with tempfile.TemporaryDirectory(dir=state_dir, prefix=SALVAGE_PREFIX) as directory:
                return _replace(path, directory)
    except (OSError, *JOURNAL_ERRORS) as error:
        raise store_error(path, error) from error


def _replace(path: str, directory: str) -> Salvage | None:
    """Replace a damaged journal with one that is made in an empty `directory`."""
    kept, copy, draft = (os.path.join(directory, name) for name in ("kept", "copy", "draft"))
    _copy(path, kept)
    _copy(kept, copy)
    damage = find_damage(path, copy=copy)  # a copy: closing a database may write to it
    if damage is None:
        return None
    salvage = Salvage(kept_as=_dated_name(path), damage=damage)
    make_journal(draft)
    with closing(connect(draft)) as new:
        _carry_over(copy, new, salvage)
    _move(kept, salvage.kept_as)
    put_in_place(draft, path)
    return salvage


def _dated_name(path: str) -> str:
    """An unused name beside the journal with the time at which it was found damaged."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name, number = f"{path}.damaged-{stamp}", 1
    while os.path.exists(name):
        number += 1
        name = f"{path}.damaged-{stamp}-{number}"
    return name


def _move(source: str, target: str) -> None:
    for more in ("", *BESIDE):
        if os.path.exists(source + more):
            os.rename(source + more, target + more)


def _copy(source: str, target: str) -> None:
    """A private copy with all files that belong to it, synced to disk."""
    for more in ("", *BESIDE):
        if not os.path.exists(source + more):
            continue
        descriptor = os.open(target + more, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(source + more, "rb") as reader, open(descriptor, "wb") as writer:
            shutil.copyfileobj(reader, writer)
            writer.flush()
            os.fsync(writer.fileno())


def _carry_over(copy: str, new: sqlite3.Connection, salvage: Salvage) -> None:
    """Read the copy, which is upgraded as far as possible.

    With `writable_schema` SQLite reads a file that is shorter than its header says. Source: SQLite
    src/btree.c, lockBtree.
    """
    with closing(sqlite3.connect(copy, isolation_level=None)) as old:
        old.row_factory = sqlite3.Row
        old.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
        with suppress(StoreError, *JOURNAL_ERRORS):
            old.execute("PRAGMA writable_schema = ON")
            migrate(old, copy)
        new.execute("BEGIN IMMEDIATE")
        for table, parse in _TABLES.items():
            _carry_table(table, parse, old, new, salvage)
        _name_holders(new, salvage)
        new.execute("COMMIT")


def _carry_table(
    table: str,
    parse: Callable[[sqlite3.Row], object],
    old: sqlite3.Connection,
    new: sqlite3.Connection,
    salvage: Salvage,
) -> None:
    columns = [row["name"] for row in new.execute(f"PRAGMA table_info({table})")]
    marks = ", ".join("?" * len(columns))
    for row in _rows(table, old, salvage):
        try:
            parse(row)
            values = [row[column] for column in columns]
            new.execute(f"INSERT INTO {table} VALUES ({marks})", values)  # noqa: S608  ours
        except JOURNAL_ERRORS as error:
            words = " ".join(str(row[name]) for name in row.keys()[1:4])
            salvage.lost.append(f"{table} {words}: {error}")
        else:
            salvage.carried[table] += 1


def _rows(table: str, old: sqlite3.Connection, salvage: Salvage) -> Iterator[sqlite3.Row]:
    """The readable rows of a table: after a damaged page it continues with the next rows."""
    query = f"SELECT rowid AS number, * FROM {table} NOT INDEXED WHERE rowid > ? ORDER BY rowid"  # noqa: S608
    last, skipped, failure = 0, 0, None
    while skipped < _MOST_SKIPPED:
        try:
            for row in old.execute(query, (last,)):
                last, skipped = row["number"], 0
                yield row
        except JOURNAL_ERRORS as error:
            last, skipped, failure = last + 1, skipped + 1, error
        else:
            break
    if failure:
        salvage.lost.append(f"rows of the table {table}: {failure}")


def _name_holders(new: sqlite3.Connection, salvage: Salvage) -> None:
    """Give devices without holds an owner, so that they are listed and can be detached."""
    held = "SELECT device FROM attachment"
    for row in new.execute(f"SELECT * FROM device WHERE id NOT IN ({held})").fetchall():  # noqa: S608
        hold = (new_id(), row["id"], UNKNOWN_OWNER, row["host_path"], row["read_only"], 1)
        new.execute("INSERT INTO attachment VALUES (?, ?, ?, ?, ?, ?)", hold)
        salvage.lost.append(f"the owner of {row['host_path']} in VM {row['vm']}")
    names = "SELECT name FROM vm"
    query = f"SELECT DISTINCT vm FROM device WHERE vm NOT IN ({names})"  # noqa: S608
    for (name,) in new.execute(query).fetchall():
        if is_lease(name):
            told = (
                f"the process of {spoken_holder(name)}: reconcile finds who has its devices open"
            )
            key = f"{LEASE_PREFIX}{read_pid_namespace(THIS_HOST)}:{new_id()}"
            new.execute("INSERT INTO vm VALUES (?, ?, NULL, NULL, 0, NULL, NULL)", (name, key))
        else:
            told = f"the socket of VM {name}: run vmplug vm adopt {name} --qmp SOCKET"
        salvage.lost.append(told)
