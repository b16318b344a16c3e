"""The vhost-user socket that was checked is the one that QEMU serves, whoever takes its name."""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.contract.sandbox import Hooked, Picture
from tests.contract.world import journal_rows, memory_side_vm, qemu_parts
from tests.qemu.test_file_id import RENAMING, Meddled, Swap, cold, processes_of
from tests.support.daemons import VIRTIOFSD, storage_daemon, vhost_user_backend, virtiofsd
from tests.support.disks import disk_image
from tests.support.vm import START_TIMEOUT_S, GuestVm
from vmplug.drivers.place import Place
from vmplug.drivers.plug import VhostUserDevice
from vmplug.drivers.ports import Command, Endpoint
from vmplug.drivers.vhost_user import VhostUserDriver
from vmplug.errors import BackendError, NoSuchDevice
from vmplug.host.file_id import file_id, pinned
from vmplug.host.kind import DeviceType
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.host.vhost_user.peer import BoundFile, find_bound_file, find_connections
from vmplug.hypervisor.qemu.abilities import QueriedAbilities
from vmplug.hypervisor.qemu.connection import (
    CheckedSocket,
    check_connected,
    connect_by_name,
    connected,
)
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.start.cold import ColdQemu
from vmplug.hypervisor.qemu.start.launch import launch
from vmplug.hypervisor.qemu.start.machine import VmSpec
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.manager.manager import DeviceManager
from vmplug.oci.requests import NetInfo, ShareInfo

pytestmark = [pytest.mark.qemu, pytest.mark.root]

BLK, NET = DeviceType.VHOST_USER_BLK, DeviceType.VHOST_USER_NET
ID = "0123456789abcdef"
RACE_S, MANY, TIMEOUT_S = 30.0, 40, 60.0


def nothing(*_: Command) -> None:
    """Nobody meddles."""


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[GuestVm]:
    """Without a guest nothing can be unplugged, so each test has its own."""
    with memory_side_vm(tmp_path, guest=False, paused=True) as vm:
        yield vm


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory for sockets, whose paths may have 107 bytes only."""
    with tempfile.TemporaryDirectory("", "vmplug-", "/tmp") as path:
        yield Path(path).resolve()


@pytest.fixture
def backends(short: Path) -> Iterator[tuple[Path, Path]]:
    """The sockets of a network that was checked, and of one of somebody else."""
    with two_backends(NET, short) as paths:
        yield paths


@contextmanager
def two_backends(kind: DeviceType, short: Path) -> Iterator[tuple[Path, Path]]:
    """Those of disks, or of networks."""
    paths = short / "a", short / "b"
    with ExitStack() as stack:
        for path in paths:
            if kind is BLK:
                disk = disk_image(path.with_suffix(".img"), 2, path.name)
                stack.enter_context(storage_daemon(disk, socket_path=path))
            else:
                stack.enter_context(vhost_user_backend("net", socket_path=path))
        yield paths


@contextmanager
def talking(vm: GuestVm, before: Callable[[Command], None] = nothing) -> Iterator[Qemu]:
    monitor = QmpMonitor.connect(str(vm.qmp_path))
    endpoint = Endpoint(str(vm.qmp_path), monitor.peer_pid)
    with closing(Qemu(Hooked(monitor, before), endpoint)) as qemu:
        yield qemu


def network(path: Path, reconnect: str) -> NetInfo:
    options = {"reconnect": reconnect}
    return NetInfo(label="eth0", socket_path=str(path), driver_options=options)


def peers_of(pid: int) -> Counter[BoundFile]:
    """The sockets that a process is connected to."""
    found = find_connections(pid)
    assert found is not None
    return Counter(found.values())


def bound(path: Path) -> BoundFile:
    descriptor = os.open(path, os.O_PATH)
    try:
        found = find_bound_file(descriptor)
    finally:
        os.close(descriptor)
    assert found
    return found


@contextmanager
def managed(
    vm: GuestVm,
    tmp_path: Path,
    before: Callable[[Command], None] = nothing,
    after: Callable[[], None] = nothing,
) -> Iterator[DeviceManager]:
    monitor = QmpMonitor.connect(str(vm.qmp_path))
    endpoint = Endpoint(str(vm.qmp_path), monitor.peer_pid)
    with DeviceManager.open(
        vm="sandbox-1",
        host=HostRoot("/"),
        hypervisor=Qemu(Meddled(monitor, before, after, {"chardev-add"}), endpoint),
        state_dir=tmp_path / "state",
    ) as devices:
        yield devices


@pytest.mark.parametrize("reconnect_s", [0, 1])
@pytest.mark.parametrize("kind", [BLK, NET])
def test_the_kernel_tells_which_file_a_peer_is_bound_to(
    vm: GuestVm, short: Path, kind: DeviceType, reconnect_s: int
) -> None:
    with two_backends(kind, short) as (path, _), talking(vm) as qemu:
        before = peers_of(vm.pid)
        qemu.plug(*plug_of(qemu, kind, path, reconnect_s))
        assert peers_of(vm.pid) - before == {bound(path): 1}


def test_a_connection_of_vmplug_is_to_the_checked_socket_whatever_has_its_name(
    vm: GuestVm, short: Path
) -> None:
    with two_backends(BLK, short) as (good, evil):
        wanted, wrong, swap = bound(good), bound(evil), Swap(good, evil)

        def meddle(command: Command) -> None:
            if command.execute == "chardev-add":
                swap.away()

        with talking(vm, meddle) as qemu:
            qemu.plug(*plug_of(qemu, BLK, good, 0))
            assert swap.kept.exists(), "it was never replaced"
            found = peers_of(vm.pid)
            assert (found[wanted], found[wrong]) == (1, 0)


@pytest.mark.parametrize("reconnect", ["0", "1"])
@pytest.mark.parametrize("puts_back", [True, False], ids=["put back", "left"])
def test_a_connection_by_name_to_another_socket_is_undone(
    vm: GuestVm,
    tmp_path: Path,
    backends: tuple[Path, Path],
    reconnect: str,
    *,
    puts_back: bool,
) -> None:
    good, evil = backends
    wrong, swap = bound(evil), Swap(good, evil, puts_back)

    def meddle(command: Command) -> None:
        if command.execute == "chardev-add" and not swap.kept.exists():
            swap.away()

    def wait_and_put_back() -> None:
        """QEMU connects in the background."""
        deadline = time.monotonic() + TIMEOUT_S
        while not peers_of(vm.pid)[wrong]:
            assert time.monotonic() < deadline
            vm.oracle.execute("query-chardev")
        swap.back()

    with managed(vm, tmp_path, meddle, wait_and_put_back) as devices:
        before = Picture(journal_rows(tmp_path / "state"), qemu_parts(vm))
        with pytest.raises(NoSuchDevice, match="was replaced after vmplug checked it"):
            devices.attach(network(good, reconnect))
        assert Picture(journal_rows(tmp_path / "state"), qemu_parts(vm)) == before
    assert not peers_of(vm.pid)[wrong]


@pytest.mark.parametrize("kind", [BLK, NET])
def test_a_socket_that_is_replaced_before_vmplug_opens_it_is_not_used(
    vm: GuestVm, short: Path, kind: DeviceType
) -> None:
    with two_backends(kind, short) as (good, evil), talking(vm) as qemu:
        wrong, plug = bound(evil), plug_of(qemu, kind, good, 0)
        Swap(good, evil).away()
        with pytest.raises(NoSuchDevice, match="was replaced after vmplug checked it"):
            qemu.plug(*plug)
        assert qemu.find_devices() == {}
        assert not peers_of(vm.pid)[wrong]


def plug_of(
    qemu: Qemu | ColdQemu, kind: DeviceType, path: Path, reconnect_s: int
) -> tuple[VhostUserDevice, Place]:
    """A device whose socket was checked, and a place for it."""
    found = VhostUserSocket(kind=kind, socket_path=str(path), file_id=file_id(path.stat()))
    place = VhostUserDriver(type=kind).choose_place(found, qemu.offer(), [])
    plug = VhostUserDevice(
        id=ID,
        type=kind,
        socket_path=str(path),
        file_id=found.file_id,
        reconnect_s=reconnect_s,
        mac_address="52:54:00:12:34:56" if kind is NET else None,
        msix=False,
    )
    return plug, place


@pytest.mark.parametrize("by_name", [False, True])
def test_qemu_never_serves_another_socket_whoever_renames_it(
    vm: GuestVm, backends: tuple[Path, Path], *, by_name: bool
) -> None:
    """The names of the two change all the time."""
    good, evil = backends
    wanted, wrong = bound(good), bound(evil)
    path, checked = str(good), file_id(good.stat())
    add = connect_by_path if by_name else connect_for_it
    plugged, refused, deadline = 0, 0, time.monotonic() + RACE_S
    attack = [sys.executable, "-c", RENAMING, path, str(evil)]
    with (
        closing(QmpMonitor.connect(str(vm.qmp_path))) as monitor,
        subprocess.Popen(attack) as attacker,
    ):
        try:
            while (plugged < MANY or not refused) and time.monotonic() < deadline:
                chardev = f"c{plugged + refused}"  # QEMU 10 is slow to forget a name
                try:
                    with pinned(path, checked) as pin:
                        add(monitor, CheckedSocket(path, checked, pin), vm.pid, chardev)
                except (NoSuchDevice, BackendError):  # another one, or none that answered
                    refused += 1
                else:
                    plugged += 1
                    assert wait_accepted(vm.pid, {wanted, wrong}) == wanted
                monitor.attempt([Command("chardev-remove", {"id": chardev})])
        finally:
            attacker.kill()
    assert plugged, "the attacker always came in between"
    assert refused, "the attacker never came in between"


def wait_accepted(pid: int, either: set[BoundFile]) -> BoundFile:
    """The only one of these sockets that a process is connected to."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := [peer for peer in peers_of(pid).elements() if peer in either]):
        assert time.monotonic() < deadline
        time.sleep(0.001)  # the kernel gives no event for a connection that others accept
    (peer,) = found
    return peer


def connect_for_it(monitor: QmpMonitor, checked: CheckedSocket, _: int, chardev: str) -> None:
    with connected(checked.path, checked.pin) as descriptor:
        take = Command("getfd", {"fdname": "c"}, descriptor=descriptor)
        address = {"type": "fd", "data": {"str": "c"}}
        monitor.execute_all([take, chardev_add(chardev, address)])


def connect_by_path(monitor: QmpMonitor, checked: CheckedSocket, pid: int, chardev: str) -> None:
    option = "reconnect-ms" if QueriedAbilities(monitor.execute).reconnect_ms else "reconnect"
    address = {"type": "unix", "data": {"path": checked.path}}
    monitor.converse(connect_by_name(checked, pid, chardev_add(chardev, address, **{option: 1})))


def chardev_add(chardev: str, address: Mapping[str, object], **options: object) -> Command:
    data = {"addr": address, "server": False, **options}
    return Command("chardev-add", {"id": chardev, "backend": {"type": "socket", "data": data}})


@pytest.mark.skipif(not VIRTIOFSD.exists(), reason="needs a virtiofsd")
def test_the_one_connection_of_a_virtiofsd_is_vmplugs(vm: GuestVm, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    with virtiofsd(shared) as daemon, managed(vm, tmp_path) as devices:
        wanted = bound(daemon.socket_path)
        devices.attach(ShareInfo(tag="work", source=str(daemon.socket_path)))
        assert peers_of(vm.pid)[wanted] == 1


def test_a_vm_starts_with_the_checked_socket_whatever_has_its_name(
    tmp_path: Path, short: Path
) -> None:
    with (
        two_backends(BLK, short) as (good, evil),
        ColdQemu(VmSpec(name="cold", accel="tcg"), tmp_path / "vm") as started,
    ):
        wanted, wrong = bound(good), bound(evil)
        started.directory.mkdir()
        started.plug(*plug_of(started, BLK, good, 0))
        Swap(good, evil).away()
        pid = launch(started, lambda _: None, timeout_s=START_TIMEOUT_S)
        found = peers_of(pid)
        with closing(Qemu.connect(str(started.qmp_socket))) as qemu:
            qemu.quit()
    assert (found[wanted], found[wrong]) == (1, 0)


def test_a_vm_that_connects_to_another_socket_never_runs(
    tmp_path: Path, backends: tuple[Path, Path]
) -> None:
    good, evil = backends
    with cold(tmp_path, network(good, "1")) as started:
        Swap(good, evil).away()
        with pytest.raises(NoSuchDevice, match="was replaced after vmplug checked it"):
            launch(started, lambda _: None, timeout_s=START_TIMEOUT_S)
        assert not processes_of(started.directory)


def test_a_vm_that_has_started_must_be_connected_to_the_checked_socket(
    vm: GuestVm, tmp_path: Path, backends: tuple[Path, Path]
) -> None:
    """Also when the path leads to that socket again."""
    good, evil = (str(path) for path in backends)
    ids = [file_id(path.stat()) for path in backends]
    with managed(vm, tmp_path) as devices:
        devices.attach(network(backends[0], "1"))
        check_connected(vm.pid, [(good, ids[0])])
        for wrong in ([(evil, ids[1])], [(good, ids[0]), (good, ids[0])]):
            with pytest.raises(NoSuchDevice, match="was replaced after vmplug checked it"):
                check_connected(vm.pid, wrong)


def test_a_vm_that_connects_to_the_checked_socket_by_its_name_runs(
    tmp_path: Path, backends: tuple[Path, Path]
) -> None:
    with cold(tmp_path, network(backends[0], "1")) as started:
        launch(started, lambda _: None, timeout_s=START_TIMEOUT_S)
        with closing(Qemu.connect(str(started.qmp_socket))) as qemu:
            assert qemu.status() == "running"
            qemu.quit()
