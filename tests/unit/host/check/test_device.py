"""Every reason not to hand a device over, one by one and together."""

import os
import shlex

import pytest

from tests.support.checking import (
    READING,
    SHARING,
    WRITING,
    claim,
    codes,
    findings,
    want,
    want_file,
)
from tests.support.tree import HostTree
from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.formats import ImageFormat
from vmplug.host.block.qcow2 import ImageFile
from vmplug.host.block.relations import relate_block, relate_file
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.device import HostDevice
from vmplug.host.finding import NEVER_ALLOWED, Access, Code, Finding, Severity, UsedBy, allow
from vmplug.host.kind import Identity
from vmplug.host.resolve import resolve
from vmplug.host.use.claim import Claim
from vmplug.host.use.mounts import MountedDevice
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.oci.info import DeviceInfo, DevType


@pytest.fixture
def disk(tree: HostTree) -> HostTree:
    """A disk 8:0 with two partitions, and nothing against it."""
    return tree.block_device("8:0", "sda", partitions={"8:1": "sda1", "8:2": "sda2"})


@pytest.mark.parametrize("number", ["8:0", "8:1", "8:2"])
@pytest.mark.parametrize("wish", [READING, WRITING, SHARING])
def test_an_idle_disk_has_no_findings(disk: HostTree, number: str, wish: Access) -> None:
    assert findings(disk, number, wish) == []


# Mounts


def test_a_mounted_disk_is_in_use(disk: HostTree) -> None:
    disk.mount("/dev/sda", "/mnt", "8:0")
    assert findings(disk) == [
        Finding(
            Code.MOUNTED_ON_HOST,
            "/dev/sda is mounted on the host at /mnt",
            "umount /mnt",
            used_by=UsedBy(
                on="/dev/sda",
                who="a mounted file system",
                where="/mnt",
                how="the mount tables of all mount namespaces",
            ),
        )
    ]


@pytest.mark.parametrize(
    ("mounted", "wanted", "named"),
    [
        ("8:1", "8:0", "/dev/sda1"),
        ("8:0", "8:1", "/dev/sda"),
        ("8:1", "8:1", "/dev/sda1"),
        ("8:2", "8:1", None),
        ("8:16", "8:0", None),
        ("259:0", "8:0", None),
    ],
)
def test_a_mount_concerns_the_device_its_disk_and_its_partitions(
    disk: HostTree, mounted: str, wanted: str, named: str | None
) -> None:
    disk.mount("/dev/x", "/mnt", mounted)
    found = findings(disk, wanted)
    assert codes(found) == (["mounted-on-host"] if named else [])
    assert all(f"{named} is mounted" in finding.message for finding in found)


def test_each_mounted_part_is_one_finding_with_all_its_places(disk: HostTree) -> None:
    for point in ("/d", "/c", "/b", "/a", "/c"):
        disk.mount("/dev/sda1", point, "8:1")
    disk.mount("/dev/sda2", "/other", "8:2")
    messages = [finding.message for finding in findings(disk)]
    assert sorted(messages) == [
        "/dev/sda1 is mounted on the host at /a, /b, /c and 1 more",
        "/dev/sda2 is mounted on the host at /other",
    ]


def test_a_mount_in_another_namespace_is_seen(disk: HostTree) -> None:
    disk.mount("/dev/sdb", "/", "8:16")
    disk.mount("/dev/sda1", "/data", "8:1", pid=4711, namespace="mnt:[4026532999]")
    assert codes(findings(disk)) == ["mounted-on-host"]


def test_a_namespace_is_read_once_however_many_processes_are_in_it(disk: HostTree) -> None:
    disk.mount("/dev/sdb", "/", "8:16", pid=1).mount("/dev/sda", "/lies", "8:0", pid=2)
    assert read_usage(disk.root).mounts == (
        MountedDevice(devnum=DevNum(8, 16), mount_point="/", read_only=False),
    )


def test_processes_that_are_ending_and_other_files_of_proc_are_passed_over(
    disk: HostTree,
) -> None:
    (disk.path / "proc/30").mkdir(parents=True)
    disk.file("/proc/31/mountinfo", "").file("/proc/self/mountinfo", "nonsense")
    disk.file("/proc/uptime", "1 1\n").mount("/dev/sda", "/mnt", "8:0", pid=32)
    disk.file("/proc/33/mountinfo", "40 1 8:1 / /later rw - ext4 /dev/sda1 rw\n")
    assert {mount.mount_point for mount in read_usage(disk.root).mounts} == {"/mnt", "/later"}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("/a\\040b", "/a b"),
        ("/a\\011b", "/a\tb"),
        ("/a\\012b", "/a\nb"),
        ("/a\\134040b", "/a\\040b"),
        ("/a\\043b", "/a#b"),
        ("/a-b", "/a-b"),
        ("/a\rb", "/a\rb"),
        ("/a\x0bb\x1cc", "/a\x0bb\x1cc"),
        ("/a\u2028b", "/a\u2028b"),
        ("/a\udcffb", "/a\udcffb"),
    ],
)
def test_mount_points_are_read_as_the_kernel_escapes_them(
    disk: HostTree, written: str, meant: str
) -> None:
    disk.mount("/dev/sdb", written, "8:16").mount("/dev/sda", "/mnt", "8:0")
    points = {mount.mount_point for mount in read_usage(disk.root).mounts}
    assert points == {meant, "/mnt"}


def test_a_mount_table_without_optional_fields_or_source_is_read(disk: HostTree) -> None:
    table = (
        "40 1 0:50 / /a rw - tmpfs  rw,size=4k\n"
        "41 1 8:0 /sub /b rw master:1 propagate_from:2 - ext4 none rw\n"
        "42 1 8:1 / /c rw - fuseblk /dev/sda1 rw,user_id=0 - odd\n"
    )
    disk.file("/proc/1/mountinfo", table)
    assert {str(mount.devnum) for mount in read_usage(disk.root).mounts} == {"8:0", "8:1"}


@pytest.mark.parametrize("table", ["nonsense\n", "36 1 8:0 /\n", "36 1 x / /a rw - ext4 b rw\n"])
def test_a_mount_table_that_makes_no_sense_is_refused_with_its_file(
    disk: HostTree, table: str
) -> None:
    disk.file("/proc/1/mountinfo", table)
    with pytest.raises(AttributeReadError) as caught:
        assert read_usage(disk.root).mounts
    assert caught.value.path == "/proc/1/mountinfo"


@pytest.mark.parametrize(
    "source", ["overlay", "none", "/srv/x", "/dev/gone", "/file/x", "/circle", "/" + "x" * 300]
)
def test_a_source_that_is_no_node_concerns_nobody(disk: HostTree, source: str) -> None:
    disk.file("/srv/x").file("/file").link("/circle", "circle")
    disk.mount(source, "/mnt", "0:50").mount("/dev/sda1", "/a", "8:1")
    assert [mount.mount_point for mount in read_usage(disk.root).mounts] == ["/a"]


@pytest.mark.root
def test_btrfs_shows_a_number_of_its_own_and_is_known_by_its_source(disk: HostTree) -> None:
    disk.node("/dev/mapper/a b", "b", "8:1")
    disk.mount("/dev/mapper/a\\040b", "/mnt", "0:45")
    assert codes(findings(disk)) == ["mounted-on-host"]


def test_every_device_of_a_btrfs_is_mounted_though_the_kernel_names_one(tree: HostTree) -> None:
    for number, name in (("8:0", "sda"), ("8:16", "sdb"), ("8:32", "sdc")):
        tree.block_device(number, name)
    for name in ("sda", "sdb"):
        tree.link(
            f"/sys/fs/btrfs/0b6e/devices/{name}", f"../../../../devices/virtual/block/{name}"
        )
    tree.file("/sys/fs/btrfs/features/raid56", "0\n")
    tree.mount("/dev/sda", "/mnt", "8:0", fs_type="btrfs")
    (finding,) = findings(tree, "8:16")
    assert finding.message == "/dev/sdb is mounted on the host at /mnt"
    assert findings(tree, "8:32") == []


@pytest.mark.parametrize("with_numbers", [False, True])
def test_a_copy_that_followed_the_links_has_partitions_of_the_same_disk(
    tree: HostTree, *, with_numbers: bool
) -> None:
    for directory, number in (
        ("/sys/class/block/sda", "8:0"),
        ("/sys/class/block/sda/sda1", "8:1"),
        ("/sys/class/block/sda1", "8:1"),
        *((("/sys/dev/block/8:0", "8:0"), ("/sys/dev/block/8:1", "8:1")) if with_numbers else ()),
    ):
        tree.file(f"{directory}/dev", f"{number}\n").file(f"{directory}/size", "2048\n")
        if number == "8:1":
            tree.file(f"{directory}/partition", "1\n")
    assert findings(tree, "8:1") == []
    tree.mount("/dev/sda", "/mnt", "8:0")
    assert codes(findings(tree, "8:1")) == codes(findings(tree, "8:0")) == ["mounted-on-host"]


def test_a_remedy_is_quoted_for_the_shell(disk: HostTree) -> None:
    (finding,) = findings(disk.mount("/dev/sda", "/a\\040b", "8:0"))
    assert finding.hint == "umount '/a b'"


@pytest.mark.parametrize(
    ("fs_options", "mount_options", "wish", "shared"),
    [
        ("ro,relatime", "ro", READING, True),
        ("ro", "rw", READING, True),
        ("ro", "ro", WRITING, False),
        ("rw", "ro,relatime", READING, False),
        ("rw", "rw", READING, False),
        ("rw,errors=remount-ro", "ro", READING, False),
    ],
)
def test_only_a_read_only_file_system_is_shared_and_only_for_reading(
    disk: HostTree, fs_options: str, mount_options: str, wish: Access, *, shared: bool
) -> None:
    disk.mount("/dev/sda1", "/mnt", "8:1", fs_options=fs_options, mount_options=mount_options)
    assert codes(findings(disk, "8:0", wish)) == ([] if shared else ["mounted-on-host"])


# Holders


@pytest.mark.parametrize(
    ("held", "wanted", "part"),
    [
        ("sda", "8:0", "/dev/sda is part of dm-0"),
        ("sda1", "8:0", "/dev/sda1 is part of dm-0"),
        ("sda", "8:1", "/dev/sda is part of dm-0"),
        ("sda2", "8:1", None),
    ],
)
def test_what_the_kernel_built_on_a_disk_holds_it(
    disk: HostTree, held: str, wanted: str, part: str | None
) -> None:
    disk.hold(held, "dm-0")
    found = findings(disk, wanted)
    assert codes(found) == (["has-holders"] if part else [])
    assert [finding.message for finding in found] == ([part] if part else [])


def test_many_holders_are_counted(disk: HostTree) -> None:
    for number in range(5):
        disk.hold("sda", f"dm-{number}")
    (finding,) = findings(disk)
    assert finding.message == "/dev/sda is part of dm-0, dm-1, dm-2 and 2 more"
    assert "hand over /dev/dm-0, /dev/dm-1, /dev/dm-2 and 2 more itself" in finding.hint


@pytest.mark.parametrize(
    ("holders", "remedy"),
    [
        (["dm-0"], "dmsetup remove 'a b'"),
        (["dm-0", "dm-1"], "dmsetup remove 'a b' c"),
        (["md127"], "mdadm --stop /dev/md127"),
        (["dm-1", "md0"], "dmsetup remove c; mdadm --stop /dev/md0"),
        (["bcache0"], "echo 1 > /sys/block/bcache0/bcache/stop"),
        (["drbd0"], "drbdadm down, with the resource of /dev/drbd0"),
        (["other0"], "dmsetup, lvm, mdadm"),
    ],
)
def test_what_holds_a_disk_is_taken_apart_by_its_name(
    disk: HostTree, holders: list[str], remedy: str
) -> None:
    disk.file("/sys/block/dm-0/dm/name", "a b\n").file("/sys/block/dm-1/dm/name", "c\n")
    for holder in holders:
        disk.hold("sda", holder)
    (finding,) = findings(disk)
    assert finding.hint.endswith(f"or dismantle it first ({remedy})")


@pytest.mark.parametrize(
    ("ro", "wish", "shared"),
    [(True, READING, True), (True, WRITING, False), (False, READING, False)],
)
def test_a_holder_that_only_reads_is_shared_with_readers(
    disk: HostTree, wish: Access, *, ro: bool, shared: bool
) -> None:
    disk.block_device("253:0", "dm-0", ro=ro).hold("sda", "dm-0")
    assert codes(findings(disk, "8:0", wish)) == ([] if shared else ["has-holders"])


# Loop devices


def idle_loop(tree: HostTree, backing_file: str, *, number: int = 0, ro: bool = False) -> HostTree:
    files = {"backing_file": f"{backing_file}\n", "offset": "0\n", "sizelimit": "0\n"}
    return tree.block_device(f"7:{number}", f"loop{number}", ro=ro, loop=files)


def loop(tree: HostTree, backing_file: str, *, number: int = 0, ro: bool = False) -> HostTree:
    """A loop device with a file system that is mounted."""
    idle_loop(tree, backing_file, number=number, ro=ro)
    return tree.mount(f"/dev/loop{number}", f"/loop{number}", f"7:{number}")


def test_a_file_behind_a_loop_device_is_in_use(tree: HostTree) -> None:
    loop(tree.file("/a.img", b"x"), "/a.img")
    assert findings(tree, "/a.img") == [
        Finding(
            Code.HAS_HOLDERS,
            "/a.img is behind the loop device /dev/loop0",
            "hand over /dev/loop0 itself, or end its use and run losetup --detach /dev/loop0",
            used_by=UsedBy(
                on="/a.img",
                who="the loop device /dev/loop0",
                how="the file that the kernel has open for it",
            ),
        )
    ]


@pytest.mark.parametrize("is_data", [True, False])
def test_a_use_of_the_files_of_an_image_counts(disk: HostTree, *, is_data: bool) -> None:
    """A data file is written; a backing file is only read, which a loop device does too."""
    disk.file("/a.qcow2", b"x").file("/b.raw", b"y")
    loop(disk, "/b.raw").file("/sys/dev/block/7:0/ro", "1\n")
    raw = ImageFile("/b.raw", ImageFormat.RAW, is_device=False, file_id="")
    image = ImageFile("/a.qcow2", ImageFormat.QCOW2, is_device=False, file_id="")
    image = image._replace(data_file=raw) if is_data else image._replace(backing=raw)
    device = DiskFile(host_path="/a.qcow2", size_bytes=1, image=image)
    found = check_device(device, WRITING, usage=read_usage(disk.root), root=disk.root)
    assert [finding.message for finding in found] == (
        ["/b.raw is behind the loop device /dev/loop0"] if is_data else []
    )
    chain = image._replace(backing=image, data_file=None)
    found = check_device(
        device._replace(image=chain), WRITING, usage=read_usage(disk.root), root=disk.root
    )
    assert codes(found) == []  # the data file of a backing file is only read, too


@pytest.mark.parametrize("wanted", ["/a.img", "8:0"])
def test_a_loop_device_that_nothing_uses_is_only_mentioned(disk: HostTree, wanted: str) -> None:
    idle_loop(disk.file("/a.img", b"x"), "/dev/sda" if wanted == "8:0" else wanted)
    (finding,) = findings(disk, wanted)
    assert (finding.code, finding.severity) == (Code.HAS_HOLDERS, Severity.WARNING)
    assert finding.message.endswith("is behind the loop device /dev/loop0, which nothing uses now")
    assert findings(disk, "7:0") == []


@pytest.mark.parametrize("use", ["mount", "holder", "swap", "loop", "partition"])
def test_every_use_of_a_loop_device_counts(tree: HostTree, use: str) -> None:
    files = {"backing_file": "/a.img\n", "offset": "0\n", "sizelimit": "0\n"}
    tree.file("/a.img", b"x")
    tree.block_device("7:0", "loop0", partitions={"259:0": "loop0p1"}, loop=files)
    match use:
        case "mount":
            tree.mount("/dev/loop0", "/mnt", "7:0")
        case "partition":
            tree.mount("/dev/loop0p1", "/mnt", "259:0")
        case "holder":
            tree.block_device("253:0", "dm-0").hold("loop0p1", "dm-0")
        case "swap":
            tree.swap("/dev/loop0")
        case _:
            idle_loop(tree, "/dev/loop0p1", number=1)
    (finding,) = findings(tree, "/a.img")
    assert (finding.code, finding.severity) == (Code.HAS_HOLDERS, Severity.ERROR)


def test_a_vm_that_has_the_loop_device_has_the_file(tree: HostTree) -> None:
    files = {"backing_file": "/a.img\n", "offset": "0\n", "sizelimit": "0\n"}
    tree.file("/a.img", b"x")
    tree.block_device("7:0", "loop0", partitions={"259:0": "loop0p1"}, loop=files)
    file = resolve(want_file("/a.img"), tree.root)
    assert isinstance(file, DiskFile)
    related = relate_file(file, read_usage(tree.root), tree.root).related_identities
    assert [str(identity) for identity in related] == ["block:7:0", "block:259:0"]


def test_a_file_is_known_behind_a_loop_device_by_any_of_its_names(tree: HostTree) -> None:
    tree.file("/a.img", b"x")
    os.link(tree.path / "a.img", tree.path / "b.img")
    loop(tree, "/b.img")
    assert codes(findings(tree, "/a.img")) == ["has-holders"]


@pytest.mark.parametrize("backing_file", ["/a.img (deleted)", "/b.img", "/circle", "/a.img/x"])
def test_other_loop_devices_do_not_matter(tree: HostTree, backing_file: str) -> None:
    tree.file("/a.img", b"x").file("/b.img", b"x").link("/circle", "circle")
    loop(tree, backing_file)
    assert findings(tree, "/a.img") == []


@pytest.mark.parametrize(
    ("ro", "wish", "shared"),
    [(True, READING, True), (True, WRITING, False), (False, READING, False)],
)
def test_a_loop_device_that_only_reads_is_shared_with_readers(
    tree: HostTree, wish: Access, *, ro: bool, shared: bool
) -> None:
    loop(tree.file("/a.img", b"x"), "/a.img", ro=ro)
    assert codes(findings(tree, "/a.img", wish)) == ([] if shared else ["has-holders"])


def test_two_loop_devices_on_one_file_show_the_same_bytes(tree: HostTree) -> None:
    tree.file("/a.img", b"x")
    loop(idle_loop(tree, "/a.img"), "/a.img", number=1)
    (finding,) = findings(tree, "7:0")
    assert finding.message == "/a.img is behind the loop device /dev/loop1"


@pytest.mark.parametrize("wanted", ["8:0", "8:1"])
def test_a_loop_device_on_a_disk_or_its_partition_concerns_both(
    disk: HostTree, wanted: str
) -> None:
    loop(disk, "/dev/sda1")
    (finding,) = findings(disk, wanted)
    assert (finding.code, "/dev/sda1 is behind" in finding.message) == (Code.HAS_HOLDERS, True)


@pytest.mark.parametrize("backing_file", ["/dev/sda1", "/dev/disk/by-id/wwn-1-part1"])
@pytest.mark.parametrize("wanted", ["7:0", "259:0"])
@pytest.mark.parametrize("use", ["mount", "mount-of-disk", "holder", "swap", "opener", "twin"])
def test_a_use_of_what_is_behind_a_loop_device_counts(
    disk: HostTree, use: str, wanted: str, backing_file: str
) -> None:
    """A loop device claims nothing of what it is on."""
    disk.link("/dev/disk/by-id/wwn-1-part1", "../../sda1")
    files = {"backing_file": f"{backing_file}\n", "offset": "0\n", "sizelimit": "0\n"}
    disk.block_device("7:0", "loop0", partitions={"259:0": "loop0p1"}, loop=files)
    disk.mount("/dev/sda2", "/", "8:2")  # another partition does not matter
    assert findings(disk, wanted) == []
    code, node = "mounted-on-host", "/dev/sda1"
    match use:
        case "mount":
            disk.mount("/dev/sda1", "/mnt", "8:1")
        case "mount-of-disk":
            disk.mount("/dev/sda", "/mnt", "8:0")
            node = "/dev/sda"
        case "holder":
            code = "has-holders"
            disk.block_device("253:0", "dm-0").hold("sda1", "dm-0")
        case "swap":
            code = "is-swap"
            disk.swap("/dev/sda1")
        case "opener":
            code = "open-by-process"
            disk.process(77, "mysqld", "/dev/sda1")
        case _:
            node = "/dev/sdb1"
            disk.block_device("8:16", "sdb", partitions={"8:17": "sdb1", "8:18": "sdb2"})
            for name in ("sda", "sdb"):
                disk.file(f"/sys/devices/virtual/block/{name}/device/wwid", "naa.600\n")
            disk.mount("/dev/sdb1", "/mnt", "8:17")
    (finding,) = findings(disk, wanted)
    assert (finding.code, finding.severity) == (code, Severity.ERROR)
    assert finding.used_by
    assert finding.used_by.on == node


def test_swap_on_the_file_behind_a_loop_device_counts(tree: HostTree) -> None:
    idle_loop(tree.file("/swap.img", b"x"), "/swap.img").swap("/swap.img")
    assert codes(findings(tree, "7:0")) == ["is-swap"]


def test_a_vm_that_has_what_is_behind_a_loop_device_has_that(disk: HostTree) -> None:
    """Also by another loop device, and through one that is on a loop device."""
    idle_loop(disk, "/dev/sda1")
    idle_loop(disk, "/dev/sda", number=1)
    idle_loop(disk, "/dev/loop0", number=2)
    device = resolve(want("7:2"), disk.root)
    assert isinstance(device, BlockDevice)
    related = relate_block(device, read_usage(disk.root), disk.root).related_identities
    assert {str(one) for one in related} >= {"block:7:0", "block:7:1", "block:8:0", "block:8:1"}


def test_another_name_of_what_a_volume_is_built_on_counts(disk: HostTree) -> None:
    """As long as the volume is not built on that too, as multipath is."""
    disk.block_device("8:16", "sdb").block_device("253:0", "dm-0").hold("sda", "dm-0")
    disk.link("/sys/devices/virtual/block/dm-0/slaves/sda", "../../sda")
    for name in ("sda", "sdb"):
        disk.file(f"/sys/devices/virtual/block/{name}/wwid", "naa.600\n")
    assert findings(disk, "253:0") == []
    disk.mount("/dev/sdb", "/mnt", "8:16")
    (finding,) = findings(disk, "253:0")
    assert finding.message == (
        "/dev/sdb, which is below /dev/dm-0, is mounted on the host at /mnt"
    )
    disk.hold("sdb", "dm-0").link("/sys/devices/virtual/block/dm-0/slaves/sdb", "../../sdb")
    assert findings(disk, "253:0") == []


# Two names of one disk

LUN = "eui.00112233445566770000000000000012\n"


@pytest.fixture
def twins(tree: HostTree) -> HostTree:
    """A LUN that is nvme3n2 and nvme4n18, and another one."""
    for major, name in ((1, "nvme3n2"), (2, "nvme4n18"), (3, "nvme5n1")):
        parts = {f"259:{major}1": f"{name}p1", f"259:{major}2": f"{name}p2"}
        tree.block_device(f"259:{major}0", name, partitions=parts)
        wwid = LUN if major < 3 else "eui.00112233445566770000000000000013\n"
        tree.file(f"/sys/devices/virtual/block/{name}/wwid", wwid)
    return tree


@pytest.mark.parametrize(
    ("mounted", "wanted", "is_used"),
    [
        ("259:21", "259:10", True),
        ("259:20", "259:11", True),
        ("259:21", "259:11", True),
        ("259:21", "259:12", False),
        ("259:21", "259:30", False),
        ("259:31", "259:10", False),
    ],
)
def test_a_use_under_another_name_of_the_disk_counts(
    twins: HostTree, mounted: str, wanted: str, *, is_used: bool
) -> None:
    assert findings(twins, wanted) == []
    twins.mount("/dev/x", "/srv", mounted)
    found = findings(twins, wanted)
    assert codes(found) == (["mounted-on-host"] if is_used else [])
    assert all("on the same disk as /dev/nvme3n2" in finding.message for finding in found)


def test_what_is_built_on_another_name_of_the_disk_counts(twins: HostTree) -> None:
    twins.block_device("253:0", "dm-0").hold("nvme4n18p2", "dm-0")
    (finding,) = findings(twins, "259:10")
    assert (finding.code, "nvme4n18p2" in finding.message) == (Code.HAS_HOLDERS, True)


def test_a_vm_that_has_one_name_of_a_disk_has_the_others(twins: HostTree) -> None:
    device = resolve(want("259:10"), twins.root)
    assert isinstance(device, BlockDevice)
    related = relate_block(device, read_usage(twins.root), twins.root).related_identities
    assert {str(identity) for identity in related} == {
        *("block:259:11", "block:259:12", "block:259:20", "block:259:21", "block:259:22")
    }


def test_scsi_paths_of_one_lun_are_one_disk_unless_their_sizes_differ(tree: HostTree) -> None:
    for number, name, size_bytes in (("8:0", "sda", 1), ("8:16", "sdb", 1), ("8:32", "sdc", 2)):
        tree.block_device(number, name, size_bytes=size_bytes << 30)
        tree.file(f"/sys/devices/virtual/block/{name}/device/wwid", "naa.600\n")
    tree.mount("/dev/sdb", "/data", "8:16")
    assert codes(findings(tree, "8:0")) == ["mounted-on-host"]
    assert findings(tree, "8:32") == []  # another slot of a card reader


def page_83(*designators: tuple[int, bytes]) -> bytes:
    """A VPD page with names of these kinds. Source: SPC-4, 7.8.6."""
    body = b"".join(bytes((1, kind, 0, len(name))) + name for kind, name in designators)
    return bytes((0, 0x83)) + len(body).to_bytes(2, "big") + body


NAA, OTHER = bytes.fromhex("60014051234567890123456789abcdef"), bytes.fromhex("5000c50012345678")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            {"wwid": f"eui.{NAA.hex()}\n"},
            {"nguid": "60014051-2345-6789-0123-456789abcdef\n", "wwid": "uuid.1-2\n"},
        ),
        ({"wwid": "eui.0025385b\n"}, {"eui": "00 25 38 5b\n"}),
        ({"wwid": "uuid.1-2\n"}, {"uuid": "1-2\n", "wwid": f"eui.{NAA.hex()}\n"}),
        ({"device/vpd_pg83": page_83((3, NAA))}, {"device/wwid": f"naa.{NAA.hex()}\n"}),
        (
            {"device/vpd_pg83": page_83((1, b"LIO a"), (3, NAA))},
            {"device/vpd_pg83": page_83((0x13, OTHER), (3, NAA), (1, b"LIO b"))},
        ),
        (
            {"device/vpd_pg83": page_83((2, NAA), (8, b"iqn.x\0"))},
            {"device/vpd_pg83": page_83((8, b"iqn.x\0\0"))},
        ),
    ],
)
def test_one_common_name_makes_two_disks_one_lun(
    tree: HostTree, one: dict[str, str | bytes], other: dict[str, str | bytes]
) -> None:
    """Whichever of its names each path shows, or a copy of a host has."""
    for number, name, names in (("8:0", "sda", one), ("8:16", "sdb", other)):
        tree.block_device(number, name)
        for file, content in names.items():
            tree.file(f"/sys/devices/virtual/block/{name}/{file}", content)
    tree.mount("/dev/sdb", "/data", "8:16")
    assert codes(findings(tree, "8:0")) == ["mounted-on-host"]


@pytest.mark.parametrize(
    "page",
    [
        page_83((0x13, OTHER), (0x23, OTHER)),  # the port and the target of both
        page_83((0, b"vendor"), (4, b"\0\1")),
        page_83((3, bytes(8))),
        page_83((3, NAA))[:6],
        b"\0\x80\0\4abcd",
    ],
)
def test_what_is_no_name_of_a_lun_makes_none(tree: HostTree, page: bytes) -> None:
    for number, name in (("8:0", "sda"), ("8:16", "sdb")):
        tree.block_device(number, name)
        tree.file(f"/sys/devices/virtual/block/{name}/device/vpd_pg83", page)
        tree.file(f"/sys/devices/virtual/block/{name}/nguid", f"{'0' * 8}-{'0' * 4}\n")
    tree.mount("/dev/sdb", "/data", "8:16")
    assert findings(tree, "8:0") == []


def test_disks_without_a_name_are_not_taken_for_one(tree: HostTree) -> None:
    for number, name in (("8:0", "sda"), ("8:16", "sdb")):
        tree.block_device(number, name)
        tree.file(f"/sys/devices/virtual/block/{name}/device/wwid", "\n")
    tree.mount("/dev/sdb", "/data", "8:16")
    assert findings(tree, "8:0") == []


# Swap


@pytest.mark.parametrize(
    ("area", "wanted", "named"),
    [
        ("/dev/sda", "8:0", "/dev/sda"),
        ("/dev/sda2", "8:0", "/dev/sda"),
        ("/dev/sda", "8:1", "/dev/sda1"),
        ("/dev/sda2", "8:1", None),
        ("/dev/zram0", "8:0", None),
        ("/swap\\040file", "/swap file", "/swap file"),
        ("/swap\u00a0file", "/swap\u00a0file", "/swap\u00a0file"),
        ("/dir/../swap\\040file", "/swap file", "/swap file"),
    ],
)
def test_swap_space_in_use_is_found_by_any_name(
    disk: HostTree, area: str, wanted: str, named: str | None
) -> None:
    disk.file("/swap file", b"x").file("/swap\u00a0file", b"x").file("/dir/x")
    disk.swap("/dev/sdz", area)
    found = findings(disk, wanted)
    assert codes(found) == (["is-swap"] if named else [])
    for finding in found:
        name = area.replace("\\040", " ")
        assert finding.message.startswith(f"{named} contains swap space that the host uses")
        assert finding.message.endswith("uses" if name == named else f"uses ({name})")
        assert shlex.split(finding.hint) == ["swapoff", name]


@pytest.mark.parametrize("table", ["", "Filename\t\t\t\tType\t\tSize\tUsed\tPriority\n"])
def test_a_host_without_swap_has_none(disk: HostTree, table: str) -> None:
    assert read_usage(disk.file("/proc/swaps", table).root).swaps == ()


@pytest.mark.root
def test_swap_on_another_node_of_the_same_disk_is_the_disks(disk: HostTree) -> None:
    disk.node("/dev/sda", "b", "8:0").node("/dev/alias", "b", "8:0").swap("/dev/alias")
    (finding,) = findings(disk)
    assert (finding.code, finding.hint) == (Code.IS_SWAP, "swapoff /dev/alias")


# Virtual machines


@pytest.mark.parametrize(
    ("held", "wish", "shared"),
    [
        (claim(), WRITING, False),
        (claim(), READING, False),
        (claim(read_only=True), WRITING, False),
        (claim(read_only=True), READING, True),
        (claim(share_rw=True), SHARING, True),
        (claim(share_rw=True), WRITING, False),
        (claim(), SHARING, False),
        (claim(read_only=True, share_rw=True), SHARING, True),
        (claim(share_rw=True), READING, False),
    ],
)
def test_vms_share_among_readers_or_when_both_said_so(
    disk: HostTree, held: Claim, wish: Access, *, shared: bool
) -> None:
    found = findings(disk, wish=wish, claims=(held,))
    assert codes(found) == ([] if shared else ["in-use-by-vm"])
    assert all("block device 8:0 is already handed to VM 'sb1'" in f.message for f in found)


def test_every_vm_is_named(disk: HostTree) -> None:
    other = Claim(vm="sb2", identity=Identity.parse("block:8:1"), read_only=True, share_rw=False)
    messages = [finding.message for finding in findings(disk, claims=(claim(), other))]
    assert messages == [
        "block device 8:0 is already handed to VM 'sb1'",
        "block device 8:1 is already handed to VM 'sb2' for reading",
    ]


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        ("char:1:3", "char device 1:3"),
        ("file:/srv/a:b", "/srv/a:b"),
        ("share:a:b:/srv", "/srv"),
        ("socket:/run/vu", "/run/vu"),
        ("vfio:0000:3b:00.0", "0000:3b:00.0"),
    ],
)
def test_a_claimed_device_is_named_by_its_number_path_or_address(
    disk: HostTree, identity: str, words: str
) -> None:
    held = Claim(vm="sb2", identity=Identity.parse(identity), read_only=False, share_rw=False)
    (finding,) = findings(disk, claims=(held,))
    assert finding.message == f"{words} is already handed to VM 'sb2'"


def test_files_are_claimed_like_devices(tree: HostTree) -> None:
    tree.file("/a.img", b"x")
    assert codes(findings(tree, "/a.img", claims=(claim(),))) == ["in-use-by-vm"]


@pytest.mark.root
def test_a_vhost_user_disk_has_no_facts_but_its_claims(tree: HostTree) -> None:
    tree.node("/store/block/devices/d", "b", "241:0").node("/store/block/sockets/d", "s")
    device = resolve(want("241:0"), tree.root, VhostUserStore("/store", root=tree.root))
    usage = read_usage(tree.root)
    assert check_device(device, WRITING, usage=usage, root=tree.root) == []
    found = check_device(device, WRITING, usage=usage, claims=(claim(),), root=tree.root)
    assert codes(found) == ["in-use-by-vm"]


def test_nothing_is_said_of_character_devices(tree: HostTree) -> None:
    tree.char_device("10:229", "fuse")
    info = DeviceInfo(container_path="/dev/fuse", dev_type=DevType.CHAR, devnum=DevNum(10, 229))
    device: HostDevice = resolve(info, tree.root)
    assert check_device(device, WRITING, usage=read_usage(tree.root), root=tree.root) == []


# The device itself


@pytest.mark.parametrize(("wish", "found"), [(WRITING, ["read-only-device"]), (READING, [])])
def test_a_read_only_disk_is_for_reading(tree: HostTree, wish: Access, found: list[str]) -> None:
    tree.block_device("8:0", "sda", ro=True)
    assert codes(findings(tree, wish=wish)) == found


@pytest.mark.parametrize(("removable", "code"), [(False, "size-zero"), (True, "no-medium")])
def test_a_disk_of_size_zero_is_empty_or_has_no_medium(
    tree: HostTree, code: str, *, removable: bool
) -> None:
    tree.block_device("8:0", "sda", size_bytes=0, removable=removable)
    assert codes(findings(tree, wish=READING)) == [code]


@pytest.mark.parametrize(("suspended", "found"), [(0, []), (1, ["unreadable"])])
def test_a_mapped_device_is_not_handed_over_while_it_is_suspended(
    tree: HostTree, suspended: int, found: list[str]
) -> None:
    tree.block_device("253:0", "dm-0").file("/sys/block/dm-0/dm/name", "a\n")
    tree.file("/sys/block/dm-0/dm/suspended", f"{suspended}\n")
    refusal = findings(tree, "253:0", READING)
    assert codes(refusal) == found
    assert all(finding.hint == "dmsetup resume a" for finding in refusal)


def test_an_empty_file_is_no_disk(tree: HostTree) -> None:
    assert codes(findings(tree.file("/a.img"), "/a.img")) == ["size-zero"]


@pytest.mark.root
def test_a_disk_without_sysfs_is_refused_and_everything_else_is_still_said(
    tree: HostTree,
) -> None:
    tree.node("/dev/wanted", "b", "8:0").mount("/dev/sda", "/mnt", "8:0").swap("/dev/wanted")
    found = codes(findings(tree, claims=(claim(),)))
    assert found == ["not-in-sysfs", "mounted-on-host", "is-swap", "in-use-by-vm"]


def test_all_reasons_are_said_at_once(tree: HostTree) -> None:
    tree.block_device("8:0", "sda", size_bytes=0, ro=True, holders=("md0",))
    loop(tree.mount("/dev/sda", "/mnt", "8:0").swap("/dev/sda"), "/dev/sda")
    found = codes(findings(tree, claims=(claim(), claim())))
    assert found == [
        "mounted-on-host",
        "has-holders",
        "has-holders",
        "is-swap",
        "in-use-by-vm",
        "in-use-by-vm",
        "read-only-device",
        "size-zero",
    ]


def test_all_reasons_against_a_file_are_said_at_once(tree: HostTree) -> None:
    loop(tree.file("/a.img").swap("/a.img"), "/a.img")
    found = codes(findings(tree, "/a.img", claims=(claim(),)))
    assert found == ["has-holders", "is-swap", "in-use-by-vm", "size-zero"]


# What the operator allows


def test_an_allowed_finding_becomes_a_warning_and_stays_visible(disk: HostTree) -> None:
    disk.mount("/dev/sda", "/mnt", "8:0").hold("sda", "dm-0")
    found = allow(findings(disk), frozenset({Code.MOUNTED_ON_HOST}))
    assert [(finding.code, finding.severity) for finding in found] == [
        (Code.MOUNTED_ON_HOST, Severity.WARNING),
        (Code.HAS_HOLDERS, Severity.ERROR),
    ]


@pytest.mark.parametrize("code", sorted(NEVER_ALLOWED))
def test_some_findings_can_never_be_allowed(code: Code) -> None:
    finding = Finding(code, "message", "hint")
    assert allow([finding], frozenset(Code)) == [finding]


@pytest.mark.root
def test_a_node_that_is_another_device_is_never_handed_over(tree: HostTree) -> None:
    tree.block_device("8:0", "sda").node("/dev/sda", "b", "8:16")
    (finding,) = findings(tree)
    assert finding.code == "wrong-node"
    assert finding.message == (
        "the kernel calls block device 8:0 /dev/sda, but that is block device 8:16"
    )
    assert allow([finding], frozenset(Code))[0].severity is Severity.ERROR


@pytest.mark.root
def test_a_char_node_in_place_of_a_disk_is_never_handed_over(tree: HostTree) -> None:
    tree.block_device("8:0", "sda").node("/dev/sda", "c", "8:0")
    assert codes(findings(tree)) == ["wrong-node"]


@pytest.mark.root
def test_the_right_node_is_no_finding(tree: HostTree) -> None:
    tree.block_device("8:0", "sda").node("/dev/sda", "b", "8:0")
    assert findings(tree) == []


def identities(*numbers: str) -> set[Identity]:
    return {Identity.of_block(DevNum.parse(number)) for number in numbers}


def test_what_a_mapped_device_is_built_on_is_related_all_the_way_down(tree: HostTree) -> None:
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"})
    tree.block_device("253:0", "dm-0").block_device("253:1", "dm-1")
    tree.link("/sys/devices/virtual/block/dm-0/slaves/sda1", "../../sda/sda1")
    tree.link("/sys/devices/virtual/block/dm-1/slaves/dm-0", "../../dm-0")
    device = resolve(want("253:1"), tree.root)
    assert set(device.related_identities) == identities("253:0", "8:1", "8:0")


@pytest.mark.root
def test_the_block_device_behind_a_loop_device_is_related(tree: HostTree) -> None:
    tree.block_device("8:0", "sda").node("/dev/sda", "b", "8:0")
    tree.block_device("7:0", "loop0", loop={"backing_file": "/dev/sda\n"})
    assert identities("8:0") <= {*resolve(want("7:0"), tree.root).related_identities}


def test_a_file_is_related_to_all_that_is_built_on_its_loop_device(tree: HostTree) -> None:
    tree.file("/a.img", b"x").block_device("253:0", "dm-0")
    files = {"backing_file": "/a.img\n"}
    tree.block_device("7:0", "loop0", partitions={"259:0": "loop0p1"}, loop=files)
    tree.link("/sys/devices/virtual/block/dm-0/slaves/loop0p1", "../../loop0/loop0p1")
    for number in ("7:0", "259:0", "253:0"):
        related = resolve(want(number), tree.root).related_identities
        assert Identity.parse("file:/a.img") in related


@pytest.mark.root
def test_the_disk_below_a_partition_below_a_loop_device_is_related(tree: HostTree) -> None:
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"}).node("/dev/sda1", "b", "8:1")
    files = {"backing_file": "/dev/sda1\n"}
    tree.block_device("7:0", "loop0", partitions={"259:0": "loop0p1"}, loop=files)
    for number in ("7:0", "259:0"):
        related = resolve(want(number), tree.root).related_identities
        assert identities("8:1", "8:0") <= set(related)


def test_loop_devices_in_a_circle_are_looked_at_once(tree: HostTree) -> None:
    tree.block_device("7:0", "loop0").block_device("7:1", "loop1")
    for one, other in ((0, 1), (1, 0)):
        tree.link(f"/sys/devices/virtual/block/loop{one}/slaves/x", f"../../loop{other}")
    related = resolve(want("7:0"), tree.root).related_identities
    assert set(related) == identities("7:1", "7:0")
