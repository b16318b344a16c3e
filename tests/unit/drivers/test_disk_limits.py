"""What the block layer says of a disk that the guest's disk cannot carry, on trees."""

import pytest

from tests.support.checking import want
from tests.support.tree import HostTree
from vmplug.drivers.plug import DiskFrontend
from vmplug.host.finding import Severity
from vmplug.manager.examine import examine
from vmplug.oci.info import DeviceInfo

SDA = "/sys/devices/virtual/block/sda"


@pytest.fixture
def disk(tree: HostTree) -> HostTree:
    """A SCSI disk 8:0 with a partition, as the kernel shows a plain one."""
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"})
    for path, content in (
        ("queue/zoned", "none"),
        ("queue/physical_block_size", "4096"),
        ("integrity/format", "none"),
        ("device/type", "0"),
        ("device/scsi_level", "7"),
    ):
        tree.file(f"{SDA}/{path}", f"{content}\n")
    return tree


def found(tree: HostTree, number: str = "8:0", *, ro: bool = False, driver: str = "") -> list[str]:
    """The findings as `code` or, for warnings, `(code)`; each has a message and a remedy."""
    asked = want(number)
    options = {"block-driver": driver} if driver else {}
    info = DeviceInfo(
        container_path=asked.container_path,
        dev_type=asked.dev_type,
        devnum=asked.devnum,
        read_only=ro,
        driver_options=options,
    )
    (examined,) = examine([info], tree.root)
    assert all("/dev/" in finding.message and finding.hint for finding in examined.findings)
    return [
        str(f.code) if f.severity is Severity.ERROR else f"({f.code})" for f in examined.findings
    ]


@pytest.mark.parametrize("number", ["8:0", "8:1"])
@pytest.mark.parametrize("ro", [False, True])
@pytest.mark.parametrize("driver", ["", *(d for d in DiskFrontend)])
def test_a_plain_disk_may_go(disk: HostTree, number: str, driver: str, *, ro: bool) -> None:
    assert found(disk, number, ro=ro, driver=driver) == []


@pytest.mark.parametrize("number", ["8:0", "8:1"])
@pytest.mark.parametrize("driver", ["", *(d for d in DiskFrontend)])
@pytest.mark.parametrize(
    ("path", "content", "codes"),
    [
        ("queue/zoned", "host-managed", ["zoned"]),
        ("queue/zoned", "host-aware", ["(zoned)"]),
        ("integrity/format", "T10-DIF-TYPE1-CRC", ["(has-integrity)"]),
        ("integrity/format", "T10-DIF-TYPE3-IP", ["(has-integrity)"]),
        ("integrity/format", "nop", ["(has-integrity)"]),
        ("queue/logical_block_size", "4096", []),
        ("queue/logical_block_size", "8192", ["sector-size"]),
        ("queue/logical_block_size", "65536", ["sector-size"]),
        ("device/type", "1", ["not-a-disk"]),
        ("device/type", "4", ["not-a-disk"]),
        ("device/type", "8", ["not-a-disk"]),
        ("device/type", "13", ["not-a-disk"]),
        ("device/type", "7", []),
        ("device/type", "14", []),
        ("device/type", "20", []),  # and its zones are in the queue
        ("removable", "1", []),
    ],
)
def test_what_a_guests_disk_cannot_carry_is_a_finding(
    disk: HostTree, number: str, driver: str, path: str, content: str, codes: list[str]
) -> None:
    disk.file(f"{SDA}/{path}", f"{content}\n")
    assert found(disk, number, driver=driver) == codes


@pytest.mark.parametrize(("name", "type_"), [("mmcblk0", "MMC"), ("pmem0", "4"), ("xvda", "1")])
def test_the_type_of_another_bus_is_no_scsi_type(tree: HostTree, name: str, type_: str) -> None:
    tree.block_device("259:0", name)
    tree.file(f"/sys/devices/virtual/block/{name}/device/type", f"{type_}\n")
    assert found(tree, "259:0") == []


def drive(tree: HostTree, slots: str = "1") -> HostTree:
    """A CD drive with a medium in it, the second of two drives."""
    tree.block_device("11:1", "sr1", removable=True, sector_bytes=2048)
    tree.file("/sys/devices/virtual/block/sr1/device/type", "5\n")
    return tree.file(
        "/proc/sys/dev/cdrom/info",
        "CD-ROM information, Id: cdrom.c 3.20 2003/12/17\n\n"
        "drive name:\t\tsr0\tsr1\ndrive speed:\t\t4\t48\n"
        f"drive # of slots:\t9\t{slots}\nCan close tray:\t\t1\t1\n",
    )


def test_a_cd_drive_goes_for_reading(tree: HostTree) -> None:
    drive(tree)
    assert found(tree, "11:1", ro=True) == []
    assert found(tree, "11:1") == ["not-a-disk"]


@pytest.mark.parametrize("ro", [False, True])
def test_a_drive_of_a_changer_stays(tree: HostTree, *, ro: bool) -> None:
    assert found(drive(tree, slots="6"), "11:1", ro=ro) == ["not-a-disk"]


@pytest.mark.parametrize("table", ["", "nonsense", "drive name:\tsr1\n", "drive # of slots:\tx\n"])
def test_a_table_of_drives_that_says_nothing_is_no_changer(tree: HostTree, table: str) -> None:
    drive(tree).file("/proc/sys/dev/cdrom/info", table)
    assert found(tree, "11:1", ro=True) == []
