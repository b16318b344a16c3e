"""What thing a device is, whatever has its name: equal while it is the same, and only then."""

from pathlib import Path

import pytest

from tests.support.checking import want, want_file
from tests.support.disks import disk_image, loop_device
from tests.support.pci_tree import PciTree
from tests.support.tree import HostTree
from vmplug.host.check.thing import identify
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.resolve import resolve
from vmplug.host.root import THIS_HOST, HostRoot

BDF = "0000:3b:00.0"


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


def test_a_function_is_another_when_it_was_swapped(tmp_path: Path) -> None:
    tree = PciTree(tmp_path / "host")
    tree.pci_function(BDF, driver="nvme", group=26)
    before = identify(find_vfio_device(BDF, tree.root), tree.root)
    assert before == identify(find_vfio_device(BDF, tree.root), tree.root)
    directory = tree.path / tree.real(BDF)[1:]
    directory.rename(directory.with_name("kept"))
    directory.mkdir()
    for file in directory.with_name("kept").iterdir():
        file.rename(directory / file.name)
    assert identify(find_vfio_device(BDF, tree.root), tree.root) != before
