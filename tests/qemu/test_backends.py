"""The backends of tests/support/daemons.py serve a real QEMU and a guest; no part of the product.

What cannot be undone with a guest that hangs is tested on a VM of its own.
"""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from guest.console import GuestDisk

from tests.contract.world import SHARED_MACHINE, SHARED_MEMORY
from tests.support.daemons import (
    TESTPMD,
    Daemon,
    dpdk_testpmd,
    storage_daemon,
    vhost_user_backend,
    virtiofsd,
    virtiofsd_on,
)
from tests.support.disks import disk_image, loop_device
from tests.support.raw_qmp import QmpError, RawQmp
from tests.support.vhost_user.messages import Connection, Message, ProtocolFeature, Request
from tests.support.vm import QEMU, GuestVm, root_ports, start_vm
from vmplug.hypervisor.qemu.abilities import of_program

pytestmark = pytest.mark.qemu

MIB = 1 << 20
TAG = "shared"
ANSWER_S = 60.0
FREEZE_S = 1.0
"""How long a QEMU must have said nothing to count as frozen."""

GUEST_BDF = "0000:01:00.0"
"""Of what is behind the first root port."""

DRIVER_OK = 0xF
"""ACKNOWLEDGE, DRIVER, DRIVER_OK and FEATURES_OK of virtio 1.2, section 2.1."""

SCSI = {"driver": "vhost-user-scsi-pci"}
BLK = {"driver": "vhost-user-blk-pci", "num-queues": 1}
FS = {"driver": "vhost-user-fs-pci", "tag": TAG}
NET = {"driver": "virtio-net-pci", "netdev": "net0", "mac": "52:54:00:aa:bb:cc", "vectors": 0}
"""QEMU 7.2 without KVM: with vectors, it crashes when the guest's driver starts."""


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    with start_vm(
        tmp_path_factory.mktemp("backends"),
        machine=SHARED_MACHINE,
        devices=root_ports(1),
        extra=SHARED_MEMORY,
    ) as vm:
        vm.console.run("true")
        yield vm


@pytest.fixture
def paused_vm(tmp_path: Path) -> Iterator[GuestVm]:
    with start_vm(
        tmp_path,
        machine=SHARED_MACHINE,
        devices=root_ports(1),
        extra=SHARED_MEMORY,
        guest=False,
        paused=True,
    ) as vm:
        yield vm


def add_chardev(qmp: RawQmp, path: Path, **options: object) -> None:
    address = {"type": "unix", "data": {"path": str(path)}}
    data = {"addr": address, "server": False, **options}
    qmp.execute("chardev-add", id="char0", backend={"type": "socket", "data": data})


def add_device(qmp: RawQmp, properties: Mapping[str, object]) -> None:
    place = {"id": "dev0", "bus": "rp0", "addr": "0x0"}
    qmp.execute("device_add", {**place, **properties})


def wait_driver(vm: GuestVm) -> None:
    """Until a driver of the guest runs the device.

    QEMU is not asked: x-query-virtio-status ends QEMU 7.2 for a SCSI backend, QEMU 11 for any.
    """
    status = f"/sys/bus/pci/devices/{GUEST_BDF}/virtio*/status"
    vm.console.run(f"until grep -q {DRIVER_OK:#010x} {status}; do usleep 10000; done 2>/dev/null")


@contextmanager
def plugged(
    vm: GuestVm, path: Path, properties: Mapping[str, object], **chardev: object
) -> Iterator[None]:
    """A device with a backend at a socket, driven by the guest; gone again at the end."""
    qmp = vm.oracle
    with ExitStack() as undo:
        add_chardev(qmp, path, **chardev)
        undo.callback(qmp.execute, "chardev-remove", id="char0")
        add_device(qmp, {"chardev": "char0", **properties})
        undo.callback(qmp.wait_event, "DEVICE_DELETED", device="dev0")
        undo.callback(qmp.execute, "device_del", id="dev0")
        wait_driver(vm)
        yield


@contextmanager
def plugged_nic(vm: GuestVm, path: Path) -> Iterator[None]:
    """A network device; its netdev takes the chardev with it."""
    qmp = vm.oracle
    vm.console.run("modprobe virtio_net")
    with ExitStack() as undo:
        add_chardev(qmp, path)
        qmp.execute("netdev_add", type="vhost-user", id="net0", chardev="char0")
        undo.callback(qmp.execute, "netdev_del", id="net0")
        add_device(qmp, NET)
        undo.callback(qmp.wait_event, "DEVICE_DELETED", device="dev0")
        undo.callback(qmp.execute, "device_del", id="dev0")
        wait_driver(vm)
        yield


@contextmanager
def plugged_share(vm: GuestVm, path: Path) -> Iterator[None]:
    """A shared directory, not yet mounted."""
    vm.console.run("modprobe virtiofs")
    with plugged(vm, path, FS):
        yield


def only_disk(vm: GuestVm) -> GuestDisk:
    (disk,) = vm.console.wait_for_disks(1)
    return disk


def assert_disk_serves(vm: GuestVm, image: Path) -> GuestDisk:
    """The guest reads what the image has, and writes what it then has."""
    disk = only_disk(vm)
    assert disk.size_bytes == image.stat().st_size
    assert disk.marker == "behind-a-socket"
    data = bytes(range(256)) * 64
    vm.console.write(disk.name, 3 * MIB + 512, data)
    assert read_at(image, 3 * MIB + 512, len(data)) == data
    assert vm.console.read(disk.name, 3 * MIB + 512, len(data)) == data
    return disk


def read_at(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def assert_ping(vm: GuestVm) -> None:
    """Three packets, three answers."""
    address = "ip link set eth0 up && ip addr add 192.0.2.2/24 dev eth0"
    answer = vm.console.run(f"{address} && ping -c 3 -i 0.2 -W 60 192.0.2.77")
    assert "3 packets transmitted, 3 packets received" in answer


def ask(path: Path, *requests: Request) -> list[int]:
    """What a backend says of itself to somebody who then goes away."""
    with socket.socket(socket.AF_UNIX) as connected:
        connected.settimeout(ANSWER_S)
        connected.connect(str(path))
        connection = Connection(connected)
        return [_answer(connection, request) for request in requests]


def _answer(connection: Connection, request: Request) -> int:
    connection.send(Message(request=request))
    message = connection.receive()
    assert message is not None
    return message.u64()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return disk_image(tmp_path / "disk.img", 8, "behind-a-socket")


def test_scsi_disk_twice_with_a_probe_between(vm: GuestVm, image: Path) -> None:
    with vhost_user_backend("scsi", image, options=["--serial", "S 1"]) as backend:
        for _ in range(2):
            features, protocol, queues = ask(
                backend.socket_path,
                Request.GET_FEATURES,
                Request.GET_PROTOCOL_FEATURES,
                Request.GET_QUEUE_NUM,
            )
            assert features == 1 << 32 | 1 << 30
            assert protocol & ProtocolFeature.MQ
            assert queues == 3
            with plugged(vm, backend.socket_path, SCSI):
                disk = assert_disk_serves(vm, image)
                assert disk.name == "sda"
                assert disk.serial == "S 1"
                assert disk.write_cache == "write back"
                assert not disk.read_only
            vm.console.wait_for_disks(0)
        ask(backend.socket_path, Request.GET_FEATURES)  # answered when QEMU has been dealt with
        assert not [file for file in open_files(backend) if "eventfd" in file or "memfd" in file]


def open_files(backend: Daemon) -> list[str]:
    files = []
    for link in Path(f"/proc/{backend.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it still closes what it had for the probe
            files.append(os.readlink(link))
    return files


def test_scsi_disk_that_is_read_only(vm: GuestVm, image: Path) -> None:
    with (
        vhost_user_backend("scsi", image, options=["--read-only"]) as backend,
        plugged(vm, backend.socket_path, SCSI),
    ):
        disk = only_disk(vm)
        assert disk.read_only
        assert disk.marker == "behind-a-socket"
        assert disk.serial == "disk.img"


def test_net_answers_ping(vm: GuestVm) -> None:
    with vhost_user_backend("net") as backend:
        for _ in range(2):
            assert ask(backend.socket_path, Request.GET_FEATURES) == [1 << 32 | 1 << 30 | 1 << 5]
            with plugged_nic(vm, backend.socket_path):
                assert_ping(vm)


@pytest.mark.skipif(not TESTPMD.exists(), reason="dpdk-testpmd is missing: install dpdk-dev")
def test_testpmd_answers_ping(vm: GuestVm) -> None:
    with dpdk_testpmd() as backend, plugged_nic(vm, backend.socket_path):
        assert_ping(vm)


def test_storage_daemon_serves_an_image(vm: GuestVm, image: Path) -> None:
    with storage_daemon(image) as backend, plugged(vm, backend.socket_path, BLK):
        assert assert_disk_serves(vm, image).name == "vda"


@pytest.mark.root
def test_storage_daemon_serves_a_block_device(vm: GuestVm, image: Path) -> None:
    with (
        loop_device(image) as node,
        storage_daemon(node, writable=False) as backend,
        plugged(vm, backend.socket_path, BLK),
    ):
        disk = only_disk(vm)
        assert disk.marker == "behind-a-socket"
        assert disk.read_only


def test_storage_daemon_serves_two_queues(vm: GuestVm, image: Path) -> None:
    with (
        storage_daemon(image, num_queues=2) as backend,
        plugged(vm, backend.socket_path, {**BLK, "num-queues": 2}),
    ):
        assert ask_queue_property(vm) == 2
        assert only_disk(vm).marker == "behind-a-socket"


def ask_queue_property(vm: GuestVm) -> Any:
    return vm.oracle.execute("qom-get", path="/machine/peripheral/dev0", property="num-queues")


def every_second() -> dict[str, int]:
    """How often QEMU tries to connect again, by the option that it has."""
    return {"reconnect-ms": 1000} if of_program(QEMU).reconnect_ms else {"reconnect": 1}


def test_storage_daemon_killed_and_restarted(vm: GuestVm, image: Path) -> None:
    with (
        storage_daemon(image) as backend,
        plugged(vm, backend.socket_path, BLK, **every_second()),
    ):
        disk = only_disk(vm)
        backend.kill()
        assert not backend.is_running
        start_reading(vm, disk)
        backend.restart()
        wait_read(vm)
        assert_disk_serves(vm, image)


def test_storage_daemon_stopped_and_continued(vm: GuestVm, image: Path) -> None:
    with storage_daemon(image) as backend, plugged(vm, backend.socket_path, BLK):
        disk = only_disk(vm)
        backend.stop()
        assert state_of(backend) == "T"
        start_reading(vm, disk)
        backend.cont()
        wait_read(vm)


def start_reading(vm: GuestVm, disk: GuestDisk) -> None:
    job = f"(read_disk {disk.name} 1048576 512; echo $? >/tmp/read) </dev/null >/dev/null 2>&1 &"
    vm.console.run(f"rm -f /tmp/read; {job}")


def wait_read(vm: GuestVm) -> None:
    assert vm.console.run("until [ -s /tmp/read ]; do usleep 10000; done; cat /tmp/read") == "0"


def state_of(backend: Daemon) -> str:
    return Path(f"/proc/{backend.pid}/stat").read_text().rpartition(") ")[2][0]


@pytest.mark.root
def test_virtiofsd_shares_a_directory(vm: GuestVm, tmp_path: Path) -> None:
    with virtiofsd(tmp_path) as backend:
        with plugged_share(vm, backend.socket_path):
            assert_shared(vm, tmp_path)
        assert backend.wait_ended() == 0


@pytest.mark.root
def test_virtiofsd_on_a_socket_of_ours(vm: GuestVm, tmp_path: Path) -> None:
    path = vm.qmp_path.with_name("fs.sock")  # in a short directory
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with virtiofsd_on(listener, tmp_path) as backend:
            listener.close()
            with plugged_share(vm, path):
                assert_shared(vm, tmp_path)
            assert backend.wait_ended() == 0


def assert_shared(vm: GuestVm, directory: Path) -> None:
    """The guest reads a file of ours, and we one of the guest's."""
    (directory / "ours").write_text("from the host")
    mount = f"mkdir -p /tmp/shared && mount -t virtiofs {TAG} /tmp/shared"
    vm.console.run(mount)
    try:
        assert vm.console.run("cat /tmp/shared/ours") == "from the host"
        vm.console.run("echo from the guest >/tmp/shared/theirs")
        assert (directory / "theirs").read_text() == "from the guest\n"
    finally:
        vm.console.run("umount /tmp/shared")


def test_backend_that_hangs_up_is_an_error(paused_vm: GuestVm, image: Path) -> None:
    with vhost_user_backend("scsi", image, options=["--hang-up"]) as backend:
        add_chardev(paused_vm.oracle, backend.socket_path)
        with pytest.raises(QmpError, match="vhost_backend_init"):
            add_device(paused_vm.oracle, {"chardev": "char0", **SCSI})
        assert backend.is_running


@contextmanager
def freezing(qmp: RawQmp) -> Iterator[None]:
    """QEMU does not answer any more. Only now: before it may take its time on a busy host."""
    qmp.timeout_s = FREEZE_S
    with pytest.raises(TimeoutError):
        yield


@pytest.mark.parametrize("answers", [0, 2])
def test_backend_that_falls_silent_freezes_qemu_until_it_is_killed(
    paused_vm: GuestVm, image: Path, answers: int
) -> None:
    with (
        vhost_user_backend("scsi", image, options=["--answers", str(answers)]) as backend,
        RawQmp.connect(paused_vm.qmp_path) as qmp,
    ):
        add_chardev(qmp, backend.socket_path)
        with freezing(qmp):
            add_device(qmp, {"chardev": "char0", **SCSI})
        backend.kill()
        names = paused_vm.oracle.execute("qom-list", path="/machine/peripheral")
        assert "dev0" not in [child["name"] for child in names]


def test_net_that_falls_silent_freezes_qemu_until_it_is_killed(paused_vm: GuestVm) -> None:
    with (
        vhost_user_backend("net", options=["--answers", "0"]) as backend,
        RawQmp.connect(paused_vm.qmp_path) as qmp,
    ):
        add_chardev(qmp, backend.socket_path)
        with freezing(qmp):
            qmp.execute("netdev_add", type="vhost-user", id="net0", chardev="char0")
        backend.kill()
        assert paused_vm.oracle.execute("query-status")["status"] == "prelaunch"


def test_a_backend_that_cannot_start_says_why(tmp_path: Path) -> None:
    missing = tmp_path / "missing.img"
    for backend in (storage_daemon(missing), vhost_user_backend("scsi", missing)):
        with pytest.raises(RuntimeError, match="No such file or directory"), backend:
            pass
