"""Large hosts: a request reads once what it asks of all processes, disks, sockets and mounts.

Each row is the CPU time of vmplug against the time that it may take: what others use of a busy
machine does not count.
"""

import os
import resource
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.journal import device_record, vm_record
from tests.support.pci_tree import PciTree
from tests.support.tree import HostTree

import vmplug
from bench.timing import Ratio, of_pairs, rounds, scaled
from vmplug import DeviceInfo, DevNum, DevType, HostRoot
from vmplug.host.block.usage import read_usage
from vmplug.host.events import HostEvents
from vmplug.host.kind import DeviceType
from vmplug.host.pci.group import VfioGroup
from vmplug.host.resolve import resolve_all
from vmplug.journal.journal import Journal
from vmplug.manager.watching.watch import Watch

_GROUPS, _PROCESSES, _DISKS, _LOOPS, _SOCKETS, _WATCHED = 64, 1074, 1000, 300, 9303, 100
_NAMESPACES, _NAMESPACE_S = (10, 100), 0.0003


def rows() -> Iterator[Ratio]:
    """A host in a directory for PCI functions and loop devices, this one for the others."""
    with TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as name:
        yield from _vfio(Path(name, "vfio"))
        yield _images(Path(name, "loops"))
        yield _watching(Path(name, "watch"))
        if os.geteuid() == 0:
            yield from _namespaces(Path(name, "namespaces"))


def _limited(name: str, work: Callable[[], int], count: int, limit_s: float) -> Ratio:
    """`work` proves by its answer that it did all of `count`."""
    pairs = []
    for _ in rounds(5):
        before_s = time.process_time()
        assert work() == count, name
        pairs.append((time.process_time() - before_s, limit_s))
    return of_pairs(f"{name} / {limit_s * 1e3:g} ms", pairs, target=1.0)


class _Live(HostRoot):
    """Taken for the running kernel's, which lists partitions beside their disks."""

    is_live = True


def _vfio(directory: Path) -> Iterator[Ratio]:
    tree, groups = PciTree(directory), scaled(_GROUPS)
    for number in range(groups):
        bdf = f"0000:{number + 1:02x}:00.0"
        tree.pci_function(bdf, class_code=0x020000, driver="vfio-pci", group=number)
        tree.char_device(f"243:{number}", f"vfio/{number}")
    for pid in range(1000, 1000 + scaled(_PROCESSES)):
        tree.process(pid, "idle", "/dev/null", "pipe:[1]", "socket:[2]")
        tree.file(f"/proc/{pid}/mountinfo")
    infos = [
        DeviceInfo(
            container_path=f"/dev/vfio/{number}",
            dev_type=DevType.CHAR,
            devnum=DevNum(243, number),
        )
        for number in range(groups)
    ]
    setup = vmplug.Setup(host=tree.root, state_dir=directory)
    yield _limited(
        f"check of {groups} VFIO groups, {scaled(_PROCESSES)} processes",
        lambda: sum(not one.is_refused for one in vmplug.check_requests(infos, setup=setup)),
        groups,
        0.5,
    )
    for number in range(scaled(_DISKS)):
        tree.block_device(f"259:{number}", f"nvme{number}n1")
    live = _Live(directory)
    yield _limited(
        f"resolving {groups} VFIO functions, {scaled(_DISKS)} block devices",
        lambda: sum(isinstance(one, VfioGroup) for one in resolve_all(infos, live)),
        groups,
        groups * 150e-6,
    )


def _images(directory: Path) -> Ratio:
    """Loop devices on other files than the images, as those of a host with snaps."""
    tree = HostTree(directory)
    for number in range(scaled(_LOOPS)):
        tree.hole(f"/snaps/{number}.img", 1 << 20)
        loop = {"backing_file": f"/snaps/{number}.img\n"}
        tree.block_device(f"7:{number}", f"loop{number}", loop=loop)
    count = scaled(_DISKS)
    for number in range(count):
        tree.hole(f"/srv/{number}.img", 1 << 20)
    usage, images = read_usage(tree.root), [f"/srv/{number}.img" for number in range(count)]
    assert len(usage.loops) == scaled(_LOOPS)

    def look() -> int:
        index = read_usage(tree.root).loop_index
        return sum(index.find_on(image) == [] for image in images)

    return _limited(f"{count} images against {scaled(_LOOPS)} loops", look, count, count * 200e-6)


def _watching(directory: Path) -> Ratio:
    """One look at vhost-user disks, each with its backend, among many other sockets."""
    directory.mkdir(mode=0o700)
    watched = scaled(_WATCHED)
    paths = [str(directory / f"{number}.sock") for number in range(watched)]
    devices = [device_record(f"socket:{path}", path, DeviceType.VHOST_USER_BLK) for path in paths]
    with ExitStack() as opened:
        _allow_descriptors(scaled(_SOCKETS) + 3 * watched + 100)
        for number in range(scaled(_SOCKETS)):
            one = opened.enter_context(socket.socket(socket.AF_UNIX))
            one.bind(paths[number] if number < watched else str(directory / f"other{number}"))
            one.listen()
            if number < watched:  # as QEMU is to its backend
                client = opened.enter_context(socket.socket(socket.AF_UNIX))
                client.connect(paths[number])
                opened.enter_context(one.accept()[0])
        with Journal.open(directory / "state") as journal:
            journal.add_vm(vm_record())
            journal.add_devices(devices, [])
        journal = Journal.open(directory / "state")
        watch = opened.enter_context(Watch(journal, HostEvents(), host=HostRoot("/")))
        watch._look([])  # noqa: SLF001  the first also searches for the processes behind them

        def look() -> int:
            watch._look([])  # noqa: SLF001  without the wait for events
            return watch.looked.devices - watch.looked.unknown

        name = f"a check of watch of {watched} vhost-user disks, {scaled(_SOCKETS)} sockets"
        return _limited(name, look, watched, 0.03)


def _allow_descriptors(count: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count if most < 0 else min(count, most), most))


def _namespaces(directory: Path) -> Iterator[Ratio]:
    """A mount namespace of its own for each process, of which each table is read."""
    directory.mkdir(mode=0o700)
    image = directory / "a.img"
    image.touch()
    os.truncate(image, 1 << 20)
    losetup = ["losetup", "--find", "--show", str(image)]
    node = subprocess.run(losetup, capture_output=True, text=True, check=True).stdout.strip()
    try:
        status = os.stat(node)
        number = DevNum(os.major(status.st_rdev), os.minor(status.st_rdev))
        info = DeviceInfo(container_path="/dev/a", dev_type=DevType.BLOCK, devnum=number)
        setup = vmplug.Setup(state_dir=directory)
        for count in map(scaled, _NAMESPACES):
            pairs = []
            for _ in rounds(3):
                alone_s = _check(info, setup)
                with _in_namespaces(count):
                    pairs.append((_check(info, setup) - alone_s, count * _NAMESPACE_S))
            name = f"check of a disk, more beside {count} mount namespaces / 0.3 ms each"
            yield of_pairs(name, pairs, target=1.0)
    finally:
        subprocess.run(["losetup", "--detach", node], check=True)


def _check(info: DeviceInfo, setup: vmplug.Setup) -> float:
    before_s = time.process_time()
    (checked,) = vmplug.check_requests([info], setup=setup)
    assert checked.device
    assert not checked.is_refused
    return time.process_time() - before_s


@contextmanager
def _in_namespaces(count: int) -> Iterator[None]:
    """That many processes which do nothing, each in a mount namespace of its own."""
    script = (
        "i=0; while [ $i -lt $0 ]; do unshare --mount sh -c 'echo; exec sleep 600' & "
        "i=$((i+1)); done; read line; kill 0"
    )
    command = ["setsid", "sh", "-c", script, str(count)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as shell:
        assert shell.stdin
        assert shell.stdout
        for _ in range(count):
            shell.stdout.readline()
        yield
        shell.stdin.close()
        shell.wait()
