"""A journal transaction against SQLite's own: both write, and wait until it is on the disk."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.timing import Ratio, compare
from vmplug.host.kind import DeviceType, Identity
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord
from vmplug.journal.state import State

_RECORD = DeviceRecord(
    id="0123456789abcdef",
    vm="bench",
    identity=Identity.parse("block:7:0"),
    kind=DeviceType.BLOCK,
    host_path="/dev/loop0",
    state=State.ATTACHED,
    read_only=False,
    share_rw=False,
    options={},
    place="rp0/00",
    guest_address=None,
)


def rows() -> Iterator[Ratio]:
    """Where people keep it, and in memory, where the disk does not hide what vmplug adds."""
    for where, directory in (("on disk", None), ("in memory", "/dev/shm")):
        with TemporaryDirectory(prefix="vmplug-bench-", dir=directory) as state_dir:
            yield from _commits(where, Path(state_dir))


def _commits(where: str, directory: Path) -> Iterator[Ratio]:
    """The same rows in the same tables, written by vmplug and by plain SQLite."""
    with Journal.open(directory / "ours") as store, Journal.open(directory / "bare") as other:
        store.add_devices([_RECORD], [])
        other.add_devices([_RECORD], [])
        with (
            closing(_connect(other.path)) as bare,
            closing(_connect(store.path)) as seeing,
        ):
            states = cycle((State.DETACHING, State.ATTACHED))
            bare_states = cycle((State.DETACHING, State.ATTACHED))

            def ours() -> None:
                store.set_state([_RECORD.id], next(states))

            def sqlites() -> None:
                state = next(bare_states)
                worker = str(store.worker) if state is State.DETACHING else None
                bare.execute("BEGIN IMMEDIATE")
                bare.execute(
                    "UPDATE device SET state = ?, worker = ? WHERE id = ?",
                    (state, worker, _RECORD.id),
                )
                bare.execute("COMMIT")

            before = _version(seeing)

            def proof(_: None, __: None) -> bool:
                """Both have the same row, and another connection has seen ours written."""
                nonlocal before
                was_written, before = _version(seeing) != before, _version(seeing)
                return was_written and _row(seeing) == _row(bare)

            name = f"journal commit {where} / SQLite's own transaction"
            yield compare(name, ours, sqlites, proof, target=1.2, size=(31, 20))


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _version(seeing: sqlite3.Connection) -> int:
    """It changes with every commit of another connection that wrote something."""
    return int(seeing.execute("PRAGMA data_version").fetchone()[0])


def _row(connection: sqlite3.Connection) -> tuple[str, bool]:
    state, worker = connection.execute("SELECT state, worker FROM device").fetchone()
    return str(state), worker is None
