"""A tree in which somebody else has put what they liked in place of the kernel's files."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

from msgspec.structs import replace

from tests.fuzz.draw import Draw
from tests.fuzz.guard import changes_only, temporary_files_in
from tests.support.memory import directory_of_this_process
from tests.support.pci_tree import PciTree
from vmplug.address import Bdf
from vmplug.devnum import DevNum
from vmplug.errors import DeviceError
from vmplug.host.block.pmem import read_pfn_info
from vmplug.host.block.usage import read_usage
from vmplug.host.block.volumes import find_volumes
from vmplug.host.check.device import check_device as check_safety
from vmplug.host.finding import Access
from vmplug.host.host_path import find_sysfs_node
from vmplug.host.inventory import read_inventory, with_reset_methods
from vmplug.host.kind import FoundBy
from vmplug.host.pci.mdev import read_mdev_types
from vmplug.host.pci.nodes import read_node_paths, read_nodes
from vmplug.host.pci.sriov import read_sriov
from vmplug.host.pci.vfio import find_vfio_device, find_vfio_group
from vmplug.host.process import read_memlock_limit, read_start_time
from vmplug.host.record.read import read_record
from vmplug.host.record.write import write_record
from vmplug.host.resolve import resolve, resolve_all
from vmplug.host.root import HostRoot
from vmplug.host.use.openers import read_open_files
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.host.vhost_user.sockets import UnixSockets
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.manager.host_listing import show_thing
from vmplug.manager.setup import Setup
from vmplug.oci.info import DeviceInfo, DevType, Mount
from vmplug.oci.requests import NetInfo, Request, RngInfo, ShareInfo

NVME, NIC = "0000:3b:00.0", "0000:3c:00.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
_HUGE = b"0" * 70_000


def check(data: bytes) -> None:
    """Every reader answers, or says in its own words what it could not read; none writes."""
    draw, tree = Draw(data), _tree()
    part = draw.number(7)
    is_recorded = part == 0  # which takes ten times as long
    with _spoiled(tree, draw):
        with changes_only():
            first, second = (
                [_words(read) for read in [*_readers(tree.root)][part % 4 :: 4]] for _ in range(2)
            )
        assert first == second
        if not is_recorded:
            return
        with temporary_files_in(str(tree.path.parent)) as directory, changes_only(directory):
            _record_and_read(f"{directory}/record.tar", tree.root)


def _record_and_read(path: str, root: HostRoot) -> None:
    with suppress(DeviceError):
        write_record(path, root, replace=True)
        read_inventory(read_record(path))


def _words(read: Callable[[], object]) -> str:
    """The answer, or the error, as text: two readings of one tree are compared."""
    try:
        return repr(read())
    except DeviceError as error:
        return repr(error)


def _readers(root: HostRoot) -> Iterator[Callable[[], object]]:
    store = VhostUserStore("/run/vhost-user", root=root)
    for request in _requests():
        yield partial(_resolve_and_check, request, root)
        yield partial(_sysfs_node, request, root)
    yield lambda: resolve_all(list(_requests()), root, store)
    yield lambda: [with_reset_methods(entry, root) for entry in read_inventory(root).pci]
    yield lambda: read_inventory(root, vhost_user_store=store)
    yield lambda: find_vfio_device(NVME, root)
    yield lambda: find_vfio_device(UUID, root)
    yield lambda: find_vfio_group(
        "/dev/vfio/26", root, devnum=DevNum(243, 26), found_by=FoundBy.SYSFS
    )
    yield lambda: read_sriov(Bdf.parse(NIC), root)
    yield lambda: read_mdev_types(root)
    yield lambda: UnixSockets(root).find_listener("/run/vhost-user/block/sockets/disk1")
    opened = partial(read_open_files, root)
    yield lambda: replace(opened(), read_at_s=0)
    yield lambda: read_nodes(NVME, read_node_paths(root), root)
    usage = read_usage(root)
    yield lambda: (usage.mounts, usage.swaps, usage.loops)
    for name in ("loop0", NIC):
        yield partial(show_thing, name, with_vms=False, setup=Setup(host=root))
    yield lambda: read_start_time(1, root)
    yield lambda: read_memlock_limit(1, root)
    yield lambda: read_pfn_info("/images/pmem.img", root)
    yield lambda: find_volumes(
        [
            Mount(destination="/data", source=source, type="bind", read_only=False)
            for source in ("/dev/sda", "/mnt/pmem")
        ],
        root,
    )


def _requests() -> Iterator[Request]:
    for dev_type, number in (("b", "8:0"), ("b", "8:1"), ("b", "7:0"), ("c", "10:200")):
        yield DeviceInfo(
            container_path="/dev/sda", dev_type=DevType(dev_type), devnum=DevNum.parse(number)
        )
    for number in ("241:1", "243:26"):
        yield DeviceInfo(
            container_path="/dev/x",
            dev_type=DevType.BLOCK if number == "241:1" else DevType.CHAR,
            devnum=DevNum.parse(number),
        )
    yield DeviceInfo(
        container_path="/dev/vda", dev_type=DevType.BLOCK, host_path="/images/pmem.img"
    )
    yield DeviceInfo(container_path="/dev/fifo", dev_type=DevType.FIFO)
    yield ShareInfo(tag="t", source="/mnt/pmem")
    yield NetInfo(label="n", socket_path="/run/vhost-user/block/sockets/disk1")
    yield RngInfo(source="/dev/hwrng")


def _sysfs_node(request: Request, root: HostRoot) -> str | None:
    """DEVNAME never leaves /dev, whatever the uevent says."""
    node = find_sysfs_node(request, root) if isinstance(request, DeviceInfo) else None
    if node is not None:
        assert node.startswith("/dev/")
        assert os.path.normpath(node).startswith("/dev/")
        assert node.isprintable()
    return node


def _resolve_and_check(request: Request, root: HostRoot) -> object:
    store = VhostUserStore("/run/vhost-user", root=root)
    device = resolve(request, root, store)
    assert device.host_path.startswith("/") or isinstance(device, VhostUserSocket)
    usage = read_usage(root)
    return device, check_safety(device, Access(read_only=False), usage=usage, root=root)


@cache
def _tree() -> PciTree:
    """A server with some of everything, made once for a process."""
    tree = PciTree(Path(directory_of_this_process("vmplug-fuzz-")) / "host")
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"}, holders=["dm-0"])
    tree.block_device("7:0", "loop0", loop={"backing_file": "/images/pmem.img\n", "offset": "0\n"})
    tree.block_device("253:0", "dm-0").char_device("10:200", "net/tun")
    tree.char_device("243:26", "vfio/26")
    tree.pci_function(NVME, driver="vfio-pci", group=26, cdev=0)
    tree.pci_disk(NVME, "259:0", "nvme0n1", partitions={"259:1": "nvme0n1p1"})
    tree.pci_function(NIC, class_code=0x020000, driver="ixgbe", group=27)
    tree.sriov(NIC, "0000:3c:10.0", "0000:3c:10.2").network(NIC, "eth0").route("eth0")
    tree.mount("/dev/sda1", "/mnt", "8:1").mount("/dev/loop0", "/mnt/pmem", "7:0")
    tree.swap("/dev/sda1").process(1, "init", "socket:[99]")
    tree.file("/proc/1/stat", "1 (init) S " + "0 " * 40).file("/proc/1/status", "CapEff:\t0\n")
    tree.file("/proc/1/limits", "Max locked memory         65536   65536   bytes\n")
    tree.pmem_file("/images/pmem.img").unix_socket("/run/vhost-user/block/sockets/disk1", 99)
    tree.file("/run/vhost-user/block/devices/plain").file("/mnt/pmem/x")
    tree.node("/run/vhost-user/block/sockets/disk1", "s").node("/dev/fifo", "p")
    tree.file("/sys/bus/mdev/devices/.keep")
    if os.geteuid() == 0:
        tree.node("/run/vhost-user/block/devices/disk1", "b", "241:1")
        tree.node("/dev/sda", "b", "8:0").node("/dev/vfio/26", "c", "243:26")
    return tree


@cache
def _paths() -> tuple[str, ...]:
    """All files, links and directories of the tree, which never changes for long."""
    return tuple(
        sorted(
            os.path.join(directory, name)
            for directory, below, files in os.walk(_tree().path)
            for name in (*below, *files)
        )
    )


@contextmanager
def _spoiled(tree: PciTree, draw: Draw) -> Iterator[None]:
    """Put up to eight hostile things into the tree, and take them out again."""
    aside = tree.path.parent / "aside"
    aside.mkdir()
    put: list[tuple[str, Path | None]] = []
    try:
        for number in range(8):
            if not draw:
                break
            path, former = draw.pick(_paths()), None
            if draw.number(7) == 0:  # beside it, under a name that nobody expects
                name = draw.some().replace(b"/", b"").replace(b"\0", b"").strip(b".") or b"\n"
                path = os.path.join(os.path.dirname(path), os.fsdecode(name))
            directory = os.path.dirname(path)
            if not os.path.isdir(directory) or os.path.realpath(directory) != directory:
                continue  # what was put before is in the way, or leads out of the tree
            if os.path.lexists(path):
                former = aside / str(number)
                os.rename(path, former)
            put.append((path, former))
            with suppress(OSError):  # its directory is something else by now
                if draw.number(2) == 0:
                    _change(path, draw, former)
                else:
                    draw.pick(_PUT)(path, draw)
        yield
    finally:
        for path, former in reversed(put):
            _remove(path)
            if former:
                os.rename(former, path)
        shutil.rmtree(aside)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def _change(path: str, draw: Draw, former: Path | None) -> None:
    """A few bytes of what was there."""
    is_file = former and former.is_file() and not former.is_symlink()
    before = former.read_bytes()[:5000] if former and is_file else b""
    start = draw.number(min(len(before), 255))
    Path(path).write_bytes(before[:start] + draw.some() + before[start + draw.number(8) :])


def _write(path: str, draw: Draw) -> None:
    Path(path).write_bytes(draw.some())


def _devname(path: str, draw: Draw) -> None:
    names = (b"../etc/shadow", b"/etc/shadow", b"a/../../b", b"", b"..", b"sda\0", b".", b"a//b")
    name = draw.pick(names) + draw.some()
    Path(path).write_bytes(b"MAJOR=8\nMINOR=0\nDEVNAME=" + name + b"\n")


def _huge(path: str, draw: Draw) -> None:
    Path(path).write_bytes(draw.some() + _HUGE)


def _link(path: str, draw: Draw) -> None:
    targets = (
        *(os.path.basename(path), "../" * 30 + "etc/passwd", "/etc/passwd", "/dev/zero", "/proc"),
        *("..", ".", "/dev/null", "absent", "/proc/self/fd/0", "x" * 4000, "../.."),
    )
    os.symlink(draw.pick(targets), path)


def _node(path: str, draw: Draw) -> None:
    draw.pick((_socket, os.mkfifo, os.mkdir))(path)


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, suppress(OSError):  # a path too long for one
        listener.bind(path)


def _nothing(path: str, draw: Draw) -> None:
    """It is not there any more."""


_PUT = (_nothing, _write, _devname, _huge, _link, _node)
