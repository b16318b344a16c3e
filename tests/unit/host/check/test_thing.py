"""What thing a device is, whatever has its name: equal while it is the same, and only then."""

from pathlib import Path

import pytest

from tests.support.checking import want, want_file
from tests.support.disks import disk_image, loop_device
from tests.support.pci_tree import PciTree
from tests.support.tree import HostTree
from vmplug.host.check.thing import has_changed, identify
from vmplug.host.kind import is_other_thing
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.resolve import resolve
from vmplug.host.root import THIS_HOST, HostRoot

BDF, OTHER = "0000:3b:00.0", "0000:3b:00.1"


def thing(name: str, root: HostRoot = THIS_HOST) -> str | None:
    """Of a file by its path, or of a block device by its number."""
    request = want_file(name) if name.startswith("/") else want(name)
    return identify(resolve(request, root), root)


def test_a_file_stays_itself_while_it_is_written_to_and_renamed(tmp_path: Path) -> None:
    path = disk_image(tmp_path / "a.img", 1, "x")
    before = thing(str(path))
    assert before
    path.write_bytes(b"shorter")
    assert thing(str(path)) == before
    other = path.rename(tmp_path / "b.img")
    assert thing(str(other)) == before
    (tmp_path / "link.img").hardlink_to(other)
    assert thing(str(tmp_path / "link.img")) == before


def test_a_file_in_the_place_of_another_is_another(tmp_path: Path) -> None:
    """Its inode number is often the same: most file systems reuse it at once."""
    path, seen = tmp_path / "a.img", set[str | None]()
    for _ in range(20):
        seen.add(thing(str(disk_image(path, 1, "x"))))
        path.unlink()
    assert len(seen) == 20


def test_a_disk_is_another_when_its_number_was_given_again(tree: HostTree) -> None:
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"})
    disk = "/sys/devices/virtual/block/sda"
    tree.file(f"{disk}/diskseq", "3\n").file(f"{disk}/sda1/start", "2048\n")
    whole, part = thing("8:0", tree.root), thing("8:1", tree.root)
    assert (whole, part) == ("block 8:0 3", "block 8:1 3 2048")
    tree.file(f"{disk}/sda1/size", "4096\n")  # it has grown
    assert thing("8:1", tree.root) == part
    tree.file(f"{disk}/sda1/start", "4096\n")
    assert thing("8:1", tree.root) != part
    tree.file(f"{disk}/diskseq", "4\n")
    assert thing("8:0", tree.root) != whole


def test_a_kernel_without_sequences_tells_a_disk_by_its_number(tree: HostTree) -> None:
    tree.block_device("8:0", "sda")
    assert thing("8:0", tree.root) == "block 8:0 -"


@pytest.mark.root
def test_a_loop_device_with_another_file_is_another(tmp_path: Path) -> None:
    first, second = (disk_image(tmp_path / name, 1, name) for name in ("a.img", "b.img"))
    seen = set()
    for image in (first, second, first):
        with loop_device(image) as node:
            number = HostRoot().read_attribute(f"/sys/block/{node.name}/dev")
            assert number
            found = thing(number.decode().strip())
            assert found == thing(number.decode().strip())
            seen.add(found)
    assert len(seen) == 3


@pytest.fixture
def pci(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path / "host").pci_function(BDF, driver="nvme", group=26)


def function(tree: PciTree) -> str:
    found = identify(find_vfio_device(BDF, tree.root), tree.root)
    assert found
    return found


def test_a_function_is_another_when_it_was_swapped(pci: PciTree) -> None:
    before = function(pci)
    assert (function(pci), has_changed(before, pci.root)) == (before, False)
    pci.swap_function(BDF)
    assert is_other_thing(before, function(pci))
    assert has_changed(before, pci.root)


def test_a_function_is_its_address_its_vendor_and_device_and_its_directory(pci: PciTree) -> None:
    inode = (pci.path / pci.real(BDF)[1:]).stat().st_ino
    assert function(pci) == f"vfio {BDF}:8086:0953:{inode}"
    pci.file(f"{pci.real(BDF)}/device", "0x0a55\n")
    assert function(pci) == f"vfio {BDF}:8086:0a55:{inode}"
    for name in ("vendor", "device"):  # a capture may lack them
        (pci.path / pci.real(BDF)[1:] / name).unlink()
    assert function(pci) == f"vfio {BDF}:8086:0953:{inode}"


def test_a_function_that_a_kernel_unbinds_is_identified_without_its_uevent(pci: PciTree) -> None:
    """The kernel locks the device meanwhile: a read of that file waits as long as the unbind."""

    class Locked(HostRoot):
        def read_attribute(self, path: str) -> bytes | None:
            assert not path.endswith("/uevent")
            return super().read_attribute(path)

    before = function(pci)
    assert not has_changed(before, Locked(pci.path))
    pci.swap_function(BDF)
    assert has_changed(before, Locked(pci.path))


def test_a_function_that_an_older_vmplug_knew_is_still_that_one(pci: PciTree) -> None:
    now = function(pci)
    older = now.replace(":8086:0953:", ":")
    assert not is_other_thing(older, now)
    assert not has_changed(older, pci.root)
    pci.swap_function(BDF)
    assert has_changed(older, pci.root)


def test_a_member_that_another_group_has_now_is_another_group(pci: PciTree) -> None:
    pci.pci_function(OTHER, driver="nvme", group=26)
    both = function(pci)
    assert both.count("8086") == 2
    pci.swap_function(OTHER)
    assert has_changed(both, pci.root)


@pytest.mark.parametrize("thing", [None, "vfio 0000:ff:00.0:8086:0953:9", "block 240:9 3 -"])
def test_what_is_gone_is_not_another(pci: PciTree, thing: str | None) -> None:
    assert not has_changed(thing, pci.root)


def test_a_disk_whose_number_was_given_again_has_changed(tree: HostTree) -> None:
    tree.block_device("8:0", "sda").file("/sys/devices/virtual/block/sda/diskseq", "3\n")
    assert not has_changed("block 8:0 3", tree.root)
    assert has_changed("block 8:0 2", tree.root)
