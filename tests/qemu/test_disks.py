"""Disks that the manager attached, as the guest and QEMU itself see them."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from guest.console import GuestError

from tests.qemu.conftest import PORTS, Lab, losetup, opened_by_another_qemu, request
from tests.support.disks import detach_loop, disk_image, loop_device, qcow2_image
from vmplug.address import PciPath, PciSlot, ScsiAddress
from vmplug.drivers.place import PciPlace, ScsiPlace
from vmplug.drivers.plug import BlockDrive, DiskFrontend
from vmplug.errors import CommandError, InUse, PolicyError, StateError
from vmplug.host.finding import Code
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.state import State

pytestmark = pytest.mark.qemu

MIB = 1 << 20
SCSI = {"block-driver": "virtio-scsi"}
RP0 = PciPlace(bus="rp0", slot=PciSlot(0), path=PciPath.parse("10/00"))
LUN3 = ScsiPlace(bus="scsi0.0", address=ScsiAddress(0, 3), path=PciPath.parse("08"))


@pytest.fixture(params=["file", pytest.param("loop", marks=pytest.mark.root)])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An image of 8 MiB that says `disk-marker`, as a file and as a loop device."""
    image = disk_image(tmp_path / "disk.img", 8, "disk-marker")
    if request.param == "file":
        yield image
        return
    with loop_device(image) as node:
        yield node


# where it is and what it says


def test_a_virtio_disk_is_where_vmplug_says(lab: Lab, disk: Path) -> None:
    before = lab.picture()
    attachment = lab.attach(disk)

    seen = lab.seen(attachment)
    assert seen.name == "vda"
    assert (seen.marker, seen.size_bytes, seen.read_only) == ("disk-marker", 8 * MIB, False)
    assert seen.serial == attachment.device_id == lab.property_of(attachment, "serial")
    assert attachment.guest_address
    qdev_id = f"vmplug-{attachment.device_id}"
    assert seen.pci_path == str(attachment.guest_address.pci_path) == "10/00"
    assert seen.pci_path == lab.pci_path_in_qemu(qdev_id)
    assert seen.scsi_address is None
    assert attachment.guest_address.scsi_address is None
    (drive,) = lab.query("query-block")
    assert drive["qdev"] == f"/machine/peripheral/{qdev_id}/virtio-backend"
    assert drive["inserted"]["node-name"] == qdev_id

    lab.devices.detach(attachment.id)
    assert lab.guest_vm.console.wait_for_disks(0) == []
    assert lab.picture() == before


def test_a_scsi_disk_is_where_vmplug_says(lab: Lab, disk: Path) -> None:
    before = lab.picture()
    attachment = lab.attach(disk, SCSI)

    seen = lab.seen(attachment)
    assert seen.name.startswith("sd")
    assert (seen.marker, seen.size_bytes, seen.read_only) == ("disk-marker", 8 * MIB, False)
    assert attachment.guest_address
    assert seen.pci_path == str(attachment.guest_address.pci_path) == "08"
    assert seen.pci_path == lab.pci_path_in_qemu("scsi0")
    assert seen.scsi_address == str(attachment.guest_address.scsi_address) == "0:0"
    assert [lab.property_of(attachment, name) for name in ("channel", "scsi-id", "lun")] == [0] * 3

    lab.devices.detach(attachment.id)
    assert lab.guest_vm.console.wait_for_disks(0) == []
    assert lab.picture() == before


def test_scsi_disks_have_luns_of_their_own(lab: Lab, tmp_path: Path) -> None:
    images = [disk_image(tmp_path / f"{i}.img", 1, f"lun-{i}") for i in range(3)]
    attachments = lab.devices.attach_all(
        [request(image, SCSI, at=f"/dev/{i}") for i, image in enumerate(images)]
    )
    for index, attachment in enumerate(attachments):
        seen = lab.seen(attachment, of=3)
        assert (seen.marker, seen.scsi_address) == (f"lun-{index}", f"0:{index}")
    lab.devices.detach_owner("lab-1")
    lab.guest_vm.console.wait_for_disks(0)


def test_a_disk_behind_a_bridge_is_where_vmplug_says(pc_lab: Lab, disk: Path) -> None:
    before = pc_lab.picture()
    attachment = pc_lab.attach(disk)

    seen = pc_lab.seen(attachment)
    assert (seen.marker, seen.size_bytes) == ("disk-marker", 8 * MIB)
    assert attachment.guest_address
    assert seen.pci_path == str(attachment.guest_address.pci_path) == "10/01"
    assert seen.pci_path == pc_lab.pci_path_in_qemu(f"vmplug-{attachment.device_id}")

    pc_lab.devices.detach(attachment.id)
    assert pc_lab.guest_vm.console.wait_for_disks(0) == []
    assert pc_lab.picture() == before


def test_disks_behind_a_bridge_have_slots_of_their_own(pc_lab: Lab, tmp_path: Path) -> None:
    stranger = {"id": "stranger", "driver": "virtio-blk-pci", "bus": "br0", "addr": "0x2"}
    pc_lab.query("blockdev-add", **{"node-name": "stranger-node", "driver": "null-co"})
    pc_lab.query("device_add", drive="stranger-node", **stranger)
    images = [disk_image(tmp_path / f"{i}.img", 1, f"slot-{i}") for i in range(2)]
    attachments = [pc_lab.attach(image) for image in images]
    for index, path in enumerate(("10/01", "10/03")):
        seen = pc_lab.seen(attachments[index], of=3)
        assert (seen.marker, seen.pci_path) == (f"slot-{index}", path)
    pc_lab.devices.detach_owner("lab-1")


def test_what_the_guest_writes_is_on_the_host(lab: Lab, disk: Path, tmp_path: Path) -> None:
    data = os.urandom(20_001)
    attachment = lab.attach(disk)
    lab.guest_vm.console.write(lab.seen(attachment).name, 777, data)
    lab.devices.detach(attachment.id)
    with disk.open("rb") as file:
        assert file.read(777 + len(data))[777:] == data


@pytest.mark.parametrize("options", [{}, SCSI], ids=["virtio", "scsi"])
def test_a_read_only_disk_takes_no_writes(lab: Lab, disk: Path, options: dict[str, str]) -> None:
    attachment = lab.attach(disk, options, ro=True)
    seen = lab.seen(attachment)
    assert seen.read_only
    assert seen.marker == "disk-marker"
    assert all(node["ro"] for node in lab.nodes_of(attachment))
    assert len(lab.nodes_of(attachment)) == 2
    with pytest.raises(GuestError, match=r"Operation not permitted|Read-only file system"):
        lab.guest_vm.console.write(seen.name, 0, b"must not arrive")
    lab.devices.detach(attachment.id)
    assert disk.read_bytes()[:12] == b"disk-marker."


def test_the_second_attach_shows_the_guest_no_second_disk(lab: Lab, disk: Path) -> None:
    first = lab.devices.attach(request(disk), owner="c1")
    second = lab.devices.attach(request(disk), owner="c2")
    assert first.device_id == second.device_id
    lab.seen(first)
    lab.devices.detach(first.id)
    assert lab.seen(second).marker == "disk-marker"
    lab.devices.detach(second.id)
    lab.guest_vm.console.wait_for_disks(0)


def test_another_process_may_finish_what_one_began(lab: Lab, disk: Path) -> None:
    attachment = lab.attach(disk, {"iothread": "on", "iops-total": "5000"})
    lab.seen(attachment)
    lab.close()

    assert lab.devices.attachments() == [attachment]
    assert lab.devices.reconcile() == []
    assert lab.attach(disk).count == 2
    lab.close()
    lab.devices.detach_owner("lab-1")
    assert lab.vmplugs() == set()


def test_a_serial_is_what_was_asked_for(lab: Lab, disk: Path) -> None:
    attachment = lab.attach(disk, {"serial": "S-1 ä,b=c%20"})
    (seen,) = lab.guest_vm.console.wait_for_disks(1)
    assert seen.serial == "S-1 ä,b=c%20"
    lab.devices.detach(attachment.id)


# files


NAMES = [
    "with,comma=x.img",
    "with 'single' and \"double\" quotes.img",
    "with  spaces .img",
    "Grüße-日本-\u2028.img",
    'json:{"driver":"null-co"}',
    "100%41%s.img",
    "nbd:localhost:1",
    "fd:0",
    "back\\slash\tand\ttab.img",
    "-dash.img",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_name_is_only_a_name(lab: Lab, tmp_path: Path, name: str) -> None:
    image = disk_image(tmp_path / name, 1, "right-file")
    attachment = lab.attach(image)
    assert attachment.host_path == str(image)
    assert lab.seen(attachment).marker == "right-file"
    assert [node["file"] for node in lab.nodes_of(attachment)][-1] == str(image)
    lab.devices.detach(attachment.id)


def test_a_qcow2_image_shows_what_is_inside(lab: Lab, tmp_path: Path) -> None:
    image = qcow2_image(tmp_path / "a.qcow2", 8, "inside-qcow2")
    attachment = lab.attach(image, {"format": "qcow2"})
    seen = lab.seen(attachment)
    assert (seen.marker, seen.size_bytes) == ("inside-qcow2", 8 * MIB)
    assert [node["drv"] for node in lab.nodes_of(attachment)] == ["qcow2", "file"]
    lab.guest_vm.console.write(seen.name, MIB, b"written inside")
    lab.devices.detach(attachment.id)
    assert b"written inside" in content_of(image, "qcow2")


def content_of(image: Path, image_format: str) -> bytes:
    raw = image.with_name(image.name + ".content")
    subprocess.run(
        ["qemu-img", "convert", "-f", image_format, "-O", "raw", str(image), str(raw)], check=True
    )
    return raw.read_bytes()


def test_a_qcow2_image_as_raw_shows_its_own_bytes(lab: Lab, tmp_path: Path) -> None:
    image = qcow2_image(tmp_path / "a.qcow2", 8, "inside")
    before = lab.picture()
    with pytest.raises(InUse) as caught:
        lab.attach(image)
    assert caught.value.codes == (Code.FORMAT_NOT_STATED,)
    assert lab.picture() == before

    attachment = lab.attach(image, {"format": "raw"})
    seen = lab.seen(attachment)
    assert seen.size_bytes == image.stat().st_size
    assert lab.guest_vm.console.read(seen.name, 0, 4) == b"QFI\xfb"
    lab.devices.detach(attachment.id)


@pytest.mark.parametrize("format_", ["vhdx", "vmdk", "vdi", "vpc", "qed", "parallels", "qcow"])
def test_an_image_that_the_guest_would_destroy_is_refused_until_raw_is_stated(
    lab: Lab, tmp_path: Path, format_: str
) -> None:
    image = tmp_path / "image"
    raw = disk_image(tmp_path / "raw", 4, "inside")
    convert = ["qemu-img", "convert", "-f", "raw", "-O", format_, str(raw), str(image)]
    subprocess.run(convert, check=True)
    before, content = lab.picture(), image.read_bytes()
    with pytest.raises(InUse) as caught:
        lab.attach(image)
    assert caught.value.codes == (Code.FORMAT_NOT_STATED,)
    assert (lab.picture(), image.read_bytes()) == (before, content)

    remedy = (caught.value.hint or "").partition("(")[2].partition(")")[0]
    assert remedy == f"qemu-img convert -f {format_} -O raw OLD NEW"
    mended = tmp_path / "mended"
    words = remedy.replace("OLD", str(image)).replace("NEW", str(mended)).split()
    subprocess.run(words, check=True)
    assert mended.read_bytes().rstrip(b"\0") == raw.read_bytes().rstrip(b"\0")
    lab.devices.detach(lab.attach(mended).id)
    lab.devices.detach(lab.attach(image, {"format": "raw"}).id)


def damage(image: Path, offset: int, content: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("fault", ["version", "corrupt", "features", "encryption", "cut short"])
def test_an_image_that_qemu_cannot_use_is_refused_by_what_is_wrong(
    lab: Lab, tmp_path: Path, fault: str
) -> None:
    image = qcow2_image(tmp_path / "a.qcow2", 8, "inside")
    before = lab.picture()
    match fault:
        case "version":
            damage(image, 4, b"\0\0\0\1")
        case "corrupt":
            damage(image, 79, b"\2")
        case "features":
            damage(image, 72, b"\x80")
        case "encryption":
            damage(image, 35, b"\1")
        case _:
            os.truncate(image, image.stat().st_size - 65536)
    with pytest.raises(InUse) as caught:
        lab.attach(image, {"format": "qcow2"})
    assert caught.value.codes == (Code.UNUSABLE_IMAGE,)
    assert lab.picture() == before
    if fault == "cut short":  # and QEMU would not have said so
        seen = lab.seen(lab.attach(image, {"format": "qcow2"}, allow=(Code.UNUSABLE_IMAGE,)))
        assert seen.marker == ""
    elif fault != "corrupt":
        with pytest.raises(CommandError):
            lab.attach(image, {"format": "qcow2"}, allow=(Code.UNUSABLE_IMAGE,))
    else:
        subprocess.run(["qemu-img", "check", "-q", "-r", "all", str(image)], check=True)
        assert lab.seen(lab.attach(image, {"format": "qcow2"})).marker == "inside"


@pytest.mark.parametrize("raw", ["on", "off"])
def test_an_image_with_a_data_file_that_was_cut_short_is_refused(
    lab: Lab, tmp_path: Path, raw: str
) -> None:
    image, data = tmp_path / "a.qcow2", tmp_path / "data.raw"
    options = f"data_file={data},data_file_raw={raw}"
    source = disk_image(tmp_path / "source.img", 4, "inside")
    damage(source, 3 * MIB, b"later" * 1000)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", options]
    subprocess.run([*convert, str(source), str(image)], check=True)
    whole, allow = data.read_bytes(), (Code.HAS_BACKING_FILE,)
    os.truncate(data, 3 * MIB)
    before = lab.picture()
    with pytest.raises(InUse, match=f"needs {data}, which has {3 * MIB} bytes") as caught:
        lab.attach(image, {"format": "qcow2"}, allow=allow)
    assert caught.value.codes == (Code.UNUSABLE_IMAGE,)
    assert lab.picture() == before

    data.write_bytes(whole)
    attachment = lab.attach(image, {"format": "qcow2"}, allow=allow)
    assert lab.guest_vm.console.read(lab.seen(attachment).name, 3 * MIB, 5) == b"later"
    lab.devices.detach(attachment.id)


def qcow2_over(tmp_path: Path, backing: Path) -> Path:
    image = tmp_path / "overlay.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(backing)]
    subprocess.run([*command, str(image)], check=True)
    return image


def test_a_backing_file_is_opened_only_when_it_is_allowed(lab: Lab, tmp_path: Path) -> None:
    image = qcow2_over(tmp_path, disk_image(tmp_path / "secret.img", 4, "secret"))
    before = lab.picture()
    with pytest.raises(InUse) as caught:
        lab.attach(image, {"format": "qcow2"})
    assert caught.value.codes == (Code.HAS_BACKING_FILE,)
    assert lab.picture() == before

    attachment = lab.attach(image, {"format": "qcow2"}, allow=(Code.HAS_BACKING_FILE,))
    assert lab.seen(attachment).marker == "secret"
    lab.devices.detach(attachment.id)


def test_a_backing_file_is_the_vms_also_when_its_image_has_another_name(
    lab: Lab, tmp_path: Path
) -> None:
    base = disk_image(tmp_path / "base.img", 4, "base")
    image = qcow2_over(tmp_path, base)
    attachment = lab.attach(image, {"format": "qcow2"}, allow=(Code.HAS_BACKING_FILE,))
    moved = image.rename(tmp_path / "moved.qcow2")
    before = lab.picture()
    with pytest.raises(InUse) as caught:
        lab.attach(base)
    assert Code.IN_USE_BY_VM in caught.value.codes
    assert lab.picture() == before
    moved.rename(image)
    lab.devices.detach(attachment.id)
    assert lab.seen(lab.attach(base)).marker == "base"


# caches, discards, limits, threads, sectors


@pytest.mark.parametrize(
    ("cache", "direct", "no_flush", "write_cache"),
    [
        ("none", True, False, "write back"),
        ("writeback", False, False, "write back"),
        ("writethrough", False, False, "write through"),
        ("directsync", True, False, "write through"),
        ("unsafe", False, True, "write back"),
    ],
)
def test_a_cache_mode_holds_for_every_layer(
    lab: Lab, disk: Path, cache: str, write_cache: str, *, direct: bool, no_flush: bool
) -> None:
    attachment = lab.attach(disk, {"cache": cache})
    assert lab.seen(attachment).write_cache == write_cache
    caches = [node["cache"] for node in lab.nodes_of(attachment)]
    assert [(c["direct"], c["no-flush"]) for c in caches] == [(direct, no_flush)] * 2
    lab.devices.detach(attachment.id)


@pytest.mark.parametrize(
    ("cache", "aio"),
    [
        ("none", "native"),
        ("none", "io_uring"),
        ("none", "threads"),
        ("writeback", "io_uring"),
        ("writeback", "threads"),
        ("directsync", "native"),
    ],
)
def test_every_kind_of_asynchronous_io_reads_and_writes(
    lab: Lab, disk: Path, cache: str, aio: str
) -> None:
    attachment = lab.attach(disk, {"cache": cache, "aio": aio})
    seen = lab.seen(attachment)
    assert seen.marker == "disk-marker"
    lab.guest_vm.console.write(seen.name, MIB, b"through " + aio.encode())
    lab.devices.detach(attachment.id)
    with disk.open("rb") as file:
        file.seek(MIB)
        assert file.read(8 + len(aio)) == b"through " + aio.encode()


@pytest.mark.parametrize(
    "options", [{}, SCSI, {"iops-total": "5000"}], ids=["virtio", "scsi", "limited"]
)
def test_a_discard_frees_the_blocks_of_the_file(
    lab: Lab, tmp_path: Path, options: dict[str, str]
) -> None:
    image = full_image(tmp_path)
    blocks = image.stat().st_blocks
    attachment = lab.attach(image, {**options, "discard": "unmap"})
    seen = lab.seen(attachment)
    assert seen.discard_max_bytes > 0
    lab.guest_vm.console.run(f"blkdiscard -o {MIB} -l {2 * MIB} /dev/{seen.name}")
    lab.devices.detach(attachment.id)
    assert image.stat().st_blocks <= blocks - 2 * MIB // 512
    assert image.read_bytes() == b"x" * MIB + bytes(2 * MIB) + b"x" * MIB


@pytest.mark.parametrize("options", [{}, {"discard": "ignore"}], ids=["unsaid", "ignore"])
def test_without_discard_the_guest_is_offered_none(
    lab: Lab, tmp_path: Path, options: dict[str, str]
) -> None:
    image = full_image(tmp_path)
    attachment = lab.attach(image, options)
    seen = lab.seen(attachment)
    assert seen.discard_max_bytes == 0
    with pytest.raises(GuestError, match="BLKDISCARD"):
        lab.guest_vm.console.run(f"blkdiscard /dev/{seen.name}")
    lab.devices.detach(attachment.id)
    assert image.read_bytes() == b"x" * 4 * MIB


def full_image(tmp_path: Path) -> Path:
    image = tmp_path / "full.img"
    with image.open("wb") as file:
        file.write(b"x" * 4 * MIB)
        file.flush()
        os.fsync(file.fileno())
    return image


@pytest.mark.parametrize("options", [{}, SCSI], ids=["virtio", "scsi"])
def test_limits_are_set_in_qemu(lab: Lab, disk: Path, options: dict[str, str]) -> None:
    limits = {"bps-read": "20M", "bps-write": "10M", "iops-total": "2000"}
    attachment = lab.attach(disk, {**options, **limits})

    seen = lab.seen(attachment)
    assert seen.marker == "disk-marker"
    path = f"/objects/vmplug-{attachment.device_id}-limits"
    found = lab.query("qom-get", path=path, property="limits")
    assert {key: value for key, value in found.items() if value > 1} == {
        "bps-read": 20 * MIB,
        "bps-write": 10 * MIB,
        "iops-total": 2000,
    }
    assert lab.nodes_of(attachment)[0]["drv"] == "throttle"
    (drive,) = lab.query("query-block")
    assert drive["inserted"]["drv"] == "throttle"
    lab.guest_vm.console.write(seen.name, MIB, b"within limits")
    assert lab.guest_vm.console.read(seen.name, MIB, 13) == b"within limits"

    lab.devices.detach(attachment.id)
    assert lab.vmplugs() == set()


@pytest.mark.parametrize(("options", "cache"), [({}, "none"), (SCSI, "unsafe")])
def test_a_disk_with_limits_is_opened_like_one_without(
    lab: Lab, disk: Path, options: dict[str, str], cache: str
) -> None:
    limits = {"iops-read": "100", "discard": "unmap", "cache": cache}
    attachment = lab.attach(disk, {**options, **limits}, ro=True)
    seen = lab.seen(attachment)
    assert (seen.marker, seen.read_only) == ("disk-marker", True)
    nodes = lab.nodes_of(attachment)
    assert [node["drv"] for node in nodes[:2]] == ["throttle", "raw"]
    assert {node["ro"] for node in nodes} == {True}
    assert [node["cache"] for node in nodes] == [nodes[-1]["cache"]] * len(nodes)
    lab.devices.detach(attachment.id)
    assert lab.vmplugs() == set()


def test_a_disk_runs_in_a_thread_of_its_own(lab: Lab, disk: Path) -> None:
    attachment = lab.attach(disk, {"iothread": "on"})
    seen = lab.seen(attachment)
    name = f"vmplug-{attachment.device_id}-thread"
    assert [thread["id"] for thread in lab.query("query-iothreads")] == [name]
    assert lab.property_of(attachment, "iothread") == f"/objects/{name}"
    lab.guest_vm.console.write(seen.name, MIB, b"in a thread")
    assert lab.guest_vm.console.read(seen.name, MIB, 11) == b"in a thread"
    lab.devices.detach(attachment.id)
    assert lab.query("query-iothreads") == []


@pytest.mark.root
@pytest.mark.parametrize("options", [{}, SCSI], ids=["virtio", "scsi"])
def test_the_guest_sees_the_sectors_of_the_host(
    lab: Lab, tmp_path: Path, options: dict[str, str]
) -> None:
    image = disk_image(tmp_path / "a.img", 8, "large-sectors")
    with loop_of_large_sectors(image) as node:
        attachment = lab.attach(node, options)
        seen = lab.seen(attachment)
        assert (seen.marker, seen.size_bytes) == ("large-sectors", 8 * MIB)
        queue = f"/sys/block/{seen.name}/queue"
        for name in ("logical_block_size", "physical_block_size"):
            assert lab.guest_vm.console.run(f"cat {queue}/{name}") == "4096"
        lab.guest_vm.console.write(seen.name, 4096, b"aligned" * 1000)
        lab.devices.detach(attachment.id)
        assert node.read_bytes()[4096:].startswith(b"aligned" * 1000)


@contextmanager
def loop_of_large_sectors(image: Path) -> Iterator[Path]:
    node = losetup("--find", "--show", "--sector-size", "4096", str(image))
    try:
        yield Path(node)
    finally:
        detach_loop(Path(node))


# another file under the name


@pytest.mark.parametrize("options", [{}, {"format": "qcow2"}], ids=["raw", "qcow2"])
def test_another_file_of_the_same_name_is_not_the_disk(
    lab: Lab, tmp_path: Path, options: dict[str, str]
) -> None:
    make = qcow2_image if options else disk_image
    image, new = make(tmp_path / "a.img", 8, "first"), make(tmp_path / "b.img", 4, "second")
    first = lab.attach(image, options)
    kept = tmp_path / "kept.img"
    kept.hardlink_to(image)
    again = request(image, options)
    before = lab.picture()
    new.rename(image)

    with pytest.raises(StateError, match="is now another device or file") as caught:
        lab.devices.attach(again, owner="another")
    assert (caught.value.state, caught.value.hint is None) == ("replaced", False)
    for size_bytes in (None, 16 * MIB):
        with pytest.raises(StateError, match="is now another device or file"):
            lab.devices.resize(first.id, size_bytes)
    assert lab.picture() == before
    assert len(kept.read_bytes()) == len(make(tmp_path / "c.img", 8, "first").read_bytes())

    lab.devices.detach(first.id)  # the remedy
    second = lab.devices.attach(again, owner="another")
    assert lab.seen(second).marker == "second"
    lab.devices.detach(second.id)


def test_the_file_is_the_disk_again_when_it_has_its_name_again(lab: Lab, tmp_path: Path) -> None:
    image, new = disk_image(tmp_path / "a.img", 8, "x"), disk_image(tmp_path / "b.img", 8, "y")
    first = lab.attach(image)
    image.rename(tmp_path / "kept.img")
    new.rename(image)
    with pytest.raises(StateError):
        lab.devices.attach(request(image), owner="another")
    (tmp_path / "kept.img").rename(image)
    second = lab.devices.attach(request(image), owner="another")
    assert second.device_id == first.device_id
    lab.devices.detach_all([first.id, second.id])


# sizes


@pytest.mark.parametrize(
    "options",
    [{}, SCSI, {"format": "qcow2"}, {"iothread": "on", "iops-total": "5000"}],
    ids=["virtio", "scsi", "qcow2", "limited in a thread"],
)
def test_a_file_grows_under_the_guest(lab: Lab, tmp_path: Path, options: dict[str, str]) -> None:
    make = qcow2_image if "format" in options else disk_image
    image = make(tmp_path / "a.img", 8, "grows")
    attachment = lab.attach(image, options)
    seen = lab.seen(attachment)
    assert seen.size_bytes == 8 * MIB

    assert lab.devices.resize(attachment.id, 16 * MIB) == 16 * MIB

    lab.wait_for_size(seen, 16 * MIB)
    lab.guest_vm.console.write(seen.name, 15 * MIB, b"beyond")
    assert lab.guest_vm.console.read(seen.name, 0, 5) == b"grows"
    lab.devices.detach(attachment.id)
    assert content_of(image, options.get("format", "raw"))[15 * MIB :].startswith(b"beyond")


@pytest.mark.parametrize("size_bytes", [None, 8 * MIB], ids=["unsaid", "the same"])
def test_a_qcow2_image_keeps_its_size_when_nothing_grew(
    lab: Lab, tmp_path: Path, size_bytes: int | None
) -> None:
    image = qcow2_image(tmp_path / "a.qcow2", 8, "kept")
    attachment = lab.attach(image, {"format": "qcow2"})
    seen = lab.seen(attachment)
    lab.guest_vm.console.write(seen.name, 8 * MIB - 7, b"the end")
    assert lab.devices.resize(attachment.id, size_bytes) == 8 * MIB
    assert lab.guest_vm.console.read(seen.name, 8 * MIB - 7, 7) == b"the end"
    lab.devices.detach(attachment.id)


@pytest.mark.parametrize("size_bytes", [None, 8 * MIB, 16 * MIB], ids=["unsaid", "same", "more"])
def test_a_qcow2_image_of_version_2_with_snapshots_keeps_its_size(
    lab: Lab, tmp_path: Path, size_bytes: int | None
) -> None:
    image = qcow2_image(tmp_path / "a.qcow2", 8, "kept")
    subprocess.run(["qemu-img", "amend", "-o", "compat=0.10", image], check=True)
    subprocess.run(["qemu-img", "snapshot", "-c", "first", image], check=True)
    attachment = lab.attach(image, {"format": "qcow2"})
    before = image.read_bytes()
    with pytest.raises(PolicyError, match="of version 2 with snapshots inside") as caught:
        lab.devices.resize(attachment.id, size_bytes)
    assert image.read_bytes() == before
    lab.devices.detach(attachment.id)

    remedy = (caught.value.hint or "").partition("then ")[2].partition(" makes")[0]
    subprocess.run([*remedy.split(), str(image)], check=True)
    attachment = lab.attach(image, {"format": "qcow2"})
    assert lab.devices.resize(attachment.id, 16 * MIB) == 16 * MIB
    lab.devices.detach(attachment.id)


@pytest.mark.parametrize("options", [{}, {"format": "qcow2"}], ids=["raw", "qcow2"])
@pytest.mark.parametrize("more", [1, 511, MIB + 1])
def test_no_disk_gets_a_size_that_it_could_not_come_back_with(
    lab: Lab, tmp_path: Path, options: dict[str, str], more: int
) -> None:
    make = qcow2_image if options else disk_image
    image = make(tmp_path / "a.img", 8, "odd")
    attachment = lab.attach(image, options)
    before = image.read_bytes()
    with pytest.raises(PolicyError, match="is not a multiple of") as caught:
        lab.devices.resize(attachment.id, 8 * MIB + more)
    assert image.read_bytes() == before
    remedy = (caught.value.hint or "").rpartition("--size ")[2]
    assert lab.devices.resize(attachment.id, int(remedy)) == int(remedy) > 8 * MIB + more
    lab.devices.detach(attachment.id)
    attachment = lab.attach(image, options | {"cache": "none"})
    lab.devices.detach(attachment.id)


@pytest.mark.root
@pytest.mark.parametrize("options", [{}, SCSI], ids=["virtio", "scsi"])
def test_a_grown_device_of_the_host_grows_in_the_guest(
    lab: Lab, tmp_path: Path, options: dict[str, str]
) -> None:
    image = disk_image(tmp_path / "a.img", 8, "grows")
    with loop_device(image) as node:
        attachment = lab.attach(node, options)
        seen = lab.seen(attachment)
        os.truncate(image, 12 * MIB)
        losetup("--set-capacity", str(node))

        assert lab.devices.resize(attachment.id) == 12 * MIB

        lab.wait_for_size(seen, 12 * MIB)
        lab.guest_vm.console.write(seen.name, 11 * MIB, b"beyond")
        lab.devices.detach(attachment.id)
    assert image.read_bytes()[11 * MIB :].startswith(b"beyond")


# several


def test_eight_disks_at_once_are_told_apart(lab: Lab, tmp_path: Path) -> None:
    before = lab.picture()
    images = [disk_image(tmp_path / f"{i}.img", 1, f"disk-{i}") for i in range(8)]
    attachments = lab.devices.attach_all(
        [request(image, at=f"/dev/{i}") for i, image in enumerate(images)], owner="c1"
    )
    disks = {disk.serial: disk for disk in lab.guest_vm.console.wait_for_disks(8)}
    for index, attachment in enumerate(attachments):
        seen = disks[attachment.device_id]
        assert attachment.guest_address
        assert seen.marker == f"disk-{index}"
        assert seen.pci_path == str(attachment.guest_address.pci_path) == f"{0x10 + index:02x}/00"
        assert seen.pci_path == lab.pci_path_in_qemu(f"vmplug-{attachment.device_id}")

    lab.devices.detach_owner("c1")
    lab.guest_vm.console.wait_for_disks(0)
    assert lab.picture() == before


def test_when_the_ports_are_full_disks_go_to_scsi(lab: Lab, tmp_path: Path) -> None:
    images = [disk_image(tmp_path / f"{i}.img", 1, f"disk-{i}") for i in range(PORTS + 1)]
    attachments = lab.devices.attach_all(
        [request(image, at=f"/dev/{i}") for i, image in enumerate(images)]
    )
    last = lab.seen(attachments[-1], of=PORTS + 1)
    assert (last.marker, last.scsi_address, last.pci_path) == (f"disk-{PORTS}", "0:0", "08")
    lab.devices.detach_owner("lab-1")
    lab.guest_vm.console.wait_for_disks(0)


def test_a_batch_whose_third_disk_fails_leaves_the_guest_nothing(lab: Lab, tmp_path: Path) -> None:
    """The third is locked by another QEMU, which the operator chose to overlook."""
    images = [disk_image(tmp_path / f"{i}.img", 1, f"disk-{i}") for i in range(4)]
    held = lab.devices.attach(request(disk_image(tmp_path / "held.img", 1, "held")), owner="c0")
    lab.seen(held)
    before = lab.picture()
    with opened_by_another_qemu(images[2], tmp_path), pytest.raises(CommandError, match="lock"):
        lab.devices.attach_all(
            [
                request(images[0], {"iothread": "on", "bps-total": "10M"}, at="/dev/0"),
                request(images[1], SCSI, at="/dev/1"),
                request(images[2], at="/dev/2"),
                request(images[3], at="/dev/3"),
            ],
            owner="c1",
            allow=[Code.IMAGE_LOCKED],
        )
    assert lab.picture() == before
    assert lab.seen(held).marker == "held"
    lab.devices.detach_owner("c0")


# two VMs


def test_two_guests_read_one_disk(lab: Lab, second_lab: Lab, disk: Path) -> None:
    labs = [lab, second_lab]
    attachments = [one.attach(disk, ro=True) for one in labs]
    for one, attachment in zip(labs, attachments, strict=True):
        seen = one.seen(attachment)
        assert (seen.marker, seen.read_only) == ("disk-marker", True)
    for one, attachment in zip(labs, attachments, strict=True):
        one.devices.detach(attachment.id)


def test_two_guests_write_one_disk_when_both_say_so(lab: Lab, second_lab: Lab, disk: Path) -> None:
    shared = {"share-rw": "on"}
    mine, theirs = lab.attach(disk, shared), second_lab.attach(disk, shared)
    lab.guest_vm.console.write(lab.seen(mine).name, MIB, b"from the first")
    name = second_lab.seen(theirs).name
    assert second_lab.guest_vm.console.read(name, MIB, 14) == b"from the first"
    second_lab.guest_vm.console.write(name, MIB, b"from the other")
    assert lab.guest_vm.console.read(lab.seen(mine).name, MIB, 14) == b"from the other"
    lab.devices.detach(mine.id)
    second_lab.devices.detach(theirs.id)


def test_a_disk_that_another_vm_writes_is_refused(lab: Lab, second_lab: Lab, disk: Path) -> None:
    attachment = lab.attach(disk)
    before = second_lab.picture()
    with pytest.raises(InUse) as caught:
        second_lab.attach(disk, ro=True)
    assert Code.IN_USE_BY_VM in caught.value.codes
    assert second_lab.picture() == before
    assert lab.devices.attachments()[0].state is State.ATTACHED
    lab.devices.detach(attachment.id)
    seen = second_lab.attach(disk, ro=True)
    assert second_lab.seen(seen).marker == "disk-marker"
    second_lab.devices.detach(seen.id)


# sizes and sectors


@pytest.mark.parametrize("options", [{}, SCSI], ids=["virtio", "scsi"])
def test_a_file_that_ends_within_a_unit_of_direct_io_goes_through_the_page_cache(
    lab: Lab, tmp_path: Path, options: dict[str, str]
) -> None:
    image = tmp_path / "odd.img"
    image.touch()
    os.truncate(image, 4 * MIB + 512)  # QEMU finds no unit in a hole, and takes a page for it
    before = lab.picture()
    with pytest.raises(InUse) as caught:
        lab.attach(image, {**options, "cache": "none"})
    assert caught.value.codes == (Code.ODD_SIZE,)
    assert str(image) in caught.value.message
    assert lab.picture() == before

    attachment = lab.attach(image, options)
    seen = lab.seen(attachment)
    assert seen.size_bytes == 4 * MIB + 512
    assert [node["cache"]["direct"] for node in lab.nodes_of(attachment)] == [False, False]
    lab.guest_vm.console.write(seen.name, 4 * MIB, b"at the end")
    lab.devices.detach(attachment.id)
    assert image.read_bytes()[4 * MIB :][:10] == b"at the end"

    remedy = (caught.value.hint or "").partition(",")[0]
    subprocess.run(remedy.split(), check=True)
    assert image.stat().st_size == 4 * MIB + 4096
    attachment = lab.attach(image, {**options, "cache": "none"})
    assert lab.seen(attachment).size_bytes == 4 * MIB + 4096
    lab.devices.detach(attachment.id)


@pytest.mark.parametrize("place", [RP0, LUN3], ids=["virtio", "scsi"])
@pytest.mark.parametrize("physical", [512, 4096])
def test_the_guest_sees_the_physical_sectors_of_a_disk(
    lab: Lab, tmp_path: Path, place: PciPlace | ScsiPlace, physical: int
) -> None:
    drive = BlockDrive(
        id="00000000000000a1",
        file=str(disk_image(tmp_path / "a.img", 4, "512e")),
        is_device=False,
        driver=DiskFrontend.VIRTIO_BLOCK,
        serial="A1",
        physical_bytes=physical,
    )
    with closing(Qemu(lab.qemu_side.monitor())) as vm:
        vm.plug(drive, place)
        (disk,) = lab.guest_vm.console.wait_for_disks(1)
        queue = f"/sys/block/{disk.name}/queue"
        said = lab.guest_vm.console.run(
            f"cat {queue}/logical_block_size {queue}/physical_block_size"
        )
        assert said.split() == ["512", str(physical)]
        assert not vm.request_unplug([drive.id])
        assert vm.wait_unplugged([drive.id], 20) == {}


def test_disks_whose_serials_begin_alike_are_not_one_disk_to_the_guest(
    lab: Lab, tmp_path: Path
) -> None:
    """By QEMU's default both have the first 20 bytes as their name, and multipathd merges them."""
    images = [disk_image(tmp_path / f"{i}.img", 4, f"disk-{i}") for i in range(2)]
    serials = [f"WD-0123456789ABCDEF0123-{i}" for i in range(2)]
    names = []
    for _ in range(2):
        held = [
            lab.attach(image, {**SCSI, "serial": serial})
            for image, serial in zip(images, serials, strict=True)
        ]
        disks = lab.guest_vm.console.wait_for_disks(2)
        at = {disk.marker: f"/sys/block/{disk.name}/device" for disk in disks}
        console = lab.guest_vm.console
        names.append([console.run(f"cat {at[f'disk-{i}']}/wwid").strip() for i in range(2)])
        pages = [console.read_file(f"{at[f'disk-{i}']}/vpd_pg83") for i in range(2)]
        assert [serials[i].encode() in pages[i] for i in range(2)] == [True, True]
        assert [lab.property_of(h, "device_id") for h in held] == serials
        for each in held:
            lab.devices.detach(each.id)
        lab.guest_vm.console.wait_for_disks(0)
    first, again = names
    assert first == again
    assert len(set(first)) == 2
    assert all(name.startswith("naa.3") for name in first)


def test_a_scsi_disk_without_a_serial_keeps_its_name(lab: Lab, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 4, "named")
    names = set()
    for _ in range(2):
        attachment = lab.attach(image, SCSI)
        disk = lab.seen(attachment)
        names.add(lab.guest_vm.console.run(f"cat /sys/block/{disk.name}/device/wwid").strip())
        lab.devices.detach(attachment.id)
        lab.guest_vm.console.wait_for_disks(0)
    assert len(names) == 1


@pytest.mark.parametrize("options", [{}, SCSI], ids=["virtio", "scsi"])
def test_the_last_part_of_a_sector_becomes_a_whole_one(
    lab: Lab, tmp_path: Path, options: dict[str, str]
) -> None:
    image = tmp_path / "odd.img"
    image.touch()
    os.truncate(image, 95_000)
    attachment = lab.attach(image, options)
    seen = lab.seen(attachment)
    assert seen.size_bytes == 95_232
    lab.guest_vm.console.write(seen.name, 95_232 - 512, b"x" * 512)
    lab.devices.detach(attachment.id)
    assert image.read_bytes()[-512:] == b"x" * 512

    os.truncate(image, 95_000)
    attachment = lab.devices.attach(request(image, options, ro=True))
    assert lab.guest_vm.console.read(lab.seen(attachment).name, 95_232 - 512, 3) == b"xxx"
    assert lab.nodes_of(attachment)[0]["cache"]["direct"]
