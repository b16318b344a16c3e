"""Leases in the table of VMs: changed only if they are still what the caller has seen.

Another process may have ended a lease meanwhile, and its owner have made another one of its name.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from vmplug.host.process import ProcessLock
from vmplug.journal.database import Transaction
from vmplug.journal.records import DeviceRecord, VmRecord, guest_text, read_device

Taken = Mapping[str, Sequence[DeviceRecord]]
"""Devices of leases, by the names of those."""
NOTHING: Taken = MappingProxyType({})

_HAND_OVER = """
UPDATE vm SET pid = ?, started_at = ?, worker = NULL
WHERE name = ? AND qmp_socket = ? AND pid IS ? AND worker IS ?
"""
_TAKE_OVER = "UPDATE device SET vm = ?, place = ?, guest = ? WHERE id = ? AND vm = ?"
_DROP_EMPTY = """
DELETE FROM vm WHERE name = ? AND NOT EXISTS (SELECT * FROM device WHERE vm = vm.name)
"""
_FORGET = "DELETE FROM vm WHERE name = ? AND qmp_socket = ? AND pid IS ? AND worker IS ?"
_HELD = "SELECT * FROM device WHERE vm = ? ORDER BY rowid"


class LeaseRows:
    """The leases of an open journal; every method is one transaction."""

    def __init__(self, db: sqlite3.Connection, lock: ProcessLock, path: str) -> None:
        self._db = db
        self._lock = lock
        self._path = path

    def hand_over(self, lease: VmRecord, pid: int, started_at: int) -> bool:
        """Record the process that has a lease from now on; False when it has changed."""
        with Transaction(self._db, self._lock, self._path) as db:
            return db.execute(_HAND_OVER, (pid, started_at, *_same(lease))).rowcount > 0

    def forget(self, lease: VmRecord) -> list[DeviceRecord] | None:
        """Forget a lease, and return what it held; None, and nothing, when it has changed."""
        with Transaction(self._db, self._lock, self._path) as db:
            if db.execute(_FORGET, _same(lease)).rowcount == 0:
                return None
            held = db.execute(_HELD, (lease.name,)).fetchall()
            db.execute("DELETE FROM device WHERE vm = ?", (lease.name,))
        return [read_device(row) for row in held]


def take_over(db: sqlite3.Connection, vm: str, devices: Taken) -> None:
    """Make devices of leases those of a VM, at their places in it.

    One that a lease no longer has is left out. A lease without devices has ended.
    """
    for lease, taken in devices.items():
        for one in taken:
            where = one.place, guest_text(one.guest_address)
            db.execute(_TAKE_OVER, (vm, *where, one.id, lease))
        db.execute(_DROP_EMPTY, (lease,))


def _same(lease: VmRecord) -> tuple[object, ...]:
    worker = str(lease.starting_by) if lease.starting_by else None
    return lease.name, lease.qmp_socket, lease.pid, worker
