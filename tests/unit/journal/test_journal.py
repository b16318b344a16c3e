"""The journal: what is written comes back whole, whoever else writes and whoever dies."""

import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.contract.world import journal_rows
from tests.support.journal import in_progress
from vmplug.address import PciPath, ScsiAddress
from vmplug.drivers.place import GuestAddress
from vmplug.errors import StateError, StoreError
from vmplug.host.kind import DeviceType, Identity
from vmplug.host.use.claim import Claim
from vmplug.journal.database import VERSION, Transaction
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, DeviceRecord, HeldFile, VmRecord
from vmplug.journal.state import FOLLOWS, State, check_step

PROCESSES, SOON_S = 4, 120
EACH = 25

DISK = DeviceRecord(
    id="00000000000000a1",
    vm="vm-1",
    identity=Identity.parse("file:/srv/a.img"),
    kind=DeviceType.BLOCK,
    host_path="/srv/a.img",
    state=State.PLUGGING,
    read_only=False,
    share_rw=True,
    options={"cache": "none", "serial": "Grüße, 100 % \u2028 '\""},
    place="rp0/00",
    guest_address=GuestAddress(pci_path=PciPath.parse("10/00.3")),
)
SCSI_DISK = replace(
    DISK,
    id="00000000000000b2",
    identity=Identity.parse("block:8:16"),
    host_path="/dev/sdb",
    read_only=True,
    share_rw=False,
    options={},
    place="scsi0.0/1:2",
    guest_address=GuestAddress(pci_path=PciPath.parse("05"), scsi_address=ScsiAddress(1, 2)),
)
HIDDEN_SCSI_DISK = replace(
    SCSI_DISK, place="scsi1.0/0:0", guest_address=GuestAddress(scsi_address=ScsiAddress(0, 0))
)
COUNTED = replace(
    DISK,
    id="00000000000000c3",
    identity=Identity.parse("char:1:3"),
    kind=DeviceType.GENERIC,
    host_path="/dev/null",
    options={},
    place=None,
    guest_address=None,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(tmp_path) as opened:
        yield opened


def hold(device: DeviceRecord, owner: str = "c1", path: str = "/dev/x") -> Attachment:
    """A hold whose id says whose it is."""
    return Attachment(
        id=f"{device.id}-{owner}-{path}",
        vm=device.vm,
        owner=owner,
        name=path,
        host_path=device.host_path,
        kind=device.kind,
        read_only=device.read_only,
        count=1,
        state=device.state,
        guest_address=device.guest_address,
        device_id=device.id,
        options=device.options,
    )


# what comes back


@pytest.mark.parametrize(
    "device",
    [
        *(DISK, SCSI_DISK, HIDDEN_SCSI_DISK, COUNTED),
        *[replace(DISK, kind=kind) for kind in DeviceType],
    ],
    ids=["virtio", "scsi", "hidden scsi", "counted", *DeviceType],
)
def test_a_device_comes_back_as_it_was_written(tmp_path: Path, device: DeviceRecord) -> None:
    with Journal.open(tmp_path) as store:
        assert store.add_devices([device], [hold(device)]) == [hold(device)]
    with Journal.open(tmp_path) as store:
        assert store.devices("vm-1") == [in_progress(device, store)]
        assert store.attachments("vm-1") == [hold(device)]


def test_everything_comes_in_the_order_it_was_written(store: Journal) -> None:
    devices = [
        replace(DISK, id=f"{9 - i}", identity=Identity.parse(f"file:{i}"), place=f"{i}")
        for i in range(5)
    ]
    store.add_devices(devices, [hold(device) for device in reversed(devices)])
    assert store.devices("vm-1") == [in_progress(device, store) for device in devices]
    assert store.attachments() == [hold(device) for device in reversed(devices)]


def test_vms_are_apart(store: Journal) -> None:
    theirs = replace(DISK, id="d4", vm="vm-2")
    store.add_devices([DISK], [hold(DISK)])
    store.add_devices([theirs], [hold(theirs)])
    assert store.devices("vm-2") == [in_progress(theirs, store)]
    assert store.attachments("vm-1") == [hold(DISK)]
    assert store.attachments() == [hold(DISK), hold(theirs)]
    assert store.devices("vm-3") == []
    assert store.attachments("vm-3") == []


def test_vms_come_back_by_name(tmp_path: Path) -> None:
    one = VmRecord(name="b", qmp_socket="/b", pid=None, started_at=None, is_ours=False)
    other = VmRecord(
        name="a", qmp_socket="/ä b/vm/a/qmp.sock", pid=2**22, started_at=2**40, is_ours=True
    )
    with Journal.open(tmp_path) as store:
        for vm in (one, other):
            store.add_vm(vm)
        store.set_process("b", 7, 9)
    with Journal.open(tmp_path) as store:
        assert store.vms() == [other, replace(one, pid=7, started_at=9)]
        assert store.find_vm("a") == other
        assert store.find_vm("c") is None


@pytest.mark.parametrize(
    ("name", "qmp_socket"), [("b", "/new"), ("c", "/vm/b/qmp.sock"), ("b", "/b")]
)
def test_a_vm_is_known_once_by_its_name_and_by_its_socket(
    store: Journal, name: str, qmp_socket: str
) -> None:
    known = VmRecord(name="b", qmp_socket="/vm/b/qmp.sock", pid=1, started_at=2, is_ours=True)
    store.add_vm(known)
    with pytest.raises(StateError, match="already in the journal"):
        store.add_vm(replace(known, name=name, qmp_socket=qmp_socket))
    assert store.vms() == [known]


def test_a_forgotten_vm_takes_its_devices_and_holds_with_it(
    store: Journal, tmp_path: Path
) -> None:
    theirs = replace(DISK, id="d4", vm="vm-2")
    store.add_vm(
        VmRecord(name="vm-1", qmp_socket="/vm/vm-1/qmp.sock", pid=1, started_at=2, is_ours=True)
    )
    store.add_devices([DISK, theirs], [hold(DISK), hold(theirs)])
    store.forget_vm("vm-1")
    assert store.vms() == []
    assert store.devices("vm-1") == []
    assert store.attachments() == [hold(theirs)]
    assert len(journal_rows(tmp_path)["attachment"]) == 1


# holds


def test_the_same_hold_again_counts_and_keeps_its_id(store: Journal) -> None:
    store.add_devices([DISK], [hold(DISK)])
    again = replace(hold(DISK), id="another id")
    assert store.set_state([DISK.id], State.ATTACHED, [again]) == [replace(hold(DISK), count=2)]
    (found,) = store.attachments()
    assert (found.id, found.count, found.state) == (hold(DISK).id, 2, State.ATTACHED)


def test_a_count_that_can_go_no_further_is_refused_and_stays(store: Journal) -> None:
    most = replace(hold(DISK), count=(1 << 63) - 1)
    store.add_devices([DISK], [most])
    with pytest.raises(StoreError):
        store.set_state([DISK.id], State.ATTACHED, [hold(DISK)])
    assert store.attachments() == [most]


def test_owners_and_paths_make_holds_of_their_own(store: Journal) -> None:
    holds = [hold(DISK), hold(DISK, "c2"), hold(DISK, "c1", "/dev/y")]
    store.add_devices([DISK], holds)
    assert store.attachments() == holds


@pytest.mark.parametrize(
    ("counts", "released", "whole", "left", "last"),
    [
        ({"c1": 2}, ["c1"], False, {"c1": 1}, False),
        ({"c1": 2}, ["c1"], True, {"c1": 2}, True),
        ({"c1": 1}, ["c1"], False, {"c1": 1}, True),
        ({"c1": 1, "c2": 1}, ["c1"], False, {"c2": 1}, False),
        ({"c1": 3, "c2": 1}, ["c1"], True, {"c2": 1}, False),
        ({"c1": 3, "c2": 1}, ["c1"], False, {"c1": 2, "c2": 1}, False),
        ({"c1": 1, "c2": 1}, ["c1", "c2"], False, {"c2": 1}, True),
        ({"c1": 2, "c2": 2}, ["c1", "c2"], True, {"c2": 2}, True),
        ({"c1": 2}, ["c1", "c1"], False, {"c1": 1}, True),
        ({"c1": 1}, ["nobody"], True, {"c1": 1}, False),
        ({"c1": 1}, [], True, {"c1": 1}, False),
    ],
)
def test_the_last_hold_stays_until_the_device_is_gone(
    store: Journal,
    counts: dict[str, int],
    released: list[str],
    left: dict[str, int],
    *,
    whole: bool,
    last: bool,
) -> None:
    holds = [hold(DISK, owner) for owner, count in counts.items() for _ in range(count)]
    store.add_devices([DISK], holds)
    store.set_state([DISK.id], State.ATTACHED)
    ids = [hold(DISK, owner).id for owner in released]
    assert set(store.release(ids, whole=whole)) == ({DISK.id} if last else set())
    assert {a.owner: a.count for a in store.attachments()} == left


def test_forgetting_a_device_forgets_its_holds_and_frees_its_place(store: Journal) -> None:
    store.add_devices([DISK], [hold(DISK), hold(DISK, "c2")])
    store.forget_devices([DISK.id])
    assert store.attachments() == []
    store.add_devices([replace(DISK, id="e5")], [])


def test_forgetting_what_somebody_else_forgot_is_no_error(store: Journal) -> None:
    store.forget_devices(["nope"])
    store.forget_devices([])


# what may not be


@pytest.mark.parametrize(
    "second",
    [
        replace(DISK, id="e5", place="rp1/00"),
        replace(DISK, id="e5", identity=Identity.parse("file:/srv/b.img")),
        replace(SCSI_DISK, id=DISK.id),
    ],
    ids=["device", "place", "id"],
)
def test_nothing_is_given_away_twice(store: Journal, tmp_path: Path, second: DeviceRecord) -> None:
    store.add_devices([DISK], [hold(DISK)])
    before = journal_rows(tmp_path)
    with pytest.raises(StoreError):
        store.add_devices([COUNTED, second], [hold(COUNTED)])
    assert journal_rows(tmp_path) == before


def test_devices_without_a_place_do_not_collide(store: Journal) -> None:
    other = replace(COUNTED, id="e5", identity=Identity.parse("char:1:5"))
    store.add_devices([COUNTED, other], [])
    assert store.devices("vm-1") == [in_progress(COUNTED, store), in_progress(other, store)]


def test_a_hold_needs_a_device(store: Journal, tmp_path: Path) -> None:
    before = journal_rows(tmp_path)
    with pytest.raises(StoreError):
        store.add_devices([DISK], [hold(DISK), hold(SCSI_DISK)])
    assert journal_rows(tmp_path) == before


# claims


@pytest.mark.parametrize(
    ("vm", "own", "related", "claimants"),
    [
        ("vm-1", "file:/srv/a.img", [], ["vm-2"]),
        ("vm-2", "file:/srv/a.img", [], ["vm-1"]),
        ("vm-3", "file:/srv/a.img", [], ["vm-1", "vm-2"]),
        (None, "file:/srv/a.img", [], ["vm-1", "vm-2"]),
        ("vm-1", "block:7:0", ["file:/srv/a.img"], ["vm-1", "vm-2"]),
        ("vm-1", "file:/srv/a.img", ["block:8:16"], ["vm-2", "vm-2"]),
        ("vm-1", "file:/srv/b.img", [], []),
    ],
)
def test_claims_include_devices_of_other_vms_and_devices_with_the_same_bytes(
    store: Journal, vm: str | None, own: str, related: list[str], claimants: list[str]
) -> None:
    theirs = replace(DISK, id="e5", vm="vm-2")
    sdb = replace(SCSI_DISK, vm="vm-2")
    store.add_devices([DISK, theirs, sdb], [])
    wanted = map(Identity.parse, related)
    found = store.find_claims(vm, Identity.parse(own), wanted)
    assert [claim.vm for claim in found] == claimants


def test_a_claim_says_how_the_device_is_held(store: Journal) -> None:
    store.add_devices([DISK], [])
    assert store.find_claims("vm-2", DISK.identity, []) == [
        Claim(vm="vm-1", identity=DISK.identity, read_only=False, share_rw=True)
    ]


# what may follow what

STATES: list[State | None] = [None, *State]
ALLOWED = {
    (None, State.PLUGGING),
    (None, State.ATTACHED),
    (State.PLUGGING, State.ATTACHED),
    (State.PLUGGING, State.DETACHING),
    (State.PLUGGING, State.RETAINED),
    (State.PLUGGING, None),
    (State.ATTACHED, State.DETACHING),
    (State.ATTACHED, State.RETAINED),
    (State.ATTACHED, None),
    (State.DETACHING, State.DETACHING),
    (State.DETACHING, State.ATTACHED),
    (State.DETACHING, State.RETAINED),
    (State.DETACHING, None),
    (State.RETAINED, State.ATTACHED),
    (State.RETAINED, None),
}


def test_the_table_knows_every_state() -> None:
    assert FOLLOWS.keys() == set(STATES)
    assert {(a, b) for a, following in FOLLOWS.items() for b in following} == ALLOWED


@pytest.mark.parametrize("wanted", STATES, ids=str)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_only_steps_of_the_table_are_taken(state: State | None, wanted: State | None) -> None:
    if (state, wanted) in ALLOWED:
        check_step("disk", state, wanted)
        return
    with pytest.raises(StateError) as caught:
        check_step("disk", state, wanted)
    assert caught.value.message == (
        f"disk is {state or 'absent'} and cannot become {wanted or 'absent'}"
    )
    assert caught.value.state == (state or "absent")
    required = {str(a or "absent") for a, b in ALLOWED if b == wanted}
    assert set(caught.value.required.split(" or ")) == required


def device_in(store: Journal, state: State | None) -> None:
    if state is not None:
        store.add_devices([DISK], [hold(DISK)])
    if state not in {None, State.PLUGGING}:
        store.set_state([DISK.id], state)


@pytest.mark.parametrize("wanted", State)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_the_store_takes_only_steps_of_the_table(
    store: Journal, tmp_path: Path, state: State | None, wanted: State
) -> None:
    """A device that is not there cannot be moved, only added."""
    device_in(store, state)
    store.add_devices([COUNTED], [])
    before = journal_rows(tmp_path)
    if state is not None and (state, wanted) in ALLOWED:
        assert store.set_state([DISK.id], wanted) == []
        assert [d.state for d in store.devices("vm-1")] == [wanted, State.PLUGGING]
        return
    moves = [COUNTED.id, DISK.id] if wanted is not State.PLUGGING else [DISK.id]
    with pytest.raises(StateError):
        store.set_state(moves, wanted, [hold(COUNTED)])
    assert journal_rows(tmp_path) == before


@pytest.mark.parametrize("state", [State.DETACHING, State.RETAINED])
def test_a_new_device_can_only_be_on_its_way_in_or_there(
    store: Journal, tmp_path: Path, state: State
) -> None:
    before = journal_rows(tmp_path)
    with pytest.raises(StateError):
        store.add_devices([COUNTED, replace(DISK, state=state)], [hold(COUNTED)])
    assert journal_rows(tmp_path) == before


# the file


def test_the_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "state"
    with Journal.open(directory) as store:
        assert store.path == str(directory / "journal.db")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_journal_survives_a_crash_of_the_machine_by_its_settings(tmp_path: Path) -> None:
    Journal.open(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with Journal.open(tmp_path) as store:  # a setting of the connection, not of the file
        full = 2
        assert store._db.execute("PRAGMA synchronous").fetchone()[0] == full


def test_giving_up_one_device_leaves_the_others_in_progress(store: Journal) -> None:
    """Two threads of a process plug at once, and one breaks off."""
    at_work = replace(DISK, id="d4", identity=Identity.parse("block:8:9"), place="elsewhere")
    store.add_devices([DISK, at_work], [])
    with pytest.raises(KeyboardInterrupt), store.in_progress([DISK.id]):
        raise KeyboardInterrupt
    in_progress = {record.id: record.in_progress_by for record in store.devices(DISK.vm)}
    assert in_progress == {DISK.id: None, "d4": store.worker}


@pytest.mark.parametrize("newer", [VERSION + 1, 99])
def test_a_journal_of_a_newer_version_is_refused_and_kept(tmp_path: Path, newer: int) -> None:
    with Journal.open(tmp_path) as store:
        store.add_devices([DISK], [hold(DISK)])
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        db.execute(f"PRAGMA user_version = {newer}")
        db.execute("ALTER TABLE device ADD COLUMN novelty TEXT")
        db.commit()
    before = journal_rows(tmp_path)
    message = f"(?m)has version {newer}; this vmplug supports version {VERSION}$"  # then the hint
    with pytest.raises(StoreError, match=message) as caught:
        Journal.open(tmp_path)
    assert caught.value.path == str(tmp_path / "journal.db")
    assert caught.value.hint
    assert journal_rows(tmp_path) == before
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (newer,)


@pytest.mark.parametrize(
    "garbage", [b"not a database " * 100, b"SQLite format 3\0" + b"\xff" * 600]
)
def test_a_damaged_journal_is_refused_and_kept(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(garbage)
    with pytest.raises(StoreError, match=r"the journal .*journal\.db is damaged") as caught:
        Journal.open(tmp_path)
    assert caught.value.hint
    assert "reconcile --set-aside" in caught.value.hint
    assert path.read_bytes() == garbage


def test_reading_a_journal_that_is_damaged_inside_is_an_error(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as store:
        for index in range(200):
            device = replace(
                DISK, id=f"{index}", identity=Identity.parse(f"file:{index}"), place=f"{index}"
            )
            store.add_devices([device], [hold(device)])
    path = tmp_path / "journal.db"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xa5" * (size // 4))
    with pytest.raises(StoreError) as caught:
        read_all(tmp_path)
    assert caught.value.hint


def read_all(state_dir: Path) -> None:
    with Journal.open(state_dir) as store:
        store.attachments()
        store.devices("vm-1")


def test_an_empty_file_is_not_a_journal_and_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "journal.db").touch()
    with pytest.raises(StoreError, match="is not a journal of vmplug"):
        Journal.open(tmp_path)
    assert (tmp_path / "journal.db").stat().st_size == 0


@pytest.mark.parametrize(
    "blocked",
    [
        pytest.param(lambda tmp_path: tmp_path / "file" / "state", id="below a file"),
        pytest.param(lambda _: Path("/proc/vmplug"), id="in proc"),
        pytest.param(lambda tmp_path: tmp_path / "taken", id="on a directory"),
    ],
)
def test_an_unwritable_directory_is_an_error(
    tmp_path: Path, blocked: Callable[[Path], Path]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "journal.db").mkdir(parents=True)
    with pytest.raises(StoreError) as caught:
        Journal.open(blocked(tmp_path))
    assert caught.value.hint
    assert "--state-dir" in caught.value.hint


@pytest.mark.root
def test_a_directory_of_another_user_is_an_error(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as store:
        store.add_devices([DISK], [])
    before = journal_rows(tmp_path)
    process = spawn(open_as_nobody, str(tmp_path))
    process.join(SOON_S)
    assert process.exitcode == 0
    assert journal_rows(tmp_path) == before


def open_as_nobody(state_dir: str) -> None:
    """In a process of its own: what root may do, nobody may not."""
    os.setresuid(65534, 65534, 65534)
    with pytest.raises(StoreError) as caught:
        Journal.open(state_dir)
    assert "root" in (caught.value.hint or "")


# others that write


APART = multiprocessing.get_context("forkserver")
"""Processes with nothing of this one, which begin where the modules of the tests are loaded."""
APART.set_forkserver_preload(
    ["tests.unit.journal.test_journal", "tests.unit.journal.test_migration"]
)


def spawn(function: Callable[..., None], *arguments: object) -> BaseProcess:
    process = APART.Process(target=function, args=arguments)
    process.start()
    return process


def add_many(state_dir: str, index: int, start: Barrier) -> None:
    """What each of several processes does: devices of its own, and a hold on the common one."""
    start.wait(SOON_S)
    with Journal.open(state_dir) as store:
        start.wait(SOON_S)
        for number in range(EACH):
            name = f"{index}-{number}"
            device = replace(DISK, id=name, identity=Identity.parse(f"file:{name}"), place=name)
            store.add_devices([device], [hold(device)])
            store.set_state([name], State.ATTACHED, [hold(COUNTED, "everybody")])
            if number % 2:
                store.set_state([name], State.DETACHING)
                store.forget_devices([name])


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "old"])
def test_processes_that_write_at_once_lose_nothing(tmp_path: Path, *, is_new: bool) -> None:
    if not is_new:
        Journal.open(tmp_path).close()
    start = APART.Barrier(PROCESSES + 1)
    processes = [spawn(add_many, str(tmp_path), index, start) for index in range(PROCESSES)]
    start.wait(SOON_S)  # from here on all open it
    with Journal.open(tmp_path) as store:
        store.add_devices([COUNTED], [])
        store.set_state([COUNTED.id], State.ATTACHED)
    start.wait(SOON_S)  # from here on all write
    for process in processes:
        process.join(SOON_S)
    assert [process.exitcode for process in processes] == [0] * PROCESSES

    with Journal.open(tmp_path) as store:
        devices = [d for d in store.devices("vm-1") if d.id != COUNTED.id]
        (common,) = [a for a in store.attachments() if a.owner == "everybody"]
    assert {d.id for d in devices} == {
        f"{index}-{number}" for index in range(PROCESSES) for number in range(0, EACH, 2)
    }
    assert {d.state for d in devices} == {State.ATTACHED}
    assert common.count == PROCESSES * EACH


def test_a_decision_made_before_another_device_came_is_not_written(
    store: Journal, tmp_path: Path
) -> None:
    known = store.device_ids()
    store.add_devices([COUNTED], [])
    before = journal_rows(tmp_path)
    assert store.add_devices([DISK], [hold(DISK)], known=known) is None
    assert journal_rows(tmp_path) == before


def test_a_device_of_another_vm_matters_only_if_the_decision_was_about_it(
    store: Journal, tmp_path: Path
) -> None:
    """Otherwise many VMs that get devices of their own would contradict each other for ever."""
    known = store.device_ids()
    theirs = replace(SCSI_DISK, vm="another")
    store.add_devices([theirs], [])
    before = journal_rows(tmp_path)
    for about in (None, {DISK.identity, theirs.identity}):
        assert store.add_devices([DISK], [hold(DISK)], known=known, about=about) is None
    assert journal_rows(tmp_path) == before
    about = {DISK.identity}
    assert store.add_devices([DISK], [hold(DISK)], known=known, about=about) == [hold(DISK)]
    top = Identity.parse("file:/srv/top.qcow2")
    base = HeldFile(Identity.parse("file:/srv/base.img"), None, only_read=True)
    known = store.device_ids()
    store.add_devices([replace(theirs, id="f6", identity=top, place="rp9", files=(base,))], [])
    assert store.add_devices([COUNTED], [], known=known, about={base.identity}) is None
    own = store.device_ids() - {DISK.id}  # it came to this VM, and may have taken the place
    assert store.add_devices([COUNTED], [], known=own, about={COUNTED.identity}) is None


def test_a_device_that_left_or_changed_state_does_not_contradict_a_new_one(store: Journal) -> None:
    store.add_devices([COUNTED, SCSI_DISK], [])
    known = store.device_ids()
    store.forget_devices([SCSI_DISK.id])
    store.set_state([COUNTED.id], State.ATTACHED)
    assert store.add_devices([DISK], [hold(DISK)], known=known) == [hold(DISK)]


@pytest.mark.parametrize("state", [State.PLUGGING, State.DETACHING, State.RETAINED, None], ids=str)
def test_a_device_that_left_meanwhile_gets_no_hold(
    store: Journal, tmp_path: Path, state: State | None
) -> None:
    device_in(store, state)
    store.add_devices([COUNTED], [])
    before = journal_rows(tmp_path)
    with pytest.raises(StateError, match=str(state) if state else "the journal has no device"):
        store.set_state([COUNTED.id], State.ATTACHED, [replace(hold(DISK), owner="late")])
    assert journal_rows(tmp_path) == before


@pytest.mark.parametrize("state", [State.ATTACHED, State.DETACHING])
def test_a_device_is_detaching_as_soon_as_its_last_hold_is_released(
    store: Journal, state: State
) -> None:
    store.add_devices([DISK], [hold(DISK)])
    store.set_state([DISK.id], State.ATTACHED)
    store.set_state([DISK.id] if state is State.DETACHING else [], State.DETACHING)
    assert store.release([hold(DISK).id], whole=False) == [DISK.id]
    assert [device.state for device in store.devices("vm-1")] == [State.DETACHING]
    with pytest.raises(StateError):
        store.set_state([], State.ATTACHED, [hold(DISK, "late")])


def test_threads_of_one_process_may_share_a_store(store: Journal) -> None:
    store.add_devices([COUNTED], [])

    def work(index: int) -> None:
        for number in range(EACH):
            name = f"{index}-{number}"
            device = replace(DISK, id=name, identity=Identity.parse(f"file:{name}"), place=name)
            store.add_devices([device], [hold(device), hold(COUNTED, "everybody")])
            store.attachments("vm-1")
            store.set_state([name], State.ATTACHED)

    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(work, range(PROCESSES)))
    assert len(store.devices("vm-1")) == PROCESSES * EACH + 1
    (common,) = [a for a in store.attachments() if a.owner == "everybody"]
    assert common.count == PROCESSES * EACH


def test_a_transaction_keeps_other_writers_out_from_its_beginning(store: Journal) -> None:
    with (
        Transaction(store._db, store._lock, store.path),
        closing(sqlite3.connect(store.path, timeout=0, isolation_level=None)) as other,
        pytest.raises(sqlite3.OperationalError, match="locked"),
    ):
        other.execute("BEGIN IMMEDIATE")


def test_a_reader_does_not_wait_for_a_writer(store: Journal, tmp_path: Path) -> None:
    store.add_devices([DISK], [hold(DISK)])
    with closing(sqlite3.connect(tmp_path / "journal.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM device")
        assert store.devices("vm-1") == [in_progress(DISK, store)]
        assert store.attachments() == [hold(DISK)]
        writer.execute("ROLLBACK")


WRITER = """
import sys
from msgspec.structs import replace
from vmplug.host.kind import Identity
from vmplug.journal.journal import Journal
from tests.unit.journal.test_journal import DISK, hold

store = Journal.open(sys.argv[1])
for number in range(100_000):
    identity = Identity.parse(f"file:{number}")
    device = replace(DISK, id=str(number), identity=identity, place=str(number))
    store.add_devices([device], [hold(device)])
    print(number, flush=True)
"""


def test_the_writes_of_a_killed_process_persist(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        assert writer.stdout
        told = [int(writer.stdout.readline()) for _ in range(50)]
        writer.send_signal(signal.SIGKILL)
        told += [int(line) for line in writer.stdout if line.endswith("\n")]
    with Journal.open(tmp_path) as store:
        written = [int(device.id) for device in store.devices("vm-1")]
        holds = store.attachments()
    assert written == list(range(len(written)))
    assert len(written) - len(told) in {0, 1}
    assert [a.device_id for a in holds] == [str(number) for number in written]
    with Journal.open(tmp_path) as store:
        store.forget_devices([str(number) for number in written])
        assert store.devices("vm-1") == []


def test_a_full_disk_is_an_error_and_the_journal_works_again_when_there_is_room(
    store: Journal, tmp_path: Path
) -> None:
    """SQLite itself takes the transaction back: there is nothing left to roll back."""
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    big = VmRecord(name="v" * 9000, qmp_socket="/v", pid=None, started_at=None, is_ours=False)
    before = journal_rows(tmp_path)
    for _ in range(2):
        with pytest.raises(StoreError, match="the disk is full") as caught:
            store.add_vm(big)
        assert "free space" in (caught.value.hint or "")
        assert journal_rows(tmp_path) == before
    store._db.execute(f"PRAGMA max_page_count = {pages + 100}")
    store.add_vm(big)
    assert store.vms() == [big]


def test_a_device_is_found_among_those_of_all_vms_by_an_index(store: Journal) -> None:
    asked = list[str]()
    store._db.set_trace_callback(asked.append)
    assert store.find_claims("vm-9", DISK.identity, ()) == []
    store._db.set_trace_callback(None)
    (query,) = [text for text in asked if "thing IN" in text]
    plan = [row["detail"] for row in store._db.execute(f"EXPLAIN QUERY PLAN {query}")]
    assert any("device_identity" in step for step in plan)
    assert "SCAN device" not in plan


def test_a_plan_gets_the_devices_it_is_about_and_the_tagged_shares(store: Journal) -> None:
    share = replace(
        DISK,
        id="ccc0000000000003",
        identity=Identity.of_share("work", "/srv/work"),
        kind=DeviceType.VHOST_USER_FS,
        place="rp9/00",
        guest_address=GuestAddress(mount_tag="work"),
    )
    other = replace(DISK, id="ccc0000000000004", identity=Identity.parse("block:7:9"), place="x")
    store.add_devices([DISK, share, other], [])
    for asked, found in (([DISK.identity], [DISK, share]), ([], [share])):
        assert store.devices_for(DISK.vm, asked) == [in_progress(one, store) for one in found]
    assert store.devices_for("vm-9", [DISK.identity]) == []
