"""Every kind of device as the matrix asks for it, with what stands behind it on the host."""

import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tests.support.daemons import Daemon, storage_daemon, vhost_user_backend, virtiofsd
from tests.support.disks import disk_image, own_loop_device
from tests.support.fake_kernel import FakeKernel
from tests.support.pci_tree import PciTree
from tests.system.faults.steps import Op
from vmplug.devnum import DevNum
from vmplug.host.pci.iommu import IOMMU_NODE
from vmplug.host.vhost_user.store import VHOST_USER_BLK_MAJOR
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import NetInfo, Request, RngInfo, ShareInfo, VfioInfo

MIB = 1 << 20


class Behind(Protocol):
    """What a device is made of on the host; a fault takes it away, and it comes back."""

    def requests(self) -> Sequence[Request]:
        """What is asked for."""

    def renew(self) -> None:
        """Be there and ready, before the device is attached."""

    def take(self) -> None:
        """The host's device disappears."""

    def is_gone(self) -> bool:
        """Whether nothing is where the device was taken from."""

    def kill(self) -> None:
        """The process at the other end ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One row of the matrix.

    `make` gives what is behind it, in a directory with a short path; the second argument is the
    QMP socket. `is_vfio` is whether it needs VFIO, which a tree plays here and no real QEMU has;
    `is_retained` whether it stays until the VM ends, `shares` whether the first one makes what all
    of its kind share and what stays: the contract has the faults of making that. `more` is what is
    done beside attach and detach, `own` what is done instead, with a VM that vmplug starts.
    """

    name: str
    make: Callable[[Path, Path], AbstractContextManager[Behind]] = field(repr=False)
    has_device: bool = True
    has_backend: bool = False
    managed: bool = False
    is_vfio: bool = False
    is_retained: bool = False
    shares: bool = False
    more: tuple[Op, ...] = ()
    own: tuple[Op, ...] = ()

    @property
    def ops(self) -> tuple[Op, ...]:
        """What is done with it."""
        return self.own or (Op.ATTACH, Op.DETACH, *self.more)


AWAY = ".away"


def put_away(path: Path) -> None:
    """Take the name from a file or directory. It is the same when it has its name again."""
    if path.exists():
        path.rename(path.with_suffix(AWAY))


def put_back(path: Path) -> None:
    """Undo `put_away`."""
    away = path.with_suffix(AWAY)
    if away.exists() and not path.exists():
        away.rename(path)


@dataclass(slots=True)
class Files:
    """Disks in files, or what is always there."""

    paths: Sequence[Path]
    asked: Sequence[Request]
    made: list[str] = field(default_factory=list)

    def requests(self) -> Sequence[Request]:
        """See Behind."""
        return self.asked

    def renew(self) -> None:
        """See Behind."""
        for path in self.paths:
            put_back(path)
            disk_image(path, 2, "faults")

    def take(self) -> None:
        """See Behind: the first of them."""
        put_away(self.paths[0])

    def is_gone(self) -> bool:
        """See Behind."""
        return not self.paths[0].exists()

    def kill(self) -> None:
        """See Behind."""
        raise AssertionError("nobody serves it")


def disk(path: Path, options: Mapping[str, str], *, pmem: bool = False) -> DeviceInfo:
    return DeviceInfo(
        container_path=f"/dev/{path.name}",
        dev_type=DevType.BLOCK,
        host_path=str(path),
        pmem=pmem,
        driver_options=options,
    )


@contextmanager
def images(
    directory: Path, _: Path, *, options: Sequence[Mapping[str, str]] = ({},), pmem: bool = False
) -> Iterator[Behind]:
    paths = [directory / f"{index}.img" for index in range(len(options))]
    asked = [disk(path, said, pmem=pmem) for path, said in zip(paths, options, strict=True)]
    yield Files(paths, asked)


@contextmanager
def random_source(_: Path, __: Path) -> Iterator[Behind]:
    yield Files([], [RngInfo()])


@contextmanager
def character_device(_: Path, __: Path) -> Iterator[Behind]:
    asked = DeviceInfo(container_path="/dev/null", dev_type=DevType.CHAR, devnum=DevNum(1, 3))
    yield Files([], [asked])


@dataclass(slots=True)
class Loop:
    """A loop device of somebody else's."""

    node: str
    image: Path

    def requests(self) -> Sequence[Request]:
        """See Behind."""
        number = os.stat(self.node).st_rdev
        devnum = DevNum(os.major(number), os.minor(number))
        return [DeviceInfo(container_path="/dev/x", dev_type=DevType.BLOCK, devnum=devnum)]

    def renew(self) -> None:
        """See Behind."""
        if not Path(f"/sys/block/{Path(self.node).name}/loop").exists():
            subprocess.run(["losetup", self.node, str(self.image)], check=True)

    def take(self) -> None:
        """See Behind."""
        subprocess.run(["losetup", "--detach", self.node], check=True)

    def is_gone(self) -> bool:
        """See Behind."""
        return not Path(f"/sys/block/{Path(self.node).name}/loop").exists()

    def kill(self) -> None:
        """See Behind."""
        raise AssertionError("nobody serves it")


@contextmanager
def loop(directory: Path, _: Path) -> Iterator[Behind]:
    image = disk_image(directory / "loop.img", 2, "faults")
    with own_loop_device(image) as node:
        yield Loop(str(node), image)


@dataclass(slots=True)
class Served:
    """A device that a process of somebody else's serves; one that serves once is begun anew."""

    daemon: Daemon
    asked: Request
    node: Path | None = None
    serves_once: bool = False
    _number: int = 0

    def requests(self) -> Sequence[Request]:
        """See Behind."""
        return [self.asked]

    def renew(self) -> None:
        """See Behind."""
        if self.node:
            self._number = self._number or os.stat(self.node).st_rdev
            if not self.node.exists():
                os.mknod(self.node, 0o600 | stat.S_IFBLK, self._number)
        if self.serves_once or not (self.daemon.is_running and self.daemon.socket_path.exists()):
            self.daemon.restart()

    def take(self) -> None:
        """See Behind: the name by which it is found."""
        (self.node or self.daemon.socket_path).unlink(missing_ok=True)

    def is_gone(self) -> bool:
        """See Behind."""
        return not (self.node or self.daemon.socket_path).exists()

    def kill(self) -> None:
        """See Behind."""
        self.daemon.kill()


@contextmanager
def stored(directory: Path, _: Path, *, major: int) -> Iterator[Behind]:
    """A device of the vhost-user store."""
    store = directory / "store/block"
    for name in ("devices", "sockets"):
        store.joinpath(name).mkdir(parents=True)
    node, path = store / "devices/disk1", store / "sockets/disk1"
    os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(major, 1))
    image = disk_image(directory / "served.img", 2, "faults")
    asked = DeviceInfo(container_path="/dev/x", dev_type=DevType.BLOCK, devnum=DevNum(major, 1))
    is_blk = major == VHOST_USER_BLK_MAJOR
    started = (
        storage_daemon(image, socket_path=path)
        if is_blk
        else vhost_user_backend("scsi", image, socket_path=path)
    )
    with started as daemon:
        yield Served(daemon, asked, node)


@contextmanager
def network(directory: Path, _: Path) -> Iterator[Behind]:
    path = directory / "net.sock"
    asked = NetInfo(
        label="eth0", socket_path=str(path), driver_options={"mac": "52:54:00:12:34:56"}
    )
    with vhost_user_backend("net", socket_path=path) as daemon:
        yield Served(daemon, asked)


@contextmanager
def share_by_socket(directory: Path, _: Path) -> Iterator[Behind]:
    path, shared = directory / "share.sock", directory / "shared"
    shared.mkdir()
    asked = ShareInfo(tag="work", source=str(path))
    with virtiofsd(shared, socket_path=path) as daemon:
        yield Served(daemon, asked, serves_once=True)


@dataclass(slots=True)
class Shared:
    """A directory that vmplug's own virtiofsd serves."""

    directory: Path
    qmp_socket: Path

    def requests(self) -> Sequence[Request]:
        """See Behind."""
        return [ShareInfo(tag="work", source=str(self.directory))]

    def renew(self) -> None:
        """See Behind."""
        put_back(self.directory)
        self.directory.mkdir(exist_ok=True)

    def take(self) -> None:
        """See Behind."""
        put_away(self.directory)

    def is_gone(self) -> bool:
        """See Behind."""
        return not self.directory.exists()

    def kill(self) -> None:
        """See Behind."""
        for pid in HostVirtiofsdRunner(str(self.qmp_socket)).find().values():
            with suppress(ProcessLookupError):
                os.killpg(os.getpgid(pid), signal.SIGKILL)


@contextmanager
def share_of_ours(directory: Path, qmp_socket: Path) -> Iterator[Behind]:
    shared = directory / "shared"
    shared.mkdir()
    yield Shared(shared, qmp_socket)


FIRST, SECOND, BOUND, THEIRS = "0000:3b:00.0", "0000:3b:00.1", "0000:3d:00.0", "0000:3e:00.0"
CDEV_NODE, CDEV_NUMBER = "/dev/vfio/devices/vfio0", "1:3"
CDEV_LINKS = ("/sys/class/vfio-dev/vfio0", f"/sys/dev/char/{CDEV_NUMBER}")
BOOT_ID = "11111111-2222-3333-4444-555555555555\n"
TAKES = {"nouveau": [FIRST], "snd_hda_intel": [SECOND], "e1000e": [THEIRS]}


@dataclass(slots=True)
class Functions:
    """PCI functions of a host that is a tree; `names` are those of the group that is asked for.

    It is asked for by the first one's address, or by its node when it `has_node`.
    """

    tree: PciTree
    names: Sequence[str]
    has_node: bool = False

    def requests(self) -> Sequence[Request]:
        """See Behind."""
        return [VfioInfo(label="gpu", device=CDEV_NODE if self.has_node else self.names[0])]

    def renew(self) -> None:
        """See Behind."""
        for bdf in self.names:
            if not (self.tree.path / f"sys/bus/pci/devices/{bdf}").exists():
                add_function(self.tree, bdf)
        if self.has_node and not (self.tree.path / CDEV_NODE[1:]).exists():
            self.tree.vfio_cdev(self.names[0], 0, devnum=CDEV_NUMBER)
            self.tree.node(CDEV_NODE, "c", CDEV_NUMBER)
            self.tree.file(IOMMU_NODE)

    def take(self) -> None:
        """See Behind: the first of them is pulled."""
        FakeKernel(self.tree)._remove_function(self.names[0])
        for path in (CDEV_NODE, *CDEV_LINKS):
            (self.tree.path / path[1:]).unlink(missing_ok=True)

    def is_gone(self) -> bool:
        """See Behind."""
        return not (self.tree.path / f"sys/bus/pci/devices/{self.names[0]}").exists()

    def kill(self) -> None:
        """See Behind."""
        raise AssertionError("nobody serves it")


def add_function(tree: PciTree, bdf: str) -> None:
    """A function as it is before anybody binds it."""
    match bdf:
        case "0000:3b:00.0":
            tree.pci_function(bdf, class_code=0x030200, driver="nouveau", group=26)
        case "0000:3b:00.1":
            tree.pci_function(bdf, class_code=0x040300, driver="snd_hda_intel", group=26)
        case "0000:3d:00.0":
            tree.pci_function(bdf, driver="vfio-pci", group=28)
        case _:
            tree.pci_function(bdf, class_code=0x020000, driver="e1000e", group=29)


def host_tree(path: Path) -> PciTree:
    """A host with a group of two, a function that VFIO has, and one of somebody else's."""
    tree = PciTree(path)
    tree.file("/proc/sys/kernel/random/boot_id", BOOT_ID)
    tree.pci_driver("vfio-pci")
    for bdf in (FIRST, SECOND, BOUND, THEIRS):
        add_function(tree, bdf)
    return tree


@contextmanager
def functions(
    directory: Path, _: Path, *, names: Sequence[str], has_node: bool = False
) -> Iterator[Behind]:
    with ExitStack() as stack:
        path = directory / "host"
        stack.callback(shutil.rmtree, path)
        yield Functions(host_tree(path), names, has_node)


MEDIATED, MEDIATED_TYPE = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "nvidia-35"


@dataclass(slots=True)
class Mediated:
    """A mediated device of a function that stays with its own driver."""

    tree: PciTree

    def requests(self) -> Sequence[Request]:
        """See Behind."""
        return [VfioInfo(label="vgpu", device=MEDIATED)]

    def renew(self) -> None:
        """See Behind."""
        if self.is_gone():
            parent = f"/sys/bus/pci/devices/{FIRST}"
            create = f"{parent}/mdev_supported_types/{MEDIATED_TYPE}/create"
            assert FakeKernel(self.tree).write_attribute(create, MEDIATED) is None

    def take(self) -> None:
        """See Behind."""
        path = f"/sys/bus/mdev/devices/{MEDIATED}/remove"
        assert FakeKernel(self.tree).write_attribute(path, "1") is None

    def is_gone(self) -> bool:
        """See Behind."""
        return not (self.tree.path / f"sys/bus/mdev/devices/{MEDIATED}").exists()

    def kill(self) -> None:
        """See Behind."""
        raise AssertionError("nobody serves it")


@contextmanager
def mediated(directory: Path, _: Path) -> Iterator[Behind]:
    with ExitStack() as stack:
        path = directory / "host"
        stack.callback(shutil.rmtree, path)
        tree = host_tree(path)
        tree.mdev_type(FIRST, MEDIATED_TYPE)
        yield Mediated(tree)
