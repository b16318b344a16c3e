"""What was checked is what is opened: a file, node or directory that is replaced in between.

The replacing happens at the worst moment, just before QEMU or virtiofsd opens the path, and in
half of the tests the right file is back by the time one could look at the path again.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contract.sandbox import Hooked, Picture
from tests.contract.world import journal_rows, memory_side_vm, qemu_parts
from tests.support.disks import disk_image
from tests.support.vm import GuestVm
from vmplug.drivers.plug import VirtiofsdSpec
from vmplug.drivers.ports import Command, Endpoint
from vmplug.errors import NoSuchDevice
from vmplug.host.process import find_marked
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.start.cold import ColdQemu
from vmplug.hypervisor.qemu.start.launch import launch
from vmplug.hypervisor.qemu.start.machine import VmSpec
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner, VirtiofsdProcess
from vmplug.manager.manager import DeviceManager
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import Request, RngInfo, ShareInfo

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


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_replaced_just_before_it_is_opened_is_not_plugged(
    vm: GuestVm, kind: str, tmp_path: Path, *, puts_back: bool
) -> None:
    request, path, other = KINDS[kind](tmp_path)
    swap = Swap(path, other, puts_back)

    def meddle(command: Command) -> None:
        if command.execute in OPENING and not swap.kept.exists():
            swap.away()
        elif command.execute not in OPENING:
            swap.back()

    monitor = QmpMonitor.connect(str(vm.qmp_path))
    endpoint = Endpoint(str(vm.qmp_path), monitor.peer_pid)
    with DeviceManager.open(
        vm="sandbox-1",
        host=HostRoot("/"),
        hypervisor=Qemu(Meddled(monitor, meddle, swap.back), endpoint),
        state_dir=tmp_path / "state",
    ) as devices:
        before = Picture(journal_rows(tmp_path / "state"), qemu_parts(vm))
        with pytest.raises(NoSuchDevice, match="was replaced after vmplug checked it"):
            devices.attach(request)
        assert Picture(journal_rows(tmp_path / "state"), qemu_parts(vm)) == before
    assert swap.kept.exists() is not puts_back, "it was never replaced"


class Meddled(Hooked):
    """Calls `after` too, when QEMU has answered."""

    def __init__(
        self, inner: QmpMonitor, before: Callable[[Command], None], after: Callable[[], None]
    ) -> None:
        super().__init__(inner, before)
        self._after = after

    def answer(self, command: Command) -> object:
        answer = super().answer(command)
        if command.execute in OPENING:
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


@pytest.mark.parametrize("kind", ["virtio-blk", "nvdimm", "rng", "9p"])
def test_a_vm_that_opened_another_file_at_its_start_never_runs(kind: str, tmp_path: Path) -> None:
    request, path, other = (KINDS | COLD_KINDS)[kind](tmp_path)
    with cold(tmp_path, request) as qemu:
        Swap(path, other).away()
        with pytest.raises(NoSuchDevice, match="was replaced after vmplug checked it"):
            launch(qemu, lambda _: None, timeout_s=20)
        assert not processes_of(qemu.directory)


@pytest.mark.parametrize("kind", ["virtio-blk", "9p"])
def test_a_vm_that_opened_the_right_files_runs(kind: str, tmp_path: Path) -> None:
    request, *_ = (KINDS | COLD_KINDS)[kind](tmp_path)
    with cold(tmp_path, request) as started:
        launch(started, lambda _: None, timeout_s=20)
        with closing(Qemu.connect(str(started.qmp_socket))) as qemu:
            assert qemu.status() == "running"
            qemu.quit()


def processes_of(directory: Path) -> list[str]:
    """The commands that run in a directory."""
    return [
        link.parent.name
        for link in Path("/proc").glob("[0-9]*/cwd")
        if os.path.exists(link) and os.path.samefile(link, directory)
    ]


class SwappingDaemons(HostVirtiofsdRunner):
    """Somebody replaces the directory as virtiofsd starts."""

    def __init__(self, vm: str, swap: Swap) -> None:
        super().__init__(vm)
        self._swap = swap

    def start(self, daemon: VirtiofsdSpec, device_id: str) -> VirtiofsdProcess:
        self._swap.away()
        return super().start(daemon, device_id)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_directory_that_is_replaced_is_not_shared(
    vm: GuestVm, tmp_path: Path, *, read_only: bool
) -> None:
    work, other = tmp_path / "work", tmp_path / "other"
    work.mkdir()
    other.mkdir()
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
