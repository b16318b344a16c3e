"""Disk image files: the header of qcow2, which a guest may have written, and what the file can."""

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.tree import GIB, MIB, HostTree
from vmplug.host.block.image_faults import find_faults
from vmplug.host.block.qcow2 import Qcow2Header, read_qcow2_header
from vmplug.host.block.sysfs import read_disk_file
from vmplug.host.root import HostRoot

MAGIC = b"QFI\xfb"


def header(
    *,
    version: int = 3,
    name: bytes = b"",
    name_offset: int = 104,
    size: int = GIB,
    incompatible: int = 0,
) -> bytes:
    offset, length = (name_offset, len(name)) if name else (0, 0)
    fixed = struct.pack(">4sIQIIQ", MAGIC, version, offset, length, 16, size)
    rest = fixed.ljust(72, b"\0") + struct.pack(">Q", incompatible)
    return rest.ljust(104, b"\0").ljust(min(offset, 1 << 16), b"\0") + name


def read(tree: HostTree, content: bytes) -> Qcow2Header | None:
    tree.file("/a.img", content)
    return read_qcow2_header("/a.img", tree.root)


@pytest.mark.parametrize(
    "content", [b"", b"Q", MAGIC[:3], b"\0" * 4096, b"X" + MAGIC, b"KDMV" * 100]
)
def test_whatever_does_not_begin_like_one_is_no_qcow2(tree: HostTree, content: bytes) -> None:
    assert read(tree, content) is None


def test_an_absent_file_is_no_qcow2(tree: HostTree) -> None:
    assert read_qcow2_header("/absent", tree.root) is None


@pytest.mark.parametrize("version", [2, 3])
def test_an_image_alone_names_no_other_file(tree: HostTree, version: int) -> None:
    found = read(tree, header(version=version, size=5 * GIB))
    assert found == Qcow2Header(5 * GIB, None, external_data=False)


@pytest.mark.parametrize("name", ["base.img", "/etc/shadow", "json:{}", "nbd://host", "ä b"])
def test_the_backing_file_is_the_headers_own_text(tree: HostTree, name: str) -> None:
    found = read(tree, header(name=name.encode()))
    assert found == Qcow2Header(GIB, name, external_data=False)


def test_a_name_that_is_no_text_is_still_a_name(tree: HostTree) -> None:
    found = read(tree, header(name=b"\xff\xfe"))
    assert found is not None
    assert found.backing_file


def test_external_data_is_a_feature_of_version_3(tree: HostTree) -> None:
    for version, external in ((3, True), (2, False)):
        found = read(tree, header(version=version, incompatible=0b100))
        assert found == Qcow2Header(GIB, None, external_data=external)


def test_other_features_are_none_of_our_business(tree: HostTree) -> None:
    assert read(tree, header(incompatible=0b11011)) == Qcow2Header(GIB, None, external_data=False)


@pytest.mark.parametrize("length", [4, 8, 31])
def test_a_header_cut_short_has_no_facts_and_a_fault(tree: HostTree, length: int) -> None:
    """It is no error of the host: a guest can write it into its raw disk."""
    assert read(tree, header()[:length]) is None
    (fault,) = find_faults("/a.img", length, tree.root)
    assert fault.what == "its header is truncated"


def test_a_header_of_version_2_may_end_the_file(tree: HostTree) -> None:
    assert read(tree, header(version=2)[:72]) == Qcow2Header(GIB, None, external_data=False)


@pytest.mark.parametrize(("version", "keeps"), [(2, True), (3, False)])
def test_snapshots_keep_the_size_of_an_image_of_version_2(
    tree: HostTree, version: int, *, keeps: bool
) -> None:
    with_one = header(version=version)
    with_one = with_one[:60] + (1).to_bytes(4, "big") + with_one[64:]
    found = read(tree, with_one)
    assert found
    assert found.keeps_size is keeps


@pytest.mark.parametrize("offset", [(2 << 20) + 1, 1 << 62, 1 << 63, (1 << 64) - 1])
def test_a_name_outside_the_header_is_a_name_that_cannot_be_read(
    tree: HostTree, offset: int
) -> None:
    found = read(tree, header(name=b"x", name_offset=offset))
    assert found == Qcow2Header(GIB, "(a name outside the header)", external_data=False)


def test_a_name_is_never_longer_than_qemu_reads(tree: HostTree) -> None:
    found = read(tree, header(name=b"x" * 5000))
    assert found is not None
    assert found.backing_file == "x" * 1023


@given(content=st.binary(max_size=120).map(lambda rest: MAGIC + rest))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_header_brings_anything_but_facts_and_faults(tree: HostTree, content: bytes) -> None:
    found = read(tree, content)
    assert (found is None) is (len(content) < 32)
    assert all(fault.what for fault in find_faults("/a.img", len(content), tree.root))


def test_a_disk_file_comes_with_its_facts(tree: HostTree) -> None:
    tree.file("/srv/a.img", header(name=b"base")).link("/link", "/srv/a.img")
    disk = read_disk_file("/link", tree.root)
    assert disk.host_path == "/srv/a.img"
    assert disk.size_bytes == 108
    assert disk.qcow2 == Qcow2Header(GIB, "base", external_data=False)
    assert not disk.read_only


def test_direct_io_is_what_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.touch()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        allowed = True
    except OSError:
        allowed = False
    assert read_disk_file(str(path), HostRoot()).direct_io is allowed


def test_a_file_of_proc_takes_neither_direct_io_nor_writes() -> None:
    disk = read_disk_file("/proc/version", HostRoot())
    assert not disk.direct_io


@pytest.mark.root
def test_a_file_on_a_read_only_file_system_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "a.img").touch()
    program = (
        "from vmplug.host.block.sysfs import read_disk_file;"
        "from vmplug.host.root import HostRoot;"
        "print(read_disk_file('a.img', HostRoot('.')).read_only)"
    )
    answer = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-e", "-c"),
            'mount --bind . . && cd "$PWD" && mount -o remount,ro,bind . && exec "$0" "$@"',
            *(sys.executable, "-c", program),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "True\n"


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img (qemu-utils)")
@pytest.mark.parametrize("backing", [None, "base.raw"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_images_that_qemu_made_are_read_as_qemu_meant_them(
    tmp_path: Path, compat: str, backing: str | None
) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    options = ["-b", backing, "-F", "raw"] if backing else []
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={compat}", *options, "a", "3M"],
        cwd=tmp_path,
        check=True,
    )
    found = read_qcow2_header(str(tmp_path / "a"), HostRoot())
    assert found == Qcow2Header(3 << 20, backing, external_data=False)


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img (qemu-utils)")
def test_an_image_with_its_data_elsewhere_is_known(tmp_path: Path) -> None:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "a", "1M"]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = read_qcow2_header(str(tmp_path / "a"), HostRoot())
    assert found == Qcow2Header(1 << 20, None, external_data=True)


# What is wrong with an image


RAW = b"x" * 65536 + bytes(7 * MIB) + b"y" * 65536


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What qemu-img makes of data at the begin and the end of a disk."""
    directory = tmp_path_factory.mktemp("converted")
    (directory / "raw").write_bytes(RAW)
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw", "a.qcow2"]
    subprocess.run(command, cwd=directory, check=True)
    return (directory / "a.qcow2").read_bytes()


@pytest.fixture
def image(tmp_path: Path, converted: bytes) -> Path:
    """An image with data at its begin and its end."""
    path = tmp_path / "a.qcow2"
    path.write_bytes(converted)
    return path


def faults_of(path: Path) -> list[str]:
    return [fault.what for fault in find_faults(str(path), path.stat().st_size, HostRoot())]


def write_at(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


IMPOSSIBLE = "has a header that no qcow2 image can have"

needs_qemu_img = pytest.mark.skipif(
    not shutil.which("qemu-img"), reason="needs qemu-img (qemu-utils)"
)


@pytest.mark.slow
@needs_qemu_img
@pytest.mark.parametrize(
    "options",
    [
        *("compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M", "extended_l2=on"),
        *("lazy_refcounts=on", "refcount_bits=1", "refcount_bits=64", "preallocation=metadata"),
        *("preallocation=full", "data_file=data", "compression_type=zlib"),
    ],
)
@pytest.mark.parametrize("size", ["0", "1M", "70M", "3T"])
def test_an_image_that_qemu_made_has_no_fault(tmp_path: Path, options: str, size: str) -> None:
    if size == "3T" and ("preallocation" in options or "512" in options):
        size = "100M"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "a", size]
    subprocess.run(command, cwd=tmp_path, check=True)
    write = ["qemu-io", "-f", "qcow2", "-c", "write 100k 900k", "a"]
    if size != "0":
        subprocess.run(write, cwd=tmp_path, check=True, capture_output=True)
    assert faults_of(tmp_path / "a") == []


@needs_qemu_img
def test_a_whole_image_has_no_fault_and_a_raw_disk_none_either(image: Path) -> None:
    assert faults_of(image) == []
    raw = image.with_name("raw")
    raw.write_bytes(RAW)
    assert faults_of(raw) == []


@needs_qemu_img
@pytest.mark.parametrize(
    ("kept", "what"),
    [
        (50, "its header is truncated"),
        (196_610, r"has 196610 bytes, and its L1 table ends after them"),
        (-65536, r"and uses a cluster at \d+"),
        (300_000, r"has 300000 bytes, and uses a cluster at \d+"),
    ],
)
def test_an_image_that_is_shorter_than_it_says_is_found(image: Path, kept: int, what: str) -> None:
    """QEMU opens it without a word, and reads zeros where the data was."""
    size = image.stat().st_size
    os.truncate(image, kept if kept > 0 else size + kept)
    (found,) = faults_of(image)
    assert re.search(what, found)


@needs_qemu_img
@pytest.mark.parametrize("block_at", [1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_table_that_points_behind_the_end_is_found(image: Path, block_at: int) -> None:
    """A tenant may write any number there, also one that is no offset of a file."""
    (table_at,) = struct.unpack_from(">Q", image.read_bytes(), 48)
    write_at(image, table_at, struct.pack(">Q", block_at))
    (found,) = faults_of(image)
    assert "and uses a cluster at" in found


@needs_qemu_img
@pytest.mark.parametrize(
    ("offset", "content", "what"),
    [
        (4, b"\0\0\0\1", "is a qcow image of version 1"),
        (4, b"\0\0\0\4", "is a qcow image of version 4"),
        (72, struct.pack(">Q", 1 << 5), r"features that vmplug does not know \(bit 5\)"),
        (72, struct.pack(">Q", 1 << 63), r"\(bit 63\)"),
        (72, struct.pack(">Q", 2), "is marked as corrupt"),
        (32, struct.pack(">I", 1), "is encrypted"),
        (32, struct.pack(">I", 2), "is encrypted"),
        (20, struct.pack(">I", 8), IMPOSSIBLE),
        (20, struct.pack(">I", 22), IMPOSSIBLE),
        (96, struct.pack(">I", 7), IMPOSSIBLE),
        (8, struct.pack(">Q", 65537), IMPOSSIBLE),  # the name of the backing file
        (8, struct.pack(">QI", 600, 1024), IMPOSSIBLE),
        (8, struct.pack(">QI", 65530, 7), IMPOSSIBLE),
        (8, struct.pack(">Q", 200), IMPOSSIBLE),  # inside of an extension
        (40, struct.pack(">Q", 8), IMPOSSIBLE),  # the L1 table
        (48, struct.pack(">Q", 8), IMPOSSIBLE),  # the refcount table
        (56, struct.pack(">I", 0), IMPOSSIBLE),
        (56, struct.pack(">I", 129), IMPOSSIBLE),
        (60, struct.pack(">I", 65537), IMPOSSIBLE),  # snapshots
        (64, struct.pack(">Q", 512), IMPOSSIBLE),
        (60, struct.pack(">IQ", 1, 1 << 40), "its table of snapshots ends after them"),
        (72, struct.pack(">Q", 1 << 3), IMPOSSIBLE),  # compression
        (104, b"\1", IMPOSSIBLE),
        (104, b"\2", IMPOSSIBLE),
        (88, struct.pack(">Q", 2), IMPOSSIBLE),  # raw data in another file
        (100, struct.pack(">I", 72), IMPOSSIBLE),  # the length of the header
        (100, struct.pack(">I", 1 << 17), IMPOSSIBLE),
        (116, struct.pack(">I", 1 << 16), IMPOSSIBLE),  # an extension
        (24, struct.pack(">Q", 1 << 50), "has an L1 table that does not fit its size"),
        (36, struct.pack(">I", 0), "has an L1 table that does not fit its size"),
        (36, struct.pack(">I", 0xFFFFFFFF), "has an L1 table that does not fit its size"),
        (40, struct.pack(">Q", 1 << 40), "its L1 table ends after them"),
        (48, struct.pack(">Q", 1 << 40), "its refcount table ends after them"),
    ],
)
def test_a_header_that_qemu_refuses_is_found_and_every_fault_has_a_remedy(
    image: Path, offset: int, content: bytes, what: str
) -> None:
    write_at(image, offset, content)
    faults = find_faults(str(image), image.stat().st_size, HostRoot())
    assert [bool(re.search(what, fault.what)) for fault in faults] == [True]
    assert all(fault.remedy for fault in faults)
    assert faults[0].only_for_writing is ("corrupt" in what)
    mode = [] if faults[0].only_for_writing else ["-r"]
    opened = subprocess.run(
        ["qemu-io", *mode, "-f", "qcow2", "-c", "read 0 512", str(image)],
        capture_output=True,
        check=False,
    )
    assert opened.returncode != 0 or "ends after them" in what  # it reads zeros there


@needs_qemu_img
def test_an_image_with_stale_refcounts_is_not_judged_by_them(image: Path) -> None:
    write_at(image, 72, struct.pack(">Q", 1))
    os.truncate(image, image.stat().st_size - 65536)
    assert faults_of(image) == []
