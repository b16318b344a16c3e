"""A journal transaction against SQLite's own."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.timing import Ratio, compare
from vmplug.host.kind import DeviceType, Identity
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord
from vmplug.journal.state import State


def rows() -> Iterator[Ratio]:
    """One committed change of state / one bare committed UPDATE, both WAL and FULL."""
    with TemporaryDirectory(prefix="vmplug-bench-") as directory, Journal.open(directory) as store:
        record = DeviceRecord(
            id="0123456789abcdef",
            vm="bench",
            identity=Identity.parse("block:7:0"),
            kind=DeviceType.BLOCK,
            host_path="/dev/loop0",
            state=State.PLUGGING,
            read_only=False,
            share_rw=False,
            options={},
            place="rp0/00",
            guest_address=None,
        )
        store.add_devices([record], [])
        store.set_state([record.id], State.DETACHING)
        bare = sqlite3.connect(Path(directory) / "bare.db", isolation_level=None)
        bare.execute("PRAGMA journal_mode = WAL")
        bare.execute("PRAGMA synchronous = FULL")
        bare.execute("CREATE TABLE device (id TEXT PRIMARY KEY, state TEXT)")
        bare.execute("INSERT INTO device VALUES ('0123456789abcdef', 'detaching')")

        def ours() -> None:
            store.set_state([record.id], State.DETACHING)

        def other() -> None:
            bare.execute("BEGIN IMMEDIATE")
            bare.execute("UPDATE device SET state = ? WHERE id = ?", ("detaching", record.id))
            bare.execute("COMMIT")

        name = "journal commit / SQLite's own bare transaction"
        yield compare(name, ours, other, target=1.5, repeat=20)
        bare.close()
