"""The functions that vmplug bound to VFIO, with the driver that each returns to.

A function's former binding is recorded before the first write to sysfs, and forgotten when it is
restored. A binding does not outlive the host's boot, so neither does the row.
"""

import os
import sqlite3
from collections.abc import Iterable
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from vmplug.address import Bdf
from vmplug.host.process import ProcessLock
from vmplug.journal.database import JOURNAL_ERRORS, Transaction, alone, store_error

if TYPE_CHECKING:
    from vmplug.host.pci.bind import FormerBinding

LOCK_TIMEOUT_S = 120.0
"""The others wait for a function that is slow to unbind."""


class BindingState(StrEnum):
    """The state of a function on its way to VFIO and back."""

    BINDING = "binding"
    BOUND = "bound"
    UNBINDING = "unbinding"


class Binding(msgspec.Struct, frozen=True, kw_only=True):
    """A function that vmplug bound, and its former binding.

    `device_id` is the device for which `attach --managed` bound it, None when it was bound by
    hand. `thing` is that function (see `vmplug.host.check.thing`), None where an older vmplug
    bound it.
    """

    former: "FormerBinding"
    state: BindingState
    device_id: str | None
    boot_id: str
    thing: str | None = None

    @property
    def bdf(self) -> Bdf:
        """The function."""
        return self.former.bdf


class Bindings:
    """The table `binding` of an open journal; every method is one transaction."""

    def __init__(self, db: sqlite3.Connection, lock: ProcessLock, path: str) -> None:
        self._db = db
        self._lock = lock
        self._path = path

    def alone(self, *, timeout_s: float = LOCK_TIMEOUT_S) -> AbstractContextManager[None]:
        """Keep every other process with this journal from binding or giving back meanwhile."""
        return alone(os.path.join(os.path.dirname(self._path), "binding.lock"), timeout_s)

    def all(self) -> list[Binding]:
        """Every row, in the order of the bus."""
        try:
            with self._lock:
                rows = self._db.execute("SELECT * FROM binding").fetchall()
            return sorted(map(read_binding, rows), key=lambda binding: binding.bdf)
        except JOURNAL_ERRORS as error:
            raise store_error(self._path, error) from error

    def ids(self) -> set[str]:
        """What functions may be bound for: devices of all VMs, and of Kubernetes, by their ids."""
        query = "SELECT id FROM device UNION SELECT resource || '=' || id FROM pod_device"
        try:
            with self._lock:
                return {str(row[0]) for row in self._db.execute(query)}
        except sqlite3.Error as error:
            raise store_error(self._path, error) from error

    def put(self, bindings: Iterable[Binding]) -> None:
        """Write rows, each replacing an older one of its function."""
        with Transaction(self._db, self._lock, self._path) as db:
            for binding in bindings:
                db.execute(
                    "INSERT OR REPLACE INTO binding VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        str(binding.bdf),
                        binding.former.driver,
                        binding.former.driver_override,
                        binding.state,
                        binding.device_id,
                        binding.boot_id,
                        binding.thing,
                    ),
                )

    def forget(self, functions: Iterable[Bdf]) -> None:
        """Remove rows."""
        with Transaction(self._db, self._lock, self._path) as db:
            db.executemany("DELETE FROM binding WHERE bdf = ?", [(str(f),) for f in functions])


def read_binding(row: sqlite3.Row) -> Binding:
    """A row of the table `binding`."""
    from vmplug.host.pci.bind import FormerBinding  # noqa: PLC0415  0.4 ms

    bdf = Bdf.parse(row["bdf"])
    return Binding(
        former=FormerBinding(
            bdf=bdf, driver=row["driver"], driver_override=row["driver_override"]
        ),
        state=BindingState(row["state"]),
        device_id=row["device"],
        boot_id=row["boot_id"],
        thing=row["thing"],
    )
