"""What is behind a loop device, in the kernel's own words."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.disks import MIB, disk_image, loop_device
from tests.support.tree import HostTree
from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError
from vmplug.host.block.device import BlockDevice
from vmplug.host.block.loop import LoopBacking, read_backing_file
from vmplug.host.block.loop_files import Loop, LoopIndex, read_loops
from vmplug.host.block.twins import read_own_name
from vmplug.host.block.usage import read_usage
from vmplug.host.kind import Identity
from vmplug.host.resolve import resolve
from vmplug.host.root import HostRoot
from vmplug.oci.info import DeviceInfo, DevType


def backing(tree: HostTree, **files: str | bytes) -> LoopBacking | None:
    tree.block_device("7:0", "loop0", loop=files)
    return read_backing_file("/sys/block/loop0", tree.root)


def live_loop(node: Path) -> BlockDevice:
    status = node.stat()
    devnum = DevNum(os.major(status.st_rdev), os.minor(status.st_rdev))
    info = DeviceInfo(container_path="/dev/x", dev_type=DevType.BLOCK, devnum=devnum)
    device = resolve(info, HostRoot())
    assert isinstance(device, BlockDevice)
    return device


def test_a_device_without_a_file_loops_to_nothing(tree: HostTree) -> None:
    tree.block_device("7:1", "loop1").block_device("8:0", "sda")
    assert backing(tree) is None
    assert read_backing_file("/sys/block/loop1", tree.root) is None
    assert read_backing_file("/sys/block/sda", tree.root) is None


def test_a_file_that_is_just_being_taken_away_is_none(tree: HostTree) -> None:
    assert backing(tree, backing_file="") is None


def test_a_whole_file_has_neither_offset_nor_limit(tree: HostTree) -> None:
    found = backing(tree, backing_file="/a.img\n", offset="0\n", sizelimit="0\n")
    assert found == LoopBacking(backing_file="/a.img")
    assert backing_of_partless(tree) == found


def backing_of_partless(tree: HostTree) -> LoopBacking | None:
    """The same without the files that older kernels leave out."""
    tree.block_device("7:1", "loop1", loop={"backing_file": "/a.img\n"})
    return read_backing_file("/sys/block/loop1", tree.root)


def test_offset_and_limit_are_bytes(tree: HostTree) -> None:
    found = backing(tree, backing_file="/a.img\n", offset="1048576\n", sizelimit="512\n")
    assert found == LoopBacking(
        backing_file="/a.img", offset_bytes=1 << 20, size_limit_bytes=512, deleted=False
    )


@pytest.mark.parametrize(
    "name",
    [
        b"/a b.img",
        b"/a\tb",
        b"/a\nb",
        b"/ a ",
        b"/a\n",
        b"/a\\040b",
        b"/a\xff\xfe",
        "/ä\u2028".encode(),
        b"/(deleted)",
        b"/a (deleted) b",
    ],
)
def test_every_character_of_a_name_is_kept(tree: HostTree, name: bytes) -> None:
    found = backing(tree, backing_file=name + b"\n")
    assert found == LoopBacking(backing_file=os.fsdecode(name))


def test_a_deleted_file_is_said_to_be_so_without_its_mark(tree: HostTree) -> None:
    found = backing(tree, backing_file="/a.img (deleted)\n")
    assert found == LoopBacking(backing_file="/a.img", deleted=True)


def test_a_new_file_of_a_deleted_ones_name_is_not_its_file(tree: HostTree) -> None:
    tree.file("/a.img", b"new")
    found = backing(tree, backing_file="/a.img (deleted)\n")
    assert found == LoopBacking(backing_file="/a.img", deleted=True)
    info = DeviceInfo(container_path="/x", dev_type=DevType.BLOCK, devnum=DevNum(7, 0))
    assert resolve(info, tree.root).related_identities == ()


def test_a_file_that_is_really_called_deleted_is_there(tree: HostTree) -> None:
    tree.file("/a (deleted)", b"x")
    found = backing(tree, backing_file="/a (deleted)\n")
    assert found == LoopBacking(backing_file="/a (deleted)")


def test_a_deleted_file_that_was_called_deleted_loses_one_mark(tree: HostTree) -> None:
    found = backing(tree, backing_file="/a (deleted) (deleted)\n")
    assert found == LoopBacking(backing_file="/a (deleted)", deleted=True)


@pytest.mark.parametrize("directory", ["file", "circle", "absent"])
def test_a_deleted_file_whose_directory_became_something_else_is_deleted(
    tree: HostTree, directory: str
) -> None:
    tree.file("/file").link("/circle", "circle")
    found = backing(tree, backing_file=f"/{directory}/a.img (deleted)\n")
    assert found == LoopBacking(backing_file=f"/{directory}/a.img", deleted=True)


@pytest.mark.parametrize("attribute", ["offset", "sizelimit"])
def test_a_number_that_is_none_is_refused_with_its_file(tree: HostTree, attribute: str) -> None:
    with pytest.raises(AttributeReadError, match="is not a number") as caught:
        backing(tree, backing_file="/a.img\n", **{attribute: "much\n"})
    assert caught.value.path == f"/sys/block/loop0/loop/{attribute}"


def test_the_file_is_among_the_devices_relatives(tree: HostTree) -> None:
    backing(tree, backing_file="/a.img\n")
    info = DeviceInfo(container_path="/x", dev_type=DevType.BLOCK, devnum=DevNum(7, 0))
    assert Identity.parse("file:/a.img") in resolve(info, tree.root).related_identities


def test_the_usage_of_a_host_lists_configured_loop_devices_only(tree: HostTree) -> None:
    backing(tree, backing_file="/a.img\n")
    tree.block_device("7:1", "loop1").block_device("8:0", "sda", loop={"backing_file": "/b\n"})
    assert read_usage(tree.root).loops == (
        Loop(
            devnum=DevNum(7, 0),
            device_node="/dev/loop0",
            backing=LoopBacking(backing_file="/a.img"),
        ),
    )


def test_a_loop_device_that_goes_while_it_is_read_is_passed_over(tree: HostTree) -> None:
    backing(tree, backing_file="/a.img\n")
    (tree.path / "sys/block/loop0/dev").unlink()
    assert read_usage(tree.root).loops == ()


# This host's kernel says the same


@pytest.mark.root
@pytest.mark.parametrize("name", ["a b.img", "a\nb", "a\\b", "a (deleted)", "ä", "a\udcff"])
def test_the_kernel_writes_names_as_they_are(tmp_path: Path, name: str) -> None:
    image = disk_image(tmp_path / name, 1, "x")
    with loop_device(image) as node:
        assert live_loop(node).backing == LoopBacking(backing_file=str(image))


@pytest.mark.root
def test_the_kernel_says_offset_limit_and_read_only(tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 4, "x")
    with loop_device(image, read_only=True, offset=1 << 20, size_limit=1 << 19) as node:
        device = live_loop(node)
        size = subprocess.run(
            ["blockdev", "--getsize64", node], capture_output=True, check=True, text=True
        )
    assert device.backing == LoopBacking(
        backing_file=str(image), offset_bytes=1 << 20, size_limit_bytes=1 << 19
    )
    assert device.read_only
    assert device.size_bytes == int(size.stdout) == 1 << 19


@pytest.mark.root
def test_the_kernel_marks_a_deleted_file(tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "x")
    with loop_device(image) as node:
        image.unlink()
        assert live_loop(node).backing == LoopBacking(backing_file=str(image), deleted=True)


def own_name(node: Path) -> str:
    root, name = HostRoot(), node.name
    found = read_own_name(f"/sys/class/block/{name}", f"/sys/class/block/{name}", root)
    assert found
    return found


@pytest.mark.root
@pytest.mark.parametrize("fate", ["replaced", "deleted"])
def test_two_files_that_had_one_name_are_two_disks_for_guests(tmp_path: Path, fate: str) -> None:
    image = disk_image(tmp_path / "a.img", 1, "first")
    with loop_device(image) as first:
        before = own_name(first)
        disk_image(tmp_path / "new.img", 1, "second").rename(image)
        with loop_device(image) as second, loop_device(image) as again:
            assert own_name(second) == own_name(again) == before
            if fate == "deleted":
                image.unlink()
            names = {own_name(first), own_name(second)}
            assert len(names) == 2
            assert own_name(second) == own_name(again)


@pytest.mark.root
def test_the_parts_of_one_file_are_disks_of_their_own_for_guests(tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 4, "parts")
    with (
        loop_device(image) as whole,
        loop_device(image, size_limit=MIB) as first,
        loop_device(image, offset=MIB) as second,
    ):
        assert len({own_name(whole), own_name(first), own_name(second)}) == 3


def test_an_image_of_a_copied_host_is_looked_at_once_however_many_loops_there_are(
    tree: HostTree,
) -> None:
    """Only the names are known there, and each may have another one by now."""

    class Counting(HostRoot):
        looks = 0

        def stat_or_none(
            self, path: str, *, follow_symlinks: bool = True
        ) -> os.stat_result | None:
            self.looks += 1
            return super().stat_or_none(path, follow_symlinks=follow_symlinks)

    tree.file("/srv/a.img").file("/srv/b.img")
    os.link(tree.path / "srv/a.img", tree.path / "srv/same.img")
    names = {0: "/srv/same.img", 1: "/srv/a.img (deleted)", 2: "/srv/gone.img", 3: "/srv/b.img"}
    for number in range(20):
        file = names.get(number, f"/snaps/{number}")
        tree.block_device(f"7:{number}", f"loop{number}", loop={"backing_file": f"{file}\n"})
    root = Counting(tree.path)
    index = LoopIndex(read_loops(root), root)
    for path, number in (("/srv/a.img", 0), ("/srv/gone.img", 2), ("/srv/b.img", 3)):
        root.looks = 0
        assert [loop.devnum.minor for loop in index.find_on(path)] == [number]
        assert root.looks == 1
