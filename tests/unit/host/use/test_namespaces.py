"""Namespaces without a process, and mounts that a chroot hides, on the running host."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.checking import WRITING, want
from tests.support.disks import loop_device
from tests.support.silent_files import silent_files
from tests.support.tree import HostTree
from vmplug.devnum import DevNum
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import Code, Finding
from vmplug.host.pci.uses import RECORDED_NETWORK
from vmplug.host.record.read import read_record
from vmplug.host.record.write import write_record
from vmplug.host.resolve import resolve
from vmplug.host.root import THIS_HOST
from vmplug.host.use.namespaces import Namespaces
from vmplug.host.use.silent import answer_within

pytestmark = pytest.mark.root

PATIENCE_S = 60.0
"""Well above the deadline of a look, also on a busy host."""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    """A loop device with a file system."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with loop_device(image) as path:
        yield path


def points(node: Path) -> list[str]:
    number = node.stat().st_rdev
    found = read_usage(THIS_HOST).mounts_of.get(DevNum(os.major(number), os.minor(number)), ())
    return sorted(mount.mount_point for mount in found)


@contextmanager
def inside(script: str, *unshare: str) -> Iterator[int]:
    """A shell in namespaces of its own, which has run the script and waits; its pid."""
    command = ["unshare", *unshare, "sh", "-ec", f"{script}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.communicate()


WAIT = "echo ready; read line || true"
NAMES = {"mount": "mnt", "net": "net"}
"""What unshare(1) calls a namespace, and /proc."""


def test_a_process_in_a_chroot_does_not_hide_the_mounts_of_its_namespace(
    node: Path, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    script = f"mount {node} {tmp_path}/mnt; exec {sys.executable} -c '{CHROOT}' {tmp_path}/mnt"
    with inside(script, "--mount"):
        assert points(node) == [f"{tmp_path}/mnt"]
    assert points(node) == []


def test_the_remedy_unmounts_it_in_its_namespace(node: Path, tmp_path: Path) -> None:
    place = tmp_path / "a b"
    place.mkdir()
    with inside(f"mount {node} '{place}'; {WAIT}", "--mount"):
        (finding,) = found_on(node)
        assert finding.code is Code.MOUNTED_ON_HOST
        assert finding.used_by
        assert finding.used_by.where == str(place)
        command = shlex.split(finding.hint.partition("or run ")[2])
        subprocess.run(command, check=True)
        assert found_on(node) == []


def test_the_remedy_unmounts_every_mount_of_it(node: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        subprocess.run(["mount", node, tmp_path / name], check=True)
    (finding,) = found_on(node)
    assert finding.code is Code.MOUNTED_ON_HOST
    subprocess.run(shlex.split(finding.hint), check=True)
    assert found_on(node) == []


def found_on(node: Path) -> list[Finding]:
    status = node.stat()
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    device = resolve(want(number), THIS_HOST)
    return check_device(device, WRITING, usage=read_usage(THIS_HOST), root=THIS_HOST)


def test_a_record_has_the_mounts_of_threads(node: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "thread.py").write_text(THREAD)
    record = tmp_path / "host.tar"
    with inside(f"exec {sys.executable} {tmp_path}/thread.py {node} {tmp_path}/mnt"):
        write_record(str(record), THIS_HOST)
    number = node.stat().st_rdev
    recorded = read_record(str(record))
    assert set(json.loads(recorded.read_text(RECORDED_NETWORK) or "")["addressed"]) >= {"lo"}
    usage = read_usage(recorded)
    found = usage.mounts_of[DevNum(os.major(number), os.minor(number))]
    assert [mount.mount_point for mount in found] == [f"{tmp_path}/mnt"]
    assert found[0].namespace
    assert "/task/" in found[0].namespace


CHROOT = (
    'import os, sys; os.mkdir(sys.argv[1] + "/in"); os.chroot(sys.argv[1] + "/in");'
    'os.chdir("/"); print("ready", flush=True); sys.stdin.read()'
)


def test_namespaces_that_only_a_thread_is_in_are_found(node: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "thread.py").write_text(THREAD)
    with inside(f"exec {sys.executable} {tmp_path}/thread.py {node} {tmp_path}/mnt") as pid:
        assert points(node) == [f"{tmp_path}/mnt"]
        found = read_usage(THIS_HOST).namespaces.networks
        (its_own,) = {
            task.joinpath("ns/net").stat().st_ino for task in Path(f"/proc/{pid}/task").iterdir()
        } - {Path(f"/proc/{pid}/ns/net").stat().st_ino}
        assert its_own in found
    assert points(node) == []


THREAD = """
import ctypes, os, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWNET, MS_PRIVATE_REC = 0x20000, 0x40000000, 0x44000
node, place = map(os.fsencode, sys.argv[1:])
def run():
    assert not libc.unshare(CLONE_NEWNS | CLONE_NEWNET)
    assert not libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_PRIVATE_REC), None)
    assert not libc.mount(node, place, b"ext4", ctypes.c_ulong(0), None)
    print("ready", flush=True)
    threading.Event().wait()
threading.Thread(target=run, daemon=True).start()
sys.stdin.read()
"""


def _keep(script: str, kind: str, file: Path, cpu: int) -> str:
    """What mount(8) says; empty once it is mounted.

    Linux 6.18 has refused one of eight: Too many levels of symbolic links. It mounts no namespace
    with a number below that of its own, and probably each processor gives numbers of its own.
    """
    if file.stat().st_dev != file.parent.stat().st_dev:
        return ""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        with inside(script, f"--{kind}") as pid:
            command = ["mount", "--bind", f"/proc/{pid}/ns/{NAMES[kind]}", str(file)]
            return subprocess.run(command, capture_output=True, text=True, check=False).stderr
    finally:
        os.sched_setaffinity(0, allowed)


@contextmanager
def kept_by_a_file(script: str, kind: str, place: Path) -> Iterator[None]:
    """A namespace without a process: a mount of its file keeps it."""
    place.mkdir()
    subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        subprocess.run(["mount", "--make-private", place], check=True)
        (place / "file").touch()
        # unshare(1) can do it too; that of Debian 13 has failed: Invalid argument.
        tries = [
            _keep(f"{script}; {WAIT}", kind, place / "file", cpu)
            for cpu in sorted(os.sched_getaffinity(0))
        ]
        assert "" in tries, tries
        yield
    finally:
        subprocess.run(["umount", place / "file"], check=False)
        subprocess.run(["umount", place], check=True)


def test_a_mount_in_a_namespace_that_only_a_file_keeps_is_found(
    node: Path, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    with kept_by_a_file(f"mount {node} {tmp_path}/mnt", "mount", tmp_path / "ns"):
        assert points(node) == [f"{tmp_path}/mnt"]
    assert points(node) == []


def test_a_mount_in_a_namespace_that_only_a_descriptor_keeps_is_found(
    node: Path, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    hold = (
        f"mount {node} {tmp_path}/mnt; exec 3</proc/self/ns/mnt;"
        f"exec nsenter --mount=/proc/{os.getpid()}/ns/mnt sh -c '{WAIT}'"
    )
    with inside(hold, "--mount"):
        assert points(node) == [f"{tmp_path}/mnt"]
    assert points(node) == []


def test_a_network_that_only_a_file_keeps_is_known(tmp_path: Path) -> None:
    with kept_by_a_file("true", "net", tmp_path / "ns"):
        kept = (tmp_path / "ns/file").stat().st_ino
        networks = read_usage(THIS_HOST).namespaces.networks
        assert os.stat(networks[kept]).st_ino == kept


@pytest.mark.parametrize("kind", NAMES)
def test_a_namespace_is_not_waited_for_whose_file_is_below_a_silent_server(
    tmp_path: Path, kind: str
) -> None:
    below, mounted = tmp_path / "below", tmp_path / "mounted"
    below.mkdir()
    mounted.mkdir()
    (below / "file").touch()
    with silent_files(below, mounted) as files:
        subprocess.run(["mount", "--make-private", mounted], check=True)
        tries = [_keep(WAIT, kind, mounted / "file", cpu) for cpu in os.sched_getaffinity(0)]
        assert "" in tries, tries
        files.stop()
        found = answer_within(PATIENCE_S, _read_namespaces)
        files.go_on()
    assert found, "it waits"
    if kind == "mount":  # the mounts in it are unknown, and that is said
        assert f"{mounted}/file cannot be read" in (found.unread or "")
    assert read_usage(THIS_HOST).namespaces.unread is None


def _read_namespaces() -> Namespaces:
    usage = read_usage(THIS_HOST)
    assert "no-such-device" not in usage.moved_interfaces
    return usage.namespaces


def test_this_threads_namespaces_stay_as_they_are() -> None:
    names = ("mnt", "net")
    before = [os.stat(f"/proc/thread-self/ns/{name}").st_ino for name in names]
    with inside(WAIT, "--mount", "--net"):
        usage = read_usage(THIS_HOST)
        assert len(usage.namespaces.tables) > 1
        assert "no-such-device" not in usage.moved_interfaces
    assert before == [os.stat(f"/proc/thread-self/ns/{name}").st_ino for name in names]
    assert not [path for path in os.listdir("/proc/self/fd") if _leads_to_proc(path)]


def _leads_to_proc(number: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{number}") == "/proc"
    except FileNotFoundError:
        return False


def test_a_decoy_of_any_user_names_a_disk_and_does_not_use_it(node: Path, tmp_path: Path) -> None:
    with inside(f"mount -t tmpfs {node} {tmp_path}; {WAIT}", "-Urm"):
        assert points(node) == []


def test_on_a_copy_of_a_host_a_decoy_is_none_either(tree: HostTree) -> None:
    tree.node("/dev/sda", "b", "8:0").mount("/dev/sda", "/mnt", "0:50", fs_type="tmpfs")
    tree.mount("/dev/sda", "/mnt", "0:51", fs_type="fuse.sshfs")
    assert read_usage(tree.root).mounts == ()


BUILT = """
import os, subprocess, sys
from vmplug.host.use.interfaces import read_others, read_own
ip = lambda words: subprocess.run(["ip", *words.split()], check=True)
ip("link add name up0 type veth peer name up1")
for line in subprocess.run(
    ["ip", "-o", "link"], check=True, capture_output=True, text=True
).stdout.splitlines():
    if ": up0@" in line:
        number = int(line.split(":")[0])
pod = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; read line"],
                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
pod.stdout.readline()
namespace = f"/proc/{pod.pid}/ns/net"
found = lambda: [(key, [one.name for one in built]) for key, built in
                 read_others([namespace]).built.items()]
print(found() == [])
ip("link add link up0 name here0 type macvlan")
ip("link add link up0 name pod0 type macvlan")
print(found() == [])
ip(f"link set pod0 netns {pod.pid}")
print(found() == [(number, ["pod0"])])
ip("addr add 198.51.100.7/32 dev up0 noprefixroute")
print(read_own().addressed == {"up0"})
print(read_own().built == {"up0": ["here0"]})
print(read_own().routed == set())
for word in ("up0", "up1"):
    ip(f"link set {word} up")
ip("route add 203.0.113.0/24 nexthop dev up0 nexthop dev up1")
print(read_own().routed == {"up0", "up1"})
ip("link set up1 down")
print(read_own().routed == {"up0"})
ip("route flush 203.0.113.0/24")
ip("link set up1 up")
ip("nexthop add id 1 dev up1")
print(read_own().routed == {"up1"})
ip("link set up1 down")
print(read_own().routed == set())
pod.stdin.close()
"""


def test_what_was_built_on_an_interface_is_found_in_other_namespaces() -> None:
    """In a network namespace of its own, where the machine's are not touched."""
    command = ["unshare", "--net", sys.executable, "-c", BUILT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["True"] * 10, done
