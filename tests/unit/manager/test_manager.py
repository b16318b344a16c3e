"""The life of a device, on a VM in memory: each test on a live manager and on a restored one."""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, suppress
from pathlib import Path

import pytest
from msgspec import structs

from tests.contract.sandbox import SIZE_BYTES, Breaking, Hooked, Noticed, Refusing, Sandbox
from tests.contract.world import MemorySide
from tests.support.disks import qcow2_image
from tests.support.tree import HostTree
from vmplug.devnum import DevNum
from vmplug.drivers.place import Offer
from vmplug.drivers.ports import Command
from vmplug.errors import (
    CommandError,
    DeviceError,
    InUse,
    NoFreePort,
    NoSuchDevice,
    NotAttached,
    PolicyError,
    ProtocolError,
    SpecError,
    StateError,
    UnplugRefused,
    UnplugTimeout,
)
from vmplug.host.finding import Code
from vmplug.host.kind import DeviceType
from vmplug.hypervisor.fake.monitor import FakeHypervisor, Guest
from vmplug.hypervisor.qemu.running import NO_PLACES, Qemu
from vmplug.hypervisor.qmp.monitor import Monitor
from vmplug.journal import journal_path
from vmplug.journal.records import Attachment
from vmplug.journal.state import State
from vmplug.manager.manager import DeviceManager
from vmplug.oci.info import DeviceInfo, DevType

GIVEN_UP_S = 30.0
"""As long as one waits for another who plugs the same device, at the most."""
AT_ONCE_S = 0.1
"""For a guest that will not answer anyway."""
SOON_S, PATIENT_S = 60.0, 300.0
LIMITED = {"bps-total": "10M", "iothread": "on"}
LIMITED_STEPS = 5


@pytest.fixture(params=["live", "restored"])
def is_restored(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "restored")


@pytest.fixture
def sandbox(tmp_path: Path, *, is_restored: bool) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path, is_restored=is_restored)
    yield made
    made.close()


@pytest.fixture
def make(tmp_path: Path, *, is_restored: bool) -> Iterator[Callable[..., Sandbox]]:
    """More sandboxes on the same journal, each a VM of its own."""
    made: list[Sandbox] = []

    def make_one(vm: str, side: MemorySide | None = None) -> Sandbox:
        made.append(Sandbox(tmp_path, side=side, vm=vm, is_restored=is_restored))
        return made[-1]

    yield make_one
    for one in made:
        one.close()


def pci(attachment: Attachment) -> str:
    assert attachment.guest_address
    return str(attachment.guest_address.pci_path)


def null_device(at: str = "/dev/null") -> DeviceInfo:
    return DeviceInfo(container_path=at, dev_type=DevType.CHAR, devnum=DevNum(1, 3))


def held(sandbox: Sandbox) -> list[tuple[str, str, int, State]]:
    """Who holds what, how often, in which state."""
    return [(a.owner, a.name, a.count, a.state) for a in sandbox.devices.attachments()]


# attaching and counting


def test_the_attachment_says_everything_about_the_hold(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk("a.img", at="/dev/xvda"), owner="c1")

    assert attachment.vm == "sandbox-1"
    assert attachment.owner == "c1"
    assert (attachment.name, attachment.container_path) == ("/dev/xvda", "/dev/xvda")
    assert attachment.host_path == str(sandbox.file("a.img"))
    assert attachment.kind is DeviceType.BLOCK
    assert not attachment.read_only
    assert attachment.count == 1
    assert attachment.state is State.ATTACHED
    assert pci(attachment) == "10/00"
    assert sandbox.devices.attachments() == [attachment]
    assert sandbox.machine.devices.keys() >= {f"vmplug-{attachment.device_id}"}


def test_an_attach_without_an_owner_belongs_to_the_vm(sandbox: Sandbox) -> None:
    assert sandbox.devices.attach(sandbox.disk()).owner == "sandbox-1"


def test_an_owner_whose_name_is_too_long_gets_nothing(sandbox: Sandbox) -> None:
    before = sandbox.picture()
    with pytest.raises(SpecError, match="256 bytes; at most 255"):
        sandbox.devices.attach(sandbox.disk(), owner="c" * 256)
    assert sandbox.picture() == before


def test_the_second_attach_of_one_owner_only_counts(sandbox: Sandbox) -> None:
    first = sandbox.devices.attach(sandbox.disk(), owner="c1")
    parts, sent = sandbox.side.parts(), sandbox.changes_sent()

    second = sandbox.devices.attach(sandbox.disk(), owner="c1")

    assert second == structs.replace(first, count=2)
    assert sandbox.devices.attachments() == [second]
    assert sandbox.side.parts() == parts
    assert sandbox.changes_sent() == sent


def test_another_owner_holds_the_same_device_apart(sandbox: Sandbox) -> None:
    first = sandbox.devices.attach(sandbox.disk(), owner="c1")
    parts = sandbox.side.parts()
    second = sandbox.devices.attach(sandbox.disk(), owner="c2")

    assert first.device_id == second.device_id
    assert first.guest_address == second.guest_address
    assert first.id != second.id
    assert sandbox.side.parts() == parts
    assert held(sandbox) == [
        ("c1", "/dev/a.img", 1, State.ATTACHED),
        ("c2", "/dev/a.img", 1, State.ATTACHED),
    ]


def test_one_owner_may_see_a_device_at_two_paths(sandbox: Sandbox) -> None:
    first, second = sandbox.devices.attach_all(
        [sandbox.disk(at="/dev/one"), sandbox.disk(at="/dev/two")], owner="c1"
    )
    assert first.device_id == second.device_id
    assert (first.container_path, second.container_path) == ("/dev/one", "/dev/two")
    assert len(sandbox.vmplugs()) == 1

    sandbox.devices.detach(first.id)
    assert sandbox.devices.attachments() == [second]
    assert sandbox.vmplugs()
    sandbox.devices.detach(second.id)
    assert not sandbox.vmplugs()


def test_the_same_request_twice_in_one_batch_counts_two(sandbox: Sandbox) -> None:
    first, second = sandbox.devices.attach_all([sandbox.disk(), sandbox.disk()], owner="c1")
    assert first == second
    assert first.count == 2
    assert len(sandbox.vmplugs()) == 1


def test_a_batch_is_answered_in_the_order_asked(sandbox: Sandbox) -> None:
    names = ["c.img", "a.img", "b.img"]
    attachments = sandbox.devices.attach_all([sandbox.disk(name) for name in names])
    assert [a.container_path for a in attachments] == [f"/dev/{name}" for name in names]
    assert [pci(a) for a in attachments] == ["10/00", "11/00", "12/00"]


def test_an_empty_batch_is_nothing(sandbox: Sandbox) -> None:
    assert sandbox.devices.attach_all([]) == []
    assert sandbox.devices.attachments() == []
    assert sandbox.changes_sent() == []


def test_one_file_is_one_device_under_all_its_names(sandbox: Sandbox) -> None:
    file = sandbox.file("a.img")
    link = sandbox.directory / "link.img"
    link.symlink_to(file)
    doubled = f"{file.parent}//./{file.name}"
    requests = [
        sandbox.disk(at=f"/dev/{index}")._replace(host_path=str(name))
        for index, name in enumerate((file, link, doubled))
    ]
    attachments = [sandbox.devices.attach(request) for request in requests]
    assert {a.device_id for a in attachments} == {attachments[0].device_id}
    assert {a.host_path for a in attachments} == {str(file)}
    assert len(sandbox.vmplugs()) == 1


def test_block_and_char_devices_of_one_number_are_two(
    tmp_path: Path, *, is_restored: bool
) -> None:
    tree = HostTree(tmp_path / "host")
    tree.block_device("8:0", "sda").char_device("8:0", "st0")
    sandbox = Sandbox(tmp_path, root=tree.root, is_restored=is_restored)
    try:
        block, char = sandbox.devices.attach_all(
            [
                DeviceInfo(container_path="/dev/sda", dev_type=kind, devnum=DevNum(8, 0))
                for kind in (DevType.BLOCK, DevType.CHAR)
            ]
        )
        assert (block.kind, block.host_path) == (DeviceType.BLOCK, "/dev/sda")
        assert (char.kind, char.host_path) == (DeviceType.GENERIC, "/dev/st0")
        assert len(sandbox.vmplugs()) == 1
    finally:
        sandbox.close()


def test_the_callers_options_are_not_written_to(sandbox: Sandbox) -> None:
    options = {"cache": "writeback"}
    sandbox.devices.attach(sandbox.disk(options=options))
    assert options == {"cache": "writeback"}


@pytest.mark.parametrize(
    "name", ["a,b=c.img", "json:{}.img", "%41 'q\" .img", "Grüße \u2028.img", "#1"]
)
def test_no_character_of_a_file_name_means_anything(sandbox: Sandbox, name: str) -> None:
    attachment = sandbox.devices.attach(sandbox.disk(name, at="/dev/x"))
    (node,) = sandbox.machine.nodes.values()
    assert attachment.host_path == str(sandbox.file(name)) == node["file"]["filename"]
    sandbox.devices.detach(attachment.id)
    assert not sandbox.vmplugs()


def test_a_file_name_that_is_no_text_is_refused(sandbox: Sandbox) -> None:
    """QMP and the journal are UTF-8: such a name could not be said."""
    disk = sandbox.disk(os.fsdecode(b"\xff.img"), at="/dev/x")
    before = sandbox.picture()
    with pytest.raises(DeviceError):
        sandbox.devices.attach(disk)
    assert sandbox.picture() == before


# detaching


def test_the_last_detach_unplugs(sandbox: Sandbox) -> None:
    before = sandbox.side.parts()
    attachment = sandbox.devices.attach(sandbox.disk(options=LIMITED))
    sandbox.devices.detach(attachment.id)
    assert sandbox.devices.attachments() == []
    assert sandbox.side.parts() == before
    assert not any(sandbox.picture().rows.values())


def test_detach_takes_one_count_back(sandbox: Sandbox) -> None:
    for _ in range(3):
        attachment = sandbox.devices.attach(sandbox.disk(), owner="c1")
    for count in (2, 1):
        sandbox.devices.detach(attachment.id)
        assert [a.count for a in sandbox.devices.attachments()] == [count]
        assert sandbox.vmplugs()
    sandbox.devices.detach(attachment.id)
    assert not sandbox.vmplugs()


def test_a_whole_detach_takes_every_count_back(sandbox: Sandbox) -> None:
    for _ in range(3):
        attachment = sandbox.devices.attach(sandbox.disk(), owner="c1")
    sandbox.devices.detach(attachment.id, whole=True)
    assert held(sandbox) == []
    assert not sandbox.vmplugs()


def test_a_whole_detach_leaves_the_other_owners(sandbox: Sandbox) -> None:
    sandbox.devices.attach(sandbox.disk(), owner="c1")
    mine = sandbox.devices.attach(sandbox.disk(), owner="c1")
    sandbox.devices.attach(sandbox.disk(), owner="c2")
    sandbox.devices.detach(mine.id, whole=True)
    assert held(sandbox) == [("c2", "/dev/a.img", 1, State.ATTACHED)]
    assert sandbox.vmplugs()


def test_an_owner_gives_back_everything_it_holds(sandbox: Sandbox) -> None:
    before = sandbox.side.parts()
    sandbox.devices.attach_all(
        [sandbox.disk("a.img"), sandbox.disk("b.img"), null_device()], owner="c1"
    )
    sandbox.devices.attach(sandbox.disk("a.img"), owner="c1")
    sandbox.devices.attach(sandbox.disk("b.img"), owner="c2")

    given = sandbox.devices.detach_owner("c1")

    assert [(a.container_path, a.count) for a in given] == [
        ("/dev/a.img", 2),
        ("/dev/b.img", 1),
        ("/dev/null", 1),
    ]
    assert held(sandbox) == [("c2", "/dev/b.img", 1, State.ATTACHED)]
    assert len(sandbox.vmplugs()) == 1
    sandbox.devices.detach_owner("c2")
    assert sandbox.side.parts() == before


def test_several_are_detached_together(sandbox: Sandbox) -> None:
    before = sandbox.side.parts()
    attachments = sandbox.devices.attach_all([sandbox.disk("a.img"), sandbox.disk("b.img")])
    sandbox.devices.detach_all([a.id for a in attachments])
    assert held(sandbox) == []
    assert sandbox.side.parts() == before


def test_detaching_one_unknown_detaches_none(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk())
    before = sandbox.picture()
    with pytest.raises(NotAttached, match="no attachment nope in VM sandbox-1"):
        sandbox.devices.detach_all([attachment.id, "nope"])
    with pytest.raises(NotAttached):
        sandbox.devices.detach("nope")
    with pytest.raises(
        NotAttached, match="nothing is attached for owner 'nobody' in VM sandbox-1"
    ):
        sandbox.devices.detach_owner("nobody")
    assert sandbox.picture() == before


def test_a_detached_device_cannot_be_detached_again(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk())
    sandbox.devices.detach(attachment.id)
    before = sandbox.picture()
    with pytest.raises(NotAttached):
        sandbox.devices.detach(attachment.id)
    assert sandbox.picture() == before


def test_a_device_may_come_again_after_it_went(sandbox: Sandbox) -> None:
    for _ in range(3):
        attachment = sandbox.devices.attach(sandbox.disk())
        assert pci(attachment) == "10/00"
        sandbox.devices.detach(attachment.id)


# options and access


def test_the_same_options_count(sandbox: Sandbox) -> None:
    sandbox.devices.attach(sandbox.disk(options={"cache": "writeback", "share-rw": "on"}))
    again = sandbox.devices.attach(sandbox.disk(options={"share-rw": "on", "cache": "writeback"}))
    assert again.count == 2


def test_a_request_without_options_accepts_the_plugged_ones(sandbox: Sandbox) -> None:
    sandbox.devices.attach(sandbox.disk(options={"cache": "unsafe"}))
    assert sandbox.devices.attach(sandbox.disk()).count == 2


@pytest.mark.parametrize("plugged", [{}, {"cache": "unsafe"}], ids=["none", "others"])
def test_other_options_than_plugged_are_refused(sandbox: Sandbox, plugged: dict[str, str]) -> None:
    sandbox.devices.attach(sandbox.disk(options=plugged))
    before = sandbox.picture()
    with pytest.raises(StateError) as caught:
        sandbox.devices.attach(sandbox.disk(options={"cache": "writeback"}), owner="c2")
    assert caught.value.required == "cache=writeback"
    assert caught.value.state == ("cache=unsafe" if plugged else "none")
    assert caught.value.hint
    assert sandbox.picture() == before


def test_writing_to_a_device_that_is_plugged_read_only_is_refused(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk(ro=True))
    before = sandbox.picture()
    with pytest.raises(StateError, match="plugged read-only, and the request is for writing"):
        sandbox.devices.attach(sandbox.disk(), owner="c2")
    assert sandbox.picture() == before

    sandbox.devices.detach(attachment.id)
    assert not sandbox.devices.attach(sandbox.disk(), owner="c2").read_only


def test_a_reader_of_a_device_that_is_plugged_for_writing_is_refused(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk(), owner="c1")
    before, reading = sandbox.picture(), [sandbox.disk(ro=True)]
    (checked,) = sandbox.devices.check_places(reading)
    assert [finding.code for finding in checked.findings] == [Code.PLUGGED_OTHERWISE]
    said = checked.findings[0].message
    assert "plugged for writing, and the request is read-only" in said
    with pytest.raises(StateError) as planned:
        sandbox.devices.plan(reading, owner="c2")
    with pytest.raises(StateError) as attached:
        sandbox.devices.attach_all(reading, owner="c2")
    assert planned.value.message == attached.value.message == said
    assert sandbox.picture() == before

    sandbox.devices.detach(attachment.id)
    assert sandbox.devices.attach(sandbox.disk(ro=True), owner="c2").read_only


def test_other_options_are_refused_beforehand(sandbox: Sandbox) -> None:
    known = sandbox.devices.attach(sandbox.disk())
    assert [c.findings for c in sandbox.devices.check_places([sandbox.disk()])] == [()]
    (other,) = sandbox.devices.check_places([sandbox.disk(options={"discard": "unmap"})])
    assert [finding.code for finding in other.findings] == [Code.PLUGGED_OTHERWISE]
    sandbox.devices.detach(known.id)
    assert not sandbox.devices.check_places([sandbox.disk()])[0].findings


@pytest.mark.parametrize(
    ("first_ro", "second_ro", "plugged_ro"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_one_batch_is_plugged_for_writing_if_one_writes(
    sandbox: Sandbox, *, first_ro: bool, second_ro: bool, plugged_ro: bool
) -> None:
    sandbox.devices.attach_all(
        [sandbox.disk(at="/dev/1", ro=first_ro), sandbox.disk(at="/dev/2", ro=second_ro)]
    )
    (node,) = sandbox.machine.nodes.values()
    assert node["read_only"] is plugged_ro
    assert [a.read_only for a in sandbox.devices.attachments()] == [first_ro, second_ro]


@pytest.mark.parametrize(
    "options", [{"cache": "none"}, {"cache": "unsafe"}], ids=["direct", "unsafe"]
)
def test_two_wishes_for_one_device_in_one_batch_are_refused(
    sandbox: Sandbox, options: dict[str, str]
) -> None:
    before = sandbox.picture()
    with pytest.raises(StateError, match="other options"):
        sandbox.devices.attach_all(
            [
                sandbox.disk(at="/dev/1", options={"cache": "writeback"}),
                sandbox.disk(at="/dev/2", options=options),
            ]
        )
    assert sandbox.picture() == before


@pytest.mark.parametrize(
    "options",
    [{"cache": "nonsense"}, {"nonsense": "1"}, {"serial": "x" * 21}, {"bps-total": "0"}],
    ids=lambda options: next(iter(options)),
)
def test_a_malformed_option_is_refused_before_anything_is_done(
    sandbox: Sandbox, options: dict[str, str]
) -> None:
    before = sandbox.picture()
    with pytest.raises(SpecError, match=f"option {next(iter(options))}"):
        sandbox.devices.attach_all([sandbox.disk("b.img"), sandbox.disk(options=options)])
    assert sandbox.picture() == before


# places


def test_the_lowest_free_place_is_given(sandbox: Sandbox) -> None:
    attachments = [sandbox.devices.attach(sandbox.disk(f"{i}.img")) for i in range(3)]
    assert [pci(a) for a in attachments] == ["10/00", "11/00", "12/00"]
    sandbox.devices.detach(attachments[1].id)
    assert pci(sandbox.devices.attach(sandbox.disk("new.img"))) == "11/00"
    assert pci(sandbox.devices.attach(sandbox.disk("next.img"))) == "13/00"


def test_a_controller_in_place_of_another_is_found(sandbox: Sandbox) -> None:
    """Another program replaces it after this manager has asked for the parts of the VM."""
    sandbox.devices.attach(sandbox.disk("a.img"))
    sandbox.machine.devices["scsi9"] = sandbox.machine.devices.pop("scsi0")
    attached = sandbox.devices.attach(
        sandbox.disk("b.img", options={"block-driver": "virtio-scsi"})
    )
    assert attached.guest_address
    assert str(attached.guest_address.scsi_address) == "0:0"


SCSI = {"block-driver": "virtio-scsi"}


def with_edited_place(sandbox: Sandbox, place: str) -> None:
    """Two SCSI disks, and somebody gives the second one another place in the journal."""
    sandbox.devices.attach(sandbox.disk("a.img", options=SCSI))
    second = sandbox.devices.attach(sandbox.disk("b.img", options=SCSI))
    sandbox.close()
    with closing(sqlite3.connect(journal_path(sandbox.state_dir))) as db, db:
        db.execute("UPDATE device SET place = ? WHERE id = ?", (place, second.device_id))


@pytest.mark.parametrize(
    "place",
    ["scsi0.0/00:0", "scsi0.0/0:01", "scsi0.0/256:0", "scsi0.0/", "scsi0.0/1"],
)
def test_a_place_in_the_journal_that_no_disk_can_have_takes_none(
    sandbox: Sandbox, place: str
) -> None:
    """The first is that of the other disk, which SQLite does not see."""
    with_edited_place(sandbox, place)
    third = sandbox.devices.attach(sandbox.disk("c.img", options=SCSI))
    assert third.guest_address
    assert str(third.guest_address.scsi_address) == "0:2"


def test_a_wrong_place_in_the_journal_is_said_and_nothing_is_lost(sandbox: Sandbox) -> None:
    with_edited_place(sandbox, "scsi0.0/0:7")
    before = sandbox.picture()
    with pytest.raises(CommandError, match="lun already used by") as refused:
        sandbox.devices.attach(sandbox.disk("c.img", options=SCSI))
    assert refused.value.hint
    assert "detach that one" in refused.value.hint
    assert sandbox.picture() == before
    wrong = sandbox.devices.attachments()[1]
    sandbox.devices.detach(wrong.id)
    third = sandbox.devices.attach(sandbox.disk("c.img", options=SCSI))
    assert third.guest_address
    assert str(third.guest_address.scsi_address) == "0:1"


def test_when_the_ports_are_full_a_disk_goes_to_scsi(sandbox: Sandbox) -> None:
    attachments = sandbox.devices.attach_all([sandbox.disk(f"{i}.img") for i in range(6)])
    addresses = [a.guest_address.scsi_address for a in attachments if a.guest_address]
    assert addresses[:4] == [None] * 4
    assert [str(address) for address in addresses[4:]] == ["0:0", "0:1"]
    assert [pci(a) for a in attachments[4:]] == ["05", "05"]


def test_a_disk_goes_where_its_driver_says(sandbox: Sandbox) -> None:
    scsi = sandbox.devices.attach(sandbox.disk("a.img", options={"block-driver": "virtio-scsi"}))
    virtio = sandbox.devices.attach(sandbox.disk("b.img", options={"block-driver": "virtio-blk"}))
    assert scsi.guest_address
    assert str(scsi.guest_address.scsi_address) == "0:0"
    assert pci(virtio) == "10/00"


@pytest.mark.parametrize(
    "options", [{"block-driver": "virtio-blk"}, {"iothread": "on"}], ids=["virtio", "iothread"]
)
def test_a_full_vm_is_told_and_nothing_changes(sandbox: Sandbox, options: dict[str, str]) -> None:
    sandbox.devices.attach_all([sandbox.disk(f"{i}.img") for i in range(4)])
    before = sandbox.picture()
    with pytest.raises(NoFreePort, match="no free PCI port left") as caught:
        sandbox.devices.attach(sandbox.disk("more.img", options=options))
    assert caught.value.hint
    assert sandbox.picture() == before


def add_stranger(sandbox: Sandbox, bus: str) -> None:
    sandbox.side.ask(Command("blockdev-add", {"node-name": "n", "driver": "null-co"}))
    stranger = {"driver": "virtio-blk-pci", "id": "s", "drive": "n", "bus": bus, "addr": "0x0"}
    sandbox.side.ask(Command("device_add", stranger))


def test_a_place_that_somebody_else_has_is_left_out(sandbox: Sandbox) -> None:
    add_stranger(sandbox, "rp1")
    attachments = [sandbox.devices.attach(sandbox.disk(f"{i}.img")) for i in range(3)]
    assert [pci(a) for a in attachments] == ["10/00", "12/00", "13/00"]


def test_a_place_that_another_client_took_is_refused_at_most_once(sandbox: Sandbox) -> None:
    """The manager does not ask for all places before each attach; it asks again when refused."""
    sandbox.devices.attach(sandbox.disk("a.img"))
    add_stranger(sandbox, "rp1")
    before = sandbox.picture()
    refusals = []
    for _ in range(2):
        try:
            attachment = sandbox.devices.attach(sandbox.disk("b.img"))
        except CommandError as error:
            refusals.append(error)
            assert sandbox.picture() == before
        else:
            break
    assert pci(attachment) == "12/00"
    assert all("try again" in (error.hint or "") for error in refusals)


def test_the_place_of_a_detaching_device_is_not_given_away(sandbox: Sandbox) -> None:
    going = sandbox.devices.attach(sandbox.disk("going.img"))
    sandbox.machine.guest = Guest.SILENT
    with pytest.raises(UnplugTimeout):
        sandbox.devices.detach(going.id, timeout_s=AT_ONCE_S)

    for index in range(3):
        attachment = sandbox.devices.attach(
            sandbox.disk(f"{index}.img", options={"block-driver": "virtio-blk"})
        )
        assert pci(attachment) == f"{0x11 + index:02x}/00"
    with pytest.raises(NoFreePort):
        sandbox.devices.attach(sandbox.disk("x.img", options={"block-driver": "virtio-blk"}))

    sandbox.machine.wake_guest()
    sandbox.devices.detach(going.id)
    assert pci(sandbox.devices.attach(sandbox.disk("x.img"))) == "10/00"


# guests that do not let go


def test_a_silent_guest_keeps_the_device_detaching(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk(options=LIMITED), owner="c1")
    parts = sandbox.side.parts()
    sandbox.machine.guest = Guest.SILENT

    for _ in range(2):
        with pytest.raises(UnplugTimeout) as caught:
            sandbox.devices.detach(attachment.id, timeout_s=AT_ONCE_S)
        assert caught.value.ids == (attachment.device_id,)
        assert attachment.host_path in caught.value.message
        assert caught.value.hint
        assert "paused" in caught.value.hint
        assert sandbox.devices.attachments() == [
            structs.replace(attachment, state=State.DETACHING)
        ]
        assert sandbox.side.parts() == parts

    sandbox.machine.wake_guest()
    sandbox.devices.detach(attachment.id)
    assert held(sandbox) == []
    assert not sandbox.vmplugs()


def test_a_detaching_device_is_not_handed_out(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk())
    sandbox.machine.guest = Guest.SILENT
    with pytest.raises(UnplugTimeout):
        sandbox.devices.detach(attachment.id, timeout_s=AT_ONCE_S)
    before = sandbox.picture()
    with pytest.raises(StateError, match="is detaching") as caught:
        sandbox.devices.attach(sandbox.disk(), owner="c2")
    assert (caught.value.state, caught.value.required) == ("detaching", "attached")
    assert sandbox.picture() == before


def test_a_guest_that_refuses_may_be_asked_again(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk(), owner="c1")
    parts = sandbox.side.parts()
    sandbox.machine.guest = Guest.REFUSES
    with pytest.raises(UnplugRefused, match="refuses to release") as caught:
        sandbox.devices.detach(attachment.id)
    assert caught.value.hint
    assert held(sandbox) == [("c1", "/dev/a.img", 1, State.DETACHING)]
    assert sandbox.side.parts() == parts

    sandbox.machine.guest = Guest.ANSWERS
    sandbox.devices.detach(attachment.id)
    assert held(sandbox) == []
    assert not sandbox.vmplugs()


def test_a_refusal_names_the_qom_path_of_the_device(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk())
    sandbox.machine.guest = Guest.REFUSES
    with pytest.raises(UnplugRefused) as caught:
        sandbox.devices.detach(attachment.id)
    assert caught.value.qom_path == f"/machine/peripheral/vmplug-{attachment.device_id}"


def test_when_qemu_refuses_to_ask_the_device_stays_attached(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk())
    before = sandbox.picture()
    sandbox.machine.fail_at = "device_del"
    with pytest.raises(CommandError):
        sandbox.devices.detach(attachment.id)
    assert sandbox.picture() == before

    sandbox.devices.detach(attachment.id)
    assert held(sandbox) == []


def test_a_silent_guest_does_not_keep_the_others(sandbox: Sandbox) -> None:
    virtio, scsi = sandbox.devices.attach_all(
        [
            sandbox.disk("a.img"),
            sandbox.disk("b.img", options={"block-driver": "virtio-scsi"}),
        ],
        owner="c1",
    )
    sandbox.devices.attach(null_device(), owner="c1")
    sandbox.machine.guest = Guest.SILENT

    with pytest.raises(UnplugTimeout) as caught:
        sandbox.devices.detach_owner("c1", timeout_s=AT_ONCE_S)

    assert caught.value.ids == (virtio.device_id,)
    assert held(sandbox) == [("c1", "/dev/a.img", 1, State.DETACHING)]
    assert sandbox.vmplugs() == {f"vmplug-{virtio.device_id}"}
    assert sandbox.devices.attach(sandbox.disk("b.img"), owner="c2").id != scsi.id


def test_a_failed_detach_loses_no_count(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk(), owner="c1")
    sandbox.devices.attach(sandbox.disk(), owner="c1")
    sandbox.machine.guest = Guest.SILENT
    sandbox.devices.detach(attachment.id, timeout_s=AT_ONCE_S)  # only counts
    for _ in range(2):
        with pytest.raises(UnplugTimeout):
            sandbox.devices.detach(attachment.id, timeout_s=AT_ONCE_S)
        assert held(sandbox) == [("c1", "/dev/a.img", 1, State.DETACHING)]


def test_a_whole_detach_that_failed_is_finished_by_the_next_detach(sandbox: Sandbox) -> None:
    for _ in range(3):
        attachment = sandbox.devices.attach(sandbox.disk(), owner="c1")
    sandbox.machine.guest = Guest.SILENT
    with pytest.raises(UnplugTimeout):
        sandbox.devices.detach(attachment.id, timeout_s=AT_ONCE_S, whole=True)
    sandbox.machine.wake_guest()
    sandbox.devices.detach(attachment.id)
    assert held(sandbox) == []
    assert not sandbox.vmplugs()


# several at once, all or none


def batch(sandbox: Sandbox) -> list[DeviceInfo]:
    """A batch that sends every kind of command: 5 for a.img, 2 for each of the others."""
    return [
        sandbox.disk("a.img", options=LIMITED),
        null_device(),
        sandbox.disk("b.img", options={"block-driver": "virtio-scsi"}),
        sandbox.disk("c.img"),
    ]


BATCH_STEPS = LIMITED_STEPS + 2 + 2


@pytest.mark.parametrize("name", ["object-add", "blockdev-add", "device_add"])
def test_a_refused_command_leaves_no_trace(sandbox: Sandbox, name: str) -> None:
    sandbox.devices.attach(sandbox.disk("held.img"), owner="c0")
    before = sandbox.picture()
    sandbox.machine.fail_at = name
    with pytest.raises(CommandError) as caught:
        sandbox.devices.attach_all(batch(sandbox), owner="c1")
    assert caught.value.command == name
    assert sandbox.picture() == before

    assert len(sandbox.devices.attach_all(batch(sandbox), owner="c1")) == 4


@pytest.mark.parametrize("count", range(1, BATCH_STEPS + 1))
def test_whichever_command_of_a_batch_is_refused_nothing_is_left(
    sandbox: Sandbox, count: int
) -> None:
    sandbox.devices.attach(sandbox.disk("held.img"), owner="c0")
    before = sandbox.picture()
    sandbox.talk_through(lambda monitor: Refusing(monitor, count))
    with pytest.raises(CommandError, match="refused by the test"):
        sandbox.devices.attach_all([*batch(sandbox), sandbox.disk("held.img")], owner="c0")
    assert sandbox.picture() == before


def test_the_batch_has_as_many_commands_as_are_refused_in_turn(sandbox: Sandbox) -> None:
    assert len(sandbox.devices.plan(batch(sandbox))) == BATCH_STEPS


def test_a_batch_without_room_for_all_sends_nothing(sandbox: Sandbox) -> None:
    sandbox.devices.attach(sandbox.disk("held.img"), owner="c1")
    before, sent = sandbox.picture(), sandbox.changes_sent()
    infos = [
        sandbox.disk(f"{index}.img", options={"block-driver": "virtio-blk"}) for index in range(4)
    ]
    with pytest.raises(NoFreePort):
        sandbox.devices.attach_all([sandbox.disk("held.img"), *infos], owner="c1")
    assert sandbox.picture() == before
    assert sandbox.changes_sent() == sent


def test_one_missing_device_stops_the_batch_and_sends_nothing(sandbox: Sandbox) -> None:
    before = sandbox.devices.attachments()
    missing = sandbox.disk("b.img")._replace(host_path="/nonexistent/b.img")
    with pytest.raises(NoSuchDevice, match=r"/nonexistent/b\.img"):
        sandbox.devices.attach_all([sandbox.disk("a.img"), missing])
    assert sandbox.devices.attachments() == before
    assert sandbox.machine.sent == []


def test_every_problem_of_a_batch_is_told_at_once(sandbox: Sandbox) -> None:
    before = sandbox.picture()
    sandbox.file("empty.img", size_bytes=0)
    missing = sandbox.disk("b.img")._replace(host_path="/nonexistent/b.img")
    with pytest.raises(InUse) as caught:
        sandbox.devices.attach_all([missing, sandbox.disk("a.img"), sandbox.disk("empty.img")])
    assert caught.value.codes == (Code.NO_SUCH_DEVICE, Code.SIZE_ZERO)
    assert "/nonexistent/b.img" in caught.value.message
    assert "/dev/empty.img" in caught.value.message
    assert sandbox.picture() == before


def test_devices_of_a_failed_batch_that_the_guest_keeps_stay_detaching(sandbox: Sandbox) -> None:
    sandbox.machine.guest = Guest.REFUSES
    sandbox.talk_through(lambda monitor: Refusing(monitor, 3))
    with pytest.raises(CommandError, match="refused by the test"):
        sandbox.devices.attach_all([sandbox.disk("a.img"), sandbox.disk("b.img")], owner="c1")
    sandbox.talk_plainly()
    assert held(sandbox) == [("c1", "/dev/a.img", 1, State.DETACHING)]
    assert len(sandbox.vmplugs()) == 1

    sandbox.machine.guest = Guest.ANSWERS
    sandbox.devices.detach_owner("c1")
    assert held(sandbox) == []
    assert not sandbox.vmplugs()


# conversations that break


@pytest.mark.slow
@pytest.mark.parametrize("is_sent", [False, True], ids=["lost", "done"])
@pytest.mark.parametrize("count", range(1, BATCH_STEPS + 1))
def test_after_a_broken_attach_reconcile_leaves_nothing(
    sandbox: Sandbox, count: int, *, is_sent: bool
) -> None:
    sandbox.devices.attach(sandbox.disk("held.img"), owner="c0")
    before = sandbox.picture()
    sandbox.talk_through(lambda monitor: Breaking(monitor, count, is_sent=is_sent))
    with pytest.raises(ProtocolError):
        sandbox.devices.attach_all(batch(sandbox), owner="c1")

    sandbox.talk_plainly()
    assert sandbox.devices.reconcile()
    assert sandbox.picture() == before
    assert sandbox.devices.reconcile() == []


def test_a_device_whose_attach_broke_off_is_not_handed_out(sandbox: Sandbox) -> None:
    sandbox.talk_through(lambda monitor: Breaking(monitor, 1, is_sent=False))
    with pytest.raises(ProtocolError):
        sandbox.devices.attach(sandbox.disk(), owner="c1")
    sandbox.talk_plainly()
    assert held(sandbox) == [("c1", "/dev/a.img", 1, State.PLUGGING)]
    before, begun_at = sandbox.picture(), time.monotonic()

    for owner in ("c1", "c2"):
        with pytest.raises(StateError, match="is plugging"):
            sandbox.devices.attach(sandbox.disk(), owner=owner)
        assert sandbox.picture() == before
    assert time.monotonic() - begun_at < GIVEN_UP_S, "nobody is working on it"

    sandbox.devices.reconcile()
    assert sandbox.devices.attach(sandbox.disk(), owner="c2").state is State.ATTACHED


def test_a_device_whose_attach_broke_off_cannot_be_detached(sandbox: Sandbox) -> None:
    held_too = sandbox.devices.attach(sandbox.disk("b.img"), owner="c1")
    sandbox.devices.attach(sandbox.disk("b.img"), owner="c2")
    sandbox.talk_through(lambda monitor: Breaking(monitor, 1, is_sent=False))
    with pytest.raises(ProtocolError):
        sandbox.devices.attach(sandbox.disk("a.img"), owner="c1")
    sandbox.talk_plainly()
    before = sandbox.picture()

    with pytest.raises(StateError, match="is plugging") as caught:
        sandbox.devices.detach_owner("c1")
    assert caught.value.hint
    assert "reconcile" in caught.value.hint
    assert sandbox.picture() == before

    sandbox.devices.reconcile()
    assert sandbox.devices.detach_owner("c1") == [held_too]


@pytest.mark.parametrize("is_sent", [False, True], ids=["lost", "done"])
@pytest.mark.parametrize("count", range(1, LIMITED_STEPS + 1))
def test_a_broken_detach_can_be_repeated(sandbox: Sandbox, count: int, *, is_sent: bool) -> None:
    before = sandbox.side.parts()
    attachment = sandbox.devices.attach(sandbox.disk(options=LIMITED))
    sandbox.talk_through(lambda monitor: Breaking(monitor, count, is_sent=is_sent))
    with pytest.raises(ProtocolError):
        sandbox.devices.detach(attachment.id)
    sandbox.talk_plainly()
    assert [a.state for a in sandbox.devices.attachments()] == [State.DETACHING]

    sandbox.devices.detach(attachment.id)
    assert held(sandbox) == []
    assert sandbox.side.parts() == before


# devices that are only counted


def test_a_char_device_is_counted_and_nothing_is_sent(sandbox: Sandbox) -> None:
    first = sandbox.devices.attach(null_device("/dev/zero-like"), owner="c1")
    assert (first.kind, first.host_path) == (DeviceType.GENERIC, "/dev/null")
    assert first.guest_address is None
    second = sandbox.devices.attach(null_device("/dev/zero-like"), owner="c2")
    assert first.device_id == second.device_id

    sandbox.devices.detach(first.id)
    assert sandbox.devices.attachments() == [second]
    sandbox.devices.detach(second.id)
    assert held(sandbox) == []
    assert sandbox.machine.sent == []


def test_a_fifo_is_counted(sandbox: Sandbox) -> None:
    fifo = sandbox.directory / "fifo"
    os.mkfifo(fifo)
    attachment = sandbox.devices.attach(
        DeviceInfo(container_path=str(fifo), dev_type=DevType.FIFO)
    )
    assert (attachment.kind, attachment.guest_address) == (DeviceType.GENERIC, None)
    assert sandbox.machine.sent == []


@pytest.mark.parametrize("major", [2, 11])
def test_char_devices_with_numbers_of_floppies_and_cdroms_are_not_dropped(
    tmp_path: Path, major: int, *, is_restored: bool
) -> None:
    tree = HostTree(tmp_path / "host").char_device(f"{major}:7", "ptyp7")
    sandbox = Sandbox(tmp_path, root=tree.root, is_restored=is_restored)
    try:
        attachment = sandbox.devices.attach(
            DeviceInfo(container_path="/dev/x", dev_type=DevType.CHAR, devnum=DevNum(major, 7))
        )
        assert attachment.host_path == "/dev/ptyp7"
        assert sandbox.devices.attachments() == [attachment]
    finally:
        sandbox.close()


def test_a_counted_device_cannot_be_resized(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(null_device())
    before = sandbox.picture()
    with pytest.raises(NotAttached, match="not a disk whose size can change"):
        sandbox.devices.resize(attachment.id, 1 << 30)
    assert sandbox.picture() == before


# two VMs, one journal


def test_two_vms_give_their_places_each_for_itself(make: Callable[..., Sandbox]) -> None:
    one, two = make("vm-1"), make("vm-2")
    first = one.devices.attach(one.disk("a.img"))
    second = two.devices.attach(two.disk("b.img"))
    assert pci(first) == pci(second) == "10/00"
    assert one.devices.attachments() == [first]
    assert two.devices.attachments() == [second]


def test_a_disk_of_another_vm_is_refused(make: Callable[..., Sandbox]) -> None:
    one, two = make("vm-1"), make("vm-2")
    attachment = one.devices.attach(one.disk())
    before = two.picture()
    with pytest.raises(InUse, match="already handed to VM 'vm-1'") as caught:
        two.devices.attach(two.disk())
    assert caught.value.codes == (Code.IN_USE_BY_VM,)
    assert two.picture() == before
    assert two.machine.sent == []

    one.devices.detach(attachment.id)
    assert two.devices.attach(two.disk()).vm == "vm-2"


def test_a_detaching_disk_still_belongs_to_its_vm(make: Callable[..., Sandbox]) -> None:
    one, two = make("vm-1"), make("vm-2")
    attachment = one.devices.attach(one.disk())
    one.machine.guest = Guest.SILENT
    with pytest.raises(UnplugTimeout):
        one.devices.detach(attachment.id, timeout_s=AT_ONCE_S)
    before = two.picture()
    with pytest.raises(InUse):
        two.devices.attach(two.disk())
    assert two.picture() == before


@pytest.mark.parametrize(
    ("first", "second", "is_shared"),
    [
        ({"ro": True}, {"ro": True}, True),
        ({"ro": True}, {}, False),
        ({}, {"ro": True}, False),
        ({"options": {"share-rw": "on"}}, {"options": {"share-rw": "on"}}, True),
        ({"options": {"share-rw": "on"}}, {}, False),
        ({}, {"options": {"share-rw": "on"}}, False),
    ],
)
def test_vms_share_a_disk_when_both_only_read_or_both_say_so(
    make: Callable[..., Sandbox],
    first: dict[str, object],
    second: dict[str, object],
    *,
    is_shared: bool,
) -> None:
    one, two = make("vm-1"), make("vm-2")
    one.devices.attach(ask(one, first))
    if is_shared:
        assert two.devices.attach(ask(two, second)).state is State.ATTACHED
        return
    before = two.picture()
    with pytest.raises(InUse):
        two.devices.attach(ask(two, second))
    assert two.picture() == before


def ask(sandbox: Sandbox, how: dict[str, object]) -> DeviceInfo:
    options = how.get("options", {})
    assert isinstance(options, dict)
    return sandbox.disk(ro=bool(how.get("ro")), options=options)


def test_an_operator_may_share_a_disk_against_advice(make: Callable[..., Sandbox]) -> None:
    one, two = make("vm-1"), make("vm-2")
    one.devices.attach(one.disk())
    shared = two.devices.attach(two.disk(), allow=[Code.IN_USE_BY_VM])
    assert shared.state is State.ATTACHED


def test_attachments_of_another_vm_cannot_be_touched(make: Callable[..., Sandbox]) -> None:
    one, two = make("vm-1"), make("vm-2")
    attachment = one.devices.attach(one.disk(), owner="c1")
    before = one.picture()
    for request in (
        lambda: two.devices.detach(attachment.id),
        lambda: two.devices.detach_owner("c1"),
        lambda: two.devices.resize(attachment.id, 2 * SIZE_BYTES),
    ):
        with pytest.raises(NotAttached):
            request()
    assert one.picture() == before


# knowing before doing


def test_a_plan_is_what_attach_sends_but_for_the_ids(sandbox: Sandbox) -> None:
    before = sandbox.picture()
    plan = sandbox.devices.plan(batch(sandbox))
    assert sandbox.picture() == before
    assert sandbox.changes_sent() == []

    attachments = sandbox.devices.attach_all(batch(sandbox))

    planned, sent = [step.do for step in plan], sandbox.changes_sent()
    drawn = [str(step.do.arguments["id"]) for step in plan if step.do.execute == "device_add"]
    given = [f"vmplug-{a.device_id}" for a in attachments if a.guest_address]
    renamed = str(planned)
    for name, other in zip(drawn, given, strict=True):
        renamed = renamed.replace(name.removeprefix("vmplug-"), other.removeprefix("vmplug-"))
    assert renamed == str(sent)


def test_a_plan_for_what_is_plugged_already_is_empty(sandbox: Sandbox) -> None:
    sandbox.devices.attach(sandbox.disk())
    assert sandbox.devices.plan([sandbox.disk(), null_device()]) == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"cache": "nonsense"}, SpecError),
        ({"format": "qcow2"}, InUse),
        ({"cache": "unsafe"}, StateError),
    ],
    ids=["malformed", "not that format", "plugged otherwise"],
)
def test_plan_and_attach_refuse_alike(
    sandbox: Sandbox, options: dict[str, str], error: type[DeviceError]
) -> None:
    sandbox.devices.attach(sandbox.disk("a.img"))
    name = "b.img" if error is InUse else "a.img"
    before = sandbox.picture()
    errors = []
    for verb in (DeviceManager.plan, DeviceManager.attach_all):
        with pytest.raises(error) as caught:
            verb(sandbox.devices, [sandbox.disk(name, options=options)])
        errors.append((caught.value.message, caught.value.hint))
    assert errors[0] == errors[1]
    assert sandbox.picture() == before


def test_check_tells_what_attach_refuses(sandbox: Sandbox) -> None:
    sandbox.file("empty.img", size_bytes=0)
    fine, empty = sandbox.devices.check([sandbox.disk("a.img"), sandbox.disk("empty.img")])
    assert not fine.is_refused
    assert [finding.code for finding in empty.findings] == [Code.SIZE_ZERO]
    assert empty.is_refused
    assert sandbox.machine.sent == []


# sizes


def test_a_grown_file_is_told_to_the_guest(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk())
    os.truncate(sandbox.file("a.img"), 3 * SIZE_BYTES)
    assert sandbox.devices.resize(attachment.id) == 3 * SIZE_BYTES
    assert sandbox.side.size_of(f"vmplug-{attachment.device_id}") == 3 * SIZE_BYTES


def test_a_file_is_made_to_grow(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk())
    assert sandbox.devices.resize(attachment.id, 2 * SIZE_BYTES) == 2 * SIZE_BYTES
    assert sandbox.side.size_of(f"vmplug-{attachment.device_id}") == 2 * SIZE_BYTES


def test_a_disk_is_never_cut(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk())
    before = sandbox.picture()
    with pytest.raises(PolicyError, match="would lose data"):
        sandbox.devices.resize(attachment.id, SIZE_BYTES - 512)
    assert sandbox.picture() == before
    assert sandbox.machine.sizes == {}


@pytest.mark.parametrize("size_bytes", [None, 2 * SIZE_BYTES])
def test_what_a_vm_only_reads_keeps_its_size_until_it_comes_again(
    sandbox: Sandbox, size_bytes: int | None
) -> None:
    attachment = sandbox.devices.attach(sandbox.disk(ro=True))
    os.truncate(sandbox.file("a.img"), 2 * SIZE_BYTES)
    before = sandbox.picture()
    with pytest.raises(PolicyError, match="read-only") as caught:
        sandbox.devices.resize(attachment.id, size_bytes)
    assert caught.value.hint
    assert sandbox.picture() == before
    assert sandbox.machine.sizes == {}


@pytest.mark.parametrize("size_bytes", [None, 4 * SIZE_BYTES], ids=["none", "smaller"])
def test_a_qcow2_disk_is_never_cut_to_the_size_of_its_file(
    sandbox: Sandbox, size_bytes: int | None
) -> None:
    image = qcow2_image(sandbox.directory / "q.qcow2", 8, "inside")
    assert image.stat().st_size < 4 * SIZE_BYTES
    attachment = sandbox.devices.attach(sandbox.disk(image.name, options={"format": "qcow2"}))
    before = sandbox.picture()
    if size_bytes is None:
        assert sandbox.devices.resize(attachment.id) == 8 * SIZE_BYTES
    else:
        with pytest.raises(PolicyError, match="would lose data"):
            sandbox.devices.resize(attachment.id, size_bytes)
    assert sandbox.picture() == before
    assert set(sandbox.machine.sizes.values()) <= {8 * SIZE_BYTES}


def test_a_qcow2_disk_grows(sandbox: Sandbox) -> None:
    image = qcow2_image(sandbox.directory / "q.qcow2", 8, "inside")
    attachment = sandbox.devices.attach(sandbox.disk(image.name, options={"format": "qcow2"}))
    assert sandbox.devices.resize(attachment.id, 16 * SIZE_BYTES) == 16 * SIZE_BYTES
    assert sandbox.side.size_of(f"vmplug-{attachment.device_id}") == 16 * SIZE_BYTES


def test_a_size_that_the_device_of_the_host_does_not_have_is_refused(
    tmp_path: Path, *, is_restored: bool
) -> None:
    tree = HostTree(tmp_path / "host").block_device("8:0", "sda", size_bytes=4 * SIZE_BYTES)
    sandbox = Sandbox(tmp_path, root=tree.root, is_restored=is_restored)
    try:
        attachment = sandbox.devices.attach(
            DeviceInfo(container_path="/dev/x", dev_type=DevType.BLOCK, devnum=DevNum(8, 0))
        )
        before = sandbox.picture()
        with pytest.raises(PolicyError, match="only the host can grow it"):
            sandbox.devices.resize(attachment.id, 8 * SIZE_BYTES)
        assert sandbox.picture() == before
        assert sandbox.devices.resize(attachment.id) == 4 * SIZE_BYTES
    finally:
        sandbox.close()


def test_a_device_that_has_left_the_host_cannot_be_resized(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk())
    sandbox.file("a.img").unlink()
    before = sandbox.picture()
    with pytest.raises(NoSuchDevice):
        sandbox.devices.resize(attachment.id, 2 * SIZE_BYTES)
    assert sandbox.picture() == before


def test_a_device_that_has_left_the_host_can_still_be_detached(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk())
    sandbox.file("a.img").unlink()
    sandbox.devices.detach(attachment.id)
    assert held(sandbox) == []
    assert not sandbox.vmplugs()


# many at once


def test_threads_that_attach_one_device_plug_it_once(sandbox: Sandbox) -> None:
    manager, disk, start = sandbox.devices, sandbox.disk(), threading.Barrier(8)

    def attach(index: int) -> Attachment:
        start.wait()
        return manager.attach(disk, owner=f"c{index % 2}")

    with ThreadPoolExecutor(8) as pool:
        attachments = list(pool.map(attach, range(8)))
    assert len({a.device_id for a in attachments}) == 1
    assert len(sandbox.vmplugs()) == 1
    assert sorted((a.owner, a.count) for a in sandbox.devices.attachments()) == [
        ("c0", 4),
        ("c1", 4),
    ]


def test_threads_get_places_of_their_own(sandbox: Sandbox) -> None:
    infos = [sandbox.disk(f"{index}.img") for index in range(8)]
    manager, start = sandbox.devices, threading.Barrier(8)

    def attach(info: DeviceInfo) -> Attachment:
        start.wait()
        return manager.attach(info)

    with ThreadPoolExecutor(8) as pool:
        attachments = list(pool.map(attach, infos))
    places = [str(a.guest_address) for a in attachments]
    assert len(set(places)) == 8
    assert len(sandbox.vmplugs()) == 8


@pytest.mark.slow
def test_a_device_that_is_being_plugged_is_waited_for_as_long_as_that_takes(
    sandbox: Sandbox,
) -> None:
    is_plugging, may_go_on = threading.Event(), threading.Event()

    def notice(command: Command) -> None:
        if command.execute == "device_add":
            is_plugging.set()
            assert may_go_on.wait(SOON_S)

    sandbox.talk_through(lambda monitor: Hooked(monitor, notice))
    manager, disk = sandbox.devices, sandbox.disk()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(manager.attach, disk, owner="c1")
        assert is_plugging.wait(SOON_S)
        second = pool.submit(manager.attach, disk, owner="c2")
        assert not wait([second], 1.2).done  # it was one second, whoever was at work
        may_go_on.set()
        assert first.result(SOON_S).device_id == second.result(SOON_S).device_id
    assert held(sandbox) == [
        ("c1", "/dev/a.img", 1, State.ATTACHED),
        ("c2", "/dev/a.img", 1, State.ATTACHED),
    ]


def test_a_thread_that_waits_for_a_guest_blocks_no_other(sandbox: Sandbox) -> None:
    asked = threading.Event()

    def notice(command: Command) -> None:
        if command.execute == "device_del":
            asked.set()

    attachment = sandbox.devices.attach(sandbox.disk("a.img"))
    sandbox.machine.guest = Guest.SILENT
    sandbox.talk_through(lambda monitor: Hooked(monitor, notice))
    manager = sandbox.devices
    with ThreadPoolExecutor(1) as pool:
        detached = pool.submit(manager.detach, attachment.id, timeout_s=PATIENT_S)
        assert asked.wait(SOON_S)
        assert pci(manager.attach(sandbox.disk("b.img"))) == "11/00"
        assert not detached.done()
        sandbox.machine.wake_guest()
        detached.result(SOON_S)
    assert [a.container_path for a in manager.attachments()] == ["/dev/b.img"]


def test_two_threads_may_detach_one_device(sandbox: Sandbox) -> None:
    """Both see its remains before either takes them away."""
    both = threading.Barrier(2)

    def meet(command: Command) -> None:
        if command.execute == "blockdev-del":
            with suppress(threading.BrokenBarrierError):  # if they take turns
                both.wait(1)

    attachment = sandbox.devices.attach(sandbox.disk())
    sandbox.machine.guest = Guest.SILENT
    with pytest.raises(UnplugTimeout):
        sandbox.devices.detach(attachment.id, timeout_s=AT_ONCE_S)
    sandbox.machine.wake_guest()

    sandbox.talk_through(lambda monitor: Hooked(monitor, meet))
    manager = sandbox.devices
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(manager.detach, attachment.id, timeout_s=60) for _ in range(2)]
        for answer in answers:
            answer.result(SOON_S)
    assert held(sandbox) == []
    assert not sandbox.vmplugs()


def test_every_waiting_thread_hears_that_the_device_went(sandbox: Sandbox) -> None:
    asking, have_asked = threading.Barrier(3, timeout=SOON_S), set[int]()

    def notice(command: Command) -> None:
        if command.execute == "qom-list" and threading.get_ident() not in have_asked:
            have_asked.add(threading.get_ident())
            asking.wait()

    attachment = sandbox.devices.attach(sandbox.disk())
    sandbox.machine.guest = Guest.SILENT
    sandbox.talk_through(lambda monitor: Noticed(monitor, notice))
    manager = sandbox.devices
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(manager.detach, attachment.id, timeout_s=60) for _ in range(2)]
        asking.wait()
        sandbox.machine.wake_guest()
        for answer in answers:
            answer.result(SOON_S)
    assert held(sandbox) == []
    assert not sandbox.vmplugs()


class Intruded(Qemu):
    """A VM to which somebody else comes between a manager's look and its act."""

    def __init__(self, monitor: Monitor, intrude: Callable[[], object]) -> None:
        super().__init__(monitor)
        self._intrude = intrude

    def places(self, known: Mapping[str, str] = NO_PLACES) -> Offer:  # noqa: ARG002
        """The offer as it was before the intrusion."""
        offer = self.offer()
        self._intrude()
        return offer


@pytest.mark.parametrize("name", ["a.img", "b.img"], ids=["one disk", "two disks"])
def test_two_managers_of_one_vm_do_not_get_in_each_others_way(sandbox: Sandbox, name: str) -> None:
    intruders: list[Attachment] = []

    def intrude() -> None:
        if not intruders:
            intruders.append(sandbox.devices.attach(sandbox.disk(name), owner="c2"))

    hypervisor = Intruded(sandbox.side.monitor(), intrude)
    with DeviceManager.open(
        vm=sandbox.vm, host=sandbox.root, hypervisor=hypervisor, state_dir=sandbox.state_dir
    ) as manager:
        mine = manager.attach(sandbox.disk("a.img"), owner="c1")

    (other,) = intruders
    if name == "a.img":
        assert mine.device_id == other.device_id
    else:
        assert [pci(other), pci(mine)] == ["10/00", "11/00"]
    assert {a.owner for a in sandbox.devices.attachments()} == {"c1", "c2"}
    assert sandbox.vmplugs() == {f"vmplug-{mine.device_id}", f"vmplug-{other.device_id}"}


# the end


def test_closing_leaves_the_devices_where_they_are(sandbox: Sandbox) -> None:
    hypervisor = FakeHypervisor()
    with DeviceManager.open(
        vm="vm-1", host=sandbox.root, hypervisor=hypervisor, state_dir=sandbox.state_dir
    ) as manager:
        attachment = manager.attach(sandbox.disk())
    assert hypervisor.find_devices() == {attachment.device_id: True}
    with DeviceManager.open(
        vm="vm-1", host=sandbox.root, hypervisor=hypervisor, state_dir=sandbox.state_dir
    ) as manager:
        assert manager.attachments() == [attachment]
        manager.detach(attachment.id)
    assert hypervisor.find_devices() == {}
