"""The other files of an image: their faults, and who has them, in both directions."""

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.contract.sandbox import Sandbox
from tests.support.disks import qcow2_header
from tests.support.journal import attach_row, device_record
from vmplug.errors import InUse
from vmplug.host.block.device import DiskFile
from vmplug.host.finding import Code, Finding, Severity
from vmplug.host.root import HostRoot
from vmplug.host.use.file_handle import identify_file
from vmplug.journal.images import list_files
from vmplug.journal.journal import Journal
from vmplug.journal.records import HeldFile
from vmplug.oci.info import DeviceInfo, DevType

ALLOWED = (Code.HAS_BACKING_FILE,)
MIB = 1 << 20


def image(path: Path, *, backing: Path | str = "", data: Path | str = "") -> Path:
    """A whole image of which the header names other files, and that has no data of its own."""
    head = bytearray(qcow2_header(backing=os.fsencode(backing), data_file=os.fsencode(data)))
    head[36:64] = struct.pack(">IQQII", 1, 1 << 16, 2 << 16, 1, 0)  # L1 and refcount tables
    head[96:100] = struct.pack(">I", 4)
    path.write_bytes(bytes(head).ljust(MIB, b"\0"))
    return path


def spoil(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def asked(path: Path, *, ro: bool = False, **options: str) -> DeviceInfo:
    said = {"format": "qcow2"} if path.suffix == ".qcow2" else {"format": "raw"}
    return DeviceInfo(
        container_path=f"/dev/{path.name}",
        dev_type=DevType.BLOCK,
        host_path=str(path),
        read_only=ro,
        driver_options={**said, **options},
    )


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Sandbox]]:
    made: list[Sandbox] = []

    def make_one(vm: str) -> Sandbox:
        made.append(Sandbox(tmp_path, vm=vm))
        return made[-1]

    yield make_one
    for one in made:
        one.close()


def found(vm: Sandbox, *requests: DeviceInfo) -> list[Finding]:
    """What `check` says, without what is allowed."""
    examined = vm.devices.check(requests, allow=ALLOWED)
    findings = [finding for request in examined for finding in request.findings]
    return [finding for finding in findings if finding.code not in ALLOWED]


def give(
    vm: Sandbox,
    request: DeviceInfo,
    thing: str | None = None,
    files: tuple[HeldFile, ...] | None = None,
) -> None:
    """The VM has it: a row of the journal, as the VM in memory opens no files of an image."""
    record = device_record(
        f"file:{request.host_path}",
        str(request.host_path),
        vm=vm.vm,
        options=request.driver_options,
    )
    with Journal.open(vm.state_dir) as journal:
        known = replace(record, read_only=request.read_only, thing=thing, files=files)
        attach_row(journal, known)


def test_an_image_that_has_taken_the_name_of_a_vms_image_is_not_the_vms(
    make: Callable[[str], Sandbox], tmp_path: Path
) -> None:
    one = make("one")
    base, other_base = (image(tmp_path / f"{name}.qcow2") for name in ("base", "other"))
    mine = image(tmp_path / "a.qcow2", backing=base)
    request = asked(mine)
    give(one, request, thing=identify_file(str(mine), HostRoot()))
    assert [finding.code for finding in found(make("two"), asked(base))] == [Code.IN_USE_BY_VM]
    image(tmp_path / "new", backing=other_base).rename(mine)
    assert found(make("three"), asked(other_base)) == []


def test_a_file_of_a_vm_is_the_vms_under_each_of_its_names(
    make: Callable[[str], Sandbox], tmp_path: Path
) -> None:
    one, mine, link = make("one"), tmp_path / "a.img", tmp_path / "b.img"
    mine.write_bytes(bytes(MIB))
    link.hardlink_to(mine)
    two = make("two")
    assert found(two, asked(link)) == []
    give(one, asked(mine), thing=identify_file(str(mine), HostRoot()))
    assert refused(two, asked(link)).startswith(
        f"/dev/b.img: {mine} is already handed to VM 'one'"
    )
    moved = mine.rename(tmp_path / "c.img")
    refused(two, asked(moved))
    take_all(one)
    give(one, asked(moved, ro=True), thing=identify_file(str(moved), HostRoot()))
    assert found(two, asked(link, ro=True)) == []


def take_all(vm: Sandbox) -> None:
    """The VM has nothing any more."""
    with Journal.open(vm.state_dir) as journal:
        journal.forget_vm(vm.vm)


def refused(vm: Sandbox, *requests: DeviceInfo) -> str:
    """The message with which attach refuses what check finds, and changes nothing."""
    findings = found(vm, *requests)
    assert {finding.code for finding in findings} == {Code.IN_USE_BY_VM}
    assert all(finding.hint and finding.used_by for finding in findings)
    before = vm.picture()
    with pytest.raises(InUse) as caught:
        vm.devices.attach_all(requests, allow=ALLOWED)
    assert Code.IN_USE_BY_VM in caught.value.codes
    assert vm.picture() == before
    return caught.value.message


# faults


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("offset", "content", "what", "severity"),
    [
        (72, struct.pack(">Q", 2), "is marked as corrupt", Severity.WARNING),
        (
            72,
            struct.pack(">Q", 1 << 5),
            "needs features that vmplug does not know",
            Severity.ERROR,
        ),
        (32, struct.pack(">I", 1), "is encrypted", Severity.ERROR),
        (4, struct.pack(">I", 1), "is a qcow image of version 1", Severity.ERROR),
        (40, struct.pack(">Q", 1 << 40), "its L1 table ends after them", Severity.ERROR),
        (0, b"vhdxfile", "is not a qcow2 image", Severity.ERROR),
    ],
)
def test_a_fault_of_a_backing_file_is_one_of_the_image(
    make: Callable[[str], Sandbox],
    tmp_path: Path,
    *,
    depth: int,
    offset: int,
    content: bytes,
    what: str,
    severity: Severity,
) -> None:
    bad = below = image(tmp_path / "bad.qcow2")
    if depth == 2:
        below = image(tmp_path / "middle.qcow2", backing=bad)
    top = asked(image(tmp_path / "top.qcow2", backing=below))
    assert found(make("vm-1"), top) == []
    spoil(bad, offset, content)
    (finding,) = found(make("vm-1"), top)
    assert (finding.code, finding.severity) == (Code.UNUSABLE_IMAGE, severity)
    assert f"needs {bad}, which " in finding.message
    assert what in finding.message
    assert finding.hint


def test_a_backing_file_that_is_cut_short_is_found(
    make: Callable[[str], Sandbox], tmp_path: Path
) -> None:
    below = image(tmp_path / "below.qcow2")
    top = asked(image(tmp_path / "top.qcow2", backing=below))
    os.truncate(below, 100_000)
    (finding,) = found(make("vm-1"), top)
    assert finding.message.endswith("has 100000 bytes, and its refcount table ends after them")


@pytest.mark.parametrize("format_", [b"vhdx", b"vmdk", b"luks", b""])
def test_a_backing_file_of_a_foreign_format_is_not_followed(
    make: Callable[[str], Sandbox], tmp_path: Path, format_: bytes
) -> None:
    below = tmp_path / "below.qcow2"
    below.write_bytes(format_.ljust(MIB, b"\0"))
    top = image(tmp_path / "top.qcow2", backing=below)
    spoil(top, 108, struct.pack(">I", len(format_)) + format_.ljust(8, b"\0"))
    (finding,) = found(make("vm-1"), asked(top))
    assert finding.code is Code.UNUSABLE_IMAGE
    assert str(below) in finding.message


@pytest.mark.parametrize(
    ("make_it", "what"),
    [
        (os.fspath, "which is not there"),
        (os.mkfifo, "which is a FIFO, and no file or disk"),
        (os.mkdir, "which is a directory, and no file or disk"),
    ],
)
def test_what_is_no_file_is_no_backing_file_and_is_said_as_what_it_is(
    make: Callable[[str], Sandbox],
    tmp_path: Path,
    make_it: Callable[[Path], object],
    what: str,
) -> None:
    below = tmp_path / "below.qcow2"
    make_it(below)
    (finding,) = found(make("vm-1"), asked(image(tmp_path / "top.qcow2", backing=below)))
    assert finding.code is Code.UNUSABLE_IMAGE
    assert f"needs {below}, {what}" in finding.message


def test_both_other_files_of_an_image_are_named(
    make: Callable[[str], Sandbox], tmp_path: Path
) -> None:
    base, data = image(tmp_path / "base.qcow2"), tmp_path / "data.img"
    data.write_bytes(bytes(MIB))
    top = image(tmp_path / "top.qcow2", backing=base, data=data)
    (examined,) = make("vm-1").devices.check([asked(top)])
    (said,) = (f for f in examined.findings if f.code is Code.HAS_BACKING_FILE)
    assert said.message.endswith(f": {base} and its external data file")


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img (qemu-utils)")
@pytest.mark.parametrize("options", [("-b", "base", "-F", "raw"), ("-o", "data_file={}/base")])
def test_an_image_needs_no_other_file_when_it_is_flattened(
    make: Callable[[str], Sandbox], tmp_path: Path, options: tuple[str, ...]
) -> None:
    old, new = tmp_path / "old.qcow2", tmp_path / "new.qcow2"
    (tmp_path / "base").write_bytes(bytes(MIB))
    words = [word.format(tmp_path) for word in options]
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *words, str(old), "1M"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (examined,) = make("vm-1").devices.check([asked(old)])
    (finding,) = examined.findings
    assert finding.code == Code.HAS_BACKING_FILE
    remedy = re.search(r"flatten it \((.+?)\)", finding.hint)
    assert remedy
    done = [{"OLD": str(old), "NEW": str(new)}.get(word, word) for word in remedy[1].split()]
    subprocess.run(done, check=True)
    (tmp_path / "base").unlink()
    assert make("vm-1").devices.check([asked(new)])[0].findings == ()


# who has them


def chain(directory: Path, kind: str, depth: int) -> tuple[Path, Path]:
    """A file, and the image that makes QEMU open it, at once or by another image."""
    base = directory / "base.img"
    base.write_bytes(b"x".ljust(MIB, b"\0"))
    if kind == "backing":
        base = image(directory / "base.qcow2")
        top = image(directory / "top.qcow2", backing=base)
    else:
        top = image(directory / "top.qcow2", data=base)
    if depth == 2:
        top = image(directory / "over.qcow2", backing=top)
    return base, top


@pytest.mark.parametrize("kind", ["backing", "data"])
@pytest.mark.parametrize("depth", [1, 2])
def test_what_another_vm_writes_is_no_file_of_an_image(
    make: Callable[[str], Sandbox], tmp_path: Path, kind: str, depth: int
) -> None:
    base, top = chain(tmp_path, kind, depth)
    one, two = make("vm-1"), make("vm-2")
    assert found(two, asked(top)) == []
    give(one, asked(base))
    assert str(base) in refused(two, asked(top))
    assert str(base) in refused(one, asked(top))  # nor of another disk of that VM
    take_all(one)
    assert found(two, asked(top)) == []


@pytest.mark.parametrize("kind", ["backing", "data"])
@pytest.mark.parametrize("depth", [1, 2])
def test_what_another_vm_has_as_a_file_of_an_image_is_not_written(
    make: Callable[[str], Sandbox], tmp_path: Path, kind: str, depth: int
) -> None:
    base, top = chain(tmp_path, kind, depth)
    one, two = make("vm-1"), make("vm-2")
    give(one, asked(top))
    assert str(base) in refused(two, asked(base))
    assert str(base) in refused(one, asked(base))
    assert (found(two, asked(base, ro=True)) == []) is (kind == "backing" or depth == 2)
    assert Code.IN_USE_BY_VM not in {one.code for one in found(one, asked(top))}  # it is its own
    take_all(one)
    assert found(two, asked(base)) == []


@pytest.mark.parametrize("kind", ["backing", "data"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("fate", ["moved", "replaced", "spoilt"])
def test_a_vm_keeps_the_files_of_an_image_whose_header_is_out_of_reach(
    make: Callable[[str], Sandbox], tmp_path: Path, kind: str, depth: int, fate: str
) -> None:
    base, top = chain(tmp_path, kind, depth)
    link = tmp_path / f"link{base.suffix}"
    link.hardlink_to(base)
    one, two = make("vm-1"), make("vm-2")
    (examined,) = one.devices.check([asked(top)], allow=ALLOWED)
    assert isinstance(examined.device, DiskFile)
    files = tuple(list_files(examined.device.image))
    give(one, asked(top), thing=examined.thing, files=files)
    if fate == "moved":
        top.rename(tmp_path / "moved")
    elif fate == "replaced":
        image(tmp_path / "new").rename(top)
    else:
        spoil(top, 0, bytes(512))
    for name in (base, link):
        assert str(base) in refused(two, asked(name))
    assert (found(two, asked(link, ro=True)) == []) is (kind == "backing" or depth == 2)
    take_all(one)
    assert found(two, asked(link)) == []


def test_many_vms_share_a_backing_file(make: Callable[[str], Sandbox], tmp_path: Path) -> None:
    base = image(tmp_path / "base.qcow2")
    tops = [asked(image(tmp_path / f"{n}.qcow2", backing=base)) for n in range(4)]
    give(make("vm-1"), tops[0])
    give(make("vm-1"), tops[1])
    give(make("vm-2"), tops[2])
    give(make("vm-2"), asked(base, ro=True))
    assert found(make("vm-3"), tops[3], asked(base, ro=True)) == []


def test_a_backing_file_is_not_written_by_the_request_that_needs_it(
    make: Callable[[str], Sandbox], tmp_path: Path
) -> None:
    base = image(tmp_path / "base.qcow2")
    top = image(tmp_path / "top.qcow2", backing=base)
    for requests in ((asked(base), asked(top)), (asked(top), asked(base))):
        assert "which this request asks for too" in refused(make("vm-1"), *requests)
    assert found(make("vm-1"), asked(base, ro=True), asked(top)) == []


def test_two_images_do_not_write_one_data_file(
    make: Callable[[str], Sandbox], tmp_path: Path
) -> None:
    data = tmp_path / "data.img"
    data.write_bytes(b"x".ljust(MIB, b"\0"))
    tops = [asked(image(tmp_path / f"{n}.qcow2", data=data)) for n in range(2)]
    give(make("vm-1"), tops[0])
    assert str(data) in refused(make("vm-2"), tops[1])
