"""Devices that another journal has in the VM stay there, until they are to be taken over."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.contract.sandbox import Breaking, Sandbox
from tests.support.daemons import vhost_user_backend
from tests.support.journal import JOURNAL_ID
from vmplug.drivers.ports import Command
from vmplug.errors import ProtocolError
from vmplug.journal.journal import Journal
from vmplug.journal.state import State
from vmplug.manager.reconcile import RepairOutcome
from vmplug.oci.requests import NetInfo, Request, RngInfo

THEIRS = {RepairOutcome.ANOTHER_JOURNAL}


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path / "first")
    yield made
    made.close()


@pytest.fixture
def second(tmp_path: Path, first: Sandbox) -> Iterator[Sandbox]:
    """Another state directory, for the same VM."""
    directory = tmp_path / "second"
    Journal.open(directory / "state").close()
    made = Sandbox(directory, side=first.side)
    yield made
    made.close()


@contextmanager
def every_kind(sandbox: Sandbox) -> Iterator[list[Request]]:
    """A request that needs each kind of name in QEMU."""
    sandbox.file("m.img", size_bytes=2 << 20)
    memory = sandbox.disk("m.img", options={"block-driver": "nvdimm"}, at="/dev/pmem0")
    with vhost_user_backend("net") as backend:
        yield [
            sandbox.disk("a.img", options={"bps-total": "10M", "iothread": "on"}),
            sandbox.disk("b.img", options={"block-driver": "virtio-scsi"}),
            NetInfo(label="eth0", socket_path=str(backend.socket_path)),
            RngInfo(),
            memory,
        ]


def test_the_ids_of_a_journals_devices_begin_with_its_id(first: Sandbox, second: Sandbox) -> None:
    theirs = first.devices.attach(first.disk()).device_id
    ours = second.devices.attach(second.disk()).device_id
    with Journal.open(second.state_dir) as journal:
        assert (theirs[:6], ours[:6]) == (JOURNAL_ID, journal.id)
    assert {len(theirs), len(ours)} == {16}
    assert first.vmplugs() == {f"vmplug-{theirs}", f"vmplug-{ours}"}


def test_every_kind_of_device_of_another_journal_is_left_alone(
    first: Sandbox, second: Sandbox
) -> None:
    with every_kind(first) as requests:
        held = first.devices.attach_all(requests)
        before = first.picture()
        for _ in range(2):
            repairs = second.devices.reconcile()
            assert {repair.device_id for repair in repairs} == {one.device_id for one in held}
            assert {repair.outcome for repair in repairs} == THEIRS
            assert not any(repair.is_gone for repair in repairs)
            assert all(f"journal {JOURNAL_ID}" in repair.reason for repair in repairs)
        assert first.picture() == before
        assert first.devices.reconcile() == []
        assert second.devices.attachments() == []

        taken = second.devices.reconcile(take_over=True)
        outcomes = [repair.outcome for repair in taken]
        assert sorted(outcomes) == [RepairOutcome.REMOVED] * 4 + [RepairOutcome.STILL_DETACHING]
        assert {repair.outcome for repair in first.devices.reconcile()} == {
            RepairOutcome.FORGOTTEN
        }


def test_what_another_journal_has_in_progress_is_left_to_it(
    first: Sandbox, second: Sandbox
) -> None:
    """An attach of its that broke off: this journal does not know whether it goes on."""
    first.talk_through(lambda monitor: Breaking(monitor, 1, is_sent=True))
    with pytest.raises(ProtocolError):
        first.devices.attach(first.disk())
    first.talk_plainly()
    before = first.picture()
    (repair,) = second.devices.reconcile()
    assert (repair.outcome, repair.reason.split()[0]) == (RepairOutcome.ANOTHER_JOURNAL, "remains")
    assert first.picture() == before
    (interrupted,) = first.devices.attachments()
    assert interrupted.state is State.PLUGGING
    (undone,) = first.devices.reconcile()
    assert undone.outcome is RepairOutcome.UNDONE
    assert not first.vmplugs()


def test_an_older_copy_of_the_journal_leaves_the_disks_in_the_vm(first: Sandbox) -> None:
    known = first.devices.attach(first.disk())
    first.close()
    older = shutil.copytree(first.state_dir, first.state_dir.with_name("older"))
    with every_kind(first) as requests:
        held = first.devices.attach_all(requests[1:])
        first.close()
        shutil.rmtree(first.state_dir)
        older.rename(first.state_dir)
        parts = first.side.parts()

        repairs = first.devices.reconcile()

        assert first.side.parts() == parts
        assert {one.device_id for one in repairs} == {one.device_id for one in held}
        assert {one.outcome for one in repairs} == THEIRS
        assert all("which has no row of it: --take-over" in one.reason for one in repairs)
        assert first.devices.attachments() == [known]
        taken = first.devices.reconcile(take_over=True)
        assert {one.device_id for one in taken} == {one.device_id for one in held}
        first.devices.detach(known.id)


def test_a_lost_journal_leaves_the_disks_in_the_vm(first: Sandbox) -> None:
    held = first.devices.attach(first.disk())
    first.close()
    shutil.rmtree(first.state_dir)
    parts = first.side.parts()
    (repair,) = first.devices.reconcile()
    assert (repair.device_id, repair.host_path) == (held.device_id, None)
    assert repair.outcome is RepairOutcome.ANOTHER_JOURNAL
    assert repair.reason.startswith(f"virtio-blk-pci of journal {JOURNAL_ID}, and this is ")
    assert repair.reason.endswith(": --take-over unplugs it")
    assert first.side.parts() == parts
    (repair,) = first.devices.reconcile(take_over=True)
    assert repair.outcome is RepairOutcome.REMOVED
    assert not first.vmplugs()


@pytest.mark.parametrize("name", ["vmplug-fedcba9876543210", "vmplug-x", "vmplug-01234-limits"])
def test_remains_of_an_earlier_vmplug_that_no_journal_knows_are_only_reported(
    first: Sandbox, name: str
) -> None:
    first.side.ask(Command("blockdev-add", {"node-name": name, "driver": "null-co"}))
    before = first.picture()
    assert [repair.outcome for repair in first.devices.reconcile()] == [*THEIRS]
    assert first.picture() == before
    assert first.devices.reconcile(take_over=True)
    assert not first.vmplugs()


def test_a_device_of_an_earlier_vmplug_is_known_by_its_row(first: Sandbox) -> None:
    """Its journal got an id when it was upgraded, which is not in the names from before."""
    held = first.devices.attach(first.disk())
    first.close()
    with Journal.open(first.state_dir) as journal:
        journal._db.execute("UPDATE journal SET id = 'abcdef'")
    assert first.devices.reconcile() == []
    first.devices.detach(held.id)
    assert not first.vmplugs()
    assert first.devices.attach(first.disk()).device_id.startswith("abcdef")
