"""Journals of older versions: brought up to date whole, or left as they are."""

import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.contract.world import journal_rows
from tests.unit.journal.test_journal import (
    APART,
    COUNTED,
    DISK,
    HIDDEN_SCSI_DISK,
    SCSI_DISK,
    hold,
    spawn,
)
from vmplug.address import new_id
from vmplug.errors import StoreError
from vmplug.host.kind import Identity
from vmplug.journal.database import VERSION
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, DeviceRecord, VmRecord
from vmplug.journal.state import State

PROCESSES, SOON_S = 4, 120

VERSION_1 = """
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
"""The tables as the first vmplug with a journal made them."""

VM = VmRecord(
    name="vm-1", qmp_socket="/ä/vm/vm-1/qmp.sock", pid=2**22, started_at=2**40, is_ours=True
)
ADOPTED = VmRecord(name="vm-2", qmp_socket="/s", pid=None, started_at=None, is_ours=False)
DEVICES = [
    replace(DISK, state=State.ATTACHED),
    replace(SCSI_DISK, state=State.DETACHING),
    replace(
        HIDDEN_SCSI_DISK, id="00000000000000d4", identity=Identity.parse("block:8:32"), vm="vm-2"
    ),
    COUNTED,
]
HOLDS = [
    replace(hold(DEVICES[0]), count=3, read_only=True),
    hold(DEVICES[0], "c2", "/dev/\u2028ü"),
    *(hold(device) for device in DEVICES[1:]),
]


def old_device(device: DeviceRecord) -> tuple[object, ...]:
    """A row as version 1 wrote it."""
    guest = device.guest_address
    return (
        device.id,
        device.vm,
        str(device.identity),
        str(device.kind),
        device.host_path,
        str(device.state),
        device.read_only,
        device.share_rw,
        json.dumps(dict(device.options)),
        device.place,
        str(guest.pci_path) if guest and guest.pci_path else None,
        str(guest.scsi_address) if guest and guest.scsi_address else None,
    )


def old_hold(hold: Attachment) -> tuple[object, ...]:
    """A row as version 1 wrote it."""
    return (hold.id, hold.device_id, hold.owner, hold.name, hold.read_only, hold.count)


def old_vm(vm: VmRecord) -> tuple[object, ...]:
    """A row as version 1 wrote it."""
    return (vm.name, vm.qmp_socket, vm.pid, vm.started_at, vm.is_ours)


def write_version_1(state_dir: Path, *more: str) -> Path:
    """A journal of version 1 with everything that one could hold; `more` is done to it."""
    state_dir.mkdir(mode=0o700, exist_ok=True)
    path = state_dir / "journal.db"
    rows: list[tuple[str, Iterable[tuple[object, ...]]]] = [
        ("INSERT INTO vm VALUES (?, ?, ?, ?, ?)", map(old_vm, (VM, ADOPTED))),
        (f"INSERT INTO device VALUES ({', '.join('?' * 12)})", map(old_device, DEVICES)),
        ("INSERT INTO attachment VALUES (?, ?, ?, ?, ?, ?)", map(old_hold, HOLDS)),
    ]
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(VERSION_1)
        for statement, values in rows:
            db.executemany(statement, values)
        for statement in (*more, "PRAGMA user_version = 1"):
            db.execute(statement)
        db.commit()
    return path


VERSION_2 = """
ALTER TABLE device ADD COLUMN guest TEXT;
UPDATE device SET guest = json_patch('{}', json_object(
    'pci_path', pci_path, 'scsi_address', scsi_address)) WHERE place IS NOT NULL;
ALTER TABLE device DROP COLUMN pci_path;
ALTER TABLE device DROP COLUMN scsi_address;
ALTER TABLE attachment RENAME COLUMN container_path TO name;
PRAGMA user_version = 2;
"""
VERSION_3 = """
CREATE TABLE binding (
    bdf TEXT PRIMARY KEY,
    driver TEXT,
    driver_override TEXT,
    state TEXT NOT NULL,
    device TEXT,
    boot_id TEXT NOT NULL
) STRICT;
INSERT INTO binding VALUES ('0000:3b:00.0', 'nvme', NULL, 'bound', NULL, 'a boot');
PRAGMA user_version = 3;
"""
VERSION_4 = """
ALTER TABLE vm ADD COLUMN boot_id TEXT;
ALTER TABLE device ADD COLUMN worker TEXT;
ALTER TABLE device ADD COLUMN parts TEXT;
PRAGMA user_version = 4;
"""
VERSION_5 = """
ALTER TABLE device ADD COLUMN thing TEXT;
PRAGMA user_version = 5;
"""
VERSION_6 = """
CREATE TABLE vf_token (
    bdf TEXT PRIMARY KEY,
    device TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    token TEXT NOT NULL
) STRICT;
ALTER TABLE vm ADD COLUMN worker TEXT;
PRAGMA user_version = 6;
"""
VERSION_7 = """
CREATE TABLE journal (id TEXT NOT NULL) STRICT;
INSERT INTO journal VALUES ('0a1b2c');
PRAGMA user_version = 7;
"""
VERSION_8 = """
ALTER TABLE binding ADD COLUMN thing TEXT;
PRAGMA user_version = 8;
"""
VERSION_9 = """
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
PRAGMA user_version = 9;
"""
VERSION_10 = """
ALTER TABLE device ADD COLUMN files TEXT;
PRAGMA user_version = 10;
"""
LATER = (
    *(VERSION_2, VERSION_3, VERSION_4, VERSION_5, VERSION_6, VERSION_7, VERSION_8, VERSION_9),
    VERSION_10,
)
"""What later vmplugs made of a journal of version 1; the third wrote down what it had bound."""


def write_version(version: int, state_dir: Path) -> Path:
    """A journal as the vmplug of that version left it."""
    path = write_version_1(state_dir)
    with closing(sqlite3.connect(path)) as db:
        for script in LATER[: version - 1]:
            db.executescript(script)
    return path


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def tables_of(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every column of every table in its order, with its type, and what must be unique."""
    with closing(sqlite3.connect(path)) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_schema ORDER BY name")]
        return {
            name: [
                *db.execute(f"PRAGMA table_xinfo('{name}')").fetchall(),
                *db.execute(f"PRAGMA index_xinfo('{name}')").fetchall(),
                *db.execute(f"PRAGMA foreign_key_list('{name}')").fetchall(),
            ]
            for name in names
        }


def test_the_page_and_its_example_have_the_version() -> None:
    page = Path("docs/restart.md").read_text()
    assert f"`user_version`, now {VERSION})" in page
    assert f"version 1 to {VERSION - 1} is" in page
    assert f"has version {VERSION + 1}; this vmplug supports version {VERSION}" in page
    assert f"user_version = {VERSION + 1}'" in Path("tests/docs/scenes.sh").read_text()


@pytest.mark.parametrize("version", range(1, VERSION))
def test_migration_keeps_every_row_of_an_older_journal(tmp_path: Path, version: int) -> None:
    path = write_version(version, tmp_path)
    with Journal.open(tmp_path) as store:
        assert store.vms() == [VM, ADOPTED]
        assert store.devices("vm-1") + store.devices("vm-2") == [
            *(device for device in DEVICES if device.vm == "vm-1"),
            *(device for device in DEVICES if device.vm == "vm-2"),
        ]
        assert store.attachments() == HOLDS
        bound = [(str(b.bdf), b.thing) for b in store.bindings.all()]
        assert bound == [("0000:3b:00.0", None)] * (version >= 3)
        for device in store.devices("vm-1"):
            assert (device.in_progress_by, device.parts, device.thing) == (None, (), None)
            assert device.files is None
            assert not device.is_other("anything")
    assert version_of(path) == VERSION
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []


@pytest.mark.parametrize("version", range(1, VERSION))
def test_a_migrated_journal_has_the_tables_of_a_new_one(tmp_path: Path, version: int) -> None:
    (tmp_path / "new").mkdir(mode=0o700)
    path = write_version(version, tmp_path)
    for state_dir in (tmp_path, tmp_path / "new"):
        Journal.open(state_dir).close()
    assert tables_of(path) == tables_of(tmp_path / "new" / "journal.db")


def test_a_migrated_journal_gets_an_id_and_knows_its_old_devices_by_their_rows(
    tmp_path: Path,
) -> None:
    write_version(6, tmp_path / "a")
    write_version(6, tmp_path / "b")
    with Journal.open(tmp_path / "a") as one, Journal.open(tmp_path / "b") as another:
        assert one.id != another.id
        assert one.find_foreign([*one.device_ids(), new_id(one.id)]) == set()
        assert one.find_foreign([strange := new_id(another.id), "old"]) == {strange, "old"}
        drawn = one.id
    with Journal.open(tmp_path / "a") as again:
        assert again.id == drawn


def test_a_migrated_journal_is_written_to_like_a_new_one(tmp_path: Path) -> None:
    write_version_1(tmp_path)
    with Journal.open(tmp_path) as store:
        before = journal_rows(tmp_path)
        again = replace(HOLDS[0], id="another id", count=1)
        (counted,) = store.set_state([], State.ATTACHED, [again])
        assert (counted.id, counted.count) == (HOLDS[0].id, HOLDS[0].count + 1)
        with pytest.raises(StoreError):
            store.add_devices(
                [replace(DISK, id="e5", identity=Identity.parse("file:/srv/c.img"))], []
            )
        store.add_devices(
            [replace(DISK, id="e5", identity=Identity.parse("file:/c"), place="rp1/00")], []
        )
        store.forget_devices(["e5", DISK.id])
        assert [held.device_id for held in store.attachments()] == [
            held.device_id for held in HOLDS if held.device_id != DISK.id
        ]
    rows = journal_rows(tmp_path)
    assert rows["device"] == before["device"][1:]
    assert rows["vm"] == before["vm"]


def test_an_up_to_date_journal_is_not_written_to_when_it_is_opened(tmp_path: Path) -> None:
    write_version_1(tmp_path)
    Journal.open(tmp_path).close()
    path = tmp_path / "journal.db"
    before = path.read_bytes()
    Journal.open(tmp_path).close()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "obstacle",
    [
        "CREATE INDEX theirs ON device (scsi_address)",
        "CREATE VIEW theirs AS SELECT pci_path FROM device",
        "ALTER TABLE device ADD COLUMN guest TEXT",
        "ALTER TABLE attachment ADD COLUMN name TEXT",
    ],
)
def test_a_failed_migration_leaves_the_journal_untouched(tmp_path: Path, obstacle: str) -> None:
    path = write_version_1(tmp_path, obstacle)
    rows, tables = journal_rows(tmp_path), tables_of(path)
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            Journal.open(tmp_path)
        assert caught.value.path == str(path)
        assert caught.value.hint
        assert (journal_rows(tmp_path), tables_of(path), version_of(path)) == (rows, tables, 1)


def test_a_journal_that_is_being_written_to_is_migrated_when_it_is_free(tmp_path: Path) -> None:
    """A vmplug of the old version may be in the middle of something."""
    path = write_version_1(tmp_path)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM vm WHERE name = 'vm-2'")
        process = spawn(open_and_close, str(tmp_path))
        process.join(1)
        assert process.is_alive()
        assert version_of(path) == 1
        writer.execute("COMMIT")
        process.join(SOON_S)
    assert process.exitcode == 0
    with Journal.open(tmp_path) as store:
        assert store.vms() == [VM]
        assert store.attachments() == HOLDS


def open_and_close(state_dir: str) -> None:
    Journal.open(state_dir).close()


def test_processes_that_migrate_at_once_do_it_once(tmp_path: Path) -> None:
    write_version_1(tmp_path)
    start = APART.Barrier(PROCESSES)
    processes = [spawn(open_together, str(tmp_path), start) for _ in range(PROCESSES)]
    for process in processes:
        process.join(SOON_S)
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    with Journal.open(tmp_path) as store:
        assert store.attachments() == HOLDS


def open_together(state_dir: str, start: Barrier) -> None:
    start.wait(SOON_S)
    with Journal.open(state_dir) as store:
        assert store.attachments() == HOLDS
