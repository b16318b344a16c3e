"""Attaching disks to a paused QEMU, against the plainest Python with the same safety.

It takes the QMP socket for the request, as others use it too. It looks whether a process has a
file open, once for all files, and journals each disk before its first step and after the last one.
QEMU gets each file by descriptor, and as nothing else is safe in a paused QEMU 7.2, by its number
there. What QEMU opened is verified before the guest gets it, and nothing stays open that is not
needed. Whatever else vmplug does is left out: a lock of QEMU's on the image, loop devices, mounts,
swap and exports of the kernel, the policy, the claims of other VMs, a free port, a serial number,
names by which a crash is undone, and options that `-global` could change.

The other yardstick only plugs: it has the socket already, and neither looks nor journals. It gives
files in sets, which that QEMU keeps open.
"""

import json
import os
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from tests.support.vm import Device, GuestVm, root_ports, scsi_controller, start_vm

from bench.timing import Ratio, of_pairs, rounds, scaled, timed
from vmplug import DeviceInfo, DeviceManager, DevNum, DevType, HostRoot, Qemu

_COUNT = 9
_NULL = DeviceInfo(container_path="/dev/null", dev_type=DevType.CHAR, devnum=DevNum(1, 3))
"""Only counted: QEMU hears nothing of it."""
_PORTS = 32


def rows() -> Iterator[Ratio]:
    """N = 1 and N = 32; one disk beside many ports and disks."""
    with TemporaryDirectory(prefix="vmplug-bench-") as name:
        directory = Path(name)
        images = _images(directory, _PORTS)
        for count in (1, 10, 32):
            yield from _least_rows(directory, images[:count])
        for title, beside in (("root ports", _beside_ports), ("SCSI disks", _beside_disks)):
            many, few = (120, 8) if beside is _beside_ports else (scaled(200), 10)
            pairs = [(beside(directory, many), beside(directory, few)) for _ in rounds(_COUNT)]
            yield of_pairs(f"attaching 1 disk, {many} / {few} {title}", pairs, target=1.3)


def _least_rows(directory: Path, images: Sequence[Path]) -> Iterator[Ratio]:
    safe, plugging = list[tuple[float, float]](), list[tuple[float, float]]()
    for _ in rounds(_COUNT):
        ours_s = _ours(directory, images, root_ports(_PORTS))
        safe.append((ours_s, _least(directory, images)))
        plugging.append((ours_s, _only_plugs(directory, images)))
    disks = "1 disk" if len(images) == 1 else f"{len(images)} disks"
    yield of_pairs(f"attaching {disks} / the least that is as safe", safe, target=1.4)
    yield of_pairs(f"attaching {disks} / the least that plugs", plugging, target=1.4)


def _images(directory: Path, count: int) -> list[Path]:
    images = [directory / f"disk{index}.img" for index in range(count)]
    for image in images:
        image.touch()
        os.truncate(image, 1 << 20)
    return images


def _beside_ports(directory: Path, count: int) -> float:
    """Seconds of the first attach of a manager, to a VM with so many ports."""
    return _ours(directory, _images(directory, 1), root_ports(count), is_first=True)


def _beside_disks(directory: Path, count: int) -> float:
    """Seconds of the first attach of a manager, to a VM with so many disks on one controller."""
    with (
        _paused_vm(directory, [*scsi_controller()]) as vm,
        TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as state_dir,
    ):
        *others, last = _infos(_images(directory, count), "virtio-scsi")
        with _manager(vm, state_dir) as manager:
            manager.attach_all(others)
        with _manager(vm, state_dir) as manager:
            seconds, _ = timed(lambda: manager.attach(last))
        _check(vm, _images(directory, count))
        return seconds


def _ours(
    directory: Path, images: Sequence[Path], devices: list[Device], *, is_first: bool = False
) -> float:
    """Seconds of an attach; one QEMU for each, as a paused VM may let nothing go again.

    The manager is up, as in a service: connected, and it has asked the VM for its places unless
    this `is_first`. The time holds finding the disks, the safety checks, two journal transactions
    and the QMP commands.
    """
    infos = _infos(images, "virtio-blk")
    with (
        _paused_vm(directory, devices) as vm,
        TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as state_dir,
        _manager(vm, state_dir) as manager,
    ):
        manager.detach(manager.attach(_NULL).id)
        if not is_first:
            manager.plan(infos)
        seconds, _ = timed(lambda: manager.attach_all(infos))
        _check(vm, images)
        return seconds


def _infos(images: Sequence[Path], driver: str) -> list[DeviceInfo]:
    return [
        DeviceInfo(
            container_path=f"/dev/{image.stem}",
            dev_type=DevType.BLOCK,
            host_path=str(image),
            driver_options={"block-driver": driver},
        )
        for image in images
    ]


def _manager(vm: GuestVm, state_dir: str) -> DeviceManager:
    return DeviceManager.open(
        vm="bench",
        host=HostRoot("/"),
        hypervisor=Qemu.connect(str(vm.qmp_path)),
        state_dir=state_dir,
    )


def _least(directory: Path, images: Sequence[Path]) -> float:
    """Seconds of the least that is as safe: see the module."""
    with (
        _paused_vm(directory, root_ports(_PORTS)) as vm,
        TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as state_dir,
        closing(_open_journal(state_dir)) as journal,
    ):

        def attach() -> None:
            assert not _find_openers(images)
            _commit(journal, "INSERT INTO device VALUES (?, 'plugging')", images)
            with closing(_Client.connect(vm.qmp_path)) as client:
                for number, image in enumerate(images):
                    client.plug_checked(number, image, vm.pid)
            _commit(journal, "UPDATE device SET state = 'attached' WHERE path = ?", images)

        seconds, _ = timed(attach)
        _check(vm, images)
        attached = journal.execute("SELECT path FROM device WHERE state = 'attached'")
        assert {path for (path,) in attached} == set(map(str, images))
        return seconds


def _find_openers(images: Iterable[Path]) -> list[str]:
    """The descriptors of all other processes that are open on one of the files."""
    wanted = {(status.st_dev, status.st_ino) for status in map(os.stat, images)}
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        if pid == str(os.getpid()):
            continue
        try:
            links = [f"/proc/{pid}/fd/{number}" for number in os.listdir(f"/proc/{pid}/fd")]
            for link in links:
                status = os.stat(link)
                if (status.st_dev, status.st_ino) in wanted:
                    found.append(link)
        except OSError:  # it has ended, or nobody may look into it
            continue
    return found


def _open_journal(state_dir: str) -> sqlite3.Connection:
    journal = sqlite3.connect(f"{state_dir}/least.db", isolation_level=None)
    journal.execute("PRAGMA journal_mode = WAL")
    journal.execute("PRAGMA synchronous = FULL")
    journal.execute("CREATE TABLE device (path TEXT PRIMARY KEY, state TEXT NOT NULL) STRICT")
    return journal


def _commit(journal: sqlite3.Connection, statement: str, images: Iterable[Path]) -> None:
    journal.execute("BEGIN IMMEDIATE")
    journal.executemany(statement, [(str(image),) for image in images])
    journal.execute("COMMIT")


def _only_plugs(directory: Path, images: Sequence[Path]) -> float:
    """Seconds of the least that plugs: see the module."""
    with (
        _paused_vm(directory, root_ports(_PORTS)) as vm,
        closing(_Client.connect(vm.qmp_path)) as client,
    ):

        def plug() -> None:
            for number, image in enumerate(images):
                client.plug(number, image, vm.pid)

        seconds, _ = timed(plug)
        _check(vm, images)
        return seconds


def _paused_vm(directory: Path, devices: list[Device]) -> AbstractContextManager[GuestVm]:
    return start_vm(directory, devices=devices, guest=False, paused=True)


def _check(vm: GuestVm, images: Sequence[Path]) -> None:
    """AssertionError unless QEMU has a disk of every image."""
    descriptors = f"/proc/{vm.pid}/fd"
    opened = [os.path.realpath(f"{descriptors}/{fd}") for fd in os.listdir(descriptors)]
    assert {str(image) for image in images} <= {*opened}
    drives = [drive for drive in vm.oracle.execute("query-block") if drive.get("inserted")]
    assert len(drives) == len(images)


class _Client:
    """A QMP client that does nothing but send, and read up to the answer."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lines = connection.makefile("rb")
        self._lines.readline()
        self.execute("qmp_capabilities")

    @classmethod
    def connect(cls, path: Path) -> Self:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        return cls(connection)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        descriptors: Sequence[int] = (),
    ) -> Any:
        message = {"execute": command} | ({"arguments": arguments} if arguments else {})
        data = json.dumps(message, separators=(",", ":")).encode()
        socket.send_fds(self._socket, [data], descriptors)
        while "event" in (message := json.loads(self._lines.readline())):
            pass
        return message["return"]

    def plug_checked(self, number: int, image: Path, pid: int) -> None:
        """A disk on a root port; QEMU opens the file that this process has open again."""
        wanted, files = os.stat(image), f"/proc/{pid}/fd"
        descriptor = os.open(image, os.O_RDWR)
        try:
            assert os.path.samestat(os.fstat(descriptor), wanted)
            before = set(os.listdir(files))
            self.execute("getfd", {"fdname": "f"}, [descriptor])
            (given,) = set(os.listdir(files)) - before
            assert os.path.samestat(os.stat(f"{files}/{given}"), wanted)
            self._add_node(number, f"/proc/self/fd/{given}")
            assert os.path.samestat(os.stat(f"{files}/{given}"), wanted)
            self.execute("closefd", {"fdname": "f"})
        finally:
            os.close(descriptor)
        self._add_device(number)

    def plug(self, number: int, image: Path, pid: int) -> None:
        """A disk on a root port, of the file that this process has open."""
        descriptor = os.open(image, os.O_RDWR)
        try:
            given = self.execute("add-fd", descriptors=[descriptor])["fdset-id"]
            self._add_node(number, f"/dev/fdset/{given}")
            wanted = os.fstat(descriptor)
            opened = (os.stat(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
            assert any(os.path.samestat(one, wanted) for one in opened)
        finally:
            os.close(descriptor)
        self._add_device(number)
        self.execute("remove-fd", {"fdset-id": given})

    def _add_node(self, number: int, name: str) -> None:
        file = {"driver": "file", "filename": name, "node-name": f"n{number}"}
        self.execute("blockdev-add", file)

    def _add_device(self, number: int) -> None:
        device = {"driver": "virtio-blk-pci", "drive": f"n{number}", "bus": f"rp{number}"}
        self.execute("device_add", device)
