"""Directories shared with the guest as virtio-fs, by a virtiofsd of vmplug's own or another's."""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from guest.console import GuestError

from tests.contract.sandbox import Hooked, Killed, Sandbox, Through
from tests.qemu.conftest import (
    PORTS,
    OpenLab,
    OpenSide,
    daemons_below,
    kill_daemons,
    leave_missing,
    opened,
)
from tests.support.daemons import VIRTIOFSD, Daemon, virtiofsd, virtiofsd_on
from tests.support.vm import root_ports, start_vm
from vmplug.drivers.ports import Command
from vmplug.errors import (
    BackendError,
    CannotPlug,
    DeviceError,
    HypervisorError,
    InUse,
    NoSuchDevice,
    SpecError,
    StateError,
)
from vmplug.host.finding import Code
from vmplug.host.kind import DeviceType
from vmplug.host.vhost_user.virtiofsd import ask_options
from vmplug.hypervisor.qmp.monitor import Monitor
from vmplug.journal.journal import Journal
from vmplug.manager.reconcile import RepairOutcome
from vmplug.oci.requests import ShareInfo
from vmplug.oci.spec import parse_config

pytestmark = [pytest.mark.qemu, pytest.mark.root]

TAG = "work"
CAP_DAC_READ_SEARCH = 2
"""Source: include/uapi/linux/capability.h."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a file `hello` in it."""
    return filled(tmp_path / "shared")


def filled(path: Path) -> Path:
    path.mkdir()
    (path / "hello").write_text("from the host")
    return path


def mount(lab: OpenLab, tag: str = TAG) -> str:
    """Where the guest has mounted the share; until its driver runs, it knows no tag."""
    directory = "/mnt/share"
    line = shlex.join(["mount", "-t", "virtiofs", tag, directory])
    lab.guest_vm.console.wait_until(f"mkdir -p {directory}; {line}")
    return directory


def assert_shared(lab: OpenLab, directory: Path, tag: str = TAG) -> None:
    """The guest reads a file of ours, and we one of the guest's."""
    console = lab.guest_vm.console
    mounted = mount(lab, tag)
    assert console.read_file(f"{mounted}/hello") == b"from the host"
    console.write_file(f"{mounted}/from-the-guest", b"both ways")
    assert (directory / "from-the-guest").read_bytes() == b"both ways"
    console.unmount(mounted)


def has_cache(directory: Path, mode: str) -> bool:
    """Whether the daemons were told that mode, in the words of the one in Rust or of that in C."""
    said = {f"--cache={mode}", f"cache={'none' if mode == 'never' else mode}"}
    pids = daemons_below(directory)
    words = [set(Path(f"/proc/{pid}/cmdline").read_text().split("\0")) for pid in pids]
    return bool(words) and all(said & own for own in words)


# directories that vmplug serves


def test_a_directory_is_shared_both_ways(life: OpenLab, directory: Path) -> None:
    before = life.picture()
    info = ShareInfo(tag=TAG, source=str(directory))
    for _ in range(2):
        attachment = life.devices.attach(info)
        assert (attachment.name, attachment.host_path) == (f"share:{TAG}", str(directory))
        assert attachment.kind is DeviceType.VHOST_USER_FS
        assert attachment.guest_address
        assert attachment.guest_address.mount_tag == TAG
        path = life.pci_path_of_driver("virtiofs")
        assert path == str(attachment.guest_address.pci_path)
        assert path == life.pci_path_in_qemu(f"vmplug-{attachment.device_id}")
        assert daemons_below(directory)
        assert_shared(life, directory)
        assert life.devices.reconcile() == []

        life.devices.detach(attachment.id)
        assert daemons_below(directory) == []
        assert life.picture() == before


ATTACH = """
import sys
from vmplug import DeviceManager, HostRoot, Qemu, ShareInfo
qmp, state, vm, tag, source = sys.argv[1:]
hypervisor = Qemu.connect(qmp)
with DeviceManager.open(
    vm=vm, host=HostRoot("/"), hypervisor=hypervisor, state_dir=state
) as devices:
    devices.attach(ShareInfo(tag=tag, source=source))
"""


def test_a_share_outlives_the_process_that_made_it(open_lab: OpenLab, directory: Path) -> None:
    before = open_lab.picture()
    open_lab.close()
    where = [str(open_lab.guest_vm.qmp_path), str(open_lab.state_dir), open_lab.vm]
    subprocess.run([sys.executable, "-c", ATTACH, *where, TAG, str(directory)], check=True)
    daemons = daemons_below(directory)
    assert daemons
    (attachment,) = open_lab.holds()
    assert open_lab.devices.reconcile() == []
    assert_shared(open_lab, directory)
    assert daemons_below(directory) == daemons
    open_lab.devices.detach(attachment.id)
    assert open_lab.picture() == before


def test_the_daemon_of_another_journals_share_goes_on(
    open_lab: OpenLab, directory: Path, tmp_path: Path
) -> None:
    before = open_lab.picture()
    attachment = open_lab.devices.attach(ShareInfo(tag=TAG, source=str(directory)))
    daemons = daemons_below(directory)
    Journal.open(tmp_path / "another").close()
    ours, open_lab.state_dir = open_lab.state_dir, tmp_path / "another"
    open_lab.close()
    (repair,) = [r for r in open_lab.devices.reconcile() if r.device_id == attachment.device_id]
    assert repair.outcome is RepairOutcome.ANOTHER_JOURNAL
    assert repair.reason.startswith("vhost-user-fs-pci of journal ")
    open_lab.close()
    open_lab.state_dir = ours
    assert daemons_below(directory) == daemons
    assert_shared(open_lab, directory)
    open_lab.devices.detach(attachment.id)
    assert open_lab.picture() == before


def test_two_owners_share_one_daemon(life: OpenLab, directory: Path) -> None:
    before = life.picture()
    info = ShareInfo(tag=TAG, source=str(directory))
    first = life.devices.attach(info, owner="c1")
    daemons = daemons_below(directory)
    second = life.devices.attach(info, owner="c2")
    assert first.device_id == second.device_id
    assert daemons_below(directory) == daemons
    life.devices.detach(first.id)
    assert_shared(life, directory)
    life.devices.detach(second.id)
    assert life.picture() == before


def test_one_directory_under_two_tags(life: OpenLab, directory: Path) -> None:
    before = life.picture()
    infos = [ShareInfo(tag=tag, source=str(directory)) for tag in ("one", "two")]
    first, second = life.devices.attach_all(infos)
    assert first.device_id != second.device_id
    assert_shared(life, directory, "one")
    life.devices.detach(first.id)
    assert_shared(life, directory, "two")
    life.devices.detach(second.id)
    assert life.picture() == before


def mounts() -> list[str]:
    """What is mounted where. Others may mount something meanwhile."""
    return Path("/proc/self/mountinfo").read_text().splitlines()


def test_a_read_only_share_takes_no_writes(life: OpenLab, directory: Path) -> None:
    before = life.picture()
    attachment = life.devices.attach(ShareInfo(tag=TAG, source=str(directory), read_only=True))
    assert attachment.read_only
    console = life.guest_vm.console
    mounted = mount(life)
    assert console.read_file(f"{mounted}/hello") == b"from the host"
    for line in (f"echo no >{mounted}/hello", f"rm {mounted}/hello", f"mkdir {mounted}/new"):
        with pytest.raises(GuestError, match="Read-only file system"):
            console.run(line)
    console.unmount(mounted)
    assert not [line for line in mounts() if str(directory) in line]
    (directory / "writable").write_text("on the host")
    life.devices.detach(attachment.id)
    assert (directory / "hello").read_text() == "from the host"
    assert life.picture() == before


def test_what_a_bundle_says_is_done(life: OpenLab, directory: Path) -> None:
    member = (
        f'{{\\"source\\": \\"{directory}\\", \\"read-only\\": true, \\"cache\\": \\"never\\"}}'
    )
    config = f'{{"ociVersion": "1", "annotations": {{"org.vmplug.share.{TAG}": "{member}"}}}}'
    before = life.picture()
    (info,) = parse_config(config.encode(), name="c1").annotated
    attachment = life.devices.attach(info)
    assert attachment.read_only
    assert has_cache(directory, "never")
    life.devices.detach(attachment.id)
    assert life.picture() == before


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, "auto"),
        *(({"cache": c}, c) for c in ("auto", "always", "never")),
        ({"cache": "none"}, "never"),
    ],
    ids=str,
)
def test_every_cache_mode_serves(
    open_lab: OpenLab, directory: Path, options: Mapping[str, str], mode: str
) -> None:
    info = ShareInfo(tag=TAG, source=str(directory), driver_options=options)
    attachment = open_lab.devices.attach(info)
    assert has_cache(directory, mode)
    assert_shared(open_lab, directory)
    open_lab.devices.detach(attachment.id)


def test_no_file_outside_of_the_directory_can_be_opened_by_its_handle(
    open_lab: OpenLab, directory: Path
) -> None:
    """A handle is a number that a guest may guess; the capability opens it wherever it is."""
    attachment = open_lab.devices.attach(ShareInfo(tag=TAG, source=str(directory)))
    serving = daemons_below(directory)
    assert serving
    for pid in serving:
        status = Path(f"/proc/{pid}/status").read_text()
        (capabilities,) = re.findall(r"^CapEff:\s(\w+)$", status, re.MULTILINE)
        assert not int(capabilities, 16) & 1 << CAP_DAC_READ_SEARCH
    open_lab.devices.detach(attachment.id)


@pytest.mark.parametrize(("options", "size"), [({}, 1024), ({"queue-size": "256"}, 256)])
def test_a_queue_has_the_size_that_is_asked_for(
    open_lab: OpenLab, directory: Path, options: Mapping[str, str], size: int
) -> None:
    info = ShareInfo(tag=TAG, source=str(directory), driver_options=options)
    attachment = open_lab.devices.attach(info)
    assert open_lab.property_of(attachment, "queue-size") == size
    assert_shared(open_lab, directory)
    open_lab.devices.detach(attachment.id)


NAMES = [
    "with,comma,source=x  and 'single' \"double\" quotes",
    "Grüße-日本-\u2028 $HOME `x` %41",
    "back\\slash\\,and\ttab\nnew line",
    "-o sandbox=none",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_a_directory_name_is_only_a_name(
    open_lab: OpenLab, tmp_path: Path, name: str, *, read_only: bool
) -> None:
    directory = filled(tmp_path / name)
    info = ShareInfo(tag=TAG, source=str(directory), read_only=read_only)
    attachment = open_lab.devices.attach(info)
    console = open_lab.guest_vm.console
    mounted = mount(open_lab)
    assert console.read_file(f"{mounted}/hello") == b"from the host"
    console.unmount(mounted)
    open_lab.devices.detach(attachment.id)
    assert daemons_below(tmp_path) == []


@contextmanager
def mounted_below(directory: Path) -> Iterator[None]:
    """A file system of its own, with a file in it."""
    below = directory / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(below)], check=True)
    try:
        (below / "deep").write_text("from below")
        yield
    finally:
        subprocess.run(["umount", str(below)], check=True)


def test_a_file_system_that_is_mounted_below_is_one_in_the_guest_too(
    open_lab: OpenLab, directory: Path
) -> None:
    with mounted_below(directory):
        attachment = open_lab.devices.attach(ShareInfo(tag=TAG, source=str(directory)))
        console = open_lab.guest_vm.console
        mounted = mount(open_lab)
        assert console.read_file(f"{mounted}/below/deep") == b"from below"
        numbers = [console.run(f"stat -c %d {mounted}/{name}") for name in ("hello", "below/deep")]
        assert numbers[0] != numbers[1]
        console.unmount(mounted)
        open_lab.devices.detach(attachment.id)
        assert daemons_below(directory) == []


def test_a_file_system_that_is_mounted_below_takes_no_writes_of_a_read_only_share(
    open_lab: OpenLab, directory: Path
) -> None:
    """One without --readonly shares none at all, and the directory below it instead."""
    with mounted_below(directory):
        info = ShareInfo(tag=TAG, source=str(directory), read_only=True)
        attachment = open_lab.devices.attach(info)
        console = open_lab.guest_vm.console
        mounted = mount(open_lab)
        with pytest.raises(GuestError, match="Read-only file system"):
            console.run(f"touch {mounted}/below/new")
        is_shared = "--readonly" in ask_options(str(VIRTIOFSD))
        assert console.run(f"ls {mounted}/below") == ("deep" if is_shared else "")
        console.unmount(mounted)
        open_lab.devices.detach(attachment.id)
        assert os.listdir(directory / "below") == ["deep"]


@pytest.mark.parametrize("tag", ["a,b=c", "with space 'n' \"q\"", "Grüße-日本", "x" * 36])
def test_a_tag_is_only_a_name(open_lab: OpenLab, directory: Path, tag: str) -> None:
    attachment = open_lab.devices.attach(ShareInfo(tag=tag, source=str(directory)))
    assert open_lab.property_of(attachment, "tag") == tag
    assert_shared(open_lab, directory, tag)
    open_lab.devices.detach(attachment.id)


# those that others serve


def test_a_virtiofsd_of_somebody_else_is_not_used_up_by_a_check(
    life: OpenLab, directory: Path
) -> None:
    with virtiofsd(directory, socket_path=life.sockets / "fs,=x 'q' Grüße.sock") as backend:
        before = life.picture()
        info = ShareInfo(tag=TAG, source=str(backend.socket_path))
        for _ in range(2):
            (examined,) = life.devices.check([info])
            assert examined.findings == ()
        attachment = life.devices.attach(info)
        assert attachment.host_path == str(backend.socket_path)
        assert_shared(life, directory)
        assert life.devices.reconcile() == []
        life.devices.detach(attachment.id)
        assert backend.wait_ended() == 0
        assert life.picture() == before


@contextmanager
def served_connection(lab: OpenLab, directory: Path) -> Iterator[tuple[socket.socket, Daemon]]:
    """A connection to a virtiofsd."""
    path = str(lab.sockets / "fs.sock")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as connection:
        listener.bind(path)
        listener.listen()
        with virtiofsd_on(listener, directory) as backend:
            connection.connect(path)
            listener.close()
            yield connection, backend


def test_a_connection_may_be_given(life: OpenLab, directory: Path) -> None:
    with served_connection(life, directory) as (connection, backend):
        before = life.picture()
        attachment = life.devices.attach(ShareInfo(tag=TAG, source=f"fd:{connection.fileno()}"))
        connection.close()
        assert attachment.guest_address
        assert_shared(life, directory)
        assert life.devices.reconcile() == []
        life.devices.detach(attachment.id)
        assert backend.wait_ended() == 0
        assert life.picture() == before


def test_a_descriptor_that_is_no_socket_is_refused(open_lab: OpenLab, directory: Path) -> None:
    before = open_lab.picture()
    with (directory / "hello").open() as file:
        number = file.fileno()
        with pytest.raises(SpecError, match="not an open socket"):
            open_lab.devices.attach(ShareInfo(tag=TAG, source=f"fd:{number}"))
    with pytest.raises(SpecError, match="not an open socket"):
        open_lab.devices.attach(ShareInfo(tag=TAG, source=f"fd:{number}"))
    assert open_lab.picture() == before


# refusals


def expect(lab: Sandbox, info: ShareInfo, error: type[DeviceError], words: str) -> DeviceError:
    """Nothing changed: no row, no part, no process."""
    before = lab.picture()
    with pytest.raises(error, match=words) as caught:
        lab.devices.attach(info)
    assert lab.picture() == before
    return caught.value


def test_a_tag_is_not_given_twice(life: OpenLab, directory: Path, tmp_path: Path) -> None:
    other = filled(tmp_path / "other")
    attachment = life.devices.attach(ShareInfo(tag=TAG, source=str(directory)))
    error = expect(life, ShareInfo(tag=TAG, source=str(other)), StateError, "has a share with")
    assert error.hint
    assert daemons_below(other) == []
    life.devices.detach(attachment.id)


def test_a_tag_is_not_given_twice_in_one_request(life: OpenLab, tmp_path: Path) -> None:
    infos = [ShareInfo(tag=TAG, source=str(filled(tmp_path / name))) for name in "ab"]
    before = life.picture()
    with pytest.raises(StateError, match=TAG):
        life.devices.attach_all(infos)
    assert life.picture() == before


@pytest.mark.parametrize(
    ("make", "found"),
    [(leave_missing, "nothing"), (Path.touch, "regular file"), (os.mkfifo, "FIFO")],
    ids=["missing", "a file", "a FIFO"],
)
def test_what_is_no_directory_is_refused(
    open_lab: OpenLab, tmp_path: Path, make: Callable[[Path], None], found: str
) -> None:
    path = tmp_path / "what"
    make(path)
    error = expect(open_lab, ShareInfo(tag=TAG, source=str(path)), NoSuchDevice, found)
    assert error.hint


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "sometimes"},
        {"queue-size": "1000"},
        {"queue-size": "2048"},
        {"cache-size": "-1"},
        {"filesystem": "nfs"},
        {"read-only": "on"},
    ],
    ids=str,
)
def test_options_that_are_wrong_are_refused(
    open_lab: OpenLab, directory: Path, options: Mapping[str, str]
) -> None:
    info = ShareInfo(tag=TAG, source=str(directory), driver_options=options)
    expect(open_lab, info, SpecError, next(iter(options)))


def test_a_dax_window_is_refused_by_this_qemu(open_lab: OpenLab, directory: Path) -> None:
    info = ShareInfo(tag=TAG, source=str(directory), driver_options={"cache-size": "64"})
    error = expect(open_lab, info, HypervisorError, "cache-size")
    assert "DAX" in (error.hint or "")


def test_a_virtio_9p_share_is_for_the_start_only(open_lab: OpenLab, directory: Path) -> None:
    options = {"filesystem": "virtio-9p"}
    info = ShareInfo(tag=TAG, source=str(directory), driver_options=options)
    error = expect(open_lab, info, CannotPlug, "before the VM starts")
    assert isinstance(error, CannotPlug)
    assert error.reason == "cold-plug-only"


def test_a_socket_of_somebody_else_has_no_options_of_ours(
    open_lab: OpenLab, directory: Path
) -> None:
    with virtiofsd(directory) as backend:
        source = str(backend.socket_path)
        info = ShareInfo(tag=TAG, source=source, driver_options={"cache": "none"})
        expect(open_lab, info, SpecError, "cache")
        info = ShareInfo(tag=TAG, source=source, read_only=True)
        error = expect(open_lab, info, InUse, "read-only")
        assert isinstance(error, InUse)
        assert error.codes == (Code.CANNOT_BE_READ_ONLY,)
        assert backend.is_running


def test_a_dead_virtiofsd_of_somebody_else_is_told(open_lab: OpenLab, directory: Path) -> None:
    with virtiofsd(directory) as backend:
        backend.kill()
        assert backend.socket_path.is_socket()
        error = expect(
            open_lab,
            ShareInfo(tag=TAG, source=str(backend.socket_path)),
            InUse,
            "no process listens",
        )
        assert isinstance(error, InUse)
        assert error.codes == (Code.NO_BACKEND,)


def test_a_file_system_that_takes_no_writes_is_shared_read_only(
    open_lab: OpenLab, tmp_path: Path
) -> None:
    path = tmp_path / "mounted"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1M", "none", str(path)], check=True)
    try:
        error = expect(
            open_lab,
            ShareInfo(tag=TAG, source=str(path)),
            InUse,
            "is read-only, and the request is for writing",
        )
        assert isinstance(error, InUse)
        assert error.codes == (Code.READ_ONLY_DEVICE,)
        info = ShareInfo(tag=TAG, source=str(path), read_only=True)
        attachment = open_lab.devices.attach(info)
        console = open_lab.guest_vm.console
        mounted = mount(open_lab)
        with pytest.raises(GuestError, match="Read-only file system"):
            console.run(f"touch {mounted}/new")
        console.unmount(mounted)
        open_lab.devices.detach(attachment.id)
    finally:
        subprocess.run(["umount", str(path)], check=True)


# what fails half-way


def test_a_daemon_ends_when_its_port_is_occupied(open_lab: OpenLab, directory: Path) -> None:
    held = open_lab.devices.attach(open_lab.disk())

    def occupy(command: Command) -> None:
        """The port was free when it was chosen."""
        if command.execute == "chardev-add":
            open_lab.query("blockdev-add", **{"node-name": "stranger-node", "driver": "null-co"})
            device = {"driver": "virtio-blk-pci", "id": "stranger", "drive": "stranger-node"}
            open_lab.query("device_add", bus="rp1", addr="0x0", **device)

    open_lab.talk_through(lambda monitor: Hooked(monitor, occupy))
    info = ShareInfo(tag=TAG, source=str(directory))
    before = open_lab.rows()
    with pytest.raises(BackendError, match="not available for vhost-user-fs-pci") as caught:
        open_lab.devices.attach(info)
    assert caught.value.hint
    open_lab.talk_plainly()
    assert open_lab.rows() == before
    assert daemons_below(directory) == []

    attachment = open_lab.devices.attach(info)
    assert str(attachment.guest_address) == f"PCI 12/00 tag {TAG}"
    assert_shared(open_lab, directory)
    for one in (held, attachment):
        open_lab.devices.detach(one.id)


def test_a_directory_that_goes_meanwhile_is_told(open_lab: OpenLab, directory: Path) -> None:
    def remove(command: Command) -> None:
        if command.execute == "query-memdev":
            (directory / "hello").unlink()
            directory.rmdir()

    open_lab.talk_through(lambda monitor: Hooked(monitor, remove))
    info = ShareInfo(tag=TAG, source=str(directory))
    error = expect(open_lab, info, NoSuchDevice, "was removed after vmplug checked it")
    assert str(directory) in error.message
    open_lab.talk_plainly()
    assert not directory.exists()


class DyingAt(Through):
    """The process is killed at a command: before it is sent, or before its answer."""

    def __init__(self, inner: Monitor, execute: str, *, is_sent: bool) -> None:
        super().__init__(inner)
        self._fatal = execute
        self._is_sent = is_sent

    def answer(self, command: Command) -> Any:
        """See Through."""
        if command.execute != self._fatal:
            return super().answer(command)
        if self._is_sent:
            super().answer(command)
        raise Killed


@pytest.mark.parametrize("execute", ["getfd", "chardev-add", "device_add"])
@pytest.mark.parametrize("is_sent", [False, True], ids=["unsent", "sent"])
def test_a_daemon_ends_when_its_attach_broke_off(
    open_lab: OpenLab, directory: Path, execute: str, *, is_sent: bool
) -> None:
    before = open_lab.picture()
    open_lab.talk_through(lambda monitor: DyingAt(monitor, execute, is_sent=is_sent))
    info = ShareInfo(tag=TAG, source=str(directory))
    with pytest.raises(Killed):
        open_lab.devices.attach(info)
    open_lab.talk_plainly()
    (repair,) = open_lab.devices.reconcile()
    assert repair.outcome is RepairOutcome.UNDONE
    assert open_lab.picture() == before
    attachment = open_lab.devices.attach(info)
    assert_shared(open_lab, directory)
    open_lab.devices.detach(attachment.id)


def test_a_vm_whose_memory_is_not_shared_is_told(tmp_path: Path, directory: Path) -> None:
    logs = tmp_path / "vm"
    logs.mkdir()
    with start_vm(logs, devices=root_ports(1), guest=False, paused=True) as vm:
        lab = Sandbox(tmp_path, side=OpenSide(vm, tmp_path))
        try:
            info = ShareInfo(tag=TAG, source=str(directory))
            error = expect(lab, info, CannotPlug, "not shared")
            assert isinstance(error, CannotPlug)
            assert error.reason == "memory-not-shared"
        finally:
            lab.close()


def test_memory_without_a_file_is_shared_with_nobody(tmp_path: Path, directory: Path) -> None:
    """QEMU 7.2 calls it shared; in 10.0 it has a file, and the guest reads the share."""
    memory = ("-object", "memory-backend-ram,id=mem,size=256M,share=on")
    words = (*memory, "-machine", "memory-backend=mem")
    logs = tmp_path / "vm"
    logs.mkdir()
    with (
        start_vm(logs, devices=root_ports(PORTS), extra=words) as vm,
        opened(vm, tmp_path, tmp_path / "state", restored=False) as lab,
    ):
        has_file = "aux-ram-share" in {
            entry["name"] for entry in vm.oracle.execute("qom-list", path="/machine")
        }
        info = ShareInfo(tag=TAG, source=str(directory))
        if has_file:
            vm.console.run("true")  # has booted
            attachment = lab.devices.attach(info)
            assert_shared(lab, directory)
            lab.devices.detach(attachment.id)
        else:
            expect(lab, info, CannotPlug, "not shared with other processes")


# daemons that die


def test_an_idle_share_whose_daemon_died_goes(life: OpenLab, directory: Path) -> None:
    before = life.picture()
    attachment = life.devices.attach(ShareInfo(tag=TAG, source=str(directory)))
    assert_shared(life, directory)
    kill_daemons(directory)
    life.devices.detach(attachment.id)
    assert life.picture() == before
