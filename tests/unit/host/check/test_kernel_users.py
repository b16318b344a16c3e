"""Disks and files that the kernel itself uses, which no holder, mount or open file shows."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.checking import SHARING, WRITING, codes, findings
from tests.support.pci_tree import PciTree
from tests.support.tree import HostTree
from vmplug.address import Bdf
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import Code, Finding, Severity
from vmplug.host.pci.vfio import find_vfio_device

CONFIG, BDF = "/sys/kernel/config", "0000:3b:00.0"
IBLOCK = """Status: ACTIVATED  Max Queue Depth: 0  SectorSize: 512  HwMaxSectors: 1280
        iBlock device: {name}  UDEV PATH: /dev/{name}  readonly: 0
        Major: {major} Minor: {minor}  CLAIMED: IBLOCK
"""
FILEIO = """Status: ACTIVATED  Max Queue Depth: 128  SectorSize: 512  HwMaxSectors: 16384
        TCM FILEIO ID: 0        File: {path}  Size: 1048576  Mode: Buffered-WCE Async: 0
"""


@pytest.fixture
def disk(tree: HostTree) -> HostTree:
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1", "8:2": "sda2"})
    return tree.file("/a.img", b"x").link("/dev/disk/by-id/wwn-1-part1", "../../sda1")


def nvmet(tree: HostTree, path: str, *, enable: int = 1, part: str = "namespaces/1") -> str:
    base = f"{CONFIG}/nvmet/subsystems/nqn.a/{part}"
    tree.file(f"{base}/device_path", f"{path}\n").file(f"{base}/enable", f"{enable}\n")
    return "the NVMe target nqn.a"


def lio(tree: HostTree, hba: str, info: str, *, enable: int = 1, udev_path: str = "") -> str:
    base = f"{CONFIG}/target/core/{hba}/lun0"
    tree.file(f"{CONFIG}/target/core/{hba}/hba_info", "HBA Index: 0\n")
    tree.file(f"{base}/info", info).file(f"{base}/enable", f"{enable}\n")
    tree.file(f"{base}/udev_path", udev_path)
    return "the SCSI target lun0"


def usb(tree: HostTree, path: str) -> str:
    base = f"{CONFIG}/usb_gadget/g1/functions/mass_storage.0"
    tree.file(f"{base}/stall", "1\n").file(f"{base}/lun.0/file", f"{path}\n")
    return "the USB target g1"


@pytest.mark.parametrize(
    ("export", "wanted", "on"),
    [
        (lambda tree: nvmet(tree, "/dev/sda1"), "8:0", "/dev/sda1"),
        (lambda tree: nvmet(tree, "/dev/sda1"), "8:1", "/dev/sda1"),
        (lambda tree: nvmet(tree, "/dev/sda"), "8:1", "/dev/sda"),
        (lambda tree: nvmet(tree, "/dev/disk/by-id/wwn-1-part1"), "8:0", "/dev/sda1"),
        (lambda tree: nvmet(tree, "/a.img"), "/a.img", "/a.img"),
        (
            lambda tree: lio(tree, "iblock_0", IBLOCK.format(name="sda", major=8, minor=0)),
            "8:2",
            "/dev/sda",
        ),
        (lambda tree: lio(tree, "fileio_1", FILEIO.format(path="/a.img")), "/a.img", "/a.img"),
        (lambda tree: lio(tree, "pscsi_2", "", udev_path="/dev/sda\n"), "8:0", "/dev/sda"),
        (lambda tree: usb(tree, "/dev/sda2"), "8:2", "/dev/sda2"),
        (lambda tree: usb(tree, "/a.img"), "/a.img", "/a.img"),
    ],
)
def test_what_the_kernel_exports_is_in_use(
    disk: HostTree, export: Callable[[HostTree], str], wanted: str, on: str
) -> None:
    assert findings(disk, wanted) == []
    who = export(disk)
    (finding,) = findings(disk, wanted)
    assert (finding.code, finding.severity) == (Code.IS_EXPORTED, Severity.ERROR)
    assert finding.message == f"{on} is exported as {who}"
    assert finding.used_by
    assert (finding.used_by.on, finding.used_by.who) == (on, who)
    (shared,) = findings(disk, wanted, SHARING)
    assert shared.severity is Severity.WARNING


@pytest.mark.parametrize(
    "export",
    [
        lambda tree: nvmet(tree, "/dev/sda", enable=0),
        lambda tree: nvmet(tree, "(null)"),
        lambda tree: nvmet(tree, "/dev/sdb"),
        lambda tree: nvmet(tree, "/dev/sda2"),
        lambda tree: lio(tree, "fileio_1", FILEIO.format(path="/b.img")),
        lambda tree: lio(tree, "fileio_1", FILEIO.format(path="/dev/sda1"), enable=0),
        lambda tree: lio(tree, "user_1", "Status: ACTIVATED\n Config: qcow//dev/sda1\n"),
        lambda tree: usb(tree, ""),
        lambda tree: tree.file("/proc/fs/jbd2/sda1-8/info"),
        lambda tree: tree.block_device("251:0", "zram0").file(
            "/sys/block/zram0/backing_dev", "none\n"
        ),
    ],
)
def test_other_exports_do_not_matter(disk: HostTree, export: Callable[[HostTree], object]) -> None:
    export(disk)
    assert findings(disk, "8:1") == findings(disk, "/a.img") == []


@pytest.mark.parametrize(
    ("module", "directory"), [("nvmet", "nvmet"), ("target_core_mod", "target/core")]
)
def test_exports_are_unknown_while_configfs_is_not_mounted(
    disk: HostTree, module: str, directory: str
) -> None:
    disk.file(f"/sys/module/{module}/refcnt", "1\n")
    for wanted in ("8:0", "/a.img"):
        (finding,) = findings(disk, wanted)
        assert (finding.code, finding.severity) == (Code.UNKNOWN_USE, Severity.WARNING)
        assert f"exports by {module} (no {CONFIG}/{directory}: " in finding.message
    disk.file(f"{CONFIG}/{directory}/hba_info")  # the remedy: it is mounted
    assert findings(disk, "8:0") == findings(disk, "/a.img") == []


def test_a_loop_device_that_is_exported_is_not_idle(disk: HostTree) -> None:
    disk.block_device("7:0", "loop0", loop={"backing_file": "/a.img\n"})
    nvmet(disk, "/dev/loop0")
    found = findings(disk, "/a.img")
    assert [(one.code, one.severity) for one in found] == [
        (Code.HAS_HOLDERS, Severity.ERROR),
        (Code.IS_EXPORTED, Severity.ERROR),
    ]
    assert codes(findings(disk, "7:0")) == ["is-exported"]


def test_the_file_behind_a_loop_device_that_is_exported_counts(disk: HostTree) -> None:
    disk.block_device("7:0", "loop0", loop={"backing_file": "/a.img\n"})
    nvmet(disk, "/a.img")
    assert codes(findings(disk, "7:0")) == ["is-exported"]


@pytest.mark.parametrize(
    ("build", "who"),
    [
        (
            lambda tree: tree.file("/proc/fs/jbd2/sda1/info"),
            "the journal of a mounted file system",
        ),
        (
            lambda tree: tree.block_device("251:0", "zram0").file(
                "/sys/block/zram0/backing_dev", "/dev/sda1\n"
            ),
            "/dev/zram0",
        ),
    ],
)
def test_what_the_kernel_keeps_its_data_on_is_in_use(
    disk: HostTree, build: Callable[[HostTree], object], who: str
) -> None:
    build(disk)
    (finding,) = findings(disk, "8:0")
    assert finding.code is Code.OPEN_EXCLUSIVELY
    assert finding.message == f"/dev/sda1 is in use by the kernel for {who}"
    assert findings(disk, "8:2") == []


def test_the_file_system_of_a_journal_is_named_where_its_thread_is(disk: HostTree) -> None:
    disk.file("/proc/fs/jbd2/sda1/info").file("/sys/fs/ext4/cciss!c0d0/journal_task", "9\n")
    disk.file("/sys/fs/ext4/sdz/journal_task", "8\n").file("/proc/8/comm", "jbd2/sdz-8\n")
    assert findings(disk, "8:0")[0].hint.endswith("file system that has its journal there (blkid)")
    disk.file("/proc/9/comm", "jbd2/sda1\n")
    assert findings(disk, "8:0")[0].hint == "umount --all-targets /dev/cciss/c0d0"


def test_where_the_host_hibernates_to_is_swap(disk: HostTree) -> None:
    disk.file("/sys/power/resume", "8:1\n")
    for wanted in ("8:0", "8:1"):
        (finding,) = findings(disk, wanted, SHARING)
        assert (finding.code, finding.severity) == (Code.IS_SWAP, Severity.ERROR)
        assert finding.message == (
            "/dev/sda1 is where the kernel looks for the memory of the host after hibernation"
        )
    assert findings(disk, "8:2") == []


@pytest.mark.parametrize("number", ["0:0", "8:16"])
def test_a_host_that_hibernates_elsewhere_or_not_does_not_matter(
    disk: HostTree, number: str
) -> None:
    disk.file("/sys/power/resume", f"{number}\n")
    assert findings(disk, "8:0") == findings(disk, "/a.img") == []


def test_a_drive_that_the_host_hibernates_to_is_swap(tmp_path: Path) -> None:
    tree = PciTree(tmp_path)
    tree.pci_function(BDF, driver="nvme", group=4).pci_disk(BDF, "259:0", "nvme0n1")
    tree.file("/sys/power/resume", "259:0\n")
    group = find_vfio_device(str(Bdf.parse(BDF)), tree.root)
    found = check_device(group, WRITING, usage=read_usage(tree.root), root=tree.root)
    assert Code.IS_SWAP in {one.code for one in found}


@pytest.mark.parametrize(
    ("file", "remedy"), [("set/cache_mode", "set/unregister"), ("state", "stop")]
)
def test_a_disk_of_bcache_that_nothing_is_built_on_is_in_use(
    disk: HostTree, file: str, remedy: str
) -> None:
    disk.file("/sys/fs/bcache/register").file(f"/sys/class/block/sda1/bcache/{file}", "1\n")
    for wanted in ("8:0", "8:1"):
        (finding,) = findings(disk, wanted)
        assert finding.code is Code.OPEN_EXCLUSIVELY
        assert finding.message == "/dev/sda1 is in use by the kernel for bcache"
        assert finding.hint == f"echo 1 > /sys/class/block/sda1/bcache/{remedy}"
    assert findings(disk, "8:2") == []


def test_a_bcache_device_is_no_disk_of_bcache(disk: HostTree) -> None:
    disk.block_device("252:0", "bcache0").file("/sys/fs/bcache/register")
    disk.file("/sys/class/block/sda1/bcache/state").hold("sda1", "bcache0")
    disk.link("/sys/block/bcache0/bcache", "../sda/sda1/bcache")
    assert findings(disk, "252:0") == []
    assert codes(findings(disk, "8:1")) == ["has-holders"]


OPEN = (
    "- 0x00000001dc2d5c6a36c1cf3a01000000: {{ type: open, access: {access}, deny: --, superblock: "
    '"{place}", filename: "srv/a.img", owner: "open id:\\000\\000" }}\n'
)
LOCK = (
    '- 0x00000001dc2d5c6a36c1cf3a02000000: {{ type: lock, superblock: "{place}", filename: '
    '"srv/a.img", owner: "lock id:\\000\\000" }}\n'
)
DELEGATION = (
    '- 0x00000001dc2d5c6a36c1cf3a03000000: {{ type: deleg, access: {access}, superblock: "{place}"'
    ', filename: "srv/a.img" }}\n'
)


def nfs(tree: HostTree, *states: str, access: str = "rw", inode: int | None = None) -> str:
    """A client with these states on the image; returns its directory."""
    status = tree.root.stat("/a.img")
    assert status
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    place = f"{device}:{status.st_ino if inode is None else inode}"
    base = "/proc/fs/nfsd/clients/3"
    text = "".join(state.format(access=access, place=place) for state in states)
    tree.file(f"{base}/states", text)
    tree.file(f"{base}/info", 'clientid: 0x1\naddress: "192.0.2.7:875"\nname: "Linux"\n')
    return base


@pytest.mark.parametrize(
    ("states", "access", "does", "severity"),
    [
        ([OPEN], "rw", "writing", Severity.ERROR),
        ([OPEN], "-w", "writing", Severity.ERROR),
        ([OPEN], "r-", "reading", Severity.WARNING),
        ([DELEGATION], "w", "writing", Severity.ERROR),
        ([DELEGATION], "r", "reading", Severity.WARNING),
        ([OPEN, LOCK, OPEN], "rw", "writing", Severity.ERROR),
    ],
)
def test_a_file_that_a_client_of_nfs_has_open_is_in_use(
    disk: HostTree, states: list[str], access: str, does: str, severity: Severity
) -> None:
    assert findings(disk, "/a.img") == []
    base = nfs(disk, *states, access=access)
    (finding,) = findings(disk, "/a.img")
    assert (finding.code, finding.severity) == (Code.IS_EXPORTED, severity)
    assert finding.message == f"/a.img is open for {does} by the NFS client 192.0.2.7:875"
    assert finding.hint.endswith(f"echo expire > {base}/ctl")
    (shared,) = findings(disk, "/a.img", SHARING)
    assert shared.severity is Severity.WARNING
    disk.block_device("7:0", "loop0", loop={"backing_file": "/a.img\n"})
    assert findings(disk, "7:0") == [finding]


def test_files_of_clients_that_may_not_be_listed_are_unknown(disk: HostTree) -> None:
    disk.link("/proc/fs/nfsd/clients", "clients")  # ELOOP, as EACCES does not stop root
    (finding,) = findings(disk, "/a.img")
    assert (finding.code, finding.severity) == (Code.UNKNOWN_USE, Severity.WARNING)
    assert "files that NFS clients have open (no permission for " in finding.message


def test_other_files_of_a_client_of_nfs_do_not_matter(disk: HostTree) -> None:
    nfs(disk, OPEN, inode=1)
    assert findings(disk, "/a.img") == []
    nfs(disk)
    assert findings(disk, "/a.img") == []


@pytest.mark.parametrize("option", ["logdev", "rtdev"])
def test_every_device_of_an_xfs_is_mounted(disk: HostTree, option: str) -> None:
    disk.block_device("8:16", "sdb")
    disk.mount("/dev/sdb", "/srv", "8:16", fs_type="xfs", fs_options=f"rw,{option}=/dev/sda1")
    assert codes(findings(disk, "8:0")) == ["mounted-on-host"]
    assert findings(disk, "8:2") == []


@pytest.mark.parametrize(
    ("path", "part"), [("/dev/nvme0n1", "namespaces/1"), ("/dev/nvme0", "passthru")]
)
def test_a_drive_that_is_exported_keeps_its_controller(
    tmp_path: Path, path: str, part: str
) -> None:
    tree = PciTree(tmp_path)
    tree.pci_function(BDF, driver="nvme", group=4).pci_disk(BDF, "259:0", "nvme0n1")
    tree.class_device(f"{BDF}/nvme/nvme0", "char", "240:0", "nvme0")
    nvmet(tree, path, part=part)
    group = find_vfio_device(str(Bdf.parse(BDF)), tree.root)
    found = check_device(group, WRITING, usage=read_usage(tree.root), root=tree.root)
    (finding,) = (one for one in found if one.code is Code.IS_EXPORTED)
    assert f"{path} is exported as the NVMe target nqn.a" in finding.message


def test_a_usb_device_that_is_exported_keeps_its_controller(tmp_path: Path) -> None:
    tree, driver = PciTree(tmp_path), "/sys/bus/usb/drivers/usbip-host"
    tree.pci_function(BDF, class_code=0x0C0330, driver="xhci_hcd", group=4)
    tree.class_device(f"{BDF}/usb1/1-2", "char", "189:1", "bus/usb/001/002")
    tree.file(f"{driver}/match_busid").link(f"{driver}/module", "/sys/module/usbip_host")

    def exports() -> list[Finding]:
        group = find_vfio_device(BDF, tree.root)
        found = check_device(group, WRITING, usage=read_usage(tree.root), root=tree.root)
        return [one for one in found if one.code is Code.IS_EXPORTED]

    assert exports() == []
    tree.link(f"{driver}/1-2", f"../../../..{tree.real(BDF).removeprefix('/sys')}/usb1/1-2")
    (finding,) = exports()
    assert finding.message == "/dev/bus/usb/001/002 is exported as the USB/IP target 1-2"
    assert finding.hint == "end the export (usbip unbind --busid=1-2)"
