"""Whether a device is in use, as the running kernel and a real QEMU see it."""

import errno
import fcntl
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.checking import READING, WRITING, claim, codes, findings, want
from tests.support.disks import disk_image, loop_device, loop_with_partition
from tests.support.tree import HostTree
from vmplug.devnum import DevNum
from vmplug.host.block.device import BlockDevice, DiskPart
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.check.exclusive import exclusive_errno
from vmplug.host.finding import Access, Code, Severity
from vmplug.host.kind import FoundBy
from vmplug.host.resolve import resolve
from vmplug.host.root import HostRoot

# Locks, as QEMU takes them

F_OFD_SETLK = 37


@contextmanager
def locked(path: Path, *, kind: int = fcntl.F_RDLCK, start: int = 100) -> Iterator[None]:
    """An open file description that holds one byte of a file."""
    with path.open("r+b" if kind == fcntl.F_WRLCK else "rb") as file:
        lock = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, 1, 0)
        fcntl.fcntl(file, F_OFD_SETLK, lock)
        yield


@pytest.mark.parametrize("kind", [fcntl.F_RDLCK, fcntl.F_WRLCK])
@pytest.mark.parametrize(
    ("start", "stops_readers"),
    [
        pytest.param(100, False, id="it reads"),
        pytest.param(101, True, id="it writes"),
        pytest.param(103, True, id="it resizes"),
        pytest.param(200, True, id="it denies reading"),
        pytest.param(201, False, id="it denies writing"),
        pytest.param(204, False, id="the last permission"),
    ],
)
def test_an_image_that_another_qemu_has_locked_is_in_use(
    tree: HostTree, kind: int, start: int, *, stops_readers: bool
) -> None:
    tree.file("/a.img", b"x")
    with locked(tree.path / "a.img", kind=kind, start=start):
        assert codes(findings(tree, "/a.img")) == ["image-locked"]
        expected = ["image-locked"] if stops_readers else []
        assert codes(findings(tree, "/a.img", READING)) == expected
    assert findings(tree, "/a.img") == []


@pytest.mark.parametrize("start", [0, 99, 300])
def test_locks_of_other_programs_are_not_qemus(tree: HostTree, start: int) -> None:
    tree.file("/a.img", b"x")
    with locked(tree.path / "a.img", start=start):
        assert findings(tree, "/a.img") == []


def test_a_lock_is_explained_by_a_known_vm_and_not_said_twice(tree: HostTree) -> None:
    tree.file("/a.img", b"x")
    with locked(tree.path / "a.img"):
        assert codes(findings(tree, "/a.img", claims=(claim(),))) == ["in-use-by-vm"]


def qemu(image: Path, *, read_only: bool) -> list[str]:
    """A QEMU, stopped, with the image as a disk, and QMP on its standard input and output."""
    blockdev = {"driver": "file", "node-name": "a", "filename": str(image), "read-only": read_only}
    device = {"driver": "virtio-blk-pci", "drive": "a"}
    return [
        *("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "16", "-S"),
        *("-nodefaults", "-display", "none", "-qmp", "stdio"),
        *("-blockdev", json.dumps(blockdev), "-device", json.dumps(device)),
    ]


@pytest.mark.qemu
@pytest.mark.parametrize("first_reads", [True, False])
@pytest.mark.parametrize("wish", [READING, WRITING])
def test_an_image_in_a_real_qemu_is_refused_when_a_second_qemu_would_refuse_it(
    tmp_path: Path, wish: Access, *, first_reads: bool
) -> None:
    image = disk_image(tmp_path / "a.img", 1, "x")
    first = qemu(image, read_only=first_reads)
    # It greets before it has opened anything, and answers afterwards.
    with waiting(first, begin=b'{"execute": "qmp_capabilities"}', ready=b'"return"'):
        found = codes(findings(HostTree(Path("/")), str(image), wish))
        second = subprocess.run(
            qemu(image, read_only=wish.read_only),
            input=b'{"execute": "qmp_capabilities"}{"execute": "quit"}',
            capture_output=True,
            check=False,
            timeout=60,
        )
    assert found == ([] if first_reads and wish.read_only else ["image-locked"])
    assert (b" lock" in second.stderr) is bool(found)
    assert bool(second.returncode) is bool(found)


# A real kernel


@contextmanager
def waiting(command: list[str], *, ready: bytes, begin: bytes = b"") -> Iterator[None]:
    """A process that has said it is ready, and lives no longer than it is needed."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(begin)
        process.stdin.flush()
        assert any(ready in line for line in process.stdout)
        try:
            yield
        finally:
            process.stdin.close()
            process.terminate()


def mounted_elsewhere(node: Path, directory: Path, options: str) -> list[str]:
    """A shell that has mounted the node in a namespace of its own."""
    script = 'mount -o "$1" "$2" "$3" && echo ready && exec cat'
    return ["unshare", "--mount", "sh", "-c", script, "sh", options, str(node), str(directory)]


HOLD_EXCLUSIVELY = """
import os, sys
os.open(sys.argv[1], os.O_RDWR | os.O_EXCL)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(node: Path) -> Iterator[None]:
    """This process has a device exclusively."""
    descriptor = os.open(node, os.O_RDONLY | os.O_EXCL)
    try:
        yield
    finally:
        os.close(descriptor)


@pytest.fixture
def live() -> HostTree:
    """This host, for reading."""
    return HostTree(Path("/"))


def number(node: Path) -> str:
    status = node.stat()
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    """A loop device of this host with an empty file system on it."""
    image = disk_image(tmp_path / "disk.img", 8, "x")
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with loop_device(image) as path:
        yield path


@pytest.mark.root
def test_nothing_speaks_against_an_idle_device_and_asking_leaves_it_idle(
    live: HostTree, node: Path
) -> None:
    for wish in (WRITING, READING, WRITING):
        assert findings(live, number(node), wish) == []


@pytest.mark.root
def test_a_mount_in_a_private_namespace_is_seen_where_our_own_table_shows_nothing(
    live: HostTree, node: Path, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    with waiting(mounted_elsewhere(node, tmp_path / "mnt", "rw"), ready=b"ready"):
        assert str(node) not in Path("/proc/self/mountinfo").read_text().split()
        for wish in (WRITING, READING):
            (finding,) = findings(live, number(node), wish)
            assert finding.code is Code.MOUNTED_ON_HOST
            assert finding.message == f"{node} is mounted on the host at {tmp_path}/mnt"
    assert findings(live, number(node)) == []


@pytest.mark.root
def test_a_file_system_mounted_for_reading_is_shared_with_readers(
    live: HostTree, node: Path, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    with waiting(mounted_elsewhere(node, tmp_path / "mnt", "ro"), ready=b"ready"):
        assert codes(findings(live, number(node), WRITING)) == ["mounted-on-host"]
        assert codes(findings(live, number(node), READING)) == []


@pytest.mark.root
def test_a_file_system_that_was_unmounted_lazily_is_in_use_until_its_last_user_ends(
    live: HostTree, node: Path, tmp_path: Path
) -> None:
    script = 'mount "$1" "$2" && cd "$2" && umount --lazy "$2" && echo ready && exec cat'
    user = ["unshare", "--mount", "sh", "-c", script, "sh", str(node), str(tmp_path)]
    with waiting(user, ready=b"ready"):
        (finding,) = findings(live, number(node))
        assert finding.code is Code.MOUNTED_ON_HOST
        assert finding.message.startswith(f"{node} has a file system in use, and no mount table")
    assert findings(live, number(node)) == []


@pytest.mark.root
@pytest.mark.parametrize("point", ["a b", "a\tb", "a\nb", "a\\b", "a#b", "a\rb", "a\u2028b"])
def test_the_kernel_escapes_mount_points_so(
    live: HostTree, node: Path, tmp_path: Path, point: str
) -> None:
    (tmp_path / point).mkdir()
    with waiting(mounted_elsewhere(node, tmp_path / point, "ro"), ready=b"ready"):
        (finding,) = findings(live, number(node))
        assert finding.message.endswith(f" at {tmp_path}/{point}")


@pytest.mark.root
def test_a_device_opened_exclusively_by_anybody_is_found(live: HostTree, node: Path) -> None:
    command = [sys.executable, "-c", HOLD_EXCLUSIVELY, str(node)]
    with waiting(command, ready=b"ready"):
        for wish in (WRITING, READING):
            (finding,) = findings(live, number(node), wish)
            assert finding.code is Code.OPEN_EXCLUSIVELY
            assert str(node) in finding.hint
    assert findings(live, number(node)) == []


PROBE_WITHOUT_END = """
import os, sys
print("ready", flush=True)
os.set_blocking(0, False)
while sys.stdin.buffer.read(1) is None:
    try:
        os.close(os.open(sys.argv[1], os.O_RDONLY | os.O_EXCL))
    except OSError:
        pass
"""


@pytest.mark.root
def test_others_who_only_probe_the_device_are_not_taken_for_users(
    live: HostTree, node: Path
) -> None:
    with waiting([sys.executable, "-c", PROBE_WITHOUT_END, str(node)], ready=b"ready"):
        for _ in range(50):
            assert findings(live, number(node)) == []


class Suspended(HostRoot):
    """Whoever probes a device is suspended as it does, for 0.4 s from the first look."""

    first_at: float | None = None

    def open_errno(self, path: str, flags: int) -> int | None:  # noqa: ARG002  as in HostRoot
        now = time.monotonic()
        self.first_at = now if self.first_at is None else self.first_at
        return errno.EBUSY if now - self.first_at < 0.4 else None


def test_one_that_is_suspended_as_it_probes_is_not_taken_for_a_user() -> None:
    """As of two vmplugs that attach one disk at the same time on a busy host."""
    assert exclusive_errno("/dev/sda", read_usage(HostRoot()), Suspended()) is None


@pytest.mark.root
def test_a_device_locked_by_another_qemu_is_found(live: HostTree, node: Path) -> None:
    with locked(node):
        assert codes(findings(live, number(node))) == ["image-locked"]
        assert codes(findings(live, number(node), claims=(claim(),))) == ["in-use-by-vm"]
    assert findings(live, number(node)) == []


@pytest.mark.root
def test_below_another_root_no_node_is_opened(tree: HostTree, node: Path) -> None:
    tree.block_device(number(node), node.name).node(str(node), "b", number(node))
    command = [sys.executable, "-c", HOLD_EXCLUSIVELY, str(node)]
    with locked(node), waiting(command, ready=b"ready"):
        assert findings(tree, number(node)) == []


@pytest.mark.root
def test_the_file_and_the_second_device_on_it_are_found_in_use(
    live: HostTree, tmp_path: Path
) -> None:
    image = disk_image(tmp_path / "a b.img", 1, "x")
    with loop_device(image) as first, loop_device(image, read_only=True) as second:
        with held(first), held(second):
            assert codes(findings(live, str(image))) == ["has-holders", "has-holders"]
        with held(second):
            (of_first,) = findings(live, number(first))
        assert of_first.message == f"{image} is behind the loop device {second}"
        assert findings(live, number(first), READING) == []
        with held(first):
            assert codes(findings(live, number(second), READING)) == ["has-holders"]
    assert findings(live, str(image)) == []


@pytest.mark.root
def test_a_device_below_another_loop_device_is_found_in_use(live: HostTree, node: Path) -> None:
    with loop_device(node) as upper:
        with held(upper):
            (finding,) = findings(live, number(node))
            assert finding.message == f"{node} is behind the loop device {upper}"
        (finding,) = findings(live, number(node))
        assert finding.severity is Severity.WARNING


@pytest.mark.root
def test_a_loop_device_that_qemu_has_is_used(live: HostTree, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "x")
    with loop_device(image) as node, locked(node):
        assert codes(findings(live, str(image))) == ["has-holders"]


@pytest.mark.root
def test_a_loop_device_is_known_by_its_file_and_not_by_the_name_of_that(
    live: HostTree, tmp_path: Path
) -> None:
    """The name in sysfs is gone, or that of another file, or of another mount namespace."""
    image, other = tmp_path / "a.img", tmp_path / "b.img"
    disk_image(image, 1, "x")
    with loop_device(image) as node, held(node):
        other.hardlink_to(image)
        image.unlink()
        (finding,) = findings(live, str(other))
        assert finding.message == f"{other} is behind the loop device {node}"
        disk_image(image, 1, "another")
        assert findings(live, str(image)) == []
    assert findings(live, str(other)) == []


@pytest.mark.root
def test_the_lock_of_kubelet_on_a_volume_is_mentioned_and_no_more(
    live: HostTree, tmp_path: Path, node: Path
) -> None:
    """It binds the node to a file, and keeps a loop device on that."""
    published = tmp_path / "pod-uid"
    published.touch()
    subprocess.run(["mount", "--bind", node, published], check=True)
    try:
        with loop_device(published) as lock:
            (finding,) = findings(live, number(node))
            assert (finding.code, finding.severity) == (Code.HAS_HOLDERS, Severity.WARNING)
            assert finding.message == (
                f"{node} is behind the loop device {lock}, which nothing uses now"
            )
            with held(lock):
                assert codes(findings(live, number(node))) == ["has-holders"]
    finally:
        subprocess.run(["umount", published], check=True)


@pytest.mark.root
def test_a_partition_in_use_keeps_its_disk(live: HostTree, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "disk.img", 8, "x")
    with loop_with_partition(image) as (disk, part):
        assert findings(live, number(disk)) == findings(live, number(part)) == []
        with loop_device(part) as upper, held(upper):
            (finding,) = findings(live, number(disk))
            assert finding.message.startswith(f"{part} is behind the loop device")
        with waiting([sys.executable, "-c", HOLD_EXCLUSIVELY, str(part)], ready=b"ready"):
            (of_disk,) = findings(live, number(disk))
            (of_part,) = findings(live, number(part))
            assert codes([of_disk, of_part]) == ["open-exclusively"] * 2
            assert of_disk.hint.startswith(f"fuser --verbose {disk} {part} may name")
            assert of_part.hint.startswith(f"fuser --verbose {part} {disk} may name")
        assert findings(live, number(disk)) == []


@pytest.mark.root
def test_another_qemu_is_found_on_the_disk_on_its_partition_and_on_the_file_behind_both(
    live: HostTree, tmp_path: Path
) -> None:
    image = disk_image(tmp_path / "disk.img", 8, "x")
    with loop_with_partition(image) as (disk, part):
        for path in (disk, part, image):
            with locked(path):
                for node in (disk, part):
                    (finding,) = findings(live, number(node))
                    assert (
                        finding.message
                        == f"{path} is open in another QEMU or in qemu-storage-daemon"
                    )
        assert findings(live, number(disk)) == findings(live, number(part)) == []


@pytest.mark.root
def test_the_kernels_partitions_and_disks_know_of_each_other(
    live: HostTree, tmp_path: Path
) -> None:
    image = disk_image(tmp_path / "disk.img", 8, "x")
    with loop_with_partition(image) as (disk, part):
        whole, piece = (resolve(want(number(node)), live.root) for node in (disk, part))
        assert isinstance(whole, BlockDevice)
        assert isinstance(piece, BlockDevice)
        assert whole.relatives == (DiskPart(DevNum.parse(number(part)), str(part)),)
        assert piece.relatives == (DiskPart(DevNum.parse(number(disk)), str(disk)),)
        assert (whole.host_path, piece.host_path) == (str(disk), str(part))
        assert (whole.size_bytes, piece.size_bytes) == (8 << 20, 8192 * 512)
        assert whole.backing
        assert piece.backing is None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("absent", "No such file or directory"), ("circle", "Too many levels of symbolic links")],
)
def test_a_device_whose_node_cannot_be_opened_is_a_finding_and_no_failure(
    tmp_path: Path, kind: str, reason: str
) -> None:
    (tmp_path / "circle").symlink_to("circle")
    device = BlockDevice(
        devnum=DevNum(4095, 0),
        device_node=str(tmp_path / kind),
        found_by=FoundBy.SYSFS,
        size_bytes=512,
        relatives=(DiskPart(DevNum(4095, 1), str(tmp_path / "circle")),),
    )
    root = HostRoot()
    found = check_device(device, WRITING, usage=read_usage(root), root=root)
    assert codes(found) == ["unreadable"]
    assert reason in found[0].message
