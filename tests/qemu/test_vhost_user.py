"""Disks, SCSI adapters and networks that other processes serve, as a guest and QEMU see them.

Never `x-query-virtio-status`: it crashes QEMU 7.2 on a SCSI adapter, and QEMU 11 on each of them.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from guest.console import GuestDisk, GuestNic

from tests.contract.sandbox import Sandbox
from tests.contract.world import SHARED_MACHINE, SHARED_MEMORY
from tests.qemu.conftest import (
    OpenLab,
    kill_daemons,
    leave_missing,
    opened,
    request,
    started_open_vm,
)
from tests.support.daemons import (
    TESTPMD,
    dpdk_testpmd,
    storage_daemon,
    vhost_user_backend,
    virtiofsd,
)
from tests.support.disks import disk_image
from tests.support.vm import GuestVm, root_ports, start_vm
from vmplug.address import qemu_id
from vmplug.errors import (
    BackendTimeout,
    CannotPlug,
    CommandError,
    InUse,
    NoSuchDevice,
    SpecError,
    UnplugTimeout,
)
from vmplug.host.finding import Code
from vmplug.host.kind import DeviceType
from vmplug.host.vhost_user.store import VHOST_USER_BLK_MAJOR, VHOST_USER_SCSI_MAJOR
from vmplug.journal.records import Attachment
from vmplug.journal.state import State
from vmplug.manager.reconcile import RepairOutcome
from vmplug.oci.requests import NetInfo, Request, ShareInfo
from vmplug.oci.spec import parse_config

pytestmark = pytest.mark.qemu

MIB = 1 << 20
AT_ONCE_S = 0.3
"""For what will not answer anyway."""
BLK, SCSI = VHOST_USER_BLK_MAJOR, VHOST_USER_SCSI_MAJOR
PEER = "192.0.2.77"
NAMES = [
    "a,b=c,,d",
    "two  spaces 'and' \"quotes\"",
    "Grüße-日本\u2028",
    "100%41\\t\ttab",
    'json:{"a":1}',
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return disk_image(tmp_path / "disk.img", 8, "behind-a-socket")


def read_at(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def seen(lab: OpenLab, attachment: Attachment, *, of: int = 1) -> GuestDisk:
    """The disk in the guest, known by its place."""
    disks = lab.guest_vm.console.wait_for_disks(of)
    assert attachment.guest_address
    path = str(attachment.guest_address.pci_path)
    assert path == lab.pci_path_in_qemu(qemu_id(attachment.device_id))
    (disk,) = [disk for disk in disks if disk.pci_path == path]
    return disk


def assert_serves(lab: OpenLab, disk: GuestDisk, image: Path) -> None:
    """The guest reads what the image has, and writes what it then has."""
    assert (disk.marker, disk.size_bytes) == ("behind-a-socket", 8 * MIB)
    data = os.urandom(5000)
    lab.guest_vm.console.write(disk.name, 3 * MIB + 512, data)
    assert read_at(image, 3 * MIB + 512, len(data)) == data
    assert lab.guest_vm.console.read(disk.name, 3 * MIB + 512, len(data)) == data


# disks


def test_a_disk_of_a_storage_daemon_is_read_and_written(life: OpenLab, image: Path) -> None:
    with storage_daemon(image) as backend:
        before = life.picture()
        info = life.stored(backend.socket_path)
        for _ in range(2):
            attachment = life.devices.attach(info)
            assert attachment.kind is DeviceType.VHOST_USER_BLK
            assert_serves(life, seen(life, attachment), image)
            assert life.devices.reconcile() == []
            life.devices.detach(attachment.id)
            life.guest_vm.console.wait_for_disks(0)
            assert life.picture() == before
        assert backend.is_running


def test_two_owners_share_a_disk_of_one_backend(life: OpenLab, image: Path) -> None:
    with storage_daemon(image) as backend:
        before = life.picture()
        info = life.stored(backend.socket_path)
        first = life.devices.attach(info, owner="c1")
        disk = seen(life, first)
        second = life.devices.attach(info, owner="c2")
        assert first.device_id == second.device_id
        life.devices.detach(first.id)
        assert_serves(life, disk, image)
        life.devices.detach(second.id)
        assert life.picture() == before


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_socket_is_only_a_name(open_lab: OpenLab, image: Path, name: str) -> None:
    path = open_lab.sockets / "store/block/sockets" / name
    with storage_daemon(image, socket_path=path):
        attachment = open_lab.devices.attach(open_lab.stored(path, name=name))
        assert attachment.host_path == str(path)
        assert seen(open_lab, attachment).marker == "behind-a-socket"
        open_lab.devices.detach(attachment.id)


@pytest.mark.parametrize(
    ("served", "options", "queues"),
    [(1, {}, 1), (4, {}, 2), (4, {"num-queues": "4"}, 4), (2, {"num-queues": "1"}, 1)],
)
def test_queues_fit_the_backend_and_the_vm(
    open_lab: OpenLab, image: Path, served: int, options: Mapping[str, str], queues: int
) -> None:
    """The VM has two CPUs."""
    with storage_daemon(image, num_queues=served) as backend:
        attachment = open_lab.devices.attach(open_lab.stored(backend.socket_path, options))
        assert open_lab.property_of(attachment, "num-queues") == queues
        assert_serves(open_lab, seen(open_lab, attachment), image)
        open_lab.devices.detach(attachment.id)


def test_a_read_only_backend_is_read_only_in_the_guest(life: OpenLab, image: Path) -> None:
    with storage_daemon(image, writable=False) as backend:
        attachment = life.devices.attach(life.stored(backend.socket_path, ro=True))
        disk = seen(life, attachment)
        assert (disk.read_only, disk.marker) == (True, "behind-a-socket")
        assert attachment.read_only
        life.devices.detach(attachment.id)


# backends that come and go


def start_load(lab: OpenLab, disk: GuestDisk) -> None:
    """The guest reads block after block until /tmp/stop is there; /tmp/reads counts them."""
    read = f"read_disk {disk.name} 65536 65536 >/dev/null"
    loop = f"while [ ! -e /tmp/stop ]; do {read} || break; echo >>/tmp/reads; done"
    lab.guest("rm -f /tmp/stop /tmp/reads /tmp/status")
    lab.guest(f"({loop}; {read}; echo $? >/tmp/status) >/dev/null 2>&1 &")
    lab.guest_vm.console.wait_until("[ $(wc -c </tmp/reads) -ge 3 ]")


def stop_load(lab: OpenLab) -> None:
    """Every read went well, also those that had to wait."""
    lab.guest("touch /tmp/stop")
    lab.guest_vm.console.wait_until("[ -s /tmp/status ]")
    assert lab.guest("cat /tmp/status") == "0"


def test_a_backend_that_comes_back_goes_on_with_its_work(life: OpenLab, image: Path) -> None:
    with storage_daemon(image) as backend:
        attachment = life.devices.attach(life.stored(backend.socket_path))
        disk = seen(life, attachment)
        start_load(life, disk)
        backend.kill()
        backend.restart()
        stop_load(life)
        assert_serves(life, disk, image)
        assert life.devices.reconcile() == []
        life.devices.detach(attachment.id)


def test_a_disk_whose_backend_is_dead_is_released_when_it_comes_back(
    life: OpenLab, image: Path
) -> None:
    with storage_daemon(image) as backend:
        before = life.picture()
        attachment = life.devices.attach(life.stored(backend.socket_path))
        disk = seen(life, attachment)
        backend.kill()
        start = f"(read_disk {disk.name} 1048576 512; echo $? >/tmp/read) >/dev/null 2>&1 &"
        life.guest(f"rm -f /tmp/read; {start}")
        life.guest_vm.console.wait_until(f"grep '1 *0' /sys/block/{disk.name}/inflight")
        for _ in range(2):
            with pytest.raises(UnplugTimeout) as caught:
                life.devices.detach(attachment.id, timeout_s=AT_ONCE_S)
            assert f"the backend of {attachment.host_path} is gone" in caught.value.message
            assert "start that backend again" in (caught.value.hint or "")
            assert [a.state for a in life.holds()] == [State.DETACHING]
        (repair,) = life.devices.reconcile(timeout_s=AT_ONCE_S)
        assert repair.outcome is RepairOutcome.STILL_DETACHING
        assert "backend" in repair.reason
        backend.restart()
        life.devices.detach(attachment.id)
        life.guest_vm.console.wait_for_disks(0)
        assert life.picture() == before


def test_an_idle_disk_whose_backend_is_dead_goes(life: OpenLab, image: Path) -> None:
    """The guest has nothing to wait for."""
    with storage_daemon(image) as backend:
        before = life.picture()
        attachment = life.devices.attach(life.stored(backend.socket_path))
        seen(life, attachment)
        backend.kill()
        life.devices.detach(attachment.id)
        life.guest_vm.console.wait_for_disks(0)
        assert life.picture() == before


# refusals


def refused(lab: Sandbox, info: Request, code: Code, *words: str) -> None:
    """Told before anything is sent; nothing changed."""
    before = lab.picture()
    with pytest.raises(InUse) as caught:
        lab.devices.attach(info)
    assert caught.value.codes == (code,)
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint
    assert lab.picture() == before


def test_more_queues_than_the_backend_serves_are_refused(open_lab: OpenLab, image: Path) -> None:
    with storage_daemon(image, num_queues=2) as backend:
        info = open_lab.stored(backend.socket_path, {"num-queues": "3"})
        refused(open_lab, info, Code.TOO_MANY_QUEUES, "2 queues")


def test_a_writable_backend_is_not_handed_over_read_only(open_lab: OpenLab, image: Path) -> None:
    with storage_daemon(image) as backend:
        info = open_lab.stored(backend.socket_path, ro=True)
        refused(open_lab, info, Code.CANNOT_BE_READ_ONLY)


def test_a_read_only_backend_is_not_handed_over_for_writing(
    open_lab: OpenLab, image: Path
) -> None:
    with storage_daemon(image, writable=False) as backend:
        info = open_lab.stored(backend.socket_path)
        refused(open_lab, info, Code.READ_ONLY_DEVICE)


def infos_for(lab: OpenLab, path: Path) -> dict[str, Request]:
    """A request of every kind for one socket."""
    return {
        "blk": lab.stored(path),
        "scsi": lab.stored(path, major=SCSI),
        "net": NetInfo(label="eth0", socket_path=str(path)),
    }


KINDS = ["blk", "scsi", "net"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_backend_is_told(open_lab: OpenLab, image: Path, kind: str) -> None:
    with storage_daemon(image) as backend:
        infos = infos_for(open_lab, backend.socket_path)
        backend.kill()
        assert backend.socket_path.is_socket()
        refused(open_lab, infos[kind], Code.NO_BACKEND, "no process listens")


@pytest.mark.parametrize("kind", ["blk", "net"])
def test_a_silent_backend_is_told(open_lab: OpenLab, image: Path, kind: str) -> None:
    with storage_daemon(image) as backend:
        infos = infos_for(open_lab, backend.socket_path)
        backend.stop()
        refused(open_lab, infos[kind], Code.BACKEND_SILENT, "does not answer")
        backend.cont()
        assert backend.is_running


def test_a_backend_that_hangs_up_is_told(open_lab: OpenLab, image: Path) -> None:
    with vhost_user_backend("scsi", image, options=["--hang-up"]) as backend:
        for info in infos_for(open_lab, backend.socket_path).values():
            refused(open_lab, info, Code.BACKEND_SILENT, "closes the connection")


def test_a_backend_of_another_qemu_is_told(open_lab: OpenLab, image: Path, tmp_path: Path) -> None:
    with storage_daemon(image) as backend:
        infos = infos_for(open_lab, backend.socket_path)
        logs = tmp_path / "another"
        logs.mkdir()
        with sleeping_vm(logs) as vm:
            address = {"type": "unix", "data": {"path": str(backend.socket_path)}}
            socket_ = {"type": "socket", "data": {"addr": address, "server": False}}
            vm.oracle.execute("chardev-add", id="c", backend=socket_)
            device = {"driver": "vhost-user-blk-pci", "id": "d", "chardev": "c", "bus": "rp0"}
            vm.oracle.execute("device_add", {**device, "addr": "0x0", "num-queues": 1})
            refused(open_lab, infos["blk"], Code.BACKEND_BUSY)
            assert vm.oracle.execute("query-status")["status"] == "prelaunch"
        attachment = open_lab.devices.attach(infos["blk"])
        assert seen(open_lab, attachment).marker == "behind-a-socket"
        open_lab.devices.detach(attachment.id)


@pytest.mark.root
@pytest.mark.parametrize("kind", KINDS)
def test_a_virtiofsd_is_told_and_not_used_up(open_lab: OpenLab, tmp_path: Path, kind: str) -> None:
    with virtiofsd(tmp_path) as backend:
        infos = infos_for(open_lab, backend.socket_path)
        refused(open_lab, infos[kind], Code.WRONG_BACKEND, "virtiofsd", str(backend.pid))
        assert backend.is_running


@pytest.mark.parametrize(
    ("kind", "served"),
    [("blk", "scsi"), ("blk", "net"), ("scsi", "blk"), ("scsi", "net"), ("net", "blk")],
)
def test_a_backend_of_another_kind_is_told(
    open_lab: OpenLab, image: Path, kind: str, served: str
) -> None:
    with ExitStack() as stack:
        match served:
            case "blk":
                backend = stack.enter_context(storage_daemon(image))
            case "net":
                backend = stack.enter_context(vhost_user_backend("net"))
            case _:
                backend = stack.enter_context(vhost_user_backend("scsi", image))
        infos = infos_for(open_lab, backend.socket_path)
        refused(open_lab, infos[kind], Code.WRONG_BACKEND)
        assert backend.is_running


def test_a_scsi_backend_does_no_harm_as_a_network(open_lab: OpenLab, image: Path) -> None:
    """It has nothing that a network could not have: nobody can tell."""
    with vhost_user_backend("scsi", image) as backend:
        before = open_lab.picture()
        info = NetInfo(label="eth0", socket_path=str(backend.socket_path))
        attachment = open_lab.devices.attach(info)
        nic = only_nic(open_lab)
        open_lab.guest(f"ip link set {nic.name} up")
        open_lab.devices.detach(attachment.id)
        open_lab.guest_vm.console.wait_for_nics(0)
        assert open_lab.picture() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make",
    [Path.touch, Path.mkdir, leave_missing],
    ids=["a file", "a directory", "missing"],
)
def test_what_is_no_socket_is_told(
    open_lab: OpenLab, tmp_path: Path, kind: str, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "socket"
    make(path)
    infos = infos_for(open_lab, path)
    before = open_lab.picture()
    with pytest.raises(NoSuchDevice) as caught:
        open_lab.devices.attach(infos[kind])
    assert caught.value.hint
    assert open_lab.picture() == before


def test_one_bad_backend_stops_the_others(open_lab: OpenLab, image: Path, tmp_path: Path) -> None:
    other = disk_image(tmp_path / "other.img", 1, "other")
    with storage_daemon(image) as good, storage_daemon(other) as bad:
        infos = [open_lab.stored(daemon.socket_path) for daemon in (good, bad)]
        bad.kill()
        before = open_lab.picture()
        with pytest.raises(InUse):
            open_lab.devices.attach_all([*infos, open_lab.disk()])
        assert open_lab.picture() == before


# VMs


@contextmanager
def sleeping_vm(
    directory: Path, *, is_shared: bool = True, memory: str = "256M"
) -> Iterator[GuestVm]:
    """A VM that has not begun to run and has nothing to boot."""
    with start_vm(
        directory,
        machine=f"{SHARED_MACHINE},nvdimm=on" if is_shared else "q35",
        memory=memory,
        extra=SHARED_MEMORY if is_shared else (),
        devices=root_ports(2),
        guest=False,
        paused=True,
    ) as vm:
        yield vm


def test_a_vm_whose_memory_is_not_shared_is_told(image: Path, tmp_path: Path) -> None:
    with (
        sleeping_vm(tmp_path, is_shared=False) as vm,
        storage_daemon(image) as disk,
        vhost_user_backend("net") as net,
        opened(vm, tmp_path / "lab", tmp_path / "journal", restored=False) as lab,
    ):
        network = NetInfo(label="eth0", socket_path=str(net.socket_path))
        before = lab.picture()
        for info in (lab.stored(disk.socket_path), network):
            with pytest.raises(CannotPlug) as caught:
                lab.devices.attach(info)
            assert caught.value.reason == "memory-not-shared"
            assert "share=on" in (caught.value.hint or "")
            assert lab.picture() == before


def test_more_memory_than_a_backend_maps_is_told(image: Path, tmp_path: Path) -> None:
    """With eight NVDIMMs beside the VM's own memory, QEMU 7.2 would never come back."""
    images = [disk_image(tmp_path / f"{i}.img", 2, "memory") for i in range(8)]
    nvdimm = {"block-driver": "nvdimm"}
    with (
        sleeping_vm(tmp_path, memory="256M,slots=9,maxmem=1G") as vm,
        storage_daemon(image) as disk,
        vhost_user_backend("net") as net,
        vhost_user_backend("scsi", image) as scsi,
        opened(vm, tmp_path / "lab", tmp_path / "journal", restored=False) as lab,
    ):
        lab.devices.attach_all([request(i, nvdimm, at=f"/dev/{i.stem}") for i in images])
        before = lab.picture()
        network = NetInfo(label="eth0", socket_path=str(net.socket_path))
        for info in (network, lab.stored(scsi.socket_path, major=SCSI)):
            with pytest.raises(CannotPlug) as caught:
                lab.devices.attach(info)
            assert caught.value.reason == "too-many-memory-regions"
            assert lab.picture() == before
        attachment = lab.devices.attach(lab.stored(disk.socket_path))  # it maps as many as need be
        assert attachment.state is State.ATTACHED


def test_more_memory_than_a_backend_maps_is_refused_by_qemu(tmp_path: Path) -> None:
    """The VM's own memory counts twice, below and above what is the firmware's."""
    images = [disk_image(tmp_path / f"{i}.img", 2, "memory") for i in range(7)]
    infos = [request(i, {"block-driver": "nvdimm"}, at=f"/dev/{i.stem}") for i in images]
    with (
        sleeping_vm(tmp_path, memory="256M,slots=9,maxmem=1G") as vm,
        vhost_user_backend("net") as net,
        opened(vm, tmp_path / "lab", tmp_path / "journal", restored=False) as lab,
    ):
        lab.devices.attach(NetInfo(label="eth0", socket_path=str(net.socket_path)))
        lab.devices.attach_all(infos[:-1])
        before = lab.picture()
        with pytest.raises(CommandError, match="free memory slots left") as caught:
            lab.devices.attach(infos[-1])
        assert "detach its device first" in (caught.value.hint or "")
        assert lab.picture() == before


def test_a_backend_that_falls_silent_for_qemu_is_told_within_the_deadline(
    image: Path, tmp_path: Path
) -> None:
    """Each for a manager of its own: one that goes on, and one that begins anew."""
    with ThreadPoolExecutor(2) as pool:
        done = [
            pool.submit(outlive_a_silent_backend, image, tmp_path / name, is_restored=is_restored)
            for name, is_restored in (("live", False), ("restored", True))
        ]
        for future in done:
            future.result()


def outlive_a_silent_backend(image: Path, directory: Path, *, is_restored: bool) -> None:
    """It answers the three questions of the check, and the first three of QEMU."""
    directory.mkdir()
    with (
        sleeping_vm(directory) as vm,
        vhost_user_backend("scsi", image, options=["--answers", "3"]) as bad,
        vhost_user_backend("scsi", image) as good,
        opened(vm, directory / "lab", directory / "journal", restored=is_restored) as lab,
    ):
        info = lab.stored(bad.socket_path, major=SCSI)
        link = lab.sockets / "store/block/sockets/disk1"
        before = lab.picture()
        with pytest.raises(BackendTimeout) as caught:
            lab.devices.attach(info)
        assert caught.value.socket == str(link)
        assert str(link) in caught.value.message
        assert "reconcile" in (caught.value.hint or "")
        bad.kill()
        (repair,) = lab.devices.reconcile()
        assert repair.outcome is RepairOutcome.UNDONE
        assert lab.picture() == before

        link.unlink()
        link.symlink_to(good.socket_path)
        assert lab.devices.attach(info).state is State.ATTACHED


# SCSI adapters


def test_a_scsi_adapter_is_read_and_written(life: OpenLab, image: Path) -> None:
    with vhost_user_backend("scsi", image, options=["--serial", "S 1"]) as backend:
        before = life.picture()
        info = life.stored(backend.socket_path, major=SCSI)
        for _ in range(2):
            attachment = life.devices.attach(info)
            assert attachment.kind is DeviceType.VHOST_USER_SCSI
            disk = seen(life, attachment)
            assert disk.name.startswith("sd")
            assert (disk.serial, disk.read_only) == ("S 1", False)
            assert_serves(life, disk, image)
            assert life.devices.reconcile() == []
            life.devices.detach(attachment.id)
            life.guest_vm.console.wait_for_disks(0)
            assert life.picture() == before
        assert backend.is_running


def test_an_adapter_has_the_queues_that_the_backend_serves(open_lab: OpenLab, image: Path) -> None:
    """It serves one, beside those for control and events."""
    with vhost_user_backend("scsi", image) as backend:
        attachment = open_lab.devices.attach(open_lab.stored(backend.socket_path, major=SCSI))
        assert open_lab.property_of(attachment, "num_queues") == 1
        seen(open_lab, attachment)
        open_lab.devices.detach(attachment.id)
        open_lab.guest_vm.console.wait_for_disks(0)
        info = open_lab.stored(backend.socket_path, {"num-queues": "2"}, major=SCSI)
        refused(open_lab, info, Code.TOO_MANY_QUEUES)


@pytest.mark.root
def test_what_a_guest_waits_for_in_vain_is_told_and_stays(image: Path, tmp_path: Path) -> None:
    """QEMU 7.2 looks neither for a SCSI adapter's backend again nor for a share's.

    A guest that waits for one of them takes no other device in or out.
    """
    directory = tmp_path / "shared"
    directory.mkdir()
    with (
        started_open_vm(tmp_path) as vm,
        opened(vm, tmp_path, tmp_path / "journal", restored=False) as lab,
        vhost_user_backend("scsi", image) as backend,
    ):
        share = lab.devices.attach(ShareInfo(tag="work", source=str(directory)))
        adapter = lab.devices.attach(lab.stored(backend.socket_path, major=SCSI))
        seen(lab, adapter)
        lab.guest_vm.console.wait_until("mkdir -p /mnt/work; mount -t virtiofs work /mnt/work")
        kill_daemons(directory)
        backend.kill()
        lab.guest("ls /mnt/work >/dev/null 2>&1 & echo $! >/tmp/waiter")
        waits = "grep -Eq 'fuse|request_wait' /proc/$(cat /tmp/waiter)/wchan"
        lab.guest_vm.console.wait_until(waits)
        for attachment in (share, adapter, adapter):
            with pytest.raises(UnplugTimeout) as caught:
                lab.devices.detach(attachment.id, timeout_s=AT_ONCE_S)
            assert f"the backend of {attachment.host_path} is gone" in caught.value.message
            assert caught.value.hint
            backend.restart()
        assert {a.state for a in lab.devices.attachments()} == {State.DETACHING}
        repairs = lab.devices.reconcile(timeout_s=AT_ONCE_S)
        assert {repair.outcome for repair in repairs} == {RepairOutcome.STILL_DETACHING}
        assert all("backend is gone" in repair.reason for repair in repairs)
        assert vm.oracle.execute("query-status")["running"]


# networks


MAC = "52:54:00:aa:bb:cc"


def only_nic(lab: OpenLab) -> GuestNic:
    (nic,) = lab.guest_vm.console.wait_for_nics(1)
    return nic


def assert_ping(lab: OpenLab) -> GuestNic:
    """The network card, after three packets and three answers."""
    nic = only_nic(lab)
    lab.guest(f"ip link set {nic.name} up && ip addr add 192.0.2.2/24 dev {nic.name}")
    lab.guest_vm.console.wait_until(f"ping -c 1 -W 1 {PEER}")
    answer = lab.guest(f"ping -c 3 -i 0.05 -W 60 {PEER}")
    assert "3 packets transmitted, 3 packets received" in answer
    return only_nic(lab)


def test_a_network_answers_ping(life: OpenLab) -> None:
    with vhost_user_backend("net") as backend:
        before = life.picture()
        options = {"mac": MAC.upper()}
        path = str(backend.socket_path)
        info = NetInfo(label="eth0", socket_path=path, driver_options=options)
        for _ in range(2):
            attachment = life.devices.attach(info)
            assert (attachment.name, attachment.host_path) == ("net:eth0", path)
            assert attachment.kind is DeviceType.VHOST_USER_NET
            address = attachment.guest_address
            assert address
            nic = assert_ping(life)
            assert nic.has_carrier
            assert nic.mac == address.mac_address == MAC
            assert nic.pci_path == str(address.pci_path)
            assert nic.pci_path == life.pci_path_in_qemu(qemu_id(attachment.device_id))
            parts = life.parts()
            assert len(parts.netdevs) == 1
            assert life.devices.reconcile() == []
            life.devices.detach(attachment.id)
            life.guest_vm.console.wait_for_nics(0)
            assert life.picture() == before
        assert backend.is_running


def test_an_address_is_drawn_when_none_is_said(life: OpenLab) -> None:
    with vhost_user_backend("net") as backend, vhost_user_backend("net") as other:
        infos = [
            NetInfo(label=f"eth{i}", socket_path=str(daemon.socket_path))
            for i, daemon in enumerate((backend, other))
        ]
        attachments = life.devices.attach_all(infos)
        addresses = {a.guest_address.mac_address for a in attachments if a.guest_address}
        assert len(addresses) == 2
        assert all(address and address.startswith("52:54:00:") for address in addresses)
        assert {nic.mac for nic in life.guest_vm.console.wait_for_nics(2)} == addresses
        life.devices.detach_owner("open")
        life.guest_vm.console.wait_for_nics(0)


def test_a_bundle_may_ask_for_a_network(life: OpenLab) -> None:
    with vhost_user_backend("net") as backend:
        before = life.picture()
        member = json.dumps({"socket": str(backend.socket_path), "mac": MAC})
        config = json.dumps({"ociVersion": "1", "annotations": {"org.vmplug.net.eth0": member}})
        (info,) = parse_config(config.encode(), name="c1").annotated
        attachment = life.devices.attach(info)
        assert only_nic(life).mac == MAC
        life.devices.detach(attachment.id)
        assert life.picture() == before


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_networks_socket_is_only_a_name(open_lab: OpenLab, name: str) -> None:
    path = open_lab.sockets / name
    with vhost_user_backend("net", socket_path=path):
        attachment = open_lab.devices.attach(NetInfo(label="eth0", socket_path=str(path)))
        only_nic(open_lab)
        open_lab.devices.detach(attachment.id)


def test_the_carrier_goes_and_comes_with_the_backend(life: OpenLab) -> None:
    with vhost_user_backend("net") as backend:
        before = life.picture()
        info = NetInfo(label="eth0", socket_path=str(backend.socket_path))
        attachment = life.devices.attach(info)
        nic = assert_ping(life)
        backend.kill()
        life.guest_vm.console.wait_until(f"[ $(cat /sys/class/net/{nic.name}/carrier) = 0 ]")
        backend.restart()
        life.guest_vm.console.wait_until(f"[ $(cat /sys/class/net/{nic.name}/carrier) = 1 ]")
        assert_ping_again(life)
        life.devices.detach(attachment.id)
        life.guest_vm.console.wait_for_nics(0)
        assert life.picture() == before


def assert_ping_again(lab: OpenLab) -> None:
    lab.guest_vm.console.wait_until(f"ping -c 1 -W 1 {PEER}")


def test_a_network_whose_backend_is_dead_goes(life: OpenLab) -> None:
    with vhost_user_backend("net") as backend:
        before = life.picture()
        info = NetInfo(label="eth0", socket_path=str(backend.socket_path))
        attachment = life.devices.attach(info)
        assert_ping(life)
        backend.kill()
        life.devices.detach(attachment.id)
        life.guest_vm.console.wait_for_nics(0)
        assert life.picture() == before


@pytest.mark.skipif(not TESTPMD.exists(), reason="dpdk-testpmd is missing: install dpdk-dev")
@pytest.mark.root
def test_testpmd_answers_ping(open_lab: OpenLab) -> None:
    with dpdk_testpmd() as backend:
        before = open_lab.picture()
        info = NetInfo(label="eth0", socket_path=str(backend.socket_path))
        attachment = open_lab.devices.attach(info)
        assert assert_ping(open_lab).has_carrier
        open_lab.devices.detach(attachment.id)
        open_lab.guest_vm.console.wait_for_nics(0)
        assert open_lab.picture() == before
        assert backend.is_running


@pytest.mark.parametrize(
    "options",
    [{"mac": "01:00:5e:00:00:01"}, {"mac": "52:54:00:aa:bb"}, {"queues": "0"}, {"mtu": "9000"}],
    ids=str,
)
def test_options_of_a_network_that_are_wrong_are_told(
    open_lab: OpenLab, options: Mapping[str, str]
) -> None:
    with vhost_user_backend("net") as backend:
        before = open_lab.picture()
        path = str(backend.socket_path)
        info = NetInfo(label="eth0", socket_path=path, driver_options=options)
        with pytest.raises(SpecError, match=next(iter(options))):
            open_lab.devices.attach(info)
        assert open_lab.picture() == before


def test_more_pairs_of_queues_than_the_backend_serves_are_refused(open_lab: OpenLab) -> None:
    with vhost_user_backend("net") as backend:
        path = str(backend.socket_path)
        info = NetInfo(label="eth0", socket_path=path, driver_options={"queues": "2"})
        refused(open_lab, info, Code.TOO_MANY_QUEUES)
