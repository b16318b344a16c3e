"""A QEMU that vmplug did not start, with devices that vmplug leased to it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import vmplug
from tests.cli.command import Vmplug
from tests.qemu.conftest import daemons_below
from tests.support.daemons import vhost_user_backend
from tests.support.disks import disk_image
from tests.support.vm import shared_memory, start_vm

pytestmark = pytest.mark.qemu
EXAMPLE = Path(__file__).parents[2] / "examples/lease.py"
PLAIN = ("-machine", "q35,accel=tcg", "-m", "64", "-S")


def test_the_example_says_what_happens(tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 2, "leased")
    done = subprocess.run(
        [sys.executable, EXAMPLE, image, tmp_path / "state", *PLAIN],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == [
        "QEMU runs: True",
        f"{image} is held by {PROGRAM}",
        f"job-18 is refused: /dev/xvda: {image} is held by lease job-17",
        "leases left: 0",
    ]


PROGRAM = "qemu-system-x86"
"""The kernel keeps 15 characters of a program's name."""


def test_qemu_locks_the_disk_itself_where_the_lease_does_not(tmp_path: Path) -> None:
    """By its path: a lease never shuts out its own VMM."""
    image = disk_image(tmp_path / "a.img", 2, "leased")
    tool = Vmplug(tmp_path / "state")
    words = ("qemu-system-x86_64", "-nodefaults", "-display", "none", *PLAIN, "-qmp", "stdio")
    node = '{"driver":"raw","node-name":"d0","file":{"driver":"file","filename":"%s"}}'
    node %= "{block.host_path}"
    quit_it = '{"execute":"qmp_capabilities"}{"execute":"quit"}'
    done = tool.as_process(
        *("lease", "--device", f"file:{image}", "--"),
        *(*words, "-blockdev", node, "-device", "virtio-blk-pci,drive=d0"),
        stdin=quit_it,
    )
    assert (done.stderr, done.status) == ("", 0)
    assert '"QMP"' in done.stdout
    assert tool("lease", "list").answer() == "nothing is leased\n"


def test_the_command_has_its_devices_by_words_that_vmplug_writes(tmp_path: Path) -> None:
    """Behind and before other words; QEMU says which disks it has."""
    image = disk_image(tmp_path / "a, b.img", 2, "leased")
    tool = Vmplug(tmp_path / "state")
    asked = '{"execute":"qmp_capabilities"}{"execute":"query-block"}{"execute":"quit"}'
    done = tool.as_process(
        *("lease", "--device", f"file:{image}", "--device", "rng", "--"),
        *("qemu-system-x86_64", "-nodefaults", "-display", "none", "{qemu-args}"),
        *(*PLAIN, "-qmp", "stdio"),
        stdin=asked,
    )
    assert (done.stderr, done.status) == ("", 0)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    (blocks,) = [answer["return"] for answer in answers if answer.get("return")]
    (node,) = [block["inserted"] for block in blocks if "inserted" in block]
    assert node["image"]["virtual-size"] == 2 << 20
    assert node["file"].startswith("/dev/fdset/")
    assert tool("lease", "list").answer() == "nothing is leased\n"


def test_locks_of_the_lease_shut_out_a_qemu_that_takes_its_own(tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 2, "leased")
    tool = Vmplug(tmp_path / "state")
    node = '{"driver":"raw","node-name":"d0","file":{"driver":"file","filename":"%s"%s}}'
    for locking, status in (("", 1), (',"locking":"off"', 0)):
        done = tool.as_process(
            *("lease", "--device", f"file:{image}", "--lock", "full", "--"),
            *("qemu-system-x86_64", "-nodefaults", "-display", "none", *PLAIN, "-qmp", "stdio"),
            *("-blockdev", node % ("{block.host_path}", locking)),
            *("-device", "virtio-blk-pci,drive=d0"),
            stdin='{"execute":"qmp_capabilities"}{"execute":"quit"}',
        )
        assert done.status == status, done
    assert os.listdir(tmp_path / "state")
    assert tool("lease", "list").answer() == "nothing is leased\n"


# shares, and sockets of backends

CONNECT = """
import signal, socket, sys
one = socket.socket(socket.AF_UNIX)
one.connect(sys.argv[1])
print("connected", flush=True)
signal.pause()
"""


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory with a file `hello` in it."""
    directory = tmp_path / "work"
    directory.mkdir()
    (directory / "hello").write_text("from the host")
    return directory


@contextmanager
def process(*command: str, pass_fds: Sequence[int] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """One that prints a line first, unless it only sleeps."""
    words = command or ("sleep", "infinity")
    with subprocess.Popen(words, pass_fds=pass_fds, stdout=subprocess.PIPE) as started:
        try:
            if command:
                assert started.stdout
                assert started.stdout.readline()
            yield started
        finally:
            started.kill()


def connected(path: str | None, *pass_fds: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
    return process(sys.executable, "-c", CONNECT, str(path), pass_fds=pass_fds)


@pytest.mark.root
def test_a_vmm_that_takes_only_the_path_of_a_socket_has_a_share(
    tmp_path: Path, shared: Path
) -> None:
    """The path is good in the process that inherits it, and for one connection."""
    setup = vmplug.Setup(state_dir=tmp_path / "state")
    terms = vmplug.LeaseTerms(shares=vmplug.ShareEnd.SOCKET)
    asked = [vmplug.ShareInfo(tag="work", source=str(shared))]
    (tmp_path / "vm").mkdir()
    with vmplug.lease(asked, owner="job", terms=terms, setup=setup) as lease:
        (device,) = lease.devices
        assert device.descriptor is None
        with pytest.raises(vmplug.SpecError, match="QEMU gets a connection"):
            lease.qemu_args("q35")
        words = ["-chardev", f"socket,id=s0,path={device.socket}"]
        words += ["-device", f"vhost-user-fs-pci,chardev=s0,tag={device.tag}"]
        with start_vm(
            tmp_path / "vm", extra=[*shared_memory(), *words], pass_fds=lease.descriptors
        ) as vm:
            lease.give_to(vm.pid)
            vm.console.run("mkdir -p /mnt/s && mount -t virtiofs work /mnt/s")
            assert vm.console.read_file("/mnt/s/hello") == b"from the host"
        assert lease.wait()
    assert daemons_below(shared) == []
    assert vmplug.list_leases(setup=setup) == []


@pytest.mark.root
def test_a_command_names_the_socket_of_a_share(tmp_path: Path, shared: Path) -> None:
    tool = Vmplug(tmp_path / "state")
    check = "import os, stat, sys; print(stat.S_ISSOCK(os.stat(sys.argv[1]).st_mode))"
    for name in ("share", "work", "virtio-fs", "share:work"):
        word = f"{{{name}.socket}}"
        done = tool.as_process(
            *("lease", "--device", f"share:{shared}:work", "--"),
            *(sys.executable, "-c", check, word),
        )
        assert (done.stdout, done.stderr, done.status) == ("True\n", "", 0)
    assert daemons_below(shared) == []
    both = ("true", "{share.socket}", "{share.descriptor}")
    refused = tool("lease", "--device", f"share:{shared}:work", "--", *both)
    assert (refused.status, "has no descriptor" in refused.stderr) == (3, True)
    assert daemons_below(shared) == []
    assert tool("lease", "list").answer() == "nothing is leased\n"


@pytest.mark.root
@pytest.mark.parametrize("end", ["connection", "socket"])
def test_whoever_has_the_connection_to_a_share_has_the_lease(
    tmp_path: Path, shared: Path, end: str
) -> None:
    setup = vmplug.Setup(state_dir=tmp_path / "state")
    terms = vmplug.LeaseTerms(shares=vmplug.ShareEnd(end))
    asked = [vmplug.ShareInfo(tag="work", source=str(shared))]
    with vmplug.lease(asked, terms=terms, setup=setup) as lease, process() as vmm:
        passed = lease.descriptors
        path = lease.devices[0].socket
        with connected(path, *passed) if path else process(pass_fds=passed) as child:
            lease.give_to(vmm.pid)
            vmm.kill()
            vmm.wait()
            assert f"process {child.pid} (" in str(lease.settle())
            (status,) = vmplug.list_leases(setup=setup)
            assert (status.process, status.state) == (child.pid, "held")
            with pytest.raises(vmplug.StateError, match=f"process {child.pid} "):
                vmplug.end_lease(status.id, setup=setup)
            assert daemons_below(shared) != []
        assert lease.settle() is None
    assert daemons_below(shared) == []
    assert vmplug.list_leases(setup=setup) == []


def test_whoever_is_connected_to_a_leased_backend_has_the_lease(tmp_path: Path) -> None:
    setup = vmplug.Setup(state_dir=tmp_path / "state")
    with vhost_user_backend("net") as backend:
        asked = [vmplug.NetInfo(label="eth0", socket_path=str(backend.socket_path))]
        with vmplug.lease(asked, setup=setup) as lease, process() as vmm:
            with connected(lease.devices[0].socket) as child:
                lease.give_to(vmm.pid)
                vmm.kill()
                vmm.wait()
                assert f"process {child.pid} (" in str(lease.settle())
            assert lease.settle() is None
    assert vmplug.list_leases(setup=setup) == []
