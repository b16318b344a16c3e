"""`show_thing`: a thing of the host, with the VMs of the journal that have it."""

from pathlib import Path

import pytest

from tests.support.journal import attach_row, device_record, lay_journal, vm_record
from tests.support.pci_tree import PciTree
from tests.support.tree import HostTree
from vmplug.errors import NoSuchDevice, StoreError
from vmplug.host.finding import Code, Severity
from vmplug.host.kind import DeviceType
from vmplug.host.thing.thing import Thing
from vmplug.journal.journal import Journal
from vmplug.manager.host_listing import show_thing
from vmplug.manager.setup import Setup


def users(thing: Thing) -> list[tuple[str, str]]:
    found = [(part.name, use) for part in thing.walk() for use in part.uses]
    return [(name, use.who) for name, use in found if use.code is Code.IN_USE_BY_VM]


def test_a_vm_is_named_at_what_it_has(tmp_path: Path) -> None:
    tree = HostTree(tmp_path / "host").file("/srv/a.img", b"x").file("/srv/work/file")
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"})
    setup = Setup(host=tree.root, state_dir=str(tmp_path / "state"))
    with pytest.raises(StoreError, match="there is no state directory"):
        show_thing("sda", setup=setup)
    (tmp_path / "state").mkdir()
    assert users(show_thing("sda", setup=setup)) == []  # no journal, and none is made
    assert not list((tmp_path / "state").iterdir())
    (tmp_path / "state").rmdir()
    lay_journal(tmp_path / "state")
    with Journal.open(str(tmp_path / "state")) as journal:
        journal.add_vm(vm_record())
        attach_row(journal, device_record("block:8:1", "/dev/sda1"))
        attach_row(journal, device_record("file:/srv/a.img", "/srv/a.img"))
        for tag in ("work", "data"):
            share = f"share:{tag}:/srv/work"
            attach_row(journal, device_record(share, "/srv/work", DeviceType.VIRTIO_9P))
    assert users(show_thing("sda", setup=setup)) == [("/dev/sda1", "VM 'sb1'")]
    assert users(show_thing("/srv/a.img", setup=setup)) == [("/srv/a.img", "VM 'sb1'")]
    shared = show_thing("/srv/work", setup=setup)
    assert users(shared) == [("/srv/work", "VM 'sb1'")]
    assert {use.severity for use in shared.uses} == {Severity.WARNING}
    without = show_thing("sda", with_vms=False, setup=setup)
    assert users(without) == []
    assert "the VMs of vmplug" in without.unknown[-1]


def test_a_socket_is_served_and_perhaps_in_use(tmp_path: Path) -> None:
    tree = HostTree(tmp_path / "host").node("/run/fs.sock", "s")
    setup = Setup(host=tree.root, state_dir=str(tmp_path))
    thing = show_thing("/run/fs.sock", setup=setup)
    assert (thing.kind, thing.title, thing.uses) == ("socket", None, ())
    assert "none can be seen" in thing.unknown[0]
    tree.unix_socket("/run/fs.sock", 77).process(812, "virtiofsd", "socket:[77]")
    thing = show_thing("/run/fs.sock", setup=setup)
    assert (thing.title, thing.uses) == ("served by virtiofsd, process 812", ())
    tree.unix_socket("/run/fs.sock", 78, listens=False)
    (use,) = show_thing("/run/fs.sock", setup=setup).uses
    assert (use.code, use.who) == (Code.BACKEND_BUSY, "a client of virtiofsd, process 812")


def test_a_name_that_nothing_has_is_said_in_the_same_words(tmp_path: Path) -> None:
    setup = Setup(host=PciTree(tmp_path / "host").root, state_dir=str(tmp_path / "state"))
    for name in ("sda", "3b:00.0", "/dev/vfio/26", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"):
        with pytest.raises(NoSuchDevice) as caught:
            show_thing(name, setup=setup)
        assert caught.value.message == f"nothing on this host goes by {name!r}"
