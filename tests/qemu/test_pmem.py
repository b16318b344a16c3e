"""Persistent memory that the manager attached: what the guest maps is what the host has.

QEMU takes no NVDIMM out again: those of earlier tests stay in the VM.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from guest.console import GuestError, GuestPmem

from tests.contract.sandbox import Hooked, Sandbox
from tests.contract.world import MemorySide, journal_rows
from tests.qemu.conftest import OpenLab, OpenSide, opened_by_another_qemu, request, started_open_vm
from tests.support.disks import PFN_DATA_OFFSET, dax_image, disk_image, loop_device
from tests.support.vm import GuestVm, start_vm
from vmplug.address import qemu_id
from vmplug.drivers.ports import Command
from vmplug.errors import (
    CannotPlug,
    CommandError,
    InUse,
    NoFreePort,
    NoSuchDevice,
    NotAttached,
    SpecError,
    StateError,
)
from vmplug.host.block.volumes import find_requests
from vmplug.host.finding import Code, Severity
from vmplug.host.root import HostRoot
from vmplug.journal.records import Attachment
from vmplug.journal.state import State
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.spec import read_bundle

pytestmark = pytest.mark.qemu

MIB = 1 << 20
SMALL_MIB = 4
NVDIMM = {"block-driver": "nvdimm"}


def by_handle(lab: OpenLab, attachment: Attachment) -> GuestPmem:
    """The persistent memory with the attachment's handle, once the guest has it."""
    assert attachment.guest_address
    handle = attachment.guest_address.nvdimm_handle
    lab.guest_vm.console.wait_until(f"pmem_of {handle}")
    return GuestPmem.parse(lab.guest(f'pmems | grep "^name=$(pmem_of {handle}) "'))


def seen(lab: OpenLab, attachment: Attachment) -> GuestPmem:
    """The persistent memory that the attachment says it is, once the guest has it."""
    pmem = by_handle(lab, attachment)
    assert attachment.guest_address
    number = attachment.guest_address.nvdimm_id
    assert number is None or pmem.name == f"pmem{number}"
    return pmem


PMEM_OF = b"""#!/bin/sh
# Prints the name of the block device of the NVDIMM with this handle.
for path in /sys/block/pmem*; do
    read -r mapping <"$path/device/../mapping0" || continue
    read -r handle <"/sys/bus/nd/devices/${mapping%%,*}/nfit/handle" || continue
    [ $((handle)) != "$1" ] || exec echo "${path##*/}"
done
exit 1
"""


@pytest.fixture(scope="module")
def open_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    """A VM of this module: NVDIMMs take the room of other devices' memory tables.

    `pmem_of HANDLE` is a command of its guest.
    """
    with started_open_vm(tmp_path_factory.mktemp("open")) as vm:
        vm.console.write_file("/bin/pmem_of", PMEM_OF)
        vm.console.run("chmod +x /bin/pmem_of")
        yield vm


@pytest.fixture(scope="module")
def open_journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its journal, as NVDIMMs stay in it from test to test."""
    return tmp_path_factory.mktemp("open-journal")


def of_qemu(lab: OpenLab, attachment: Attachment) -> Mapping[str, object]:
    """What QEMU says of an NVDIMM."""
    devices = lab.query("query-memory-devices")
    qdev_id = qemu_id(attachment.device_id)
    (data,) = [device["data"] for device in devices if device["data"]["id"] == qdev_id]
    path = lab.query("qom-get", path=data["memdev"], property="mem-path")
    is_read_only = lab.query("qom-get", path=data["memdev"], property="readonly")
    return {**data, "mem-path": path, "readonly": is_read_only}


def state_of(lab: Sandbox, attachment: Attachment) -> State:
    """The state of the device in the journal."""
    rows = journal_rows(lab.state_dir)["device"]
    (row,) = [row for row in rows if attachment.device_id in row]
    (state,) = [word for word in State if word in row]
    return state


def file_in(image: Path, name: str) -> bytes:
    """A file of the ext4 in an image of `dax_image`, as it is on the host."""
    reader = ["debugfs", "-R", f"cat {name}", f"{image}?offset={PFN_DATA_OFFSET}"]
    return subprocess.check_output(reader, stderr=subprocess.DEVNULL)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """An image with an ext4 that has a file `hello`, for a guest's DAX."""
    content = tmp_path / "content"
    content.mkdir()
    (content / "hello").write_text("from the host")
    return dax_image(tmp_path / "dax.img", 16, content)


@contextmanager
def mounted_volume(image: Path, directory: Path, *, read_only: bool = True) -> Iterator[Path]:
    """The data of a pmem image mounted on the host through a loop device."""
    directory.mkdir()
    option = "ro" if read_only else "rw"
    with loop_device(image, read_only=read_only, offset=PFN_DATA_OFFSET) as node:
        subprocess.run(["mount", "-o", option, str(node), str(directory)], check=True)
        try:
            yield directory
        finally:
            subprocess.run(["umount", str(directory)], check=True)


def bundle_with_mount(directory: Path, source: Path, *options: str, nvdimm: bool = True) -> Path:
    """A bundle that binds a directory of the host to /data, if said as an NVDIMM."""
    directory.mkdir()
    mount = {
        "destination": "/data",
        "type": "bind",
        "source": str(source),
        "options": ["rbind", *options],
    }
    annotations = {"org.vmplug.options./data": json.dumps(NVDIMM)} if nvdimm else {}
    config = {"ociVersion": "1", "annotations": annotations, "mounts": [mount]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


# volumes


@pytest.mark.root
def test_a_mounted_volume_of_a_bundle_is_mapped_by_the_guest(
    life: OpenLab, tmp_path: Path, filled: Path
) -> None:
    with mounted_volume(filled, tmp_path / "volume") as source:
        bundle = read_bundle(bundle_with_mount(tmp_path / "bundle", source))
        requests = find_requests(bundle, HostRoot("/"))
        assert requests == [
            DeviceInfo(
                container_path="/data",
                dev_type=DevType.BLOCK,
                host_path=str(filled),
                pmem=True,
                read_only=True,
                driver_options={"fstype": "ext4", **NVDIMM},
            )
        ]
        (attachment,) = life.devices.attach_all(requests, owner="c1")
        assert (attachment.name, attachment.host_path) == ("/data", str(filled))

        pmem = seen(life, attachment)
        assert (pmem.dax, pmem.read_only) == (True, True)
        assert pmem.size_bytes == 16 * MIB - PFN_DATA_OFFSET
        console = life.guest_vm.console
        directory = console.mount("ext4", f"/dev/{pmem.name}", "ro,dax")
        assert "dax=always" in console.run(f"grep {directory} /proc/mounts")
        assert console.read_file(f"{directory}/hello") == (source / "hello").read_bytes()
        console.unmount(directory)
        with pytest.raises(GuestError):
            console.write(pmem.name, 0, b"must not arrive")
        life.devices.detach_owner("c1")


@pytest.mark.root
def test_a_part_of_a_volume_is_no_device(open_lab: OpenLab, tmp_path: Path, filled: Path) -> None:
    with mounted_volume(filled, tmp_path / "volume") as source:
        part = source / "lost+found"
        bundle = read_bundle(bundle_with_mount(tmp_path / "bundle", part))
        with pytest.raises(SpecError, match="is not the mount point"):
            find_requests(bundle, HostRoot("/"))


@pytest.mark.root
def test_a_volume_is_a_directory_unless_the_bundle_says_nvdimm(
    tmp_path: Path, filled: Path
) -> None:
    with mounted_volume(filled, tmp_path / "volume") as source:
        bundle = read_bundle(bundle_with_mount(tmp_path / "bundle", source, nvdimm=False))
        assert find_requests(bundle, HostRoot("/")) == []


@pytest.mark.root
def test_a_volume_that_the_host_writes_to_is_refused_unless_allowed(
    open_lab: OpenLab, tmp_path: Path, filled: Path
) -> None:
    with mounted_volume(filled, tmp_path / "volume", read_only=False) as source:
        bundle = read_bundle(bundle_with_mount(tmp_path / "bundle", source, "ro"))
        (info,) = find_requests(bundle, HostRoot("/"))
        assert info.read_only
        before = open_lab.picture()
        with pytest.raises(InUse) as caught:
            open_lab.devices.attach(info)
        assert caught.value.codes == (Code.HAS_HOLDERS,)
        assert open_lab.picture() == before

        attachment = open_lab.devices.attach(info, allow=[Code.HAS_HOLDERS])
        pmem = seen(open_lab, attachment)
        assert (pmem.dax, pmem.read_only) == (True, True)
        open_lab.devices.detach(attachment.id)


# files and devices


def test_a_file_with_a_pfn_block_is_written_past_every_cache(life: OpenLab, filled: Path) -> None:
    attachment = life.devices.attach(request(filled, NVDIMM))
    pmem = seen(life, attachment)
    assert (pmem.dax, pmem.read_only) == (True, False)
    console = life.guest_vm.console
    text = b"written past the page cache " * 1000

    directory = console.mount("ext4", f"/dev/{pmem.name}", "dax")
    assert "dax=always" in console.run(f"grep {directory} /proc/mounts")
    assert console.read_file(f"{directory}/hello") == b"from the host"
    console.write_file(f"{directory}/from-the-guest", text)
    console.unmount(directory)
    assert file_in(filled, "from-the-guest") == text
    life.devices.detach(attachment.id)


def test_a_guest_that_writes_a_pfn_block_keeps_its_disk(life: OpenLab, tmp_path: Path) -> None:
    """It would be an NVDIMM at the next attach, which QEMU never releases."""
    image = disk_image(tmp_path / "tenant.img", 16, "tenant")
    donor = dax_image(tmp_path / "donor.img", 16)
    first = life.devices.attach(request(image))
    life.guest_vm.console.write(life.seen(first).name, 4096, donor.read_bytes()[4096:8192])
    life.devices.detach(first.id)
    assert image.read_bytes()[4096 : 4096 + 15] == b"NVDIMM_PFN_INFO"

    for options in ({}, {"format": "raw"}):
        again = life.devices.attach(request(image, options))
        assert again.guest_address
        assert again.guest_address.nvdimm_handle is None
        life.devices.detach(again.id)
        assert again.id not in {held.id for held in life.devices.attachments()}


def test_a_read_only_file_takes_no_writes(open_lab: OpenLab, filled: Path) -> None:
    before = filled.read_bytes()
    attachment = open_lab.devices.attach(request(filled, NVDIMM, ro=True))
    pmem = seen(open_lab, attachment)
    assert (pmem.dax, pmem.read_only) == (True, True)
    assert of_qemu(open_lab, attachment)["readonly"] is True
    assert open_lab.property_of(attachment, "unarmed") is True
    console = open_lab.guest_vm.console
    with pytest.raises(GuestError, match=r"Operation not permitted|Read-only|write"):
        console.write(pmem.name, 0, b"must not arrive")
    directory = console.mount("ext4", f"/dev/{pmem.name}", "ro,dax")
    with pytest.raises(GuestError, match="Read-only file system"):
        console.run(f"echo no >{directory}/no")
    console.unmount(directory)
    open_lab.devices.detach(attachment.id)
    assert filled.read_bytes() == before


@pytest.fixture(params=["file", pytest.param("loop", marks=pytest.mark.root)])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk without a PFN block, as a file and as a loop device."""
    image = disk_image(tmp_path / "plain.img", SMALL_MIB, "plain-memory")
    if request.param == "file":
        yield image
        return
    with loop_device(image) as node:
        yield node


def test_any_disk_may_be_an_nvdimm(life: OpenLab, plain: Path, tmp_path: Path) -> None:
    info = request(plain, NVDIMM)
    (examined,) = life.devices.check([info])
    warnings = {finding.code for finding in examined.findings}
    expected = {Code.NO_PFN_SIGNATURE, Code.SPARSE_NVDIMM} if plain.is_file() else set()
    assert warnings == expected
    assert {finding.severity for finding in examined.findings} <= {Severity.WARNING}

    attachment = life.devices.attach(info)
    pmem = seen(life, attachment)
    assert (pmem.marker, pmem.size_bytes) == ("plain-memory", SMALL_MIB * MIB)
    assert (pmem.dax, pmem.read_only) == (False, False)
    assert str(plain) in Path(f"/proc/{life.guest_vm.pid}/maps").read_text()
    life.guest_vm.console.write(pmem.name, MIB, b"from the guest")
    with plain.open("rb") as file:
        file.seek(MIB)
        assert file.read(14) == b"from the guest"
    life.devices.detach(attachment.id)


NAMES = [
    "with,comma=x  and 'single' \"double\" quotes.img",
    "Grüße-日本-\u2028 100%41%s back\\slash\tand\ttab.img",
    'json:{"driver":"null-co"}',
    "-dash,share=off,size=1.img",
]


def test_two_at_once_are_told_apart(life: OpenLab, tmp_path: Path) -> None:
    images = [disk_image(tmp_path / f"{i}.img", SMALL_MIB, f"pmem-{i}") for i in range(2)]
    attachments = life.devices.attach_all(
        [request(image, NVDIMM, at=f"/dev/{i}") for i, image in enumerate(images)]
    )
    for index, attachment in enumerate(attachments):
        assert seen(life, attachment).marker == f"pmem-{index}"
    life.devices.detach_owner("open")


def test_a_file_name_is_only_a_name(open_lab: OpenLab, tmp_path: Path) -> None:
    """And a disk behind persistent memory goes before it."""
    images = [disk_image(tmp_path / name, SMALL_MIB, f"pmem-{i}") for i, name in enumerate(NAMES)]
    disk = disk_image(tmp_path / "disk.img", 1, "disk")
    infos = [request(image, NVDIMM, at=f"/dev/{i}") for i, image in enumerate(images)]

    *attachments, last = open_lab.devices.attach_all(
        [*infos, request(disk, at="/dev/d")], owner="c1"
    )

    for index, attachment in enumerate(attachments):
        assert seen(open_lab, attachment).marker == f"pmem-{index}"
        assert str(images[index]) in Path(f"/proc/{open_lab.guest_vm.pid}/maps").read_text()
    assert open_lab.seen(last).marker == "disk"
    open_lab.devices.detach_owner("c1")
    open_lab.guest_vm.console.wait_for_disks(0)


def test_those_that_a_guest_finds_later_are_told_apart(open_lab: OpenLab, tmp_path: Path) -> None:
    """Attached one by one while the guest stands still, they come to it at once."""
    images = [disk_image(tmp_path / str(i), SMALL_MIB, f"pmem-{i}") for i in range(3)]
    open_lab.query("stop")
    attachments = [open_lab.devices.attach(request(image, NVDIMM)) for image in images]
    open_lab.query("cont")
    for index, attachment in enumerate(attachments):
        assert by_handle(open_lab, attachment).marker == f"pmem-{index}"
        open_lab.devices.detach(attachment.id)


# references


def test_a_detached_one_stays_and_counts_again(life: OpenLab, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", SMALL_MIB, "stays")
    info = request(image, NVDIMM)
    first = life.devices.attach(info, owner="c1")
    second = life.devices.attach(info, owner="c2")
    assert first.device_id == second.device_id
    parts = life.parts()

    life.devices.detach(first.id)
    assert state_of(life, second) is State.ATTACHED
    life.devices.detach(second.id)
    assert life.holds() == []
    assert state_of(life, second) is State.RETAINED
    assert life.parts() == parts
    assert seen(life, second).marker == "stays"
    assert life.devices.reconcile() == []
    rows = life.rows()
    with pytest.raises(NotAttached, match=r"c2 has released .* already"):
        life.devices.detach(second.id)
    assert life.rows() == rows

    third = life.devices.attach(info, owner="c3")
    assert (third.device_id, third.count, third.state) == (second.device_id, 1, State.ATTACHED)
    assert third.guest_address == second.guest_address
    assert state_of(life, third) is State.ATTACHED
    assert life.parts() == parts
    with pytest.raises(NotAttached, match="not a disk whose size can change"):
        life.devices.resize(third.id, 8 * MIB)
    life.devices.detach_owner("c3")


@pytest.mark.parametrize("is_retained", [False, True], ids=["attached", "retained"])
def test_another_vm_does_not_get_it(life: OpenLab, tmp_path: Path, *, is_retained: bool) -> None:
    image = disk_image(tmp_path / "a.img", SMALL_MIB, "mine")
    attachment = life.devices.attach(request(image, NVDIMM))
    assert seen(life, attachment).marker == "mine"
    if is_retained:
        life.devices.detach(attachment.id)
    other = Sandbox(tmp_path / "other", side=MemorySide(), vm="other")
    other.state_dir = life.state_dir
    before = other.picture()
    for ro in (False, True):
        with pytest.raises(InUse) as caught:
            other.devices.attach(request(image, ro=ro))
        assert Code.IN_USE_BY_VM in caught.value.codes
    assert other.picture() == before
    other.close()
    if not is_retained:
        life.devices.detach(attachment.id)


def test_a_retained_one_may_not_become_writable(open_lab: OpenLab, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", SMALL_MIB, "read-only")
    attachment = open_lab.devices.attach(request(image, NVDIMM, ro=True))
    assert seen(open_lab, attachment).read_only
    open_lab.devices.detach(attachment.id)
    before = open_lab.picture()
    with pytest.raises(StateError, match="read-only") as caught:
        open_lab.devices.attach(request(image, NVDIMM))
    assert caught.value.hint
    assert open_lab.picture() == before


def test_what_fails_behind_an_nvdimm_leaves_it_retained(open_lab: OpenLab, tmp_path: Path) -> None:
    """It cannot be taken back; whoever asks again gets the same one."""
    good = disk_image(tmp_path / "good.img", SMALL_MIB, "good")
    bad = disk_image(tmp_path / "bad.img", SMALL_MIB, "bad")

    def remove(command: Command) -> None:
        if command.execute == "query-memory-devices":
            bad.unlink()

    open_lab.talk_through(lambda monitor: Hooked(monitor, remove))
    infos = [request(image, NVDIMM, at=f"/dev/{image.stem}") for image in (good, bad)]
    with pytest.raises(CannotPlug):
        open_lab.devices.attach_all(infos)
    open_lab.talk_plainly()
    assert open_lab.holds() == []
    assert open_lab.devices.reconcile() == []
    parts = open_lab.parts()
    attachment = open_lab.devices.attach(request(good, NVDIMM))
    assert open_lab.parts() == parts
    assert seen(open_lab, attachment).marker == "good"
    open_lab.devices.detach(attachment.id)


# refusals


def test_a_file_that_has_gone_is_never_made_anew(life: OpenLab, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "gone.img", SMALL_MIB, "gone")
    info = request(image, NVDIMM)
    before = life.picture()

    def remove(command: Command) -> None:
        if command.execute == "query-memory-devices":
            image.unlink()

    life.talk_through(lambda monitor: Hooked(monitor, remove))
    with pytest.raises(CannotPlug) as caught:
        life.devices.attach(info)
    assert caught.value.reason == "no-such-file"
    assert str(image) in caught.value.message
    life.talk_plainly()
    assert not image.exists()
    assert life.picture() == before

    with pytest.raises(NoSuchDevice):
        life.devices.attach(info)
    assert not image.exists()
    assert life.picture() == before


def test_a_file_that_shrank_meanwhile_is_refused(open_lab: OpenLab, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", SMALL_MIB, "shrinks")
    before = open_lab.picture()

    def shrink(command: Command) -> None:
        if command.execute == "object-add":
            os.truncate(image, MIB)

    open_lab.talk_through(lambda monitor: Hooked(monitor, shrink))
    with pytest.raises(CommandError, match=r"(does not match|is too small for) 'size' option"):
        open_lab.devices.attach(request(image, NVDIMM))
    open_lab.talk_plainly()
    assert image.stat().st_size == MIB
    assert open_lab.picture() == before


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "none"},
        {"aio": "threads"},
        {"discard": "unmap"},
        {"share-rw": "on"},
        {"serial": "s"},
        {"iothread": "on"},
        {"bps-total": "1M"},
    ],
    ids=str,
)
def test_options_of_disks_do_not_apply(
    open_lab: OpenLab, filled: Path, options: Mapping[str, str]
) -> None:
    before = open_lab.picture()
    with pytest.raises(SpecError) as caught:
        open_lab.devices.attach(request(filled, {**NVDIMM, **options}))
    (option,) = options
    assert option in caught.value.where
    assert caught.value.hint
    assert open_lab.picture() == before


def refused(lab: OpenLab, info: DeviceInfo, *codes: Code) -> None:
    before = lab.picture()
    with pytest.raises(InUse) as caught:
        lab.devices.attach(info)
    assert caught.value.codes == codes
    assert caught.value.hint
    assert lab.picture() == before


@contextmanager
def small_file_system(at: Path, size_mib: int) -> Iterator[Path]:
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}M", "none", at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)  # a VM keeps an NVDIMM


@pytest.mark.root
def test_a_sparse_file_on_a_full_file_system_is_refused(life: OpenLab, tmp_path: Path) -> None:
    """A write of the guest without room is a bus error, which ends QEMU."""
    with small_file_system(tmp_path / "full", 12) as full:
        image, other = disk_image(full / "a.img", SMALL_MIB, "sparse"), full / "other"
        other.write_bytes(bytes((12 * MIB) - 64 * 1024))
        refused(life, request(image, NVDIMM), Code.SPARSE_NVDIMM)

        other.unlink()
        (examined,) = life.devices.check([request(image, NVDIMM)])
        (sparse,) = [f for f in examined.findings if f.code is Code.SPARSE_NVDIMM]
        assert sparse.severity is Severity.WARNING
        subprocess.run(sparse.hint.split(), check=True)
        (examined,) = life.devices.check([request(image, NVDIMM)])
        assert Code.SPARSE_NVDIMM not in [finding.code for finding in examined.findings]
        attachment = life.devices.attach(request(image, NVDIMM))
        pmem = seen(life, attachment)
        assert pmem.marker == "sparse"
        life.guest_vm.console.write(pmem.name, SMALL_MIB * MIB - 4096, b"to the end")
        life.devices.detach(attachment.id)


def test_no_format_but_raw(open_lab: OpenLab, filled: Path) -> None:
    options = {"block-driver": "nvdimm", "format": "qcow2"}
    refused(open_lab, request(filled, options), Code.NOT_THAT_FORMAT)


def test_an_empty_file_is_refused(open_lab: OpenLab, tmp_path: Path) -> None:
    image = tmp_path / "empty.img"
    image.touch()
    refused(open_lab, request(image, NVDIMM), Code.SIZE_ZERO)


@pytest.mark.root
def test_a_file_behind_a_writable_loop_device_is_refused(
    open_lab: OpenLab, tmp_path: Path
) -> None:
    image = disk_image(tmp_path / "a.img", SMALL_MIB, "looped")
    with loop_device(image) as node:
        holder = os.open(node, os.O_RDONLY | os.O_EXCL)
        try:
            for ro in (False, True):
                refused(open_lab, request(image, NVDIMM, ro=ro), Code.HAS_HOLDERS)
        finally:
            os.close(holder)


@pytest.mark.root
def test_a_read_only_device_is_not_handed_over_for_writing(
    open_lab: OpenLab, tmp_path: Path
) -> None:
    image = disk_image(tmp_path / "a.img", SMALL_MIB, "looped")
    with loop_device(image, read_only=True) as node:
        refused(open_lab, request(node, NVDIMM), Code.READ_ONLY_DEVICE)


def test_a_file_that_another_qemu_writes_is_refused(open_lab: OpenLab, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", SMALL_MIB, "locked")
    with opened_by_another_qemu(image, tmp_path):
        refused(open_lab, request(image, NVDIMM), Code.IMAGE_LOCKED)


@pytest.mark.parametrize("size", [3 * MIB, 4 * MIB + 512])
def test_an_odd_size_is_refused(open_lab: OpenLab, tmp_path: Path, size: int) -> None:
    image = disk_image(tmp_path / "a.img", 1, "odd")
    os.truncate(image, size)
    refused(open_lab, request(image, NVDIMM), Code.NVDIMM_SIZE)
    assert image.stat().st_size == size


# VMs


@contextmanager
def small_vm(directory: Path, machine: str, memory: str) -> Iterator[Sandbox]:
    """A VM without a guest, below a manager."""
    logs = directory / "vm"
    logs.mkdir()
    with start_vm(logs, machine=machine, memory=memory, guest=False, paused=True) as vm:
        lab = Sandbox(directory, side=OpenSide(vm, directory))
        try:
            yield lab
        finally:
            lab.close()


@pytest.mark.parametrize(
    ("machine", "memory"),
    [
        ("q35", "256M,slots=2,maxmem=1G"),
        ("q35,nvdimm=on", "256M"),
        ("q35,nvdimm=on", "256M,maxmem=1G"),
        ("pc", "256M"),
    ],
)
def test_a_vm_that_takes_none_is_told(tmp_path: Path, machine: str, memory: str) -> None:
    image = disk_image(tmp_path / "a.img", SMALL_MIB, "none")
    with small_vm(tmp_path, machine, memory) as lab:
        before = lab.picture()
        with pytest.raises(CannotPlug) as caught:
            lab.devices.attach(request(image, NVDIMM))
        assert caught.value.reason == "no-nvdimm"
        assert "nvdimm=on" in (caught.value.hint or "")
        assert lab.picture() == before


@pytest.mark.parametrize("machine", ["q35,nvdimm=on", "pc,nvdimm=on"])
def test_slots_run_out(tmp_path: Path, machine: str) -> None:
    images = [disk_image(tmp_path / f"{i}.img", SMALL_MIB, "full") for i in range(4)]
    infos = [request(image, NVDIMM, at=f"/dev/{i}") for i, image in enumerate(images)]
    with small_vm(tmp_path, machine, "256M,slots=2,maxmem=1G") as lab:
        lab.devices.attach(infos[0])
        before = lab.picture()
        with pytest.raises(NoFreePort):
            lab.devices.attach_all(infos[1:])
        assert lab.picture() == before
        lab.devices.attach(infos[1])
        before = lab.picture()
        with pytest.raises(NoFreePort) as caught:
            lab.devices.attach(infos[2])
        assert "memory-slots" in (caught.value.hint or "")
        assert lab.picture() == before


def test_a_slot_that_somebody_has_is_left_out(tmp_path: Path) -> None:
    images = [disk_image(tmp_path / f"{i}.img", SMALL_MIB, f"{i}") for i in range(3)]
    with small_vm(tmp_path, "q35,nvdimm=on", "256M,slots=3,maxmem=1G") as lab:
        memory = {"qom-type": "memory-backend-ram", "id": "m", "size": 128 * MIB}
        lab.side.ask(Command("object-add", memory))
        lab.side.ask(Command("device_add", {"driver": "pc-dimm", "id": "d", "memdev": "m"}))
        attachments = lab.devices.attach_all(
            [request(image, NVDIMM, at=f"/dev/{i}") for i, image in enumerate(images[:2])]
        )
        assert [a.guest_address and a.guest_address.nvdimm_handle for a in attachments] == [2, 3]
        before = lab.picture()
        with pytest.raises(NoFreePort):
            lab.devices.attach(request(images[2], NVDIMM))
        assert lab.picture() == before


def test_room_for_memory_runs_out(tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 64, "too large")
    with small_vm(tmp_path, "q35,nvdimm=on", "256M,slots=2,maxmem=272M") as lab:
        before = lab.picture()
        with pytest.raises(CommandError, match="not enough space") as caught:
            lab.devices.attach(request(image, NVDIMM))
        assert caught.value.hint
        assert lab.picture() == before
        small = disk_image(tmp_path / "small.img", SMALL_MIB, "fits")
        assert lab.devices.attach(request(small, NVDIMM)).state is State.ATTACHED
