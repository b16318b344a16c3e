"""Which format a disk looks like, and when anybody looks."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.disks import loop_device
from tests.support.tree import MIB, HostTree
from vmplug.devnum import DevNum
from vmplug.host.block.content import look_into
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.formats import HEAD_BYTES, TAIL_BYTES, ImageFormat, find_format
from vmplug.host.block.sysfs import read_block_device, read_disk_file
from vmplug.host.kind import FoundBy
from vmplug.host.root import HostRoot

BOCHS = b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0")
CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
DESCRIPTOR = b"# Disk DescriptorFile\nversion=1\nCID=163d788f\nparentCID=ffffffff\n"
IMAGE = "/srv/a.img"
SDA = "/sys/devices/virtual/block/sda"


@pytest.mark.parametrize(
    ("head", "format_"),
    [
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (b"KDMV\1\0\0\0", "vmdk"),
        (b"COWD", "vmdk"),
        (DESCRIPTOR, "vmdk"),
        (DESCRIPTOR.replace(b"\n", b"\r\n"), "vmdk"),
        (b"# a\n#b\n \n\nversion=3\n", "vmdk"),
        (DESCRIPTOR.replace(b"=1", b"=4"), "vmdk"),
        (DESCRIPTOR.replace(b"=1", b" = 1"), "vmdk"),
        (DESCRIPTOR.replace(b"version", b'encoding="UTF-8"\nversion'), "vmdk"),
        (b"\xef\xbb\xbf\n\t" + DESCRIPTOR, "vmdk"),
        (struct.pack("<Q", 0xCAFEBABE), "vmdk"),
        (b"QED\0", "qed"),
        (b"WithoutFreeSpace", "parallels"),
        (b"WithouFreSpacExt", "parallels"),
        (b"LUKS\xba\xbe\0\1", "luks"),
        (b"LUKS\xba\xbe\0\2", "luks"),
        (BOCHS, "bochs"),
        (CLOOP, "cloop"),
        (bytes(64) + struct.pack("<I", 0xBEDA107F), "vdi"),
        (b"QFI\xfb\0\0\0\1", "qcow"),
        (b"QFI\xfb\0\0\0\2", "qcow2"),
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"QFI\xfb", "qcow2"),
        # and disks that are none of them
        (b"", None),
        (bytes(HEAD_BYTES), None),
        (b"#!/bin/sh\necho version=1\n", None),
        (b"# only comments\n", None),
        (b"version=4\n", None),
        (b"# Disk Descriptor\n", None),
        (struct.pack(">Q", 0xCAFEBABE), None),
        (b"x\nversion=1\n", None),
        (b"xvhdxfile", None),
        (b"KDM", None),
        (bytes(510) + b"\x55\xaa", None),
        (b"\xeb\x63\x90GRUB", None),
    ],
)
def test_a_format_is_known_by_its_first_bytes(head: bytes, format_: str | None) -> None:
    assert find_format(head.ljust(HEAD_BYTES, b"\0")) == format_
    assert find_format(head) == format_


@pytest.mark.parametrize(
    ("tail", "format_"),
    [
        (b"conectix", "vpc"),  # of fixed size: raw but for its footer
        (b"\0conectix", "vpc"),
        (b"koly", "dmg"),
        (b"", None),
        (bytes(100) + b"conectix", None),
    ],
)
def test_some_are_known_by_their_footer(tail: bytes, format_: str | None) -> None:
    assert find_format(bytes(HEAD_BYTES), tail.ljust(TAIL_BYTES, b"\0")) == format_


def test_a_dmg_image_is_known_by_its_name_as_in_qemu() -> None:
    assert find_format(b"", name="/srv/a.dmg") == "dmg"
    assert find_format(b"", name="/srv/dmg") is None


@given(st.binary(max_size=HEAD_BYTES))
def test_any_bytes_have_a_format_or_none(head: bytes) -> None:
    assert find_format(b"\1" + head) is None or head
    find_format(head)


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img (qemu-utils)")
@pytest.mark.parametrize(
    ("format_", "more"),
    [
        *((f, ()) for f in ("vhdx", "vmdk", "vdi", "vpc", "qed", "parallels", "qcow", "qcow2")),
        pytest.param("luks", (), marks=pytest.mark.slow),  # it tries out how fast this machine is
        ("raw", ()),
        *(("vpc", ("subformat=fixed",)), ("vhdx", ("subformat=fixed",))),
        *(("vmdk", ("subformat=monolithicFlat",)), ("vmdk", ("subformat=streamOptimized",))),
    ],
)
def test_images_of_qemus_own_tools_are_known(
    tmp_path: Path, format_: str, more: tuple[str, ...]
) -> None:
    options = ["-o", *more] if more else []
    if format_ == "luks":
        options = ["--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"]
    path = tmp_path / "image"
    command = ["qemu-img", "create", "-q", "-f", format_, *options, str(path), "4M"]
    for _ in range(100):  # on a busy machine luks may not learn how fast it is
        made = subprocess.run(command, stderr=subprocess.PIPE, check=False)
        if b"accurate CPU usage" not in made.stderr:
            break
    assert made.returncode == 0, made.stderr
    seen = look_into(read_disk_file(str(path), HostRoot()), None, HostRoot())
    assert seen.looks_like == (None if format_ == "raw" else format_)


# When anybody looks


def vhdx(tree: HostTree) -> DiskFile:
    tree.file(IMAGE, b"vhdxfile".ljust(MIB, b"\0"))
    return read_disk_file(IMAGE, tree.root)


def test_a_file_is_looked_into_only_when_no_format_is_stated(tree: HostTree) -> None:
    disk = vhdx(tree)
    assert look_into(disk, None, tree.root) == disk._replace(looks_like="vhdx")
    assert look_into(disk, ImageFormat.RAW, tree.root) == disk


@pytest.mark.parametrize(
    ("used", "most", "has_aio"),
    [
        ("0", "65536", True),
        ("64512", "65536", True),
        ("64513", "65536", False),
        ("65536", "65536", False),
        ("0", "0", False),
        (None, "65536", True),
    ],
)
def test_a_context_for_native_aio_must_be_left(
    tree: HostTree, used: str | None, most: str, *, has_aio: bool
) -> None:
    tree.file("/proc/sys/fs/aio-max-nr", f"{most}\n")
    if used:
        tree.file("/proc/sys/fs/aio-nr", f"{used}\n")
    assert look_into(vhdx(tree), ImageFormat.RAW, tree.root).has_aio is has_aio


@pytest.mark.parametrize(
    ("physical", "offset", "expected"),
    [
        ("4096", None, 4096),
        ("4096", "0", 4096),
        ("4096", "3584", None),  # a partition off the grid
        ("0", None, None),
        ("6144", None, None),
        (str(4 << 20), None, None),  # QEMU takes 2 MiB at most
        (None, None, None),
    ],
)
def test_the_physical_sectors_are_those_of_the_queue(
    tree: HostTree, physical: str | None, offset: str | None, expected: int | None
) -> None:
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"})
    if physical:
        tree.file(f"{SDA}/queue/physical_block_size", f"{physical}\n")
    if offset:
        tree.file(f"{SDA}/sda1/alignment_offset", f"{offset}\n")
    disk = read_block_device(DevNum(8, 1), "/dev/sda1", FoundBy.SYSFS, tree.root)
    seen = look_into(disk, None, tree.root)
    assert isinstance(seen, BlockDevice)
    assert seen.queue
    assert seen.queue.physical_bytes == expected
    assert seen.physical_bytes == (expected or 512)


def test_a_sparse_file_lacks_room_and_says_how_much_is_left(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.touch()
    os.truncate(image, 8 * MIB)
    sparse = look_into(read_disk_file(str(image), HostRoot()), ImageFormat.RAW, HostRoot())
    assert isinstance(sparse, DiskFile)
    assert (sparse.unallocated_bytes, bool(sparse.free_bytes)) == (8 * MIB, True)
    os.posix_fallocate(os.open(image, os.O_RDWR), 0, 8 * MIB)
    whole = look_into(read_disk_file(str(image), HostRoot()), ImageFormat.RAW, HostRoot())
    assert isinstance(whole, DiskFile)
    assert (whole.unallocated_bytes, whole.free_bytes) == (0, None)


@pytest.mark.root
@pytest.mark.parametrize("kind", [["tmpfs", "-o", "size=0"], ["ramfs"]])
def test_a_file_system_without_a_limit_is_not_full(tmp_path: Path, kind: list[str]) -> None:
    subprocess.run(["mount", "-t", *kind, "none", tmp_path], check=True)
    try:
        image = tmp_path / "a.img"
        image.touch()
        os.truncate(image, 8 * MIB)
        sparse = look_into(read_disk_file(str(image), HostRoot()), ImageFormat.RAW, HostRoot())
        assert isinstance(sparse, DiskFile)
        assert sparse.unallocated_bytes
        assert sparse.free_bytes is None
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_file_that_goes_while_vmplug_looks_into_it_is_no_crash(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.touch()
    os.truncate(image, 8 * MIB)

    class Racing(HostRoot):
        def stat(self, path: str) -> os.stat_result | None:
            status = super().stat(path)
            image.unlink()
            return status

    found = look_into(read_disk_file(str(image), HostRoot()), ImageFormat.RAW, Racing())
    assert isinstance(found, DiskFile)
    assert (found.unallocated_bytes, found.free_bytes) == (8 * MIB, None)


def test_the_unit_of_direct_io_is_asked_for_only_where_a_file_ends_in_one(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    for size, is_asked in ((MIB, False), (MIB + 512, True), (MIB + 100, True)):
        image.write_bytes(bytes(size))
        disk = read_disk_file(str(image), HostRoot())
        if not disk.direct_io:
            pytest.skip("the file system of temporary files has no direct I/O")
        seen = look_into(disk, ImageFormat.RAW, HostRoot())
        assert isinstance(seen, DiskFile)
        assert (seen.direct_io_bytes in {512, 1024, 2048, 4096}) is is_asked


def test_a_raw_disk_is_never_read_whatever_a_guest_wrote(tree: HostTree) -> None:
    for content in (
        b"QFI\xfb",
        b"QFI\xfb\0\0\0\7" + bytes(200),
        bytes(4096) + b"NVDIMM_PFN_INFO\0",
    ):
        tree.file(IMAGE, content.ljust(2 * MIB, b"\0"))
        disk = read_disk_file(IMAGE, tree.root)
        assert look_into(disk, ImageFormat.RAW, tree.root) == disk


def test_the_node_of_another_host_is_never_opened(tree: HostTree) -> None:
    tree.file("/dev/sdb", b"vhdxfile")
    disk = BlockDevice(devnum=DevNum(8, 16), device_node="/dev/sdb", found_by=FoundBy.SYSFS)
    assert look_into(disk, None, tree.root) == disk


@pytest.mark.root
@pytest.mark.parametrize(
    ("content", "looks_like"),
    [
        (b"vhdxfile", "vhdx"),
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"LUKS\xba\xbe\0\2", None),
        (b"", None),
    ],
)
def test_a_block_device_is_read_on_the_running_host(
    tmp_path: Path, content: bytes, looks_like: str | None
) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(content.ljust(MIB, b"\0"))
    with loop_device(image) as node:
        disk = BlockDevice(devnum=DevNum(7, 0), device_node=str(node), found_by=FoundBy.SYSFS)
        seen = look_into(disk, None, HostRoot())
        assert (seen.looks_like, seen) == (looks_like, disk._replace(looks_like=looks_like))
        assert look_into(disk, ImageFormat.RAW, HostRoot()) == disk


class Slow(HostRoot):
    """This host, whose kernel reads no device without waiting, as Linux 6.12 does of zram."""

    def read_within(self, path: str, length: int, patience_s: float) -> bytes | None:
        assert path.startswith("/")
        assert length
        assert patience_s
        return b""


@pytest.mark.parametrize(("content", "format_"), [(b"vhdxfile", "vhdx"), (b"data", None)])
def test_a_device_that_the_kernel_cannot_read_without_waiting_is_read_all_the_same(
    tmp_path: Path, content: bytes, format_: str | None
) -> None:
    node = tmp_path / "zram0"
    node.write_bytes(content.ljust(MIB, b"\0"))
    device = BlockDevice(DevNum(252, 0), str(node), FoundBy.SYSFS, sysfs_path=str(tmp_path))
    found = look_into(device, None, Slow())
    assert isinstance(found, BlockDevice)
    assert (found.looks_like, found.is_silent) == (format_, False)
