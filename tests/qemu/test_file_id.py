"""What was checked is what is opened: a file, node or directory that is replaced in between.

The replacing happens at the worst moment, just before QEMU or virtiofsd opens the path, and in
half of the tests the right file is back by the time one could look at the path again.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.contract.sandbox import Hooked, Picture
from tests.contract.world import journal_rows, memory_side_vm, qemu_parts
from tests.support.disks import disk_image, qcow2_image
from tests.support.vm import QEMU, START_TIMEOUT_S, GuestVm, root_ports, scsi_controller, start_vm
from vmplug.address import PciPath, PciSlot
from vmplug.drivers.place import PciPlace, Place
from vmplug.drivers.plug import Plug, SharedFS, VirtiofsdSpec
from vmplug.drivers.ports import Command, Endpoint
from vmplug.errors import DeviceError, NoSuchDevice
from vmplug.host.file_id import file_id
from vmplug.host.finding import Code
from vmplug.host.process import find_marked
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.virtiofsd import find_virtiofsd
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.start.cold import ColdQemu
from vmplug.hypervisor.qemu.start.launch import launch
from vmplug.hypervisor.qemu.start.machine import VmSpec
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner, VirtiofsdProcess
from vmplug.manager.manager import DeviceManager
from vmplug.manager.setup import Setup
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import Request, RngInfo, ShareInfo
from vmplug.vms.connect import connect_vm
from vmplug.vms.listing import list_attachments
from vmplug.vms.reconcile import reconcile_host
from vmplug.vms.status import list_vms

pytestmark = [pytest.mark.qemu, pytest.mark.root]

OPENING = {"blockdev-add", "object-add"}


@dataclass(slots=True)
class Swap:
    """Somebody who puts something else at a path, and may put the first thing back."""

    path: Path
    other: Path
    puts_back: bool = True

    def away(self) -> None:
        self.path.rename(self.kept)
        self.other.rename(self.path)

    def back(self) -> None:
        if self.puts_back and self.kept.exists():
            self.path.rename(self.other)
            self.kept.rename(self.path)

    @property
    def kept(self) -> Path:
        return self.path.with_suffix(".kept")


@pytest.fixture(params=[True, False], ids=["put back", "left"])
def puts_back(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    with memory_side_vm(tmp_path_factory.mktemp("vm"), guest=False, paused=True) as vm:
        yield vm


def image(path: Path) -> Path:
    return disk_image(path, 2, path.name)


def node(path: Path, minor: int) -> Path:
    os.mknod(path, 0o020600, os.makedev(1, minor))
    return path


def disk(path: Path, **options: str) -> DeviceInfo:
    return DeviceInfo(
        container_path="/dev/xvda",
        dev_type=DevType.BLOCK,
        host_path=str(path),
        driver_options={key.replace("_", "-"): value for key, value in options.items()},
    )


def read_only(path: Path) -> DeviceInfo:
    return disk(path, block_driver="virtio-scsi")._replace(read_only=True)


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def share_by_qemu(path: Path) -> ShareInfo:
    options = {"filesystem": "virtio-9p"}
    return ShareInfo(tag="work", source=str(path), driver_options=options)


COLD_KINDS: dict[str, Callable[[Path], tuple[Request, Path, Path]]] = {
    "9p": lambda d: (share_by_qemu(d / "a"), folder(d / "a"), folder(d / "b")),
}
KINDS: dict[str, Callable[[Path], tuple[Request, Path, Path]]] = {
    "virtio-blk": lambda d: (disk(d / "a"), image(d / "a"), image(d / "b")),
    "scsi": lambda d: (disk(d / "a", block_driver="virtio-scsi"), image(d / "a"), image(d / "b")),
    "nvdimm": lambda d: (disk(d / "a", block_driver="nvdimm"), image(d / "a"), image(d / "b")),
    "rng": lambda d: (RngInfo(source=str(d / "a")), node(d / "a", 9), node(d / "b", 8)),
}


class Begun(Qemu):
    """Calls `begin` after the check and the journal, and before vmplug opens a file."""

    begin: Callable[[], None]

    def plug(self, plug: Plug, place: Place) -> None:
        """See Qemu."""
        self.begin()
        super().plug(plug, place)


@pytest.fixture(scope="module")
def running_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    with memory_side_vm(tmp_path_factory.mktemp("vm"), guest=False) as vm:
        yield vm


@pytest.fixture(params=["paused", "running"])
def any_vm(request: pytest.FixtureRequest) -> GuestVm:
    name = "vm" if request.param == "paused" else "running_vm"
    found: GuestVm = request.getfixturevalue(name)
    return found


@contextmanager
def meddled(
    vm: GuestVm,
    tmp_path: Path,
    before: Callable[[Command], None] = lambda _: None,
    after: Callable[[], None] = lambda: None,
    begin: Callable[[], None] = lambda: None,
) -> Iterator[DeviceManager]:
    monitor = QmpMonitor.connect(str(vm.qmp_path))
    meddled = Meddled(monitor, before, after)
    qemu = Begun(meddled, Endpoint(str(vm.qmp_path), monitor.peer_pid))
    qemu.begin = begin
    with DeviceManager.open(
        vm="sandbox-1",
        host=HostRoot("/"),
        hypervisor=qemu,
        state_dir=tmp_path / "state",
    ) as devices:
        yield devices


def files_of(vm: GuestVm) -> Counter[str]:
    """What QEMU has open, each by its device and inode."""
    return files_of_process(vm.pid)


def files_of_process(pid: int) -> Counter[str]:
    found = Counter[str]()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was just closed
            found[file_id(link.stat())] += 1
    return found


def left_in_sets(vm: GuestVm) -> list[Mapping[str, Any]]:
    """QEMU 7.2 lists a set that a node uses, without the descriptor that it was made with."""
    return [fd for found in vm.oracle.execute("query-fdsets") for fd in found["fds"]]


@pytest.mark.parametrize("kind", ["virtio-blk", "scsi", "rng"])
def test_a_file_that_is_replaced_before_vmplug_opens_it_is_not_plugged(
    running_vm: GuestVm, kind: str, tmp_path: Path
) -> None:
    request, path, other = KINDS[kind](tmp_path)
    swap = Swap(path, other, puts_back=False)

    with meddled(running_vm, tmp_path, begin=swap.away) as devices:
        before = Picture(journal_rows(tmp_path / "state"), qemu_parts(running_vm))
        with pytest.raises(NoSuchDevice, match="was replaced after vmplug checked it"):
            devices.attach(request)
        assert Picture(journal_rows(tmp_path / "state"), qemu_parts(running_vm)) == before
    assert swap.kept.exists(), "it was never replaced"
    assert not left_in_sets(running_vm)


@pytest.mark.parametrize("kind", ["scsi", "nvdimm", "rng"])
def test_the_checked_file_is_plugged_whatever_has_its_name_when_qemu_opens_it(
    any_vm: GuestVm, kind: str, tmp_path: Path, *, puts_back: bool
) -> None:
    request, path, other = KINDS[kind](tmp_path)
    swap = Swap(path, other, puts_back)
    checked, wrong = file_id(path.stat()), file_id(other.stat())
    before = files_of(any_vm)
    swapped = list[str]()

    def meddle(command: Command) -> None:
        if command.execute in OPENING and not swap.kept.exists():
            swap.away()
            swapped.append(command.execute)

    with meddled(any_vm, tmp_path, meddle, swap.back) as devices:
        devices.attach(request)
    opened = files_of(any_vm) - before
    assert opened[checked] >= 1
    assert wrong not in opened
    assert swapped
    assert not left_in_sets(any_vm)


def test_one_file_of_two_names_does_not_stand_for_another(vm: GuestVm, tmp_path: Path) -> None:
    """A descriptor that the VM has already of the checked file proves nothing."""
    first, second, other = image(tmp_path / "a"), tmp_path / "b", image(tmp_path / "c")
    swap = Swap(second, other)
    before = files_of(vm)

    def meddle(command: Command) -> None:
        if second.exists() and command.execute in OPENING and not swap.kept.exists():
            swap.away()

    with meddled(vm, tmp_path, meddle, swap.back) as devices:
        devices.attach(read_only(first))
        second.hardlink_to(first)
        wrong = file_id(other.stat())
        devices.attach(read_only(second))
        opened = files_of(vm) - before
    assert opened[file_id(first.stat())] == 2
    assert wrong not in opened


def test_a_paused_vm_keeps_no_file_of_a_disk_that_has_left(
    any_vm: GuestVm, tmp_path: Path
) -> None:
    request, path, _ = KINDS["scsi"](tmp_path)
    checked = file_id(path.stat())
    with meddled(any_vm, tmp_path, lambda _: None, lambda: None) as devices:
        for _ in range(3):
            devices.detach(devices.attach(request).id)
    assert not files_of(any_vm)[checked]
    assert not left_in_sets(any_vm)


class Meddled(Hooked):
    """Calls `after` too, when QEMU has answered a command in `opening`."""

    def __init__(
        self,
        inner: QmpMonitor,
        before: Callable[[Command], None],
        after: Callable[[], None],
        opening: Collection[str] = frozenset(OPENING),
    ) -> None:
        super().__init__(inner, before)
        self._after = after
        self._opening = opening

    def answer(self, command: Command) -> object:
        answer = super().answer(command)
        if command.execute in self._opening:
            self._after()
        return answer


def test_a_file_that_stays_is_plugged(vm: GuestVm, tmp_path: Path) -> None:
    request, path, _ = KINDS["virtio-blk"](tmp_path)
    with DeviceManager.open(
        vm="sandbox-1",
        host=HostRoot("/"),
        hypervisor=Qemu.connect(str(vm.qmp_path)),
        state_dir=tmp_path / "state",
    ) as devices:
        devices.attach(request)
        opened = [os.path.realpath(link) for link in Path(f"/proc/{vm.pid}/fd").iterdir()]
        assert str(path) in opened


def test_who_speaks_is_known_even_when_another_process_made_the_socket(vm: GuestVm) -> None:
    """The tests make QEMU's sockets and pass them on, as libvirt does."""
    with closing(QmpMonitor.connect(str(vm.qmp_path))) as monitor:
        assert monitor.peer_pid == vm.pid != os.getpid()


def cold(directory: Path, request: Request) -> ColdQemu:
    """A VM about to be started, with the device on its command line."""
    spec = VmSpec(name="cold", accel="tcg")
    qemu = ColdQemu(spec, directory / "vm")
    qemu.directory.mkdir()
    with DeviceManager.open(
        vm="cold", host=HostRoot("/"), hypervisor=qemu, state_dir=directory / "state"
    ) as devices:
        devices.attach(request)
    return qemu


@pytest.mark.parametrize("kind", ["virtio-blk", "nvdimm", "rng"])
def test_a_vm_that_opened_another_file_at_its_start_never_runs(kind: str, tmp_path: Path) -> None:
    request, path, other = (KINDS | COLD_KINDS)[kind](tmp_path)
    with cold(tmp_path, request) as qemu:
        Swap(path, other).away()
        with pytest.raises(NoSuchDevice, match="was replaced after vmplug checked it"):
            launch(qemu, lambda _: None, timeout_s=START_TIMEOUT_S)
        assert not processes_of(qemu.directory)


@pytest.mark.parametrize("kind", ["virtio-blk", "9p"])
def test_a_vm_that_opened_the_right_files_runs(kind: str, tmp_path: Path) -> None:
    request, *_ = (KINDS | COLD_KINDS)[kind](tmp_path)
    with cold(tmp_path, request) as started:
        launch(started, lambda _: None, timeout_s=START_TIMEOUT_S)
        with closing(Qemu.connect(str(started.qmp_socket))) as qemu:
            assert qemu.status() == "running"
            qemu.quit()


def processes_of(directory: Path) -> list[str]:
    """The commands that run in a directory."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):  # it has just ended
            found += [link.parent.name] if link.samefile(directory) else []
    return found


def test_qemu_shares_the_directory_that_was_checked_whatever_its_name_is_now(
    tmp_path: Path,
) -> None:
    request, path, other = COLD_KINDS["9p"](tmp_path)
    checked, wrong = file_id(path.stat()), file_id(other.stat())
    with cold(tmp_path, request) as started:
        Swap(path, other).away()
        pid = launch(started, lambda _: None, timeout_s=START_TIMEOUT_S)
        opened = files_of_process(pid)
        with closing(Qemu.connect(str(started.qmp_socket))) as qemu:
            qemu.quit()
    assert checked in opened
    assert wrong not in opened


def test_a_directory_that_is_replaced_before_vmplug_opens_it_is_not_shared_by_qemu(
    tmp_path: Path,
) -> None:
    path, other = folder(tmp_path / "a"), folder(tmp_path / "b")
    plug = SharedFS(
        id="0123456789abcdef",
        directory=str(path),
        tag="work",
        read_only=False,
        file_id=file_id(path.stat()),
    )
    Swap(path, other).away()
    place = PciPlace(bus="rp0", slot=PciSlot(0), path=PciPath.parse("02/00"))
    with (
        ColdQemu(VmSpec(name="cold", accel="tcg"), tmp_path / "vm") as qemu,
        pytest.raises(NoSuchDevice, match="was replaced after vmplug checked it"),
    ):
        qemu.plug(plug, place)
    assert qemu.descriptors() == []


class SwappingDaemons(HostVirtiofsdRunner):
    """Somebody replaces the directory before virtiofsd starts, or just after it was opened."""

    def __init__(self, vm: str, swap: Swap, *, late: bool = False) -> None:
        super().__init__(vm)
        self._swap = swap
        self._late = late

    def start(self, daemon: VirtiofsdSpec, device_id: str) -> VirtiofsdProcess:
        if not self._late:
            self._swap.away()
        return super().start(daemon, device_id)

    def _run(self, *arguments: Any) -> None:
        if self._late:
            self._swap.away()
        super()._run(*arguments)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_directory_that_is_replaced_is_not_shared(
    vm: GuestVm, tmp_path: Path, *, read_only: bool
) -> None:
    work, other = folder(tmp_path / "work"), folder(tmp_path / "other")
    socket = str(vm.qmp_path)
    monitor = QmpMonitor.connect(socket)
    daemons = SwappingDaemons(socket, Swap(work, other))
    with DeviceManager.open(
        vm="sandbox-1",
        host=HostRoot("/"),
        hypervisor=Qemu(monitor, Endpoint(socket, monitor.peer_pid), daemons),
        state_dir=tmp_path / "state",
    ) as devices:
        before = Picture(journal_rows(tmp_path / "state"), qemu_parts(vm))
        with pytest.raises(NoSuchDevice, match="was replaced after vmplug checked it"):
            devices.attach(ShareInfo(tag="work", source=str(work), read_only=read_only))
        assert Picture(journal_rows(tmp_path / "state"), qemu_parts(vm)) == before
    assert socket not in " ".join(find_marked("VMPLUG_DEVICE").values())


@pytest.mark.parametrize("read_only", [False, True])
def test_the_directory_that_was_opened_is_shared_whatever_its_name_is_by_then(
    tmp_path: Path, *, read_only: bool
) -> None:
    work, other = folder(tmp_path / "work"), folder(tmp_path / "other")
    daemon = checked_daemon(work, read_only=read_only)
    swap = Swap(work, other)
    runner = SwappingDaemons(f"VM in {tmp_path}", swap, late=True)
    try:
        with runner.start(daemon, "0123456789abcdef"):
            assert swap.kept.exists(), "it was never replaced"
            assert sandboxes(f"VM in {tmp_path}", daemon.file_id or "")
    finally:
        runner.end(["0123456789abcdef"])


def with_data_file(path: Path, data_file: Path) -> Path:
    options = ["-o", f"data_file={data_file}"]
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "1M"]
    subprocess.run(command, check=True)
    return path


class Header:
    """Somebody who can write an image, and changes its header in place."""

    def __init__(self, directory: Path) -> None:
        self.evil = image(directory / "evil")
        self.image = qcow2_image(directory / "a", 1, "inside")
        good = self.image.read_bytes()[:HEADER_BYTES]
        bad = with_data_file(directory / "b", self.evil).read_bytes()[:HEADER_BYTES]
        self.headers = (good, bad)

    def write(self, header: bytes) -> None:
        with self.image.open("r+b") as file:
            file.write(header)

    def flip_for_ever(self) -> "subprocess.Popen[bytes]":
        """In a process of its own."""
        texts = [header.hex() for header in self.headers]
        return subprocess.Popen([sys.executable, "-c", FLIPPING, str(self.image), *texts])


HEADER_BYTES = 4096
FLIPPING = """
import os, sys, itertools
file = os.open(sys.argv[1], os.O_WRONLY)
for header in itertools.cycle(map(bytes.fromhex, sys.argv[2:])):
    os.pwrite(file, header, 0)
"""


def qcow2_disk(path: Path) -> DeviceInfo:
    return disk(path, block_driver="virtio-scsi", format="qcow2")


def test_an_image_that_gets_a_data_file_before_qemu_reads_it_is_not_plugged(
    any_vm: GuestVm, tmp_path: Path
) -> None:
    header = Header(tmp_path)
    good, bad = header.headers

    def meddle(command: Command) -> None:
        header.write(bad if command.execute == "blockdev-add" else good)

    with meddled(any_vm, tmp_path, meddle, lambda: header.write(good)) as devices:
        before = Picture(journal_rows(tmp_path / "state"), qemu_parts(any_vm))
        with pytest.raises(NoSuchDevice, match="QEMU opened other files for it"):
            devices.attach(qcow2_disk(header.image))
        assert Picture(journal_rows(tmp_path / "state"), qemu_parts(any_vm)) == before
    assert not files_of(any_vm)[file_id(header.evil.stat())]
    assert not files_of(any_vm)[file_id(header.image.stat())]
    assert not left_in_sets(any_vm)


def test_whoever_writes_an_image_never_shows_the_guest_another_file(
    any_vm: GuestVm, tmp_path: Path
) -> None:
    """As it was won: the header is rewritten all the time. Before, after 18 tries.

    It need not see a refusal: who comes first is chance. That the other file is refused, is shown
    by test_an_image_that_gets_a_data_file_before_qemu_reads_it_is_not_plugged, at the one moment.
    """
    header = Header(tmp_path)
    evil, refused, tries = file_id(header.evil.stat()), 0, 0
    deadline = time.monotonic() + RACE_S
    with (
        header.flip_for_ever() as attacker,
        meddled(any_vm, tmp_path, lambda _: None, lambda: None) as devices,
    ):
        try:
            while refused < ENOUGH and time.monotonic() < deadline:
                tries += 1
                try:
                    attachment = devices.attach(qcow2_disk(header.image))
                except NoSuchDevice:
                    refused += 1
                except DeviceError:
                    continue
                else:
                    assert not files_of(any_vm)[evil]
                    devices.detach(attachment.id)
        finally:
            attacker.kill()
    assert tries, "nothing was tried"
    assert not files_of(any_vm)[evil]


RACE_S, ENOUGH, MANY = 8.0, 3, 20


def test_a_vm_whose_image_got_a_data_file_at_its_start_never_runs(tmp_path: Path) -> None:
    header = Header(tmp_path)
    with cold(tmp_path, qcow2_disk(header.image)) as qemu:
        header.write(header.headers[1])
        with pytest.raises(NoSuchDevice, match="QEMU opened other files for it"):
            launch(qemu, lambda _: None, timeout_s=START_TIMEOUT_S)
        assert not processes_of(qemu.directory)


def overlay(path: Path, backing: Path, format_: str = "raw") -> Path:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", format_, "-b", str(backing)]
    subprocess.run([*command, str(path)], check=True)
    return path


def test_backing_and_data_files_are_those_that_were_checked(
    any_vm: GuestVm, tmp_path: Path
) -> None:
    base, other, data = (image(tmp_path / name) for name in ("base", "other", "data"))
    middle = overlay(tmp_path / "middle", base)
    os.truncate(data, 2 << 20)
    top = tmp_path / "top"
    options = ["-o", f"data_file={data}", "-F", "qcow2", "-b", str(middle)]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(top)], check=True)
    swap = Swap(base, other)
    checked = [file_id(path.stat()) for path in (top, middle, base, data)]
    before = files_of(any_vm)

    def meddle(command: Command) -> None:
        if command.execute in OPENING and not swap.kept.exists():
            swap.away()

    with meddled(any_vm, tmp_path, meddle, swap.back) as devices:
        attachment = devices.attach(qcow2_disk(top), allow=[Code.HAS_BACKING_FILE])
        opened = files_of(any_vm) - before
        assert [opened[found] for found in checked] == [1, 1, 1, 1]
        assert not opened[file_id(other.stat())]
        devices.detach(attachment.id)
    assert not any(files_of(any_vm)[found] for found in checked)
    assert not left_in_sets(any_vm)


def test_a_backing_file_that_is_replaced_before_vmplug_opens_it_is_refused(
    running_vm: GuestVm, tmp_path: Path
) -> None:
    base, other = image(tmp_path / "base"), image(tmp_path / "other")
    top, swap = overlay(tmp_path / "top", base), Swap(base, other, puts_back=False)

    with (
        meddled(running_vm, tmp_path, begin=swap.away) as devices,
        pytest.raises(NoSuchDevice, match="base was replaced after vmplug checked it"),
    ):
        devices.attach(qcow2_disk(top), allow=[Code.HAS_BACKING_FILE])
    assert not files_of(running_vm)[file_id(top.stat())]
    assert not left_in_sets(running_vm)


RENAMING = """
import os, sys
path, other = sys.argv[1:]
while True:
    os.rename(path, path + ".kept")
    os.rename(other, path)
    os.rename(path, other)
    os.rename(path + ".kept", path)
"""


def is_read_only(pid: str) -> bool:
    """Whether the root directory of a process is on a mount that is read-only."""
    return bool(os.statvfs(f"/proc/{pid}/root").f_flag & os.ST_RDONLY)


def checked_daemon(work: Path, *, read_only: bool, but: str = "") -> VirtiofsdSpec:
    """The host's virtiofsd for a directory, without an option that it may have."""
    program = find_virtiofsd(HostRoot("/"))
    assert program
    return VirtiofsdSpec(
        program=program.path,
        options=(program.options or frozenset()) - {but},
        directory=str(work),
        cache="auto",
        read_only=read_only,
        file_id=file_id(work.stat()),
    )


@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_a_share_is_of_the_checked_directory_whoever_renames_it(
    tmp_path: Path, *, read_only: bool
) -> None:
    """As it was won, on the third try: one path was mounted read-only, and another was shared.

    It need not see a refusal: test_a_directory_that_is_replaced_is_not_shared shows that one, and
    test_the_directory_that_was_opened_is_shared_whatever_its_name_is_by_then what is shared.
    """
    work, other = folder(tmp_path / "work"), folder(tmp_path / "other")
    daemon = checked_daemon(work, read_only=read_only, but="--readonly")
    runner, shared = HostVirtiofsdRunner(f"VM in {tmp_path}"), 0
    wrong = file_id(other.stat())
    attack = [sys.executable, "-c", RENAMING, str(work), str(other)]
    deadline = time.monotonic() + 10 * RACE_S  # a daemon takes long to start on a busy host
    with subprocess.Popen(attack) as attacker:
        try:
            while shared < MANY and time.monotonic() < deadline:
                try:
                    started = runner.start(daemon, "0123456789abcdef")
                except NoSuchDevice:  # another directory, when vmplug opened it
                    continue
                with started:
                    assert not sandboxes(f"VM in {tmp_path}", wrong)
                    roots = sandboxes(f"VM in {tmp_path}", daemon.file_id or "")
                    shared += len(roots)
                    assert all(is_read_only(root) is read_only for root in roots)
                runner.end(["0123456789abcdef"])
        finally:
            attacker.kill()
            runner.end(["0123456789abcdef"])
    assert shared, "the attacker always came in between"


def sandboxes(vm: str, directory: str) -> list[str]:
    """The processes of a VM's daemons that have confined themselves to the directory."""
    found = []
    for pid, mark in find_marked("VMPLUG_DEVICE").items():
        with suppress(FileNotFoundError):  # what set it up has ended
            root = os.stat(f"/proc/{pid}/root")
            found += [str(pid)] if mark.endswith(f" {vm}") and file_id(root) == directory else []
    return found


@pytest.fixture
def unprivileged_vm(tmp_path: Path) -> Iterator[GuestVm]:
    """Paused; its user may not open files of mode 0600."""
    ports = [*root_ports(3), *scsi_controller()]
    known = subprocess.run([QEMU, "-help"], check=True, capture_output=True, text=True).stdout
    # QEMU 10: -run-with
    user = ["-runas", "nobody"] if "-runas" in known else ["-run-with", "user=nobody"]
    with start_vm(
        folder(tmp_path / "vm"), guest=False, paused=True, extra=user, devices=ports
    ) as vm:
        assert "\nUid:\t0" not in Path(f"/proc/{vm.pid}/status").read_text()
        yield vm


def private(kind: str, directory: Path) -> tuple[Request, Path, Path]:
    request, path, other = KINDS[kind](directory)
    path.chmod(0o600)
    return request, path, other


@pytest.mark.parametrize("kind", ["scsi", "rng"])
def test_a_paused_vm_of_another_user_uses_the_checked_file_that_its_user_may_not_open(
    unprivileged_vm: GuestVm, kind: str, tmp_path: Path, *, puts_back: bool
) -> None:
    request, path, other = private(kind, tmp_path)
    swap = Swap(path, other, puts_back)
    checked, wrong = file_id(path.stat()), file_id(other.stat())
    before = files_of(unprivileged_vm)
    swapped = list[str]()

    def meddle(command: Command) -> None:
        if command.execute in OPENING and not swap.kept.exists():
            swap.away()
            swapped.append(command.execute)

    with meddled(unprivileged_vm, tmp_path, meddle, swap.back) as devices:
        devices.attach(request)
        opened = files_of(unprivileged_vm) - before
    assert opened[checked] >= 1
    assert wrong not in opened
    assert swapped


VERBS: dict[str, Callable[[Setup], object]] = {
    "list": lambda setup: list_attachments(setup=setup),
    "vm list": lambda setup: list_vms(setup=setup),
    "reconcile": lambda setup: reconcile_host(setup=setup),
    "attach": lambda setup: connect_vm("sandbox-1", setup=setup).close(),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_next_verb_after_a_paused_vm_runs_closes_what_it_has_kept(
    unprivileged_vm: GuestVm, verb: str, tmp_path: Path
) -> None:
    request, path, _ = private("scsi", tmp_path)
    checked, setup = file_id(path.stat()), Setup(state_dir=tmp_path / "state")
    socket, other = str(unprivileged_vm.qmp_path), {"opaque": "another program's"}
    with meddled(unprivileged_vm, tmp_path) as devices:
        for _ in range(3):
            devices.detach(devices.attach(request).id)
    with path.open("rb") as file, closing(QmpMonitor.connect(socket)) as monitor:
        monitor.execute(Command("add-fd", other, descriptor=file.fileno()))
    kept = files_of(unprivileged_vm)[checked]

    VERBS[verb](setup)  # nothing can be done yet, and nothing is lost
    assert files_of(unprivileged_vm)[checked] == kept
    unprivileged_vm.oracle.execute("cont")
    VERBS[verb](setup)
    assert files_of(unprivileged_vm)[checked] == 1
    assert [fd.get("opaque") for fd in left_in_sets(unprivileged_vm)] == [other["opaque"]]
