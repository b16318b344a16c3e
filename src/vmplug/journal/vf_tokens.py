"""The VF tokens that vmplug drew: the secret that a physical function and its virtual ones share.

A process that opens the physical function sets the token. A process that opens one of its virtual
functions, or opens it again while one of them is open, must know the token.
Source: vfio_pci_validate_vf_token, Linux drivers/vfio/pci/vfio_pci_core.c; the same on 6.1, 6.12.
"""

import sqlite3

import msgspec

from vmplug.address import Bdf, new_uuid
from vmplug.host.process import ProcessLock
from vmplug.journal.database import JOURNAL_ERRORS, Transaction, store_error

_FIND_KEPT = "SELECT token FROM vf_token WHERE bdf = ? AND boot_id = ?"
_FIND_ATTACHED = """
SELECT t.token FROM vf_token t JOIN device d ON d.id = t.device
WHERE t.bdf = ? AND t.boot_id = ? AND d.state = 'attached'
"""


class VfToken(msgspec.Struct, frozen=True, kw_only=True):
    """The token of the physical function `bdf`, which the device `device_id` was plugged with."""

    bdf: Bdf
    device_id: str
    boot_id: str
    token: str


class VfTokens:
    """The table `vf_token` of an open journal; every method is one transaction."""

    def __init__(self, db: sqlite3.Connection, lock: ProcessLock, path: str, boot_id: str) -> None:
        self._db = db
        self._lock = lock
        self._path = path
        self._boot_id = boot_id

    def give(self, bdf: Bdf, device_id: str, *, keep: bool) -> str:
        """The token to plug a physical function with as that device, journalled.

        It is a new one, unless `keep`: its virtual functions may be in use with the former one,
        and the kernel then accepts no other.
        """
        with Transaction(self._db, self._lock, self._path) as db:
            known = db.execute(_FIND_KEPT, (str(bdf), self._boot_id)).fetchone() if keep else None
            token = str(known["token"]) if known else new_uuid()
            row = (str(bdf), device_id, self._boot_id, token)
            db.execute("INSERT OR REPLACE INTO vf_token VALUES (?, ?, ?, ?)", row)
        return token

    def find(self, bdf: Bdf) -> str | None:
        """The token of a physical function that a VM has; None if none has it with a token."""
        try:
            with self._lock:
                row = self._db.execute(_FIND_ATTACHED, (str(bdf), self._boot_id)).fetchone()
        except JOURNAL_ERRORS as error:
            raise store_error(self._path, error) from error
        return str(row["token"]) if row else None


def read_vf_token(row: sqlite3.Row) -> VfToken:
    """A row of the table `vf_token`. Raises ValueError, without the token."""
    from vmplug.host.pci.mdev import UUID  # noqa: PLC0415  0.6 ms

    if not UUID.match(row["token"]):
        raise ValueError("its token is not a UUID")
    return VfToken(
        bdf=Bdf.parse(row["bdf"]),
        device_id=row["device"],
        boot_id=row["boot_id"],
        token=row["token"],
    )
