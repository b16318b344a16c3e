"""File systems of several disks, and those that no mount table shows."""

from collections.abc import Callable

import pytest

from tests.support.checking import READING, codes, findings
from tests.support.tree import HostTree
from vmplug.host.finding import Code, Severity

UNSEEN = "has a file system in use, and no mount table shows where"


@pytest.fixture
def disks(tree: HostTree) -> HostTree:
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"})
    tree.block_device("8:16", "sdb", partitions={"8:17": "sdb1"})
    return tree.block_device("8:32", "sdc", partitions={"8:33": "sdc1"})


def link(tree: HostTree, path: str, disk: str) -> None:
    tree.link(path, "../" * (path.count("/") - 2) + f"devices/virtual/block/{disk}")


def bcachefs(tree: HostTree) -> HostTree:
    for number, name in enumerate(("sda", "sdb")):
        link(tree, f"/sys/fs/bcachefs/0b6e/dev-{number}/block", name)
    return tree


@pytest.mark.parametrize(
    "mount",
    [
        lambda tree: tree.mount("/dev/sda:/dev/sdb", "/mnt", "8:0", fs_type="bcachefs"),
        lambda tree: tree.mount("/dev/sda:/dev/sdb", "/mnt", "0:45", fs_type="bcachefs"),
        lambda tree: bcachefs(tree).mount("UUID=1", "/mnt", "8:0", fs_type="bcachefs"),
        lambda tree: tree.mount(
            "/dev/sda", "/mnt", "8:0", fs_type="reiserfs", fs_options="rw,jdev=/dev/sdb"
        ),
        lambda tree: tree.mount(
            "/dev/sda", "/mnt", "8:0", fs_type="erofs", fs_options="ro,device=/dev/sdb"
        ),
        lambda tree: tree.mount(
            "/dev/sda", "/mnt", "8:0", fs_type="xfs", fs_options="rw,logdev=/dev/sdb"
        ),
    ],
)
def test_every_disk_of_a_file_system_is_mounted(
    disks: HostTree, mount: Callable[[HostTree], object]
) -> None:
    assert findings(disks, "8:0") == findings(disks, "8:16") == []
    mount(disks)
    for number, name in (("8:0", "sda"), ("8:16", "sdb")):
        (finding,) = findings(disks, number)
        assert finding.message == f"/dev/{name} is mounted on the host at /mnt"
    assert findings(disks, "8:32") == []


@pytest.mark.parametrize(
    "build",
    [
        lambda tree: tree.file("/sys/module/zfs/refcnt", "1\n"),
        lambda tree: tree.mount("tank/a", "/a", "0:44", fs_type="zfs"),
    ],
)
def test_a_copy_does_not_show_the_disks_of_a_zfs_pool(
    disks: HostTree, build: Callable[[HostTree], object]
) -> None:
    build(disks)
    (finding,) = findings(disks, "8:32")
    assert (finding.code, finding.severity) == (Code.UNKNOWN_USE, Severity.WARNING)
    assert "could not look for disks of ZFS pools (no file lists them)" in finding.message


def test_the_options_of_what_anybody_mounts_name_no_disk(disks: HostTree) -> None:
    for fs_type in ("overlay", "fuse.sshfs", "tmpfs"):
        disks.mount("x", "/mnt", "0:45", fs_type=fs_type, fs_options="rw,lowerdir=/dev/sdb")
    assert findings(disks, "8:16") == []


@pytest.mark.parametrize(
    "keep",
    [
        lambda tree: tree.file("/sys/fs/ext4/sdb1/journal_task", "9\n"),
        lambda tree: tree.file("/sys/fs/xfs/sdb1/stats/stats"),
        lambda tree: tree.file("/sys/fs/f2fs/sdb1/dirty_segments", "0\n"),
        lambda tree: link(tree, "/sys/fs/btrfs/0b6e/devices/sdb1", "sdb/sdb1"),
        lambda tree: link(tree, "/sys/fs/bcachefs/0b6e/dev-0/block", "sdb/sdb1"),
    ],
)
def test_a_file_system_that_no_mount_table_shows_is_in_use(
    disks: HostTree, keep: Callable[[HostTree], object]
) -> None:
    disks.file("/sys/fs/ext4/features/lazy_itable_init").file("/sys/fs/xfs/debug/x")
    keep(disks)
    for number in ("8:16", "8:17"):
        for wish in ((), (READING,)):
            (finding,) = findings(disks, number, *wish)
            assert (finding.code, finding.message) == ("mounted-on-host", f"/dev/sdb1 {UNSEEN}")
            assert "fuser --verbose --mount /dev/sdb1 " in finding.hint
    assert findings(disks, "8:0") == findings(disks, "8:32") == []


def test_the_root_of_a_host_has_a_source_that_is_no_node(disks: HostTree) -> None:
    """The kernel itself mounted it, as /dev/root."""
    for name in ("sda", "sdb"):
        link(disks, f"/sys/fs/btrfs/0b6e/devices/{name}", name)
    disks.mount("/dev/root", "/", "0:25", fs_type="btrfs")
    assert codes(findings(disks, "8:0")) == codes(findings(disks, "8:16")) == ["mounted-on-host"]


def test_a_mounted_file_system_is_said_once_and_shared_among_readers(disks: HostTree) -> None:
    disks.file("/sys/fs/ext4/sdb1/journal_task", "9\n")
    disks.mount("/dev/sdb1", "/mnt", "8:17", fs_options="ro")
    assert [found.message for found in findings(disks, "8:16")] == [
        "/dev/sdb1 is mounted on the host at /mnt"
    ]
    assert findings(disks, "8:16", READING) == []
