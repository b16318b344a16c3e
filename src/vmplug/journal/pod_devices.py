"""The devices that the device plugin has given to pods, or has bound to offer them.

A row is written before anything is done for it. It says which device was meant: an ID of
Kubernetes may stand for another one after a boot, or when a card is swapped.
"""

import sqlite3
from collections.abc import Iterable
from enum import StrEnum

import msgspec

from vmplug.host.check.thing import identities_in
from vmplug.host.kind import IdentityKind
from vmplug.host.process import ProcessLock
from vmplug.host.use.claim import POD_PREFIX, Claim
from vmplug.journal.database import Transaction, store_error


class PodDeviceState(StrEnum):
    """How far a device is on its way to a pod and back."""

    OFFERED = "offered"
    ALLOCATED = "allocated"
    STARTED = "started"
    RETURNING = "returning"


class PodDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One device of a resource, by its ID in Kubernetes.

    `thing` is that device in the boot `boot_id` (see `vmplug.host.check.thing`), `named` the same
    without what only holds in one boot; both are empty where kubelet knows of it and the journal
    did not. `serial` is None where it has none that is known.
    """

    resource: str
    id: str
    state: PodDeviceState
    boot_id: str
    thing: str
    named: str
    serial: str | None = None

    @property
    def device_id(self) -> str:
        """Its name among the devices for which functions are bound."""
        return device_id(self.resource, self.id)

    def claims(self, boot_id: str | None) -> list[Claim]:
        """What a pod has of it, or will have.

        The number of a disk holds in one boot alone: PreStartContainer writes it again.
        """
        if self.state is PodDeviceState.OFFERED:
            return []
        vm = POD_PREFIX + self.device_id
        return [
            Claim(vm=vm, identity=each, read_only=False, share_rw=False)
            for each in identities_in(self.thing)
            if each.kind is not IdentityKind.BLOCK or self.boot_id == boot_id
        ]


def device_id(resource: str, id_: str) -> str:
    """The name of a device of Kubernetes where others have the id of a device in a VM."""
    return f"{resource}={id_}"


class PodDevices:
    """The table `pod_device` of an open journal; every method is one transaction."""

    def __init__(self, db: sqlite3.Connection, lock: ProcessLock, path: str) -> None:
        self._db = db
        self._lock = lock
        self._path = path

    def all(self) -> list[PodDevice]:
        """Every row, by resource and ID."""
        try:
            with self._lock:
                rows = self._db.execute(
                    "SELECT * FROM pod_device ORDER BY resource, id"
                ).fetchall()
            return [read_pod_device(row) for row in rows]
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise store_error(self._path, error) from error

    def claims(self, boot_id: str | None) -> list[Claim]:
        """What pods of Kubernetes were given, whether or not they have opened it."""
        return [claim for row in self.all() for claim in row.claims(boot_id)]

    def put(self, devices: Iterable[PodDevice]) -> None:
        """Write rows, each replacing an older one of its device."""
        with Transaction(self._db, self._lock, self._path) as db:
            for one in devices:
                row = (one.resource, one.id, one.state, one.boot_id)
                more = (one.thing, one.named, one.serial)
                db.execute(
                    "INSERT OR REPLACE INTO pod_device VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*row, *more),
                )

    def forget(self, devices: Iterable[PodDevice]) -> None:
        """Remove rows."""
        with Transaction(self._db, self._lock, self._path) as db:
            keys = [(one.resource, one.id) for one in devices]
            db.executemany("DELETE FROM pod_device WHERE resource = ? AND id = ?", keys)


def read_pod_device(row: sqlite3.Row) -> PodDevice:
    """A row of the table `pod_device`."""
    return PodDevice(
        resource=str(row["resource"]),
        id=str(row["id"]),
        state=PodDeviceState(row["state"]),
        boot_id=str(row["boot_id"]),
        thing=str(row["thing"]),
        named=str(row["named"]),
        serial=None if row["serial"] is None else str(row["serial"]),
    )
