"""Disks as drives: their options, what speaks against them, and the place they get."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.support.checking import want
from tests.support.scsi import first_addresses
from tests.support.tree import GIB, HostTree
from vmplug.address import CcwDevNo, PciPath, PciSlot, ScsiAddress
from vmplug.devnum import DevNum
from vmplug.drivers.block import OPTIONS, BlockDiskDriver, check_disk, choose_place, plan_drive
from vmplug.drivers.place import (
    CcwPlace,
    GuestAddress,
    MemorySlot,
    MmioPlace,
    Offer,
    PciPlace,
    PciPort,
    Place,
    PlugMode,
    ScsiController,
    ScsiPlace,
)
from vmplug.drivers.plug import (
    Aio,
    BlockDrive,
    Cache,
    DiskFrontend,
    ErrorAction,
    Plug,
    RNGDevice,
    SharedFS,
    Throttle,
    VhostUserDevice,
    guest_address,
)
from vmplug.errors import CannotPlug, NoFreePort, SpecError
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.formats import ImageFormat
from vmplug.host.block.image_faults import ImageFault
from vmplug.host.block.qcow2 import ImageFile, Qcow2Header
from vmplug.host.block.queue import QueueFacts
from vmplug.host.finding import Code, Severity
from vmplug.host.kind import DeviceType, FoundBy
from vmplug.manager.examine import examine

SDB = BlockDevice(
    devnum=DevNum(8, 16),
    device_node="/dev/sdb",
    found_by=FoundBy.SYSFS,
    size_bytes=1 << 30,
    sector_bytes=4096,
)
IMAGE = DiskFile(host_path="/srv/a.img", size_bytes=1 << 30, direct_io=True)
PAGE_CACHED = DiskFile(host_path="/srv/b.img", size_bytes=1 << 30, direct_io=False)


def qcow2(*, backing_file: str | None = None, external_data: bool = False) -> DiskFile:
    header = Qcow2Header(1 << 30, backing_file, external_data)
    return DiskFile(
        host_path="/srv/q.img",
        size_bytes=1 << 20,
        direct_io=True,
        qcow2=header,
        looks_like="qcow2",
    )


ODD = IMAGE._replace(size_bytes=(1 << 30) + 512, direct_io_bytes=4096)
FAULTY = qcow2()._replace(faults=(ImageFault("is encrypted", "decrypt it"),))
CORRUPT = qcow2()._replace(
    faults=(ImageFault("is marked as corrupt", "repair it", only_for_writing=True),)
)


# Options


def test_without_options_every_choice_is_open() -> None:
    assert BlockDiskDriver.parse({}) == BlockDiskDriver()


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        *[("block-driver", str(word), BlockDiskDriver(driver=word)) for word in DiskFrontend],
        *[("format", str(word), BlockDiskDriver(format=word)) for word in ImageFormat],
        *[("cache", str(word), BlockDiskDriver(cache=word)) for word in Cache],
        *[("aio", str(word), BlockDiskDriver(aio=word)) for word in Aio],
        ("discard", "unmap", BlockDiskDriver(discard=True)),
        ("discard", "ignore", BlockDiskDriver(discard=False)),
        ("share-rw", "on", BlockDiskDriver(share_rw=True)),
        ("share-rw", "off", BlockDiskDriver(share_rw=False)),
        ("serial", "disk 1,x=é", BlockDiskDriver(serial="disk 1,x=é")),
        ("iothread", "on", BlockDiskDriver(iothread=True)),
        ("iothread", "off", BlockDiskDriver(iothread=False)),
        ("werror", "enospc", BlockDiskDriver(werror=ErrorAction.ENOSPC)),
        ("werror", "stop", BlockDiskDriver(werror=ErrorAction.STOP)),
        ("werror", "report", BlockDiskDriver(werror=ErrorAction.REPORT)),
        ("rerror", "stop", BlockDiskDriver(rerror=ErrorAction.STOP)),
        ("rerror", "report", BlockDiskDriver(rerror=ErrorAction.REPORT)),
        ("fstype", "ext4", BlockDiskDriver(fs_type="ext4")),
        ("bps-total", "1", BlockDiskDriver(throttle=Throttle(bps_total=1))),
        ("bps-read", "10K", BlockDiskDriver(throttle=Throttle(bps_read=10 << 10))),
        ("bps-write", "10M", BlockDiskDriver(throttle=Throttle(bps_write=10 << 20))),
        ("iops-total", "10G", BlockDiskDriver(throttle=Throttle(iops_total=10 << 30))),
        ("iops-read", "1000000000000000", BlockDiskDriver(throttle=Throttle(iops_read=10**15))),
        ("iops-write", "931322G", BlockDiskDriver(throttle=Throttle(iops_write=931322 << 30))),
    ],
)
def test_every_word_of_an_option_means_what_it_says(
    key: str, text: str, expected: BlockDiskDriver
) -> None:
    assert BlockDiskDriver.parse({key: text}) == expected


def test_the_table_of_options_is_complete() -> None:
    assert set(OPTIONS) == {
        *("block-driver", "format", "cache", "aio", "discard", "share-rw", "serial", "iothread"),
        *("fstype", "werror", "rerror"),
        *("bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write"),
    }
    assert all(option.help for option in OPTIONS.values())


def test_limits_of_bytes_and_operations_go_together() -> None:
    options = BlockDiskDriver.parse({"bps-read": "1M", "bps-write": "2M", "iops-total": "100"})
    assert options.throttle == Throttle(bps_read=1 << 20, bps_write=2 << 20, iops_total=100)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        (
            "block-driver",
            "virtio-nvme",
            f"'virtio-nvme' is not one of {', '.join(DiskFrontend)}\nhint: ",
        ),
        ("block-driver", "NVDIMM", "'NVDIMM' is not one of virtio-mmio"),
        ("block-driver", "", "'' is not one of"),
        ("fstype", "", "'' is not printable text"),
        ("fstype", "a\nb", "is not printable text"),
        ("werror", "ignore", "'ignore' is not one of enospc, stop, report"),
        ("rerror", "enospc", "'enospc' is not one of report, stop"),
        ("format", "vmdk", "'vmdk' is not one of raw, qcow2"),
        ("format", "QCOW2", "is not one of raw, qcow2"),
        ("cache", "writeBack", "is not one of none, writeback"),
        ("aio", "uring", "is not one of threads, native, io_uring"),
        ("discard", "on", "'on' is not unmap or ignore"),
        ("share-rw", "true", "'true' is not on or off"),
        ("iothread", "", "'' is not on or off"),
        ("serial", "", "'' is not printable text"),
        ("serial", "a\nb", "is not printable text"),
        ("serial", "a\0b", "is not printable text"),
        *[
            (
                "bps-total",
                text,
                f"is not a number from 1 to {10**15}, optionally with K, M, G or T",
            )
            for text in ("", "0", "-1", "1.5", "1k", "1KB", "K", "0x10", " 1", "1\n", "٣")
        ],
        ("iops-read", "1000000000000001", "is not a number from 1 to"),
        ("iops-read", "931323G", "is not a number from 1 to"),
        ("iops-read", "9" * 5000, "is not a number from 1 to"),
        ("cached", "none", "unknown for a disk"),
        ("", "", "unknown for a disk"),
    ],
)
def test_a_wrong_word_is_refused_with_its_option(key: str, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        BlockDiskDriver.parse({"share-rw": "on", key: text})
    assert caught.value.where == f"option {key}"


def test_an_unknown_option_is_answered_with_the_known_ones() -> None:
    with pytest.raises(SpecError) as caught:
        BlockDiskDriver.parse({"readonly": "on"})
    assert caught.value.hint == "known options: " + ", ".join(OPTIONS)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"aio": "native", "cache": "writeback"}, "option aio"),
        ({"aio": "native", "cache": "writethrough"}, "option aio"),
        ({"aio": "native", "cache": "unsafe"}, "option aio"),
        ({"iothread": "on", "block-driver": "virtio-scsi"}, "option iothread"),
        ({"bps-total": "5", "bps-read": "5"}, "option bps-total"),
        ({"bps-total": "5", "bps-write": "5"}, "option bps-total"),
        ({"iops-total": "5", "iops-read": "5"}, "option iops-total"),
        ({"iops-total": "5", "iops-write": "5"}, "option iops-total"),
        *[
            ({"block-driver": "nvdimm", key: text}, f"option {key}")
            for key, text in (
                ("cache", "none"),
                ("aio", "threads"),
                ("discard", "unmap"),
                ("share-rw", "on"),
                ("serial", "x"),
                ("iothread", "on"),
                ("werror", "enospc"),
                ("rerror", "report"),
                ("bps-total", "5"),
                ("iops-write", "5"),
            )
        ],
    ],
)
def test_options_that_qemu_would_refuse_together_are_refused_here(
    options: dict[str, str], where: str
) -> None:
    for key, text in options.items():
        BlockDiskDriver.parse({key: text})
    with pytest.raises(SpecError) as caught:
        BlockDiskDriver.parse(options)
    assert caught.value.where == where


@pytest.mark.parametrize(
    "options",
    [
        {"aio": "native", "cache": "none"},
        {"aio": "native", "cache": "directsync"},
        {"aio": "native"},
        {"aio": "threads", "cache": "unsafe"},
        {"iothread": "on", "block-driver": "virtio-blk"},
        {"bps-total": "5", "iops-read": "5", "iops-write": "5"},
        {"block-driver": "nvdimm", "format": "raw", "fstype": "ext4"},
        {"block-driver": "nvdimm", "share-rw": "off", "discard": "ignore", "iothread": "off"},
    ],
)
def test_options_that_fit_each_other_are_taken(options: dict[str, str]) -> None:
    BlockDiskDriver.parse(options)


@given(st.dictionaries(st.sampled_from(list(OPTIONS)) | st.text(), st.text(), max_size=3))
def test_any_options_are_taken_or_refused(options: dict[str, str]) -> None:
    error = None
    try:
        BlockDiskDriver.parse(options)
    except SpecError as caught:
        error = caught
    assert error is None or error.where.removeprefix("option ") in options


# What speaks against a disk


@pytest.mark.parametrize(
    ("device", "options", "codes"),
    [
        (SDB, {}, []),
        (SDB, {"format": "raw", "cache": "none"}, []),
        (SDB, {"format": "qcow2"}, [Code.NOT_THAT_FORMAT]),
        (IMAGE, {}, []),
        (IMAGE, {"format": "raw", "cache": "none", "aio": "native"}, []),
        (IMAGE, {"format": "qcow2"}, [Code.NOT_THAT_FORMAT]),
        (qcow2(), {}, [Code.FORMAT_NOT_STATED]),
        (qcow2(), {"format": "raw"}, []),
        (qcow2(), {"format": "qcow2"}, []),
        (qcow2(backing_file="/etc/shadow"), {"format": "qcow2"}, [Code.HAS_BACKING_FILE]),
        (qcow2(backing_file="/etc/shadow"), {"format": "raw"}, []),
        (qcow2(external_data=True), {"format": "qcow2"}, [Code.HAS_BACKING_FILE]),
        (PAGE_CACHED, {}, []),
        (PAGE_CACHED, {"cache": "writeback"}, []),
        (PAGE_CACHED, {"cache": "none"}, [Code.NO_DIRECT_IO]),
        (PAGE_CACHED, {"cache": "directsync"}, [Code.NO_DIRECT_IO]),
        (PAGE_CACHED, {"aio": "native"}, [Code.NO_DIRECT_IO]),
        (PAGE_CACHED, {"aio": "io_uring"}, []),
        (PAGE_CACHED, {"cache": "none", "format": "qcow2"}, ["not-that-format", "no-direct-io"]),
        (IMAGE._replace(looks_like="vhdx"), {}, [Code.FORMAT_NOT_STATED]),
        (IMAGE._replace(looks_like="luks"), {}, [Code.FORMAT_NOT_STATED]),
        (IMAGE._replace(looks_like="vhdx"), {"format": "raw"}, []),
        (IMAGE._replace(looks_like="vhdx"), {"block-driver": "nvdimm"}, ["format-not-stated"]),
        (SDB._replace(looks_like="qcow2"), {}, [Code.FORMAT_NOT_STATED]),
        (SDB._replace(looks_like="qcow2"), {"format": "raw"}, []),
        (SDB._replace(is_silent=True), {}, [Code.UNREADABLE]),
        (FAULTY, {"format": "qcow2"}, [Code.UNUSABLE_IMAGE]),
        (FAULTY, {"format": "raw"}, []),
        (CORRUPT, {"format": "qcow2"}, [Code.UNUSABLE_IMAGE]),
        (ODD, {}, [Code.ODD_SIZE]),
        (ODD, {"cache": "none"}, [Code.ODD_SIZE]),
        (ODD, {"aio": "native"}, [Code.ODD_SIZE]),
        (ODD, {"cache": "writeback"}, []),
        (ODD, {"format": "qcow2"}, [Code.NOT_THAT_FORMAT]),
        (IMAGE._replace(has_aio=False), {}, [Code.NO_AIO_CONTEXT]),
        (SDB._replace(has_aio=False), {}, [Code.NO_AIO_CONTEXT]),
        (SDB._replace(has_aio=False), {"aio": "native"}, [Code.NO_AIO_CONTEXT]),
        (SDB._replace(has_aio=False), {"aio": "io_uring"}, []),
        (SDB._replace(has_aio=False), {"cache": "writeback"}, []),
        (PAGE_CACHED._replace(has_aio=False), {}, []),
    ],
)
def test_a_disk_is_checked_against_its_options(
    device: BlockDevice | DiskFile, options: dict[str, str], codes: list[str]
) -> None:
    findings = list(check_disk(device, BlockDiskDriver.parse(options)))
    assert [finding.code for finding in findings] == codes
    assert all(finding.message.count(device.host_path) == 1 for finding in findings)
    assert all(finding.hint for finding in findings)


def test_a_corrupt_image_may_be_read_and_a_slow_device_is_only_warned_of() -> None:
    options = BlockDiskDriver(format=ImageFormat.QCOW2)
    (writing,) = check_disk(CORRUPT, options, read_only=False)
    (reading,) = check_disk(CORRUPT, options, read_only=True)
    assert (writing.severity, reading.severity) == (Severity.ERROR, Severity.WARNING)
    (silent,) = check_disk(SDB._replace(is_silent=True), BlockDiskDriver())
    assert silent.severity is Severity.WARNING


@pytest.mark.parametrize(
    ("device", "remedy"),
    [
        (IMAGE._replace(looks_like="vhdx"), "convert it (qemu-img convert -f vhdx -O raw"),
        (IMAGE._replace(looks_like="qcow"), "convert it (qemu-img convert -f qcow -O raw"),
        (IMAGE._replace(looks_like="luks"), "open it on the host (cryptsetup open)"),
        (qcow2(), "set format=qcow2, or set format=raw"),
        (SDB._replace(looks_like="qcow2"), "convert it (qemu-img convert -f qcow2 -O raw"),
    ],
)
def test_an_image_without_a_stated_format_has_a_remedy(
    device: BlockDevice | DiskFile, remedy: str
) -> None:
    (finding,) = check_disk(device, BlockDiskDriver())
    assert finding.hint.startswith(remedy)
    assert "format=raw" in finding.hint
    assert f"looks like a {device.looks_like} image" in finding.message


def test_the_file_that_qemu_would_open_besides_is_named() -> None:
    options = BlockDiskDriver(format=ImageFormat.QCOW2)
    (backing,) = check_disk(qcow2(backing_file="/etc/shadow"), options)
    (external,) = check_disk(qcow2(external_data=True), options)
    assert "another file: /etc/shadow" in backing.message
    assert "another file: its external data file" in external.message


# The drive


def drive(
    device: BlockDevice | DiskFile,
    driver: DiskFrontend = DiskFrontend.VIRTIO_BLOCK,
    **options: str,
) -> BlockDrive:
    parsed = BlockDiskDriver.parse({key.replace("_", "-"): text for key, text in options.items()})
    return plan_drive("0123456789abcdef", device, parsed, read_only=False, driver=driver)


def test_a_block_device_passes_the_page_cache_by_in_its_own_sectors() -> None:
    planned = plan_drive(
        "0123456789abcdef",
        SDB,
        BlockDiskDriver(),
        read_only=True,
        driver=DiskFrontend.VIRTIO_BLOCK,
    )
    assert planned == BlockDrive(
        id="0123456789abcdef",
        file="/dev/sdb",
        is_device=True,
        driver=DiskFrontend.VIRTIO_BLOCK,
        format=ImageFormat.RAW,
        read_only=True,
        cache=Cache.NONE,
        aio=Aio.NATIVE,
        serial="0123456789abcdef",
        sector_bytes=4096,
        physical_bytes=4096,
        aio_is_choice=True,
        disk_id=f"{drive(SDB).wwn:016x}",
        wwn=drive(SDB).wwn,
        size_bytes=1 << 30,
        file_id="block 8:16",
    )


@pytest.mark.parametrize(
    ("device", "options", "cache", "aio", "severity"),
    [
        (ODD, {}, Cache.WRITEBACK, Aio.THREADS, Severity.WARNING),
        (ODD, {"cache": "none"}, Cache.NONE, Aio.NATIVE, Severity.ERROR),
        (SDB._replace(has_aio=False), {}, Cache.NONE, Aio.THREADS, Severity.WARNING),
        (SDB._replace(has_aio=False), {"aio": "native"}, Cache.NONE, Aio.NATIVE, Severity.ERROR),
    ],
)
def test_what_vmplug_would_choose_and_cannot_work_is_replaced_and_said(
    device: BlockDevice | DiskFile,
    options: dict[str, str],
    cache: Cache,
    aio: Aio,
    severity: Severity,
) -> None:
    planned = drive(device, DiskFrontend.VIRTIO_BLOCK, **options)
    assert (planned.cache, planned.aio) == (cache, aio)
    (finding,) = check_disk(device, BlockDiskDriver.parse(options))
    assert finding.severity is severity
    if severity is Severity.WARNING:
        assert f"vmplug uses {'cache=' + cache if device is ODD else 'aio=' + aio}" in (
            finding.message
        )


def test_a_file_of_odd_size_is_read_directly() -> None:
    planned = plan_drive(
        "0123456789abcdef",
        ODD,
        BlockDiskDriver(),
        read_only=True,
        driver=DiskFrontend.VIRTIO_BLOCK,
    )
    assert planned.cache is Cache.NONE
    assert list(check_disk(ODD, BlockDiskDriver(), read_only=True)) == []


@pytest.mark.parametrize(
    ("logical", "physical", "expected"),
    [(512, 4096, 4096), (512, None, 512), (4096, 512, 4096), (4096, None, 4096), (512, 512, 512)],
)
def test_the_guest_sees_the_physical_sectors(
    logical: int, physical: int | None, expected: int
) -> None:
    device = SDB._replace(sector_bytes=logical, queue=QueueFacts(physical_bytes=physical))
    planned = drive(device)
    assert (planned.sector_bytes, planned.physical_bytes) == (logical, expected)


def test_a_disk_has_one_name_for_guests_and_no_other_disk_has_it() -> None:
    names = [IMAGE._replace(host_path=f"/srv/{number}.img") for number in range(1000)]
    wwns = [drive(device).wwn for device in names]
    assert len(set(wwns)) == 1000
    assert wwns == [drive(device).wwn for device in names]
    assert {wwn and wwn >> 60 for wwn in wwns} == {3}
    assert drive(IMAGE).disk_id == f"{drive(IMAGE).wwn:016x}"


def scsi_name(tree: HostTree, number: str) -> int | None:
    """The WWN with which a request for this number is planned."""
    (asked,) = examine([want(number)], tree.root)
    assert isinstance(asked.device, BlockDevice)
    return drive(asked.device, DiskFrontend.VIRTIO_SCSI).wwn


def test_a_lun_has_one_name_for_guests_over_every_path_and_so_has_each_partition(
    tree: HostTree,
) -> None:
    numbers = {"8:0": "sda", "8:16": "sdb", "8:32": "sdc"}
    for number, name in numbers.items():
        major, minor = number.split(":")
        tree.block_device(number, name, partitions={f"{major}:{int(minor) + 1}": f"{name}1"})
    for name, wwid in (("sda", "naa.6001"), ("sdb", "naa.6001"), ("sdc", "naa.6002")):
        tree.file(f"/sys/devices/virtual/block/{name}/device/wwid", f"{wwid}\n")
    tree.block_device("253:0", "dm-0")
    multipath = "/sys/devices/virtual/block/dm-0"
    tree.file(f"{multipath}/dm/uuid", "mpath-36001\n").link(f"{multipath}/slaves/sdb", "../../sdb")
    assert scsi_name(tree, "8:0") == scsi_name(tree, "8:16") == scsi_name(tree, "253:0")
    assert scsi_name(tree, "8:1") == scsi_name(tree, "8:17")
    assert len({scsi_name(tree, n) for n in ("8:0", "8:1", "8:32", "8:33")}) == 4


def test_a_volume_and_a_file_behind_a_loop_device_keep_their_name_on_another_node(
    tree: HostTree,
) -> None:
    loop = {"backing_file": "/srv/a.img\n", "offset": "0\n"}
    tree.block_device("7:0", "loop0", loop=loop).block_device("7:5", "loop5", loop=loop)
    tree.block_device("7:6", "loop6", loop={**loop, "offset": "512\n"})
    assert scsi_name(tree, "7:0") == scsi_name(tree, "7:5") != scsi_name(tree, "7:6")
    for number, name, uuid in (("253:1", "dm-1", "LVM-a"), ("253:2", "dm-2", "LVM-b")):
        tree.block_device(number, name)
        tree.file(f"/sys/devices/virtual/block/{name}/dm/uuid", f"{uuid}\n")
    first, second = scsi_name(tree, "253:1"), scsi_name(tree, "253:2")
    assert first != second
    tree.file("/sys/devices/virtual/block/dm-2/dm/uuid", "LVM-a\n")
    assert scsi_name(tree, "253:2") == first


@pytest.mark.parametrize("wwid", ["t10.Generic USB Flash", "nvme.1b36-31-51-00000001"])
def test_disks_of_other_sizes_with_one_serial_number_have_other_names(
    tree: HostTree, wwid: str
) -> None:
    """The slots of a card reader, or clones of a virtual disk."""
    for number, name, size in (("8:0", "sda", GIB), ("8:16", "sdb", 2 * GIB)):
        tree.block_device(number, name, size_bytes=size)
        tree.file(f"/sys/devices/virtual/block/{name}/device/wwid", f"{wwid}\n")
    assert scsi_name(tree, "8:0") != scsi_name(tree, "8:16")


@pytest.mark.parametrize(
    ("names", "file"), [(("dm-1", "dm-4"), "dm/name"), (("md1", "md127"), "md/uuid")]
)
def test_a_volume_without_a_uuid_and_an_array_keep_their_name_under_another_number(
    tree: HostTree, names: tuple[str, str], file: str
) -> None:
    for number, name in zip(("253:1", "253:4"), names, strict=True):
        tree.block_device(number, name)
        tree.file(f"/sys/devices/virtual/block/{name}/{file}", "data\n")
    assert scsi_name(tree, "253:1") == scsi_name(tree, "253:4")


def test_a_serial_is_told_whole_beside_the_name() -> None:
    first = drive(IMAGE, DiskFrontend.VIRTIO_SCSI, serial="WD-0123456789ABCDEF0123-1")
    second = drive(PAGE_CACHED, DiskFrontend.VIRTIO_SCSI, serial="WD-0123456789ABCDEF0123-2")
    assert (first.disk_id, second.disk_id) == (first.serial, second.serial)
    assert first.wwn != second.wwn


def test_an_image_is_raw_unless_the_format_is_stated() -> None:
    assert drive(qcow2()).format is ImageFormat.RAW
    assert drive(qcow2(), format="qcow2").format is ImageFormat.QCOW2
    assert not drive(IMAGE).is_device
    assert drive(IMAGE).sector_bytes == 512


@pytest.mark.parametrize(
    ("device", "options", "cache", "aio"),
    [
        (IMAGE, {}, Cache.NONE, Aio.NATIVE),
        (PAGE_CACHED, {}, Cache.WRITEBACK, Aio.THREADS),
        (PAGE_CACHED, {"aio": "io_uring"}, Cache.WRITEBACK, Aio.IO_URING),
        (PAGE_CACHED, {"aio": "native"}, Cache.NONE, Aio.NATIVE),
        (SDB, {"cache": "writeback"}, Cache.WRITEBACK, Aio.THREADS),
        (SDB, {"cache": "directsync"}, Cache.DIRECTSYNC, Aio.NATIVE),
        (SDB, {"cache": "unsafe"}, Cache.UNSAFE, Aio.THREADS),
        (SDB, {"aio": "threads"}, Cache.NONE, Aio.THREADS),
        (SDB, {"cache": "none", "aio": "io_uring"}, Cache.NONE, Aio.IO_URING),
    ],
)
def test_cache_and_aio_are_chosen_to_fit_each_other_and_the_file(
    device: BlockDevice | DiskFile, options: dict[str, str], cache: Cache, aio: Aio
) -> None:
    planned = drive(device, DiskFrontend.VIRTIO_BLOCK, **options)
    assert (planned.cache, planned.aio) == (cache, aio)


@pytest.mark.parametrize(
    ("cache", "direct", "no_flush", "write_cache"),
    [
        (Cache.NONE, True, False, True),
        (Cache.WRITEBACK, False, False, True),
        (Cache.WRITETHROUGH, False, False, False),
        (Cache.DIRECTSYNC, True, False, False),
        (Cache.UNSAFE, False, True, True),
    ],
)
def test_a_cache_mode_is_the_three_switches_of_qemus_manual(
    cache: Cache,
    direct: bool,  # noqa: FBT001 - a column of a table
    no_flush: bool,  # noqa: FBT001
    write_cache: bool,  # noqa: FBT001
) -> None:
    assert (cache.direct, cache.no_flush, cache.write_cache) == (direct, no_flush, write_cache)


def test_the_switches_reach_the_drive() -> None:
    planned = drive(SDB, share_rw="on", discard="unmap", iothread="on", iops_total="9")
    assert (planned.share_rw, planned.discard, planned.iothread) == (True, True, True)
    assert planned.throttle == Throttle(iops_total=9)


BASE = ImageFile("/srv/base.img", ImageFormat.RAW, is_device=False, file_id="inode 8:1")
OVER_BASE = ImageFile(
    "/srv/a.qcow2", ImageFormat.QCOW2, is_device=False, file_id="inode 8:2", backing=BASE
)


@pytest.mark.parametrize(
    ("device", "backing"),
    [
        (SDB, None),
        (IMAGE, None),
        (qcow2(), None),
        (qcow2(backing_file="base.img")._replace(image=OVER_BASE), BASE),
        (qcow2()._replace(image=OVER_BASE), None),
    ],
)
def test_only_an_image_that_names_other_files_may_open_them(
    device: BlockDevice | DiskFile, backing: ImageFile | None
) -> None:
    assert drive(device).backing == backing


@pytest.mark.parametrize("device", [qcow2(backing_file="x"), qcow2(external_data=True)])
def test_an_image_whose_files_cannot_be_checked_is_never_plugged(device: DiskFile) -> None:
    with pytest.raises(CannotPlug) as caught:
        drive(device)
    assert caught.value.reason == "unusable-image"


@pytest.mark.parametrize(
    ("driver", "limit"), [(DiskFrontend.VIRTIO_BLOCK, 20), (DiskFrontend.VIRTIO_SCSI, 36)]
)
def test_a_serial_is_never_cut(driver: DiskFrontend, limit: int) -> None:
    assert drive(SDB, driver, serial="x" * limit).serial == "x" * limit
    assert drive(SDB, driver, serial="é" * (limit // 2)).serial == "é" * (limit // 2)
    for serial in ("x" * (limit + 1), "é" * (limit // 2 + 1)):
        with pytest.raises(SpecError, match=f"is longer than {limit} bytes") as caught:
            drive(SDB, driver, serial=serial)
        assert caught.value.where == "option serial"


def test_an_iothread_is_refused_also_when_the_vm_offers_only_scsi() -> None:
    with pytest.raises(SpecError, match="runs in the iothread of its controller"):
        drive(SDB, DiskFrontend.VIRTIO_SCSI, iothread="on")


# The place


def port(bus: str, *free: int) -> PciPort:
    slot = PciSlot(int(bus.removeprefix("rp")))
    return PciPort(bus=bus, path=PciPath((slot,)), free=tuple(map(PciSlot, free)))


def controller(bus: str, used: int = 0) -> ScsiController:
    return ScsiController(bus=f"{bus}.0", path=PciPath((PciSlot(9),)), used=first_addresses(used))


def offer(*parts: PciPort | ScsiController) -> Offer:
    return Offer(
        machine="q35",
        ports=tuple(part for part in parts if isinstance(part, PciPort)),
        controllers=tuple(part for part in parts if isinstance(part, ScsiController)),
        shared_memory=False,
    )


BLK, SCSI = DiskFrontend.VIRTIO_BLOCK, DiskFrontend.VIRTIO_SCSI
FULL = offer(port("rp1", 0), port("rp2", 3, 4), controller("scsi0", 2), controller("scsi1"))


@pytest.mark.parametrize(
    ("driver", "taken", "chosen", "place"),
    [
        (None, (), BLK, "rp1/00"),
        (BLK, (), BLK, "rp1/00"),
        (None, ("rp1/00",), BLK, "rp2/03"),
        (None, ("rp1/00", "rp2/03"), BLK, "rp2/04"),
        (None, ("rp2/03",), BLK, "rp1/00"),
        (None, ("rp1/00", "rp2/03", "rp2/04"), SCSI, "scsi0.0/0:2"),
        (SCSI, (), SCSI, "scsi0.0/0:2"),
        (SCSI, ("scsi0.0/0:2", "scsi0.0/0:4"), SCSI, "scsi0.0/0:3"),
    ],
)
def test_a_disk_gets_the_lowest_free_place_of_the_wanted_kind(
    driver: DiskFrontend | None, taken: tuple[str, ...], chosen: DiskFrontend, place: str
) -> None:
    answer, found = choose_place(FULL, driver, taken)
    assert (answer, str(found)) == (chosen, place)


def test_a_full_controller_leads_to_the_next() -> None:
    full = offer(controller("scsi0", 1 << 16), controller("scsi1", 256))
    assert str(choose_place(full, None, ())[1]) == "scsi1.0/1:0"


def test_a_place_says_where_the_guest_will_see_it() -> None:
    _, pci = choose_place(FULL, BLK, ("rp1/00",))
    _, scsi = choose_place(FULL, SCSI, ())
    assert pci == PciPlace(bus="rp2", slot=PciSlot(3), path=PciPath.parse("02/03"))
    assert guest_address(drive(SDB), pci) == GuestAddress(pci_path=PciPath.parse("02/03"))
    assert isinstance(scsi, ScsiPlace)
    assert guest_address(drive(SDB, SCSI), scsi) == GuestAddress(
        pci_path=PciPath.parse("09"), scsi_address=ScsiAddress(0, 2)
    )


MAC = "52:54:00:12:34:56"
BEHIND_PORT = PciPlace(bus="rp2", slot=PciSlot(3), path=PciPath.parse("02/03"))
ON_CCW = CcwPlace(devno=CcwDevNo(0, 5))
ON_MMIO = MmioPlace(bus="virtio-mmio-bus.2", index=2)
NET = VhostUserDevice(id="a", type=DeviceType.VHOST_USER_NET, socket_path="/s", mac_address=MAC)
SHARE = SharedFS(id="a", directory="/srv", tag="work", read_only=False)
RNG = RNGDevice(id="a", filename="/dev/urandom")


@pytest.mark.parametrize(
    ("plug", "place", "address", "text"),
    [
        (drive(SDB), ON_CCW, GuestAddress(ccw_devno=CcwDevNo(0, 5)), "CCW 0.0.0005"),
        (drive(SDB), ON_MMIO, GuestAddress(virt_path="/dev/vdc"), "/dev/vdc"),
        (
            drive(SDB),
            MemorySlot(slot=3, index=1),
            GuestAddress(nvdimm_id=1, nvdimm_handle=4),
            "/dev/pmem1",
        ),
        (
            NET,
            BEHIND_PORT,
            GuestAddress(pci_path=PciPath.parse("02/03"), mac_address=MAC),
            f"PCI 02/03 {MAC}",
        ),
        (
            SHARE,
            BEHIND_PORT,
            GuestAddress(pci_path=PciPath.parse("02/03"), mount_tag="work"),
            "PCI 02/03 tag work",
        ),
        (SHARE, ON_MMIO, GuestAddress(mount_tag="work"), "tag work"),
        (
            SHARE,
            ON_CCW,
            GuestAddress(ccw_devno=CcwDevNo(0, 5), mount_tag="work"),
            "CCW 0.0.0005 tag work",
        ),
        (RNG, BEHIND_PORT, GuestAddress(pci_path=PciPath.parse("02/03")), "PCI 02/03"),
        (RNG, ON_MMIO, GuestAddress(), ""),
    ],
)
def test_the_guest_sees_each_kind_by_what_it_can_look_for(
    plug: Plug, place: Place, address: GuestAddress, text: str
) -> None:
    assert guest_address(plug, place) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("parts", "driver", "taken", "message"),
    [
        ((), None, (), "the VM (q35) has no PCI port to plug into"),
        ((), BLK, (), "the VM (q35) has no PCI port to plug into"),
        ((), SCSI, (), "the VM has no virtio-scsi controller with a free address"),
        ((port("rp1", 0),), SCSI, (), "the VM has no virtio-scsi controller with a free address"),
        ((port("rp1"),), None, (), "the VM (q35) has no free PCI port left"),
        ((port("rp1", 0),), None, ("rp1/00",), "the VM (q35) has no free PCI port left"),
        (
            (controller("s", 1 << 16),),
            None,
            (),
            "the VM (q35) has no PCI port to plug into and no free SCSI address",
        ),
        ((port("rp1"), controller("s")), BLK, (), "the VM (q35) has no free PCI port left"),
    ],
)
def test_no_place_left_is_said_with_a_remedy(
    parts: tuple[Any, ...], driver: DiskFrontend | None, taken: tuple[str, ...], message: str
) -> None:
    with pytest.raises(NoFreePort) as caught:
        choose_place(offer(*parts), driver, taken)
    assert caught.value.message == message
    assert caught.value.hint


MICROVM = replace(offer(), machine="microvm")
S390 = replace(offer(controller("scsi0")), machine="s390-ccw-virtio", ccw_used=frozenset())
WITH_MEMORY = replace(offer(port("rp1", 0)), nvdimm=True, memory_slots=2)


@pytest.mark.parametrize(
    ("machine", "driver", "reason"),
    [
        (FULL, DiskFrontend.VIRTIO_MMIO, "no-virtio-mmio"),
        (FULL, DiskFrontend.VIRTIO_BLOCK_CCW, "no-channel-subsystem"),
        (FULL, DiskFrontend.NVDIMM, "no-nvdimm"),
        (replace(FULL, nvdimm=True), DiskFrontend.NVDIMM, "no-nvdimm"),
        (replace(FULL, memory_slots=2), DiskFrontend.NVDIMM, "no-nvdimm"),
        (replace(FULL, mode=PlugMode.COLD), DiskFrontend.VIRTIO_MMIO, "no-virtio-mmio"),
        (MICROVM, DiskFrontend.VIRTIO_MMIO, "cold-plug-only"),
        (MICROVM, None, "cold-plug-only"),
        (MICROVM, DiskFrontend.NVDIMM, "no-nvdimm"),
        (MICROVM, DiskFrontend.VIRTIO_BLOCK, "no-pci"),
        (S390, DiskFrontend.VIRTIO_BLOCK, "no-pci"),
        (S390, DiskFrontend.VIRTIO_MMIO, "no-virtio-mmio"),
        (S390, DiskFrontend.NVDIMM, "no-nvdimm"),
    ],
)
def test_a_driver_that_the_vm_never_takes_is_refused_and_not_replaced(
    machine: Offer, driver: DiskFrontend | None, reason: str
) -> None:
    with pytest.raises(CannotPlug) as caught:
        choose_place(machine, driver, ())
    assert caught.value.reason == reason
    assert caught.value.hint


TRANSPORTS = (ON_MMIO, MmioPlace(bus="virtio-mmio-bus.3", index=3))


@pytest.mark.parametrize(
    ("machine", "driver", "taken", "chosen", "place"),
    [
        (S390, None, (), DiskFrontend.VIRTIO_BLOCK_CCW, "ccw/0.0.0001"),
        (S390, DiskFrontend.VIRTIO_BLOCK_CCW, (), DiskFrontend.VIRTIO_BLOCK_CCW, "ccw/0.0.0001"),
        (
            replace(S390, ccw_used=frozenset({CcwDevNo(0, 1), CcwDevNo(1, 3)})),
            None,
            ("ccw/0.0.0002",),
            DiskFrontend.VIRTIO_BLOCK_CCW,
            "ccw/0.0.0003",
        ),
        (S390, SCSI, (), SCSI, "scsi0.0/0:0"),
        (
            replace(MICROVM, mode=PlugMode.COLD, mmio=TRANSPORTS),
            None,
            ("virtio-mmio-bus.2",),
            DiskFrontend.VIRTIO_MMIO,
            "virtio-mmio-bus.3",
        ),
        (WITH_MEMORY, None, (), BLK, "rp1/00"),
        (WITH_MEMORY, DiskFrontend.NVDIMM, (), DiskFrontend.NVDIMM, "memory/0"),
        (WITH_MEMORY, DiskFrontend.NVDIMM, ("memory/0",), DiskFrontend.NVDIMM, "memory/1"),
        (
            replace(WITH_MEMORY, memory_slots_used=frozenset({0})),
            DiskFrontend.NVDIMM,
            ("memory/0",),
            DiskFrontend.NVDIMM,
            "memory/1",
        ),
    ],
)
def test_every_machine_gives_a_disk_its_lowest_place(
    machine: Offer,
    driver: DiskFrontend | None,
    taken: tuple[str, ...],
    chosen: DiskFrontend,
    place: str,
) -> None:
    answer, found = choose_place(machine, driver, taken)
    assert (answer, str(found)) == (chosen, place)


@pytest.mark.parametrize(
    ("used", "nvdimms", "taken", "index"),
    [
        ((), 0, (), 0),
        ((0,), 1, (), 1),
        ((0,), 0, (), 0),  # a memory device of another kind
        ((), 0, ("memory/0",), 1),  # journalled, not yet plugged
        ((0,), 1, ("memory/0",), 1),
        ((0, 2), 1, ("memory/0", "memory/1"), 2),
    ],
)
def test_an_nvdimm_is_numbered_by_those_that_come_before(
    used: tuple[int, ...], nvdimms: int, taken: tuple[str, ...], index: int
) -> None:
    machine = replace(
        WITH_MEMORY, memory_slots=4, memory_slots_used=frozenset(used), nvdimms=nvdimms
    )
    _, place = choose_place(machine, DiskFrontend.NVDIMM, taken)
    assert isinstance(place, MemorySlot)
    assert place.index == index


def test_full_memory_slots_are_said_with_a_remedy() -> None:
    machine = replace(WITH_MEMORY, memory_slots_used=frozenset({1}))
    with pytest.raises(NoFreePort, match="all 2 memory slots") as caught:
        choose_place(machine, DiskFrontend.NVDIMM, ("memory/0",))
    assert caught.value.hint
    assert "--memory-slots" in caught.value.hint
