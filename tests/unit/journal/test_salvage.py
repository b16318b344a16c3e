"""Damaged journals: told, left as they are, and set aside with nothing lost that can be read."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.contract.sandbox import Sandbox
from tests.contract.world import Rows, journal_rows
from tests.support.disks import disk_image
from tests.support.journal import JOURNAL_ID, attach_row, device_record
from tests.unit.journal.test_journal import DISK, hold
from tests.unit.journal.test_migration import write_version
from vmplug.address import Bdf
from vmplug.errors import StoreError
from vmplug.host.kind import Identity
from vmplug.host.pci.bind import FormerBinding
from vmplug.journal.bindings import Binding, BindingState
from vmplug.journal.database import VERSION
from vmplug.journal.journal import Journal
from vmplug.journal.records import VmRecord
from vmplug.journal.salvage import UNKNOWN_OWNER, check_journal, find_damage, set_aside
from vmplug.journal.state import State
from vmplug.leases.life import record_lease
from vmplug.manager.reconcile import RepairOutcome
from vmplug.manager.setup import Setup
from vmplug.vms.reconcile import reconcile_host

DEVICES = 120
PAGE = 4096

BINDING = Binding(
    former=FormerBinding(bdf=Bdf.parse("0000:3b:00.0"), driver="nvme", driver_override=None),
    state=BindingState.BOUND,
    device_id="0",
    boot_id="a boot",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with all that one can hold, on many pages, all of it in one file."""
    with Journal.open(tmp_path) as store:
        store.add_vm(VmRecord(name="vm-1", qmp_socket="/s", pid=1, started_at=2, is_ours=False))
        for index in range(DEVICES):
            device = replace(
                DISK, id=f"{index}", identity=Identity.parse(f"file:{index}"), place=f"{index}"
            )
            store.add_devices([device], [hold(device)])
        store.set_state([f"{index}" for index in range(DEVICES)], State.ATTACHED)
        store.bindings.put([BINDING])
    assert not list(tmp_path.glob("journal.db-*"))
    return tmp_path / "journal.db"


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3 * PAGE)


def overwritten(path: Path) -> None:
    """In the middle of the devices, which fill the last pages."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 4 * PAGE)
        file.write(b"\xa5" * (2 * PAGE))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def scribbled(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"scribble" * 8)


def without_index(path: Path) -> None:
    """An index over the ids of the holds that has lost all of its entries."""
    query = "SELECT rootpage FROM sqlite_schema WHERE name = 'sqlite_autoindex_attachment_1'"
    with closing(sqlite3.connect(path)) as db:
        page = db.execute(query).fetchone()[0]
    with path.open("r+b") as file:
        file.seek((page - 1) * PAGE)
        file.write(b"\x0a\0\0\0\0\x10\0\0")  # a leaf with no cell; sqlite.org/fileformat2.html


def senseless(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE device SET state = 'flying' WHERE id = '7'")
        db.commit()


def undecodable(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE device SET host_path = CAST(x'ff' AS TEXT) WHERE id = '7'")
        db.commit()


def bottomless(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE device SET options = ? WHERE id = '7'", ("[" * 100_000,))
        db.commit()


def infinite(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("""UPDATE device SET guest = '{"nvdimm_handle": 1e400}' WHERE id = '7'""")
        db.commit()


def without_holds(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP TABLE attachment")
        db.commit()


Damage = Callable[[Path], None]
ALL_LOST = (emptied, scribbled)
SENSELESS = (senseless, undecodable, bottomless, infinite)
SEEN_WHEN_READ = (truncated, overwritten, *ALL_LOST, *SENSELESS, without_holds)


def read_all(state_dir: Path) -> None:
    with Journal.open(state_dir) as store:
        store.vms()
        store.attachments()
        store.devices("vm-1")
        store.bindings.all()


@pytest.mark.parametrize("damage", SEEN_WHEN_READ)
def test_a_verb_reports_a_damaged_journal_with_a_remedy_and_changes_nothing(
    path: Path, damage: Damage
) -> None:
    damage(path)
    before = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        read_all(path.parent)
    assert caught.value.hint
    assert caught.value.hint.startswith("vmplug reconcile --set-aside")
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", [*SEEN_WHEN_READ, without_index])
def test_a_damaged_journal_is_kept_and_what_can_be_read_is_carried_over(
    path: Path, damage: Damage
) -> None:
    rows = journal_rows(path.parent)
    damage(path)
    before = path.read_bytes()
    with pytest.raises(StoreError):
        check_journal(str(path))
    assert path.read_bytes() == before

    salvage = set_aside(str(path.parent))

    assert salvage
    assert Path(salvage.kept_as).read_bytes() == before
    assert Path(salvage.kept_as).stat().st_mode & 0o777 == 0o600
    assert salvage.damage
    check_journal(str(path))
    read_all(path.parent)
    carried = journal_rows(path.parent)
    assert len(carried["attachment"]) == len(carried["device"])
    for table in ("vm", "device", "binding"):
        assert len(carried[table]) == salvage.carried[table]
        assert set(carried[table]) <= set(rows[table])
    if damage in ALL_LOST:
        assert not any(carried.values())
    else:
        assert carried["device"]
        assert is_whole(carried, rows) or salvage.lost
    assert {p.name for p in path.parent.iterdir() if not p.name.endswith(("-wal", "-shm"))} == {
        *("journal.db", "set-aside.lock", Path(salvage.kept_as).name)
    }
    assert set_aside(str(path.parent)) is None


def is_whole(carried: Rows, rows: Rows) -> bool:
    return all(sorted(map(repr, carried[t])) == sorted(map(repr, rows[t])) for t in rows)


@pytest.mark.parametrize(
    ("was", "is_now"),
    [
        (b"qmp_socket TEXT NOT", b"qmp_socket TEXT N\x9cT"),
        (b"CREATE TABLE vm", b"CREATE TA\x9cLE vm"),
        (b"CREATE TABLE device", b"CREATE TABLE d\x9cvice"),
        (b"host_path TEXT NOT NULL", b"host_path TEXT N\x8aT NULL"),
        (b"host_path TEXT NOT NULL", b"host_pate TEXT NOT NULL"),
        (b"name TEXT PRIMARY KEY", b"nome TEXT PRIMARY KEY"),
        (b"is_ours INTEGER", b"is_ouxs INTEGER"),
        (b"owner TEXT NOT", b"owxer TEXT NOT"),
    ],
)
def test_tables_whose_own_text_is_damaged_are_set_aside(
    path: Path, was: bytes, is_now: bytes
) -> None:
    data = path.read_bytes()
    assert was in data
    path.write_bytes(data.replace(was, is_now))
    with pytest.raises(StoreError, match="damaged"):
        reconcile_host(setup=Setup(state_dir=path.parent))
    salvage = set_aside(path.parent)
    assert salvage
    assert salvage.damage
    check_journal(str(path))
    read_all(path.parent)


def test_an_index_that_lies_loses_no_row(path: Path) -> None:
    rows = journal_rows(path.parent)
    without_index(path)
    salvage = set_aside(str(path.parent))
    assert salvage
    assert salvage.lost == []
    assert is_whole(journal_rows(path.parent), rows)


@pytest.mark.parametrize(
    "damage",
    ["DELETE FROM journal", "UPDATE journal SET id = 'x'", "INSERT INTO journal VALUES ('a')"],
)
def test_a_journal_without_one_id_is_damaged(path: Path, damage: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(damage)
    with pytest.raises(StoreError, match="is damaged"):
        Journal.open(path.parent)
    with pytest.raises(StoreError, match="not the id of a journal"):
        check_journal(str(path))
    salvage = set_aside(str(path.parent))
    assert salvage
    assert salvage.lost == []
    Journal.open(path.parent).close()


def test_rows_on_both_sides_of_what_was_overwritten_are_carried_over(path: Path) -> None:
    overwritten(path)
    salvage = set_aside(str(path.parent))
    assert salvage
    with Journal.open(path.parent) as store:
        ids = [int(device.id) for device in store.devices("vm-1")]
    assert (ids[0], ids[-1]) == (0, DEVICES - 1)
    assert DEVICES / 2 < len(ids) < DEVICES
    assert salvage.lost[0] == "rows of the table device: database disk image is malformed"


def test_a_malformed_row_is_reported_and_the_other_rows_are_kept(path: Path) -> None:
    senseless(path)
    salvage = set_aside(str(path.parent))
    assert salvage
    assert salvage.carried == {
        "vm": 1,
        "device": DEVICES - 1,
        "attachment": DEVICES - 1,
        "binding": 1,
    }
    assert len(salvage.lost) == 2
    assert salvage.lost[0] == "device 7 vm-1 file:7: 'flying' is not a valid State"
    assert salvage.lost[1].startswith("attachment ")


def test_devices_whose_holds_were_lost_can_still_be_listed_and_detached(path: Path) -> None:
    without_holds(path)
    salvage = set_aside(str(path.parent))
    assert salvage
    assert "the owner of /srv/a.img in VM vm-1" in salvage.lost
    with Journal.open(path.parent) as store:
        holds = store.attachments("vm-1")
    assert len(holds) == DEVICES
    assert {(hold.owner, hold.name) for hold in holds} == {(UNKNOWN_OWNER, "/srv/a.img")}


def test_a_claim_stays_when_the_journal_has_lost_where_its_vm_is(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("DELETE FROM vm")
        db.execute("UPDATE device SET state = 'flying' WHERE id = '7'")
        db.commit()
    salvage = set_aside(str(path.parent))
    assert salvage
    assert salvage.lost[-1] == "the socket of VM vm-1: run vmplug vm adopt vm-1 --qmp SOCKET"
    with Journal.open(path.parent) as store:
        assert len(store.find_claims("vm-2", Identity.parse("file:8"), [])) == 1


@pytest.mark.parametrize("damage", ["DELETE FROM vm", "UPDATE vm SET qmp_socket = '/s'"])
def test_a_lease_whose_process_was_lost_has_ended_unless_somebody_uses_it(
    tmp_path: Path, damage: str
) -> None:
    setup = Setup(state_dir=tmp_path / "state")
    with Journal.open(setup.state_dir) as journal:
        journal.add_vm(replace(record_lease("job", journal), starting_by=None, pid=1))
        for name in ("a.img", "b.img"):
            image = disk_image(tmp_path / name, 1, name)
            attach_row(journal, device_record(f"file:{image}", str(image), vm="lease:job"))
    with closing(sqlite3.connect(journal.path)) as db, db:
        db.execute(damage)
        db.execute("UPDATE device SET state = 'flying' WHERE host_path LIKE '%b.img'")
    told = reconcile_host(set_aside=True, setup=setup)
    assert told.salvage
    assert told.salvage.lost[-1].startswith("the process of lease job: ")
    assert [(one.vm, one.repair.outcome) for one in told.repairs] == [
        ("lease:job", RepairOutcome.FORGOTTEN)
    ]


def test_commits_that_are_only_in_the_wal_are_carried_over(path: Path) -> None:
    """A process that was killed leaves the last transactions in the log beside the file."""
    late = replace(DISK, id="late", identity=Identity.parse("file:late"), place="late")
    with Journal.open(path.parent) as writer:
        writer.add_devices([late], [hold(late)])
        before = {p.name: p.read_bytes() for p in path.parent.glob("journal.db*")}
    for name, content in before.items():
        (path.parent / name).write_bytes(content)
    assert "journal.db-wal" in before
    overwritten(path)
    salvage = set_aside(str(path.parent))
    assert salvage
    assert Path(f"{salvage.kept_as}-wal").exists()
    with Journal.open(path.parent) as store:
        assert len(store.find_claims("vm-2", Identity.parse("file:late"), [])) == 1


_KILLED = """
import os, signal, sys
from vmplug.journal.salvage import set_aside

left = int(sys.argv[2])

def kill(event, arguments):
    global left
    if event in {"os.rename", "os.remove", "os.rmdir"} and "journal.db" in str(arguments):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
set_aside(sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_sets_a_journal_aside_loses_no_row(
    tmp_path: Path,
) -> None:
    """The last commits, and the damage, are in the WAL alone: without that the rest is sound."""
    made, state_dir = tmp_path / "made", tmp_path / "state"
    Journal.open(made).close()
    with Journal.open(made) as store, closing(sqlite3.connect(made / "journal.db")) as db:
        for name in ("vm-1", "vm-2"):
            store.add_vm(
                VmRecord(name=name, qmp_socket=f"/{name}", pid=1, started_at=2, is_ours=False)
            )
        db.execute("UPDATE journal SET id = 'no id'")
        db.commit()
        os.sync()
        kept = {file.name: file.read_bytes() for file in made.glob("journal.db*")}
    for step in count():
        shutil.rmtree(state_dir, ignore_errors=True)
        state_dir.mkdir(mode=0o700)
        for name, data in kept.items():
            (state_dir / name).write_bytes(data)
        command = [sys.executable, "-c", _KILLED, str(state_dir), str(step)]
        status = subprocess.run(command, check=False).returncode
        if status == 0:
            break
        assert status == -signal.SIGKILL
        try:
            names = read_names(state_dir)
        except StoreError as error:
            assert "damaged" in error.message  # noqa: PT017  either is right
            set_aside(state_dir)
            names = read_names(state_dir)
        assert (names, step) == (["vm-1", "vm-2"], step)
        assert find_damage(str(state_dir / "journal.db")) is None
    assert step > 4
    assert read_names(state_dir) == ["vm-1", "vm-2"]


def test_who_has_a_journal_open_writes_no_more_to_it_when_another_is_ready(path: Path) -> None:
    with Journal.open(path.parent) as store:
        shutil.copy(path, f"{path}.ready")
        with pytest.raises(StoreError, match="another journal has been put in place"):
            store.forget_vm("vm-1")
    assert read_names(path.parent) == ["vm-1"]
    assert not Path(f"{path}.ready").exists()


def read_names(state_dir: Path) -> list[str]:
    with Journal.open(state_dir) as store:
        return [vm.name for vm in store.vms()]


def test_a_damaged_journal_of_an_older_version_is_carried_over_too(tmp_path: Path) -> None:
    path = write_version(2, tmp_path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE device SET kind = 'nonsense' WHERE vm = 'vm-2'")
        db.execute("DELETE FROM device WHERE vm = 'vm-1' AND place IS NULL")  # not its holds
        db.commit()
    salvage = set_aside(str(tmp_path))
    assert salvage
    assert salvage.carried["vm"] == 2
    with Journal.open(tmp_path) as store:
        assert len(store.devices("vm-1")) == 2


def test_a_newer_journal_is_not_damaged(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    before = path.read_bytes()
    message = f"(?m)^{path} has version {VERSION + 1}; this vmplug supports version {VERSION}$"
    with pytest.raises(StoreError, match=message):
        set_aside(str(path.parent))
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*damaged*"))


def test_a_sound_journal_is_left_where_it_is(path: Path) -> None:
    before = path.read_bytes()
    assert set_aside(str(path.parent)) is None
    check_journal(str(path))
    assert path.read_bytes() == before


def test_devices_that_the_journal_lost_are_reported_and_stay_in_the_guest(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    attachment = sandbox.devices.attach(sandbox.disk())
    sandbox.close()
    assert attachment.device_id.startswith(JOURNAL_ID)
    emptied(sandbox.state_dir / "journal.db")
    assert set_aside(str(sandbox.state_dir))
    parts = sandbox.side.parts()
    (repair,) = sandbox.devices.reconcile()
    assert repair.device_id == attachment.device_id
    assert repair.outcome is RepairOutcome.ANOTHER_JOURNAL
    assert not repair.is_gone
    assert sandbox.side.parts() == parts
    (repair,) = sandbox.devices.reconcile(take_over=True)
    assert repair.outcome is RepairOutcome.REMOVED
    assert not sandbox.vmplugs()
    sandbox.close()


def test_a_process_that_has_the_old_journal_open_writes_no_more_to_it(path: Path) -> None:
    """VMs in two journals would get one disk."""
    with Journal.open(path.parent) as open_before:
        known = open_before.vms()[0]
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE device SET state = 'flying'")
        assert set_aside(path.parent)
        with Journal.open(path.parent) as opened_after:
            before = [vm.name for vm in opened_after.vms()]
            for use in (
                lambda: open_before.add_vm(replace(known, name="new", qmp_socket="/new")),
                open_before.vms,
                open_before.bindings.all,
            ):
                with pytest.raises(StoreError, match="another journal has been put in place of"):
                    use()
            assert [vm.name for vm in opened_after.vms()] == before


def test_a_journal_is_not_replaced_in_the_middle_of_a_transaction(path: Path) -> None:
    with Journal.open(path.parent) as journal:
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE device SET state = 'flying'")
        replaced = threading.Thread(target=set_aside, args=[path.parent])
        with journal._lock:
            replaced.start()
            replaced.join(0.05)
            assert replaced.is_alive()
            assert journal.vms()
        replaced.join()
        with pytest.raises(StoreError):
            journal.vms()
