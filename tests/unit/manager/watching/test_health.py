"""Is a host device still what it was? On trees, and on this host for what only a kernel shows."""

import os
import socket
from collections.abc import Collection
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.disks import disk_image, qcow2_image
from tests.support.journal import device_record, hold_on, vm_record
from tests.support.pci_tree import PciTree
from tests.support.tree import GIB, MIB
from vmplug.devnum import DevNum
from vmplug.host.check.thing import (
    identify_block,
    identify_function,
    identify_member,
)
from vmplug.host.kind import DeviceType, IdentityKind
from vmplug.host.process import read_start_time
from vmplug.host.program import Looks
from vmplug.host.root import HostRoot
from vmplug.host.use.file_handle import identify_file
from vmplug.journal.records import DeviceRecord
from vmplug.journal.state import State
from vmplug.manager.watching.health import DeviceHealth, HostSnapshot, HostState, find_silent
from vmplug.manager.watching.notice import EventKind, compare, device_notices

BDFS = ("0000:3b:00.0", "0000:3b:00.1")
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path / "host")


def plugged(record: DeviceRecord, root: HostRoot) -> DeviceRecord:
    """The record of what has its name now."""
    thing: str | None = None
    match record.identity.kind:
        case IdentityKind.BLOCK if record.kind is DeviceType.BLOCK:
            number = DevNum.parse(record.identity.key)
            thing = identify_block(number, root.real_path(f"/sys/dev/block/{number}"), root)
        case IdentityKind.FILE | IdentityKind.SHARE:
            thing = identify_file(record.host_path, root)
        case IdentityKind.VFIO:
            key = record.identity.key
            bus = "mdev" if record is MDEV else "pci"
            thing = identify_function(f"/sys/bus/{bus}/devices/{key}", root)
        case _:
            pass
    return replace(record, thing=thing)


def look(tree: PciTree, record: DeviceRecord) -> DeviceHealth | None:
    known = record if record.thing else plugged(record, tree.root)
    return HostSnapshot(tree.root, [vm_record()]).of(known)


def state(tree: PciTree, record: DeviceRecord) -> HostState | None:
    found = look(tree, record)
    if found:
        assert (found.detail is None) == (found.state is HostState.PRESENT)
    return found.state if found else None


DISK = device_record("block:8:16", "/dev/sdb")
LOOP = device_record("block:7:3", "/dev/loop3")
GROUP = device_record(f"vfio:{BDFS[0]}", "/dev/vfio/26", DeviceType.VFIO, functions=BDFS)
MDEV = device_record(f"vfio:{UUID}", "/dev/vfio/27", DeviceType.VFIO, functions=(UUID,))
BACKEND = device_record("socket:/run/vu.sock", "/run/vu.sock", DeviceType.VHOST_USER_BLK)
IMAGE = device_record("file:/srv/a.img", "/srv/a.img")
SHARE = device_record("share:work:/srv/work", "/srv/work", DeviceType.VIRTIO_9P)
CHAR = device_record("char:10:183", "/dev/hwrng", DeviceType.GENERIC)


def test_a_disk_that_is_there_has_its_size(tree: PciTree) -> None:
    tree.block_device("8:16", "sdb", size_bytes=3 * GIB)
    assert look(tree, DISK) == DeviceHealth(HostState.PRESENT, size_bytes=3 * GIB)


@pytest.mark.parametrize("record", [DISK, IMAGE, GROUP, SHARE], ids=lambda r: r.host_path)
def test_what_the_journal_does_not_identify_is_reported_and_what_is_gone_is_gone(
    tree: PciTree, record: DeviceRecord
) -> None:
    tree.file("/sys/dev/block/uevent")  # a host with sysfs
    snapshot = HostSnapshot(tree.root, [vm_record()])
    found = snapshot.of(record)
    assert found
    assert found.state in {HostState.GONE, HostState.DELETED}
    tree.block_device("8:16", "sdb").file("/srv/a.img").file("/srv/work/file")
    for bdf in BDFS:
        tree.pci_function(bdf, driver="vfio-pci")
    found = snapshot.of(record)
    assert found
    assert found.state is HostState.UNIDENTIFIED
    assert f"vmplug does not know whether {record.host_path} is still" in (found.detail or "")
    assert state(tree, record) is HostState.PRESENT
    event = compare(None, found, taken_away=False)
    assert event is EventKind.UNIDENTIFIED
    (notice,) = device_notices(event, record, [hold_on(record)], before=None, now=found)
    assert "vmplug detach" in notice.hint


def test_a_disk_that_was_pulled_is_gone(tree: PciTree) -> None:
    tree.block_device("8:32", "sdc")
    found = look(tree, DISK)
    assert found == DeviceHealth(HostState.GONE, "/dev/sdb (8:16) no longer exists")


def test_a_host_without_sysfs_has_no_health(tree: PciTree) -> None:
    tree.file("/etc/hostname", "host")
    assert look(tree, DISK) is None


def test_a_loop_device_without_a_file_is_gone(tree: PciTree) -> None:
    tree.block_device("7:3", "loop3", size_bytes=0)
    assert look(tree, LOOP) == DeviceHealth(
        HostState.GONE, "/dev/loop3 no longer has a file behind it"
    )


def test_a_loop_device_whose_file_was_deleted(tree: PciTree) -> None:
    tree.block_device("7:3", "loop3", loop={"backing_file": "/srv/a.img (deleted)\n"})
    assert state(tree, LOOP) is HostState.DELETED
    tree.file("/srv/a.img (deleted)")
    assert state(tree, LOOP) is HostState.PRESENT


def test_a_file_is_there_deleted_or_no_file_any_more(tree: PciTree) -> None:
    image = device_record("file:/srv/a.img", "/srv/a.img")
    assert state(tree, image) is HostState.DELETED
    tree.file("/srv/a.img", b"x" * 1024)
    assert look(tree, image) == DeviceHealth(HostState.PRESENT, size_bytes=1024)
    (tree.path / "srv/a.img").unlink()
    (tree.path / "srv/a.img").mkdir()
    assert state(tree, image) is HostState.REPLACED


def test_a_file_in_the_place_of_the_one_that_the_vm_has_open_is_told(tmp_path: Path) -> None:
    """On this host: this process stands for the VM's."""
    host, path = HostRoot(), disk_image(tmp_path / "a.img", 1, "first")
    vm = vm_record(pid=os.getpid(), started_at=read_start_time(os.getpid(), host))
    image = device_record(f"file:{path}", str(path))
    with path.open("rb"):
        assert HostSnapshot(host, [vm]).of(plugged(image, host)) == DeviceHealth(
            HostState.PRESENT, size_bytes=MIB
        )
        disk_image(tmp_path / "b.img", 1, "second").rename(path)
        found = HostSnapshot(host, [vm]).of(image)
        assert found == DeviceHealth(HostState.REPLACED, f"{path} is now another file")
        ended = replace(vm, started_at=1)
        found = HostSnapshot(host, [ended]).of(image)
        assert found
        assert found.state is HostState.UNIDENTIFIED


def test_another_file_is_known_by_what_was_plugged_and_not_by_the_vms_files(
    tmp_path: Path,
) -> None:
    """The VM's process is unknown, and the former file has another name."""
    host, path = HostRoot(), disk_image(tmp_path / "a.img", 1, "first")
    image = replace(device_record(f"file:{path}", str(path)), thing=identify_file(str(path), host))
    assert HostSnapshot(host, []).of(image) == DeviceHealth(HostState.PRESENT, size_bytes=MIB)
    kept = path.rename(tmp_path / "kept.img")
    disk_image(path, 1, "second")
    found = HostSnapshot(host, []).of(image)
    assert found == DeviceHealth(HostState.REPLACED, f"{path} is now another file")
    kept.rename(path)
    assert HostSnapshot(host, []).of(image) == DeviceHealth(HostState.PRESENT, size_bytes=MIB)


def test_another_disk_of_the_same_number_is_known_by_its_sequence(tree: PciTree) -> None:
    tree.block_device("8:16", "sdb", size_bytes=GIB)
    sequence = "/sys/devices/virtual/block/sdb/diskseq"
    tree.file(sequence, "7\n")
    disk = replace(DISK, thing="block 8:16 7")
    assert look(tree, disk) == DeviceHealth(HostState.PRESENT, size_bytes=GIB)
    tree.file(sequence, "8\n")
    found = look(tree, disk)
    assert found == DeviceHealth(HostState.REPLACED, "/dev/sdb (8:16) is now another device")


def test_a_qcow2_image_has_the_size_that_a_guest_sees(tmp_path: Path) -> None:
    path = qcow2_image(tmp_path / "a.qcow2", 8, "a")
    image = device_record(f"file:{path}", str(path), options={"format": "qcow2"})
    image = plugged(image, HostRoot())
    found = HostSnapshot(HostRoot(), []).of(image)
    assert found == DeviceHealth(HostState.PRESENT, size_bytes=8 * MIB)
    raw = replace(image, options={})
    assert HostSnapshot(HostRoot(), []).of(raw) == DeviceHealth(
        HostState.PRESENT, size_bytes=path.stat().st_size
    )


def test_a_group_is_what_it_was_while_vfio_has_all_of_it(tree: PciTree) -> None:
    tree.pci_function(BDFS[0], driver="vfio-pci").pci_function(BDFS[1], driver="mlx5_vfio_pci")
    assert look(tree, GROUP) == DeviceHealth(HostState.PRESENT)


@pytest.mark.parametrize(("driver", "says"), [("nvme", "the driver nvme"), (None, "no driver")])
def test_a_function_that_another_driver_has_is_told_for_its_group(
    tree: PciTree, driver: str | None, says: str
) -> None:
    tree.pci_function(BDFS[0], driver="vfio-pci").pci_function(BDFS[1], driver=driver)
    found = look(tree, GROUP)
    assert found
    assert found.state is HostState.OTHER_DRIVER
    assert found.detail == f"{BDFS[1]} is bound to {says}, not to VFIO's"


def test_a_function_that_was_swapped_is_another(tree: PciTree) -> None:
    tree.pci_function(BDFS[0], driver="vfio-pci").pci_function(BDFS[1], driver="vfio-pci")
    things = " ".join(identify_member(f"/sys/bus/pci/devices/{bdf}", tree.root) for bdf in BDFS)
    known = replace(GROUP, thing=f"vfio {things}")
    assert look(tree, known) == DeviceHealth(HostState.PRESENT)
    tree.swap_function(BDFS[1])
    found = look(tree, known)
    assert found
    assert (found.state, found.detail) == (
        HostState.REPLACED,
        "/dev/vfio/26 is now another device than the VM has",
    )


def test_a_function_that_was_pulled_is_gone(tree: PciTree) -> None:
    tree.pci_function(BDFS[0], driver="vfio-pci")
    assert look(tree, GROUP) == DeviceHealth(HostState.GONE, f"{BDFS[1]} no longer exists")


def test_a_mediated_device_is_there_or_gone(tree: PciTree) -> None:
    assert state(tree, MDEV) is HostState.GONE
    tree.file(f"/sys/bus/mdev/devices/{UUID}/uevent")
    assert state(tree, MDEV) is HostState.PRESENT


def test_a_backend_that_serves_somebody_is_there_also_when_it_listens_no_more(
    tree: PciTree,
) -> None:
    tree.unix_socket("/run/vu.sock", 77, listens=False)
    assert state(tree, BACKEND) is HostState.PRESENT


def test_a_backend_that_nobody_serves_is_gone(tree: PciTree) -> None:
    tree.unix_socket("/run/other.sock", 77)
    assert state(tree, BACKEND) is HostState.GONE


def test_a_backend_that_serves_nobody_is_disconnected_while_the_vm_runs(tree: PciTree) -> None:
    tree.unix_socket("/run/vu.sock", 77)
    assert state(tree, BACKEND) is HostState.DISCONNECTED
    ended = vm_record(pid=4242, started_at=1)
    assert HostSnapshot(tree.root, [ended]).of(BACKEND) == DeviceHealth(HostState.PRESENT)


def test_an_inherited_connection_has_no_health(tree: PciTree) -> None:
    tree.unix_socket("/run/other.sock", 77)
    given = device_record("socket:[77]", "socket:[77]", DeviceType.VHOST_USER_FS)
    assert look(tree, given) is None


def test_a_virtiofsd_of_vmplugs_own_is_told_by_its_mark() -> None:
    shared = device_record("share:work:/srv", "/srv", DeviceType.VHOST_USER_FS)
    daemons: dict[str, int] = {}
    assert HostSnapshot(HostRoot(), [], daemons).of(shared) == DeviceHealth(
        HostState.GONE, "the virtiofsd that shares /srv has ended"
    )
    running = HostSnapshot(HostRoot(), [], {shared.id: os.getpid()})
    assert running.of(plugged(shared, HostRoot())) == DeviceHealth(HostState.PRESENT)


def test_a_character_device_is_there_or_gone(tree: PciTree) -> None:
    tree.file("/sys/dev/char/1:3/uevent")
    assert state(tree, CHAR) is HostState.GONE
    tree.char_device("10:183", "hwrng")
    assert state(tree, CHAR) is HostState.PRESENT


@pytest.mark.parametrize(
    ("identity", "kind", "without"),
    [
        ("share:work:/srv/work", DeviceType.VIRTIO_9P, HostState.DELETED),
        ("rng:/srv/work", DeviceType.VIRTIO_RNG, HostState.GONE),
    ],
)
def test_a_directory_or_node_is_there_or_gone(
    tree: PciTree, identity: str, kind: DeviceType, without: HostState
) -> None:
    record = device_record(identity, "/srv/work", kind)
    assert state(tree, record) is without
    tree.file("/srv/work/file")
    assert state(tree, record) is HostState.PRESENT


@pytest.mark.parametrize("kind", [DeviceType.VIRTIO_9P, DeviceType.VHOST_USER_FS])
def test_a_share_is_of_its_directory_whatever_has_the_name(
    tmp_path: Path, kind: DeviceType
) -> None:
    shared, other = tmp_path / "work", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    record = plugged(device_record(f"share:work:{shared}", str(shared), kind), HostRoot())

    def look_again() -> HostState | None:
        found = HostSnapshot(HostRoot(), [], {record.id: os.getpid()}).of(record)
        return found.state if found else None

    assert look_again() is HostState.PRESENT
    (shared / "file").touch()
    assert look_again() is HostState.PRESENT
    shared.rename(tmp_path / "moved")
    assert look_again() is HostState.DELETED
    other.rename(shared)
    assert look_again() is HostState.REPLACED
    shared.rename(other)
    (tmp_path / "moved").rename(shared)
    assert look_again() is HostState.PRESENT


def test_the_storage_of_a_share_is_asked_first(tmp_path: Path) -> None:
    record = device_record(f"share:a:{tmp_path}", str(tmp_path), DeviceType.VHOST_USER_FS)
    looks = Told()
    assert find_silent([record], looks, HostRoot()) == set()
    assert looks.asked == [str(tmp_path)]


class Told(Looks):
    """Notes what is asked."""

    def find_silent(self, paths: Collection[str]) -> set[str]:
        self.asked = list(paths)
        return set()


@pytest.mark.parametrize("on_its_way", [State.PLUGGING, State.DETACHING])
def test_a_device_in_transition_has_no_health(tree: PciTree, on_its_way: State) -> None:
    tree.block_device("8:32", "sdc")
    assert look(tree, replace(DISK, state=on_its_way)) is None
    assert state(tree, replace(DISK, state=State.RETAINED)) is HostState.GONE


def test_a_malformed_size_has_no_health(tree: PciTree) -> None:
    tree.file("/sys/dev/block/8:16/size", "many\n")
    assert look(tree, DISK) is None


def test_a_real_listener_is_seen_without_a_connection(tmp_path: Path) -> None:
    path = os.path.realpath(f"/tmp/vmplug-look-{os.getpid()}")
    record = device_record(f"socket:{path}", path, DeviceType.VHOST_USER_NET)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        try:
            listener.bind(path)
            listener.listen()
            before = HostSnapshot(HostRoot(), [vm_record()])
            assert before.of(record) == DeviceHealth(
                HostState.DISCONNECTED, f"the backend at {path} has no client"
            )
            client.connect(path)
            with listener.accept()[0]:
                now = HostSnapshot(HostRoot(), [vm_record()])
                assert now.of(record) == DeviceHealth(HostState.PRESENT)
        finally:
            os.unlink(path)
