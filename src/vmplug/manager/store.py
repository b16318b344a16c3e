"""Store: the journal, and the list of VMs, in one SQLite file.

Everything that is allocated is written here before the act. WAL with synchronous=FULL: a
committed transaction survives a crash of the process and of the machine, and readers never wait.
The tables are this version's own; `user_version` says which.
Source: sqlite.org/wal.html, sqlite.org/pragma.html#pragma_synchronous.
"""

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Self, TypeVar

from vmplug.address import new_id
from vmplug.drivers.base import GuestAddress
from vmplug.errors import StoreError
from vmplug.host.safety import Claim
from vmplug.manager.records import (
    Attachment,
    DeviceRecord,
    VmRecord,
    read_attachment,
    read_claim,
    read_device,
    read_vm,
)
from vmplug.manager.state import (
    FOLLOWS,
    State,
    check_step,
    known_already,
    not_in_journal,
    on_its_way,
)

T = TypeVar("T")

DEFAULT_STATE_DIR = "/run/vmplug"
_VERSION = 1
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
    pci_path TEXT,
    scsi_address TEXT,
    UNIQUE (vm, identity),
    UNIQUE (vm, place)
) STRICT;
CREATE TABLE attachment (
    id TEXT PRIMARY KEY,
    device TEXT NOT NULL REFERENCES device (id) ON DELETE CASCADE,
    owner TEXT NOT NULL,
    container_path TEXT NOT NULL,
    read_only INTEGER NOT NULL,
    count INTEGER NOT NULL CHECK (count > 0),
    UNIQUE (device, owner, container_path)
) STRICT;
"""


_HOLD = """
SELECT a.device, a.count, d.vm, d.host_path, d.state,
       (SELECT count(*) FROM attachment b WHERE b.device = a.device) AS holds
FROM attachment a JOIN device d ON a.device = d.id WHERE a.id = ?
"""
_RELEASE_ONE = "UPDATE attachment SET count = count - 1 WHERE id = ?"


class Store:
    """The journal of one host, open in this process.

    Every method is one transaction. Raises StoreError for a file that is not a journal, comes
    from a newer version, or stays locked for 10 seconds.
    """

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        self._db = connection
        self._lock = threading.RLock()
        self.path = path

    @classmethod
    def open(cls, state_dir: str | os.PathLike[str] = DEFAULT_STATE_DIR) -> Self:
        """The journal below `state_dir`, made when it is not there."""
        path = os.path.join(state_dir, "journal.db")
        try:
            os.makedirs(state_dir, mode=0o700, exist_ok=True)
            if not os.path.exists(path):
                _create(path)
            store = cls(_connect(path), path)
        except (OSError, sqlite3.Error) as error:
            raise _store_error(path, error) from error
        try:
            store._check_version()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_version(self) -> None:
        with self._errors():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            raise StoreError(
                self.path,
                f"{self.path} is not a journal of vmplug",
                hint="move it away, or name another --state-dir",
            )
        if version != _VERSION:
            raise StoreError(
                self.path,
                f"{self.path} is of version {version}; this vmplug knows {_VERSION}",
                hint="use the vmplug that wrote it, or name another --state-dir",
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            raise _store_error(self.path, error) from error

    def _read(self, parse: Callable[[sqlite3.Row], T], query: str, *values: object) -> list[T]:
        """Every row as a value; StoreError for one that makes no sense."""
        with self._lock, self._errors():
            return [parse(row) for row in self._db.execute(query, values)]

    # VMs

    def add_vm(self, vm: VmRecord) -> None:
        """Remember a VM. StateError when its name or its QMP socket is known already."""
        with _Transaction(self._db, self._lock, self.path) as db:
            known = db.execute(
                "SELECT name FROM vm WHERE name = ? OR qmp_socket = ?", (vm.name, vm.qmp_socket)
            ).fetchone()
            if known:
                raise known_already(
                    known["name"], vm.qmp_socket if known["name"] != vm.name else None
                )
            db.execute(
                "INSERT INTO vm VALUES (?, ?, ?, ?, ?)",
                (vm.name, vm.qmp_socket, vm.pid, vm.started_at, vm.is_ours),
            )

    def set_process(self, name: str, pid: int, started_at: int | None) -> None:
        """Remember the process of a known VM."""
        with _Transaction(self._db, self._lock, self.path) as db:
            db.execute(
                "UPDATE vm SET pid = ?, started_at = ? WHERE name = ?", (pid, started_at, name)
            )

    def forget_vm(self, name: str) -> None:
        """Forget a VM and every device it held."""
        with _Transaction(self._db, self._lock, self.path) as db:
            db.execute("DELETE FROM device WHERE vm = ?", (name,))
            db.execute("DELETE FROM vm WHERE name = ?", (name,))

    def vms(self) -> list[VmRecord]:
        """Every known VM, by name."""
        return self._read(read_vm, "SELECT * FROM vm ORDER BY name")

    def find_vm(self, name: str) -> VmRecord | None:
        """The VM of that name; None when it is not known."""
        return next((vm for vm in self.vms() if vm.name == name), None)

    # devices

    def version(self) -> int:
        """A number that changes when another process or manager has written to the journal."""
        with self._lock, self._errors():
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def add_devices(
        self,
        devices: Iterable[DeviceRecord],
        holds: Iterable[Attachment],
        *,
        version: int | None = None,
    ) -> list[Attachment] | None:
        """Write down devices that are about to be plugged, and who wants them.

        None, and nothing written, when the journal is no longer of that `version`: what was
        decided on it, such as that no VM holds the device, may be wrong by now.
        """
        with _Transaction(self._db, self._lock, self.path) as db:
            if version not in {None, self.version()}:
                return None
            for device in devices:
                check_step(device.host_path, None, device.state)
                guest = device.guest_address or GuestAddress()
                db.execute(
                    "INSERT INTO device VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        device.id,
                        device.vm,
                        device.identity,
                        device.kind,
                        device.host_path,
                        device.state,
                        device.read_only,
                        device.share_rw,
                        json.dumps(dict(device.options)),
                        device.place,
                        str(guest.pci_path) if guest.pci_path else None,
                        str(guest.scsi_address) if guest.scsi_address else None,
                    ),
                )
            return _add_holds(db, holds)

    def set_state(
        self, device_ids: Sequence[str], state: State, holds: Iterable[Attachment] = ()
    ) -> list[Attachment]:
        """Move devices on to `state`, and add holds on any device with it.

        Raises StateError when the table does not let one of them; then none moves.
        """
        with _Transaction(self._db, self._lock, self.path) as db:
            for device_id in device_ids:
                done = db.execute(_SET_STATE[state], (device_id,))
                if done.rowcount == 0:
                    check_step(device_id, _state(db, device_id), state)
                    raise not_in_journal(device_id)
            return _add_holds(db, holds)

    def forget_devices(self, device_ids: Sequence[str]) -> None:
        """Forget devices that the VM no longer holds, their places and their holds."""
        with _Transaction(self._db, self._lock, self.path) as db:
            for device_id in device_ids:
                if state := _state(db, device_id):  # another thread may have been quicker
                    check_step(device_id, state, None)
                    db.execute("DELETE FROM device WHERE id = ?", (device_id,))

    def release(self, attachment_ids: Sequence[str], *, whole: bool) -> list[str]:
        """Take holds back: one count of each, or the `whole` of it.

        A device's last hold stays until the device is gone, so that it can be seen and tried
        again. Gives the ids of the devices for which that is so: they are to be unplugged.
        Raises StateError, and takes nothing back, for a device whose attach broke off.
        """
        last = []
        with _Transaction(self._db, self._lock, self.path) as db:
            for attachment_id in attachment_ids:
                row = db.execute(_HOLD, (attachment_id,)).fetchone()
                if row is None:
                    continue
                if row["state"] == State.PLUGGING:
                    raise on_its_way(row["vm"], row["host_path"], State.PLUGGING)
                if row["state"] == State.DETACHING or (
                    row["holds"] == 1 and (whole or row["count"] == 1)
                ):
                    last.append(row["device"])
                elif row["count"] > 1 and not whole:
                    db.execute(_RELEASE_ONE, (attachment_id,))
                else:
                    db.execute("DELETE FROM attachment WHERE id = ?", (attachment_id,))
        return last

    def devices(self, vm: str) -> list[DeviceRecord]:
        """Every device of a VM, in the order they came."""
        return self._read(read_device, "SELECT * FROM device WHERE vm = ? ORDER BY rowid", vm)

    def find_claims(self, vm: str | None, own: str, identities: Iterable[str]) -> list[Claim]:
        """What VMs hold of `identities`, and other VMs than `vm` of `own`."""
        wanted = [own, *identities]
        marks = ", ".join("?" * len(wanted))
        return self._read(
            read_claim,
            f"SELECT * FROM device WHERE identity IN ({marks})"  # noqa: S608  only marks
            " AND NOT (identity = ? AND vm IS ?) ORDER BY rowid",
            *wanted,
            own,
            vm,
        )

    def attachments(self, vm: str | None = None) -> list[Attachment]:
        """Every hold on a device of `vm`, or of all VMs."""
        return self._read(
            read_attachment,
            "SELECT a.*, d.vm, d.host_path, d.kind, d.state, d.place, d.pci_path, d.scsi_address"
            " FROM attachment a JOIN device d ON a.device = d.id"
            " WHERE d.vm = coalesce(?, d.vm) ORDER BY a.rowid",
            vm,
        )


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
        connection.execute(f"PRAGMA user_version = {_VERSION}")
    finally:
        connection.close()
    try:
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)


class _Transaction:
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
                raise _store_error(self._path, error) from error
            raise
        return self._db

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        try:
            self._db.execute("ROLLBACK" if kind else "COMMIT")
        except sqlite3.Error as failure:
            raise _store_error(self._path, failure) from failure
        finally:
            self._lock.release()
        if isinstance(error, sqlite3.Error):
            raise _store_error(self._path, error) from error


def _step_statement(state: State) -> str:
    """SQL that moves one device to `state` if the table lets it."""
    before = " OR ".join(f"state = '{s}'" for s, nexts in FOLLOWS.items() if s and state in nexts)
    before = before or "FALSE"
    return f"UPDATE device SET state = '{state}' WHERE id = ? AND ({before})"  # noqa: S608


_SET_STATE = {state: _step_statement(state) for state in State}


def _state(db: sqlite3.Connection, device_id: str) -> State | None:
    row = db.execute("SELECT state FROM device WHERE id = ?", (device_id,)).fetchone()
    return State(row[0]) if row else None


def _add_holds(db: sqlite3.Connection, holds: Iterable[Attachment]) -> list[Attachment]:
    """The holds as they stand now: an owner that holds a device already has the older id."""
    added = []
    for hold in holds:
        row = db.execute(
            "INSERT INTO attachment VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (device, owner, container_path) DO UPDATE"
            " SET count = count + 1, read_only = read_only AND excluded.read_only"
            " RETURNING id, count, read_only",
            (hold.id, hold.device_id, hold.owner, hold.container_path, hold.read_only, hold.count),
        ).fetchone()
        read_only = bool(row["read_only"])
        added.append(replace(hold, id=row["id"], count=row["count"], read_only=read_only))
    return added


def _store_error(path: str, error: Exception) -> StoreError:
    if isinstance(error, OSError):
        why, hint = os.strerror(error.errno or 0), "name a writable --state-dir, or become root"
    elif "unable to open" in str(error) or "readonly" in str(error):
        why, hint = str(error), "name a writable --state-dir, or become root"
    elif "locked" in str(error):
        why, hint = "another process keeps it locked", "try again when it has finished"
    else:
        why, hint = str(error), "it may be damaged: move it away and run vmplug reconcile"
    return StoreError(path, f"cannot use the journal {path}: {why}", hint=hint)
