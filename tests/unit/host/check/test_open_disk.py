"""Processes that have a disk open without a claim on it, an image without a lock, or a node."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.checking import READING, SHARING, WRITING, Counting, findings, want, want_file
from tests.support.disks import loop_device
from tests.support.tree import MIB, HostTree
from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import Access, Code, Finding, Severity, UsedBy
from vmplug.host.resolve import resolve
from vmplug.host.root import HostRoot
from vmplug.host.use.claim import VmProcess
from vmplug.oci.info import DeviceInfo, DevType

ERROR, WARNING = Severity.ERROR, Severity.WARNING


# character devices


def of_char(path: str, number: str, root: HostRoot) -> list[Finding]:
    """What is found of a character device that a container has."""
    devnum = DevNum.parse(number)
    info = DeviceInfo(container_path=path, dev_type=DevType.CHAR, devnum=devnum)
    return check_device(resolve(info, root), WRITING, usage=read_usage(root), root=root)


def test_who_has_a_character_device_open_is_mentioned(tree: HostTree) -> None:
    tree.char_device("10:232", "kvm").char_device("1:3", "null").process(77, "dnsmasq")
    assert of_char("/dev/kvm", "10:232", tree.root) == []
    tree.process(78, "firecracker", "/dev/kvm", "/dev/null")
    (finding,) = of_char("/dev/kvm", "10:232", tree.root)
    assert (finding.code, finding.severity) == (Code.OPEN_BY_PROCESS, WARNING)
    assert finding.message == "/dev/kvm is open in process 78 (firecracker)"
    assert finding.hint.endswith("fuser --verbose /dev/kvm")
    assert of_char("/dev/null", "1:3", tree.root) == []


def test_what_a_copy_does_not_show_of_a_character_device_is_unknown(tree: HostTree) -> None:
    tree.char_device("10:232", "kvm").char_device("1:3", "null")
    (tree.path / "proc/1/fd").rmdir()
    (finding,) = of_char("/dev/kvm", "10:232", tree.root)
    assert (finding.code, finding.severity) == (Code.UNKNOWN_USE, WARNING)
    assert "open files of processes (no /proc/PID/fd)" in finding.message
    assert of_char("/dev/null", "1:3", tree.root) == []


def test_a_character_device_is_known_by_its_number() -> None:
    """A terminal, as it needs no privilege; the other end has no name."""
    ours, theirs = os.openpty()
    path, number = os.ttyname(theirs), os.fstat(theirs).st_rdev
    words = f"{os.major(number)}:{os.minor(number)}"
    root = HostRoot("/")
    assert of_char(path, words, root) == []  # this process does not count
    with subprocess.Popen(["cat"], stdin=theirs, stdout=subprocess.DEVNULL) as process:
        (finding,) = of_char(path, words, root)
        os.close(theirs)
        os.close(ours)
        process.terminate()
    assert finding.message == f"{path} is open in process {process.pid} (cat)"


# on a tree


@pytest.fixture
def disk(tree: HostTree) -> HostTree:
    return tree.block_device("8:0", "sda", partitions={"8:1": "sda1", "8:2": "sda2"})


def test_the_client_of_a_network_disk_is_no_user_of_it(tree: HostTree) -> None:
    """It has its own disk open for as long as it makes it; a thread of it does."""
    tree.block_device("43:0", "nbd0", partitions={"43:1": "nbd0p1"})
    tree.process(77, "qemu-nbd", "/dev/nbd0")
    tree.file("/sys/block/nbd0/pid", "78\n")
    assert {f.code for f in findings(tree, "43:1")} == {Code.OPEN_BY_PROCESS}
    tree.file("/proc/77/task/78/comm", "qemu-nbd\n")
    assert findings(tree, "43:0") == findings(tree, "43:1") == []
    tree.process(79, "mysqld", "/dev/nbd0p1")
    assert {f.code for f in findings(tree, "43:0")} == {Code.OPEN_BY_PROCESS}


@pytest.mark.parametrize(
    ("opened", "wanted", "is_found"),
    [
        ("sda", "8:0", True),
        ("sda", "8:1", True),
        ("sda1", "8:1", True),
        ("sda1", "8:0", True),
        ("sda1", "8:2", False),
        ("sdb", "8:0", False),
    ],
)
def test_a_process_concerns_the_disk_and_its_parts_as_a_mount_does(
    disk: HostTree, opened: str, wanted: str, *, is_found: bool
) -> None:
    disk.block_device("8:16", "sdb").process(77, "mysqld", "/dev/null", f"/dev/{opened}")
    found = findings(disk, wanted)
    assert found == (
        [
            Finding(
                Code.OPEN_BY_PROCESS,
                f"/dev/{opened} is open for writing in process 77 (mysqld)",
                "end that process, or the service that it belongs to: fuser --verbose "
                f"/dev/{opened}; or set share-rw=on if its file system supports several writers",
                used_by=UsedBy(
                    on=f"/dev/{opened}",
                    who="process 77 (mysqld)",
                    how="the open files of all processes",
                ),
            )
        ]
        if is_found
        else []
    )


@pytest.mark.parametrize(
    ("flags", "wish", "severity"),
    [
        (os.O_RDWR, WRITING, ERROR),
        (os.O_WRONLY | os.O_DIRECT, WRITING, ERROR),
        (os.O_RDWR, READING, ERROR),
        (os.O_RDWR, SHARING, WARNING),
        (os.O_RDONLY, WRITING, WARNING),
        (os.O_RDONLY, SHARING, WARNING),
        (os.O_RDONLY, READING, None),
        (os.O_PATH, WRITING, None),
    ],
)
def test_a_writer_is_in_the_way_and_a_reader_is_mentioned(
    disk: HostTree, flags: int, wish: Access, severity: Severity | None
) -> None:
    disk.process(77, "smartd", "/dev/sda").file(
        "/proc/77/fdinfo/3", f"pos:\t0\nflags:\t0{flags:o}\nmnt_id:\t29\n"
    )
    found = findings(disk, wish=wish)
    assert [(each.code, each.severity) for each in found] == (
        [(Code.OPEN_BY_PROCESS, severity)] if severity else []
    )


def test_who_reads_a_part_of_what_a_disk_is_built_on_is_multipathd(disk: HostTree) -> None:
    disk.block_device("254:0", "dm-0")
    disk.link("/sys/devices/virtual/block/dm-0/slaves/sda", "../../sda")
    disk.process(77, "multipathd", "/dev/sda")
    written = findings(disk, "254:0")
    disk.file("/proc/77/fdinfo/3", "flags:\t0100000\n")
    assert findings(disk, "254:0") == []
    assert [finding.code for finding in written] == [Code.OPEN_BY_PROCESS]


def sends_commands(tree: HostTree, disk: str, node: str) -> HostTree:
    """The character device that a SCSI disk or a namespace of NVMe has besides."""
    name = node.rpartition("/")[2]
    place = {"sg": "scsi_generic", "bs": "bsg"}.get(node[:2])
    directory = f"/sys/devices/virtual/block/{disk}/device/{place}/{name}"
    directory = directory if place else f"/sys/class/nvme-generic/{name}"
    return tree.file(f"{directory}/dev", "21:7\n").char_device("21:7", node)


@pytest.mark.parametrize(
    ("name", "node"),
    [("sda", "sg7"), ("sda", "bsg/0:0:0:0"), ("nvme1n2", "ng1n2")],
)
def test_who_sends_commands_to_a_disk_past_the_block_layer_uses_it(
    tree: HostTree, name: str, node: str
) -> None:
    part = f"{name}p1" if name.startswith("nvme") else f"{name}1"
    tree.block_device("8:0", name, partitions={"8:1": part}).block_device("8:16", "sdb")
    sends_commands(tree, name, node)
    assert findings(tree) == findings(tree, "8:1") == []
    tree.process(77, "qemu-system-x86", f"/dev/{node}")
    for wanted, asked in (("8:0", name), ("8:1", part)):
        (finding,) = findings(tree, wanted)
        assert (finding.code, finding.severity) == (Code.OPEN_BY_PROCESS, ERROR)
        assert finding.message == (
            f"/dev/{node}, which sends commands to /dev/{asked}, is open for writing in process "
            "77 (qemu-system-x86)"
        )
    usage = read_usage(tree.root, vms={77: vm_with("block:8:0")})
    found = check_device(resolve(want("8:0"), tree.root), WRITING, usage=usage, root=tree.root)
    assert [finding.severity for finding in found] == [ERROR]
    assert findings(tree, "8:16") == []


def test_a_process_that_has_an_image_open_is_named(tree: HostTree) -> None:
    tree.file("/srv/a.img", bytes(MIB)).process(77, "cloud-hypervisor", "/srv/a.img")
    (finding,) = findings(tree, "/srv/a.img")
    assert finding.message == ("/srv/a.img is open for writing in process 77 (cloud-hypervisor)")
    (tree.path / "proc/77/fd/3").unlink()  # the remedy: it has let go
    assert findings(tree, "/srv/a.img") == []


def test_a_vm_of_vmplug_is_no_stranger(disk: HostTree) -> None:
    disk.process(77, "qemu", "/dev/sda").process(78, "qemu", "/dev/sda")
    device = resolve(want("8:0"), disk.root)
    for pids, expected in (((77, 78), []), ((77,), ["process 78"]), ((), ["process 77"])):
        usage = read_usage(disk.root, vms=dict.fromkeys(pids, vm_with("block:8:0")))
        found = check_device(device, WRITING, usage=usage, root=disk.root)
        assert all(any(e in finding.message for finding in found) for e in expected)
        assert bool(found) == bool(expected)


def vm_with(*identities: str) -> VmProcess:
    return VmProcess(vm="sb1", holds=frozenset(identities))


@pytest.mark.parametrize("held", [(), ("block:8:32",)])
def test_a_vm_that_got_it_elsewhere_is_reported_and_its_lock_decides(
    disk: HostTree, held: tuple[str, ...]
) -> None:
    """Another journal's vmplug plugged it, or it was on QEMU's command line."""
    disk.process(77, "qemu", "/dev/sda")
    usage = read_usage(disk.root, vms={77: vm_with(*held)})
    found = check_device(resolve(want("8:0"), disk.root), WRITING, usage=usage, root=disk.root)
    ((code, severity, message, used_by),) = [
        (f.code, f.severity, f.message, f.used_by) for f in found
    ]
    assert (code, severity) == (Code.OPEN_BY_PROCESS, Severity.WARNING)
    assert message.startswith(
        "/dev/sda is open for writing in VM 'sb1', which did not get it from"
    )
    assert used_by
    assert used_by.who == "VM 'sb1' (not from this journal)"


def test_what_is_asked_of_all_processes_is_asked_once_for_a_request(tree: HostTree) -> None:
    for disk in range(5):
        tree.block_device(f"8:{16 * disk}", f"sd{disk}")
        tree.file(f"/sys/block/sd{disk}/wwid", f"naa.{disk}\n")
    tree.mount("/dev/x", "/", "9:9", pid=5).process(5, "init", "/dev/null").swap("/dev/x")
    root = Counting(tree.root)
    usage = read_usage(root)
    for disk in range(5):
        device = resolve(want(f"8:{16 * disk}"), root)
        assert check_device(device, WRITING, usage=usage, root=root) == []
    once = ("/proc/5/fd", "/proc/5/mountinfo", "/proc/swaps")
    assert [root.reads[path] for path in once] == [1, 1, 1]
    assert root.reads["/proc"] == 2  # for open files and for namespaces
    assert root.reads["/sys/block"] == 2  # for loop devices and for names of LUNs


def lock(tree: HostTree, owner: str, *, waits: bool = False) -> HostTree:
    """A lock on /srv/a.img, as the kernel writes it: `OFDLCK ADVISORY  WRITE -1`."""
    status = tree.root.stat("/srv/a.img")
    assert status
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    arrow = "-> " if waits else ""
    return tree.file("/proc/locks", f"1: {arrow}{owner} {device}:{status.st_ino} 0 EOF\n")


@pytest.fixture
def image(tree: HostTree) -> HostTree:
    tree.process(77, "cp", "/dev/null").process(12, "lockd")
    return tree.file("/srv/a.img", bytes(MIB)).file(
        "/proc/12/stat", "12 (lockd) S 2 0 0 0 -1 2097216"
    )


@pytest.mark.parametrize(
    ("owner", "severity", "by"),
    [
        ("OFDLCK ADVISORY  WRITE -1", ERROR, "writing by a process"),
        ("OFDLCK ADVISORY  READ -1", WARNING, "reading by a process"),
        ("POSIX  ADVISORY  WRITE 12", ERROR, "writing by process 12 (lockd)"),
        ("FLOCK  ADVISORY  WRITE 4711", ERROR, "writing by process 4711 (?)"),
        ("LEASE  ACTIVE    READ 4711", WARNING, "reading by process 4711 (?)"),
    ],
)
def test_a_lock_shows_a_user_whose_open_files_nothing_shows(
    image: HostTree, owner: str, severity: Severity, by: str
) -> None:
    assert findings(image, "/srv/a.img") == []
    (finding,) = findings(lock(image, owner), "/srv/a.img")
    assert (finding.code, finding.severity) == (Code.OPEN_BY_PROCESS, severity)
    assert finding.message == (
        f"/srv/a.img is locked for {by}, whose open files vmplug does not see"
    )
    assert len(findings(image, "/srv/a.img", READING)) == (severity is ERROR)
    assert [one.severity for one in findings(image, "/srv/a.img", SHARING)] == [WARNING]


def test_a_lock_of_somebody_else_does_not_matter(image: HostTree) -> None:
    """It is waited for, or its owner has the file open."""
    lock(image, "POSIX  ADVISORY  WRITE 12", waits=True)
    assert findings(image, "/srv/a.img") == []
    image.file("/srv/b.img", bytes(MIB))
    assert findings(lock(image, "OFDLCK ADVISORY  WRITE -1"), "/srv/b.img") == []
    image.process(78, "tar", "/srv/a.img").file("/proc/78/fdinfo/3", "flags:\t0100000\n")
    assert findings(image, "/srv/a.img", READING) == []
    lock(image, "POSIX  ADVISORY  WRITE 12")  # of the kernel's own thread, which has no files
    assert len(findings(image, "/srv/a.img", READING)) == 1


# on the running host


@contextmanager
def holding(path: Path, mode: str = "r+b", *, seconds: float = 600) -> Iterator[int]:
    """A process that has a file open for that time; its number."""
    code = (
        "import sys, select; file = open(sys.argv[1], sys.argv[2], 0); print(flush=True);"
        "select.select([0], [], [], float(sys.argv[3])); file.close(); sys.stdin.read()"
    )
    command = [sys.executable, "-IS", "-c", code, str(path), mode, str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.communicate()


def look(wanted: str, wish: Access = WRITING) -> list[tuple[Code, Severity]]:
    found = findings(HostTree(Path("/")), wanted, wish)
    return [(finding.code, finding.severity) for finding in found]


OPEN = (Code.OPEN_BY_PROCESS, ERROR)


def test_an_image_is_known_by_any_of_its_names(tmp_path: Path) -> None:
    image, other = tmp_path / "a.img", tmp_path / "other name"
    image.write_bytes(bytes(MIB))
    os.link(image, other)
    with holding(other) as pid:
        (finding,) = findings(HostTree(Path("/")), str(image))
        assert f"process {pid} (" in finding.message
        assert look(str(image), READING) == [OPEN]
    with holding(other, "rb"):
        assert look(str(image)) == [(Code.OPEN_BY_PROCESS, WARNING)]
        assert look(str(image), READING) == []
    assert look(str(image)) == []


def test_who_has_it_open_for_a_moment_is_not_taken_for_a_user(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(MIB))
    with holding(image, seconds=0.1):
        assert look(str(image)) == []


def test_a_lock_shows_who_has_a_file_open_only_in_a_socket(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(MIB))
    code = (
        "import array, fcntl, socket, sys\n"
        "here, there = socket.socketpair()\n"
        "with open(sys.argv[1], 'r+b') as file:\n"
        "    fcntl.flock(file, fcntl.LOCK_EX)\n"
        "    here.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, "
        "array.array('i', [file.fileno()]))])\n"
        "print(flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-IS", "-c", code, str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        (finding,) = findings(HostTree(Path("/")), str(image))
        assert (finding.code, finding.severity) == (Code.OPEN_BY_PROCESS, ERROR)
        assert f"{image} is locked for writing by process {process.pid} (" in finding.message
        process.communicate()
    assert look(str(image)) == []


def test_an_own_lock_is_no_use(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(MIB))
    with image.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert look(str(image)) == []


@pytest.mark.root
def test_a_node_in_a_chroot_by_another_name_hides_no_process(tmp_path: Path) -> None:
    image, node = tmp_path / "a.img", tmp_path / "node"
    image.write_bytes(bytes(8 * MIB))
    with loop_device(image) as loop:
        os.mknod(node, 0o60600, loop.stat().st_rdev)
        number = f"{os.major(loop.stat().st_rdev)}:{os.minor(loop.stat().st_rdev)}"
        assert look(number) == []
        with holding(node):
            assert look(number) == [OPEN]
        with holding(node, "rb"):
            assert look(number) == [(Code.OPEN_BY_PROCESS, WARNING)]
        with holding(image):  # what it is built on
            assert look(number) == [OPEN]
        with holding(image, "rb"):
            assert look(number) == []
        assert look(number) == []


@pytest.mark.root
def test_a_process_that_this_user_may_not_look_into_may_have_it(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(MIB))

    class Guest(HostRoot):
        """This host, for a user that may not list the files of process 1."""

        def list_dir(self, path: str) -> list[str]:
            if path == "/proc/1/fd":
                raise AttributeReadError(path, 13)
            return super().list_dir(path)

    root = Guest()
    found = check_device(
        resolve(want_file(str(image)), root), WRITING, usage=read_usage(root), root=root
    )
    assert [(finding.code, finding.severity) for finding in found] == [(Code.UNKNOWN_USE, ERROR)]
    assert "open files of process 1 (permission denied)" in found[0].message


@pytest.mark.root
def test_a_process_that_even_root_may_not_look_into_does_not_count(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(MIB))
    root = HostRoot()
    usage = read_usage(root)
    vars(usage)["open_files"] = replace(usage.open_files, guarded=(1,))
    device = resolve(want_file(str(image)), root)
    assert check_device(device, WRITING, usage=usage, root=root) == []


def test_a_copy_without_open_files_cannot_say_who_has_a_disk_open(tree: HostTree) -> None:
    tree.block_device("8:0", "sda")
    (tree.path / "proc/1/fd").rmdir()
    (finding,) = findings(tree)
    assert (finding.code, finding.severity) == (Code.UNKNOWN_USE, WARNING)
    assert finding.message.endswith("open files of processes (no /proc/PID/fd)")
    assert finding.used_by
    assert finding.used_by.on == "/dev/sda"
