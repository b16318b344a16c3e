"""What `check` answers is what `plan`, `attach` and `bind` do, for every code that there is.

Each row makes one finding on a host that is a tree, or in a VM in memory, and is tried twice: with
the fault, and without. A code that needs a live kernel, a process or a QEMU names its test.
"""

import fcntl
import os
import sqlite3
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec.structs import replace

import tests
from tests.support.fake_kernel import FakeKernel
from tests.support.pci_tree import FLAGS_MEM64, PciTree
from tests.support.tree import GIB, MIB
from vmplug.address import PciPath, PciSlot
from vmplug.devnum import DevNum
from vmplug.drivers.place import Offer, PciPort, PlugMode, Windows
from vmplug.errors import AttributeReadError, DeviceError, InUse, PolicyError
from vmplug.host.finding import NEVER_ALLOWED, Code, Severity
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.hypervisor.fake.monitor import FakeHypervisor
from vmplug.hypervisor.qemu.running import NO_PLACES
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder
from vmplug.manager.examine import CheckedRequest
from vmplug.manager.manager import DeviceManager
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import NetInfo, Request, RngInfo, ShareInfo, VfioInfo
from vmplug.policy.rules import Policy

GPU, SOUND, PF, VF = "0000:3b:00.0", "0000:3b:00.1", "0000:3c:00.0", "0000:3c:10.0"
REMAPPING = "  0:  122  IR-IO-APIC   2-edge      timer\n"
IMAGE, COW, ODD = "/srv/a.img", "/srv/a.qcow2", "/srv/odd.img"
F_OFD_SETLK = 37


class World:
    """A host with a disk, images and a graphics card that VFIO has, and a VM in memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tree = PciTree(directory / "host")
        self.proc = self.tree.path / "proc"
        self.ports = 4
        self.offer: Mapping[str, object] = {}
        self.policy: Policy | None = None
        self.before: list[Request] = []
        self.others: list[Request] = []
        self.afterwards: Callable[[], object] = lambda: None
        self.files: list[int] = []
        self.tree.file("/proc/interrupts", REMAPPING)
        self.tree.file("/proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555555\n")
        self.tree.hole(IMAGE, 4 * MIB).hole(ODD, 3 * MIB)
        self.tree.file(COW, qcow2()).file("/srv/work/file").file(
            "/usr/libexec/virtiofsd", "#!/bin/sh\n"
        )
        (self.tree.path / "usr/libexec/virtiofsd").chmod(0o755)

    def build(self, gpu: Mapping[str, object], disk: Mapping[str, object]) -> None:
        """The card and the disk, with what is wrong with them."""
        card = {"driver": "vfio-pci", "group": 26, "class_code": 0x030000, **gpu}
        self.tree.pci_function(GPU, **card)  # type: ignore[arg-type]
        sda = {"partitions": {"8:1": "sda1"}, **disk}
        self.tree.block_device("8:0", "sda", **sda)  # type: ignore[arg-type]
        self.tree.char_device("10:229", "fuse")

    def manager(self, journal: Journal, vm: str = "sb1") -> DeviceManager:
        return DeviceManager(
            vm=vm,
            host=self.tree.root,
            hypervisor=_Offering(self.offer, root_ports=self.ports),
            journal=journal,
            policy=self.policy,
        )


class _Offering(FakeHypervisor):
    """A VM whose offer has some other values."""

    def __init__(self, values: Mapping[str, object], **more: int) -> None:
        super().__init__(**more)  # type: ignore[arg-type]
        self._values = values

    def places(self, known: Mapping[str, str] = NO_PLACES) -> Offer:  # noqa: ARG002
        return replace(self.offer(), **self._values)


def qcow2(backing: bytes = b"") -> bytes:
    """A header of version 3, and after it the name of a backing file."""
    offset = 512 if backing else 0
    head = struct.pack(">4sIQIIQ", b"QFI\xfb", 3, offset, len(backing), 16, MIB)
    head += struct.pack(">IIQQIIQ", 0, 1, 1 << 16, 2 << 16, 1, 0, 0)  # L1 and refcount tables
    head += struct.pack(">QQQII", 0, 0, 0, 4, 104)
    return (head.ljust(512, b"\0") + backing).ljust(MIB, b"\0")


def disk(number: str = "8:0", *, ro: bool = False, **options: str) -> DeviceInfo:
    return DeviceInfo(
        container_path=f"/dev/disk{number}",
        dev_type=DevType.BLOCK,
        devnum=DevNum.parse(number),
        read_only=ro,
        driver_options={key.replace("_", "-"): value for key, value in options.items()},
    )


def image(path: str = IMAGE, *, ro: bool = False, **options: str) -> DeviceInfo:
    return DeviceInfo(
        container_path="/dev/image",
        dev_type=DevType.BLOCK,
        host_path=path,
        read_only=ro,
        driver_options={key.replace("_", "-"): value for key, value in options.items()},
    )


def share(tag: str = "work", source: str = "/srv/work", *, ro: bool = False) -> ShareInfo:
    return ShareInfo(tag=tag, source=source, read_only=ro)


def nvdimm(path: str = IMAGE, **options: str) -> DeviceInfo:
    return image(path, **{"block_driver": "nvdimm", **options})  # type: ignore[arg-type]


CARD, RNG = VfioInfo(label="card", device=GPU), RngInfo()
NET = NetInfo(label="eth0", socket_path="/run/net.sock")
PLAN9 = ShareInfo(tag="work", source="/srv/work", driver_options={"filesystem": "virtio-9p"})
CHAR = DeviceInfo(container_path="/dev/fuse", dev_type=DevType.CHAR, devnum=DevNum.parse("10:229"))


EACH = (
    disk(),
    disk(ro=True),
    disk("8:1"),
    image(),
    image(COW),
    image(COW, format="qcow2"),
    image(ODD, cache="none"),
    nvdimm(),
    share(),
    share(ro=True),
    PLAN9,
    CHAR,
    NET,
    RNG,
    CARD,
)
"""A request of each kind, for what a fault of one may be to another."""


def nothing(world: World) -> None:
    """No fault: it is in the request."""


@dataclass(frozen=True)
class Row:
    """One fault; `without` is the request that is fine, where the fault is in the request.

    `gpu` and `disk` are faults of what the host has anyway. `binds`: the function is with its own
    driver, the request is --managed, and `bind` refuses it too.
    """

    code: Code
    what: str
    asked: Sequence[Request]
    fault: Callable[[World], object] = nothing
    without: Sequence[Request] = ()
    warns: bool = False
    binds: bool = False
    gpu: Mapping[str, object] = field(default_factory=dict)
    disk: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.code} {self.what}"


def lock(world: World) -> None:
    """The byte by which QEMU says that it writes."""
    world.files.append(fd := os.open(world.tree.path / IMAGE[1:], os.O_RDWR))
    fcntl.fcntl(fd, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 201, 1, 0))


def has(*requests: Request) -> Callable[[World], object]:
    """What the VM has already."""
    return lambda world: world.before.extend(requests)


def other_has(*requests: Request) -> Callable[[World], object]:
    """What another VM has already."""
    return lambda world: world.others.extend(requests)


def take(path: str) -> Callable[[World], object]:
    return lambda world: (world.tree.path / path.lstrip("/")).unlink()


def replaced_image(world: World) -> None:
    """The VM has a file, and another one has its name now."""
    world.before.append(image())
    path = world.tree.path / IMAGE[1:]
    (path.parent / "new").write_bytes(bytes(4 * MIB))
    world.afterwards = lambda: os.replace(path.parent / "new", path)


def replaced_disk(world: World) -> None:
    """The VM has a disk, and another one has its number now."""
    queue(diskseq="1")(world)
    world.before.append(DISK)
    world.afterwards = lambda: queue(diskseq="2")(world)


def replaced_share(world: World) -> None:
    """The VM has a directory, and another one has its name now."""
    world.before.append(share())
    path = world.tree.path / "srv/work"

    def replace_it() -> None:
        path.rename(path.with_name("old"))
        path.mkdir()

    world.afterwards = replace_it


def brought_over(request: Request) -> Callable[[World], None]:
    """The VM has what a vmplug attached before journals recorded which one it was."""

    def fault(world: World) -> None:
        world.before.append(request)

        def forget() -> None:
            with sqlite3.connect(world.directory / "state/journal.db") as db:
                db.execute("UPDATE device SET thing = NULL")
            db.close()

        world.afterwards = forget

    return fault


def odd_size(world: World) -> None:
    world.tree.block_device("8:16", "sdb")
    (world.tree.path / "sys/block/sdb/size").write_text("x\n")


def no_size(world: World) -> None:
    world.tree.block_device("8:16", "sdb")
    (world.tree.path / "sys/block/sdb/size").unlink()


def odd_partition(world: World) -> None:
    (world.tree.path / "sys/dev/block/8:1/size").write_text("x\n")


def no_ports(world: World) -> None:
    world.ports = 0


def offers(**values: object) -> Callable[[World], object]:
    """What the VM offers otherwise."""
    return lambda world: setattr(world, "offer", values)


def no_policy(world: World) -> None:
    world.policy = Policy(name="/etc/vmplug/policy.toml", rules=())


def member(driver: str | None, class_code: int, **more: object) -> Callable[[World], object]:
    """Another function in the card's group, on the root bus."""
    made = {"class_code": class_code, "driver": driver, "group": 26, **more}
    return lambda world: world.tree.pci_function(SOUND, **made)  # type: ignore[arg-type]


def reserve(world: World) -> None:
    regions = "0xad000000 0xae7fffff direct\n"
    world.tree.file("/sys/kernel/iommu_groups/26/reserved_regions", regions)


def no_group_node(world: World) -> None:
    """/dev/vfio/26 was removed; the container's own node is there."""
    world.tree.vfio_group(26).file("/dev/vfio/vfio")


def device_node_alone(world: World) -> None:
    """A node of the function itself, which needs iommufd, and none of its group."""
    directory = f"{world.tree.real(GPU)}/vfio-dev/vfio0"
    world.tree.file("/dev/iommu").file("/dev/vfio/devices/vfio0").file(f"{directory}/uevent")
    world.tree.link("/sys/class/vfio-dev/vfio0", f"../..{directory.removeprefix('/sys')}")


def virtual_function(world: World) -> None:
    """VFIO has its physical function too."""
    world.tree.pci_function(PF, class_code=0x020000, driver="vfio-pci", group=27)
    world.tree.sriov(PF, VF, driver="vfio-pci", group=28)


def large_windows(world: World) -> None:
    """Four of 512 GiB, and a guest with addresses for one TiB."""
    large = Windows(512 * GIB, 2 * MIB)
    path = PciPath.parse("03")
    port = PciPort(bus="rp9", path=path, free=(PciSlot(0),), windows=large)
    world.offer = {"ports": (port,) * 4, "address_bits": 40}


def guest_iommu(world: World) -> None:
    world.offer = {"viommu": True}
    member("vfio-pci", 0x040300)(world)


def memlock(world: World) -> None:
    world.offer = {"mode": PlugMode.COLD, "memory_bytes": GIB}
    line = "Max locked memory         8388608              8388608              bytes\n"
    world.tree.file(f"/proc/{os.getpid()}/limits", line)


def queue(**facts: str) -> Callable[[World], object]:
    """What the kernel says of the disk; `queue__zoned` is the file queue/zoned."""

    def write(world: World) -> None:
        for name, content in facts.items():
            path = f"/sys/devices/virtual/block/sda/{name.replace('__', '/')}"
            world.tree.file(path, f"{content}\n")

    return write


def no_aio(world: World) -> None:
    world.tree.file("/proc/sys/fs/aio-nr", "65536\n").file("/proc/sys/fs/aio-max-nr", "65536\n")


def sparse(world: World) -> None:
    os.truncate(world.tree.file(IMAGE).path / IMAGE[1:], 4 * MIB)


def mounted_part(world: World) -> None:
    world.tree.pci_disk(GPU, "259:0", "nvme0n1", way="nvme/nvme0")
    world.tree.mount("/dev/nvme0n1", "/data", "259:0")


def export(world: World, path: str) -> None:
    base = "/sys/kernel/config/nvmet/subsystems/nqn.a/namespaces/1"
    world.tree.file(f"{base}/device_path", f"{path}\n").file(f"{base}/enable", "1\n")


def exported_drive(world: World) -> None:
    world.tree.pci_disk(GPU, "259:0", "nvme0n1", way="nvme/nvme0")
    export(world, "/dev/nvme0n1")


def drive(use: Callable[[World], object]) -> Callable[[World], object]:
    """The function has a disk, and that is in use."""

    def fault(world: World) -> None:
        world.tree.pci_disk(GPU, "259:0", "nvme0n1", way="nvme/nvme0")
        use(world)

    return fault


def socket_without_a_rule(world: World) -> None:
    """The socket that is asked for is there."""
    world.tree.node("/run/net.sock", "s")
    no_policy(world)


NOUVEAU = {"driver": "nouveau"}
LARGE_BAR = {0: (0xF0000000, 256 * GIB, FLAGS_MEM64)}
SDB, DISK, PART = disk("8:16"), disk(), disk("8:1")


ROWS = [
    Row(Code.MOUNTED_ON_HOST, "disk", [DISK], lambda w: w.tree.mount("/dev/sda", "/m", "8:0")),
    Row(Code.MOUNTED_ON_HOST, "part", [DISK], lambda w: w.tree.mount("/dev/sda1", "/m", "8:1")),
    Row(Code.MOUNTED_ON_HOST, "vfio", [CARD], mounted_part, binds=True),
    Row(Code.HAS_HOLDERS, "disk", [DISK], disk={"holders": ("dm-0",)}),
    Row(
        Code.HAS_HOLDERS,
        "file",
        [image()],
        lambda w: w.tree.block_device(
            "7:0", "loop0", holders=("dm-0",), loop={"backing_file": f"{IMAGE}\n"}
        ),
    ),
    Row(Code.IS_SWAP, "disk", [DISK], lambda w: w.tree.swap("/dev/sda1")),
    Row(Code.IS_SWAP, "file", [image()], lambda w: w.tree.swap(IMAGE)),
    Row(Code.IS_EXPORTED, "disk", [DISK], lambda w: export(w, "/dev/sda1")),
    Row(Code.IS_EXPORTED, "file", [image()], lambda w: export(w, IMAGE)),
    Row(Code.IS_EXPORTED, "vfio", [CARD], exported_drive, binds=True),
    Row(Code.IMAGE_LOCKED, "file", [image()], lock),
    Row(Code.IN_USE_BY_VM, "part", [DISK, PART], without=[DISK]),
    Row(Code.IN_USE_BY_VM, "vfio", [CARD, disk("259:0")], mounted_part, without=[CARD]),
    Row(Code.READ_ONLY_DEVICE, "disk", [DISK], disk={"ro": True}),
    Row(Code.NO_MEDIUM, "disk", [DISK], disk={"removable": True, "size_bytes": 0}),
    Row(Code.SIZE_ZERO, "disk", [DISK], disk={"size_bytes": 0}),
    Row(Code.SIZE_ZERO, "file", [image("/srv/0")], lambda w: w.tree.file("/srv/0"), [image()]),
    Row(Code.NOT_IN_SYSFS, "disk", [SDB], no_size, without=[DISK]),
    Row(Code.WRONG_NODE, "disk", [DISK], lambda w: w.tree.file("/dev/sda")),
    Row(
        Code.HAS_BACKING_FILE,
        "file",
        [image(COW, format="qcow2")],
        lambda w: w.tree.file(COW, qcow2(b"/etc/shadow")),
    ),
    Row(Code.FORMAT_NOT_STATED, "file", [image(COW)], without=[image(COW, format="raw")]),
    Row(Code.NOT_THAT_FORMAT, "file", [image(format="qcow2")], without=[image()]),
    Row(Code.NOT_THAT_FORMAT, "disk", [disk(format="qcow2")], without=[DISK]),
    Row(Code.NO_PFN_SIGNATURE, "file", [image(block_driver="nvdimm")], warns=True),
    Row(Code.NVDIMM_SIZE, "file", [image(ODD, block_driver="nvdimm")], without=[image(ODD)]),
    Row(Code.NO_BACKEND, "share", [share()], take("/usr/libexec/virtiofsd")),
    Row(
        Code.CANNOT_BE_READ_ONLY,
        "share",
        [share(source="/run/fs.sock", ro=True)],
        lambda w: w.tree.node("/run/fs.sock", "s"),
        [share()],
    ),
    Row(Code.NO_IOMMU, "vfio", [CARD], gpu={"group": None}),
    Row(
        Code.NO_INTERRUPT_REMAPPING,
        "vfio",
        [CARD],
        lambda w: w.tree.file("/proc/interrupts", REMAPPING.replace("IR-", "")),
    ),
    Row(
        Code.ACS_OVERRIDE,
        "vfio",
        [CARD],
        lambda w: w.tree.file("/proc/cmdline", "quiet pcie_acs_override=downstream\n"),
        warns=True,
    ),
    Row(
        Code.GROUP_NOT_VIABLE,
        "vfio",
        [CARD],
        lambda w: w.tree.pci_function(SOUND, driver="snd_hda_intel", group=26),
    ),
    Row(Code.NOT_BOUND, "vfio", [CARD], gpu={"driver": "nouveau"}),
    Row(
        Code.NETWORK_IN_USE,
        "vfio",
        [CARD],
        lambda w: w.tree.network(GPU, "eth0").route("eth0"),
        binds=True,
    ),
    Row(Code.BOOT_CONSOLE, "vfio", [CARD], gpu={"boot_vga": "1\n"}, binds=True),
    Row(Code.HAS_VIRTUAL_FUNCTIONS, "vfio", [CARD], lambda w: w.tree.sriov(GPU, VF), binds=True),
    Row(Code.MEMBER_IN_USE, "bridge", [CARD], member("shpchp", 0x060400), binds=True),
    Row(Code.MACHINE_PART, "vfio", [CARD], member(None, 0x0C0500), binds=True),
    Row(Code.NO_NODE, "vfio", [CARD], no_group_node),
    Row(Code.NO_RESPONSE, "vfio", [CARD], gpu={**NOUVEAU, "config": b"\xff" * 4096}, binds=True),
    Row(
        Code.BAR_UNASSIGNED,
        "vfio",
        [CARD],
        gpu={**NOUVEAU, "bars": {2: (0, GIB, 0x20000000 | FLAGS_MEM64)}},
        binds=True,
    ),
    Row(
        Code.VFIO_REFUSES,
        "vfio",
        [CARD],
        gpu={**NOUVEAU, "class_code": 0x0B4000, "device": 0x37C8},
        binds=True,
    ),
    Row(Code.RESERVED_MEMORY, "vfio", [CARD], reserve, binds=True),
    Row(
        Code.PHYSFN_WITH_VFIO,
        "vfio",
        [VfioInfo(label="vf", device=VF)],
        virtual_function,
        [CARD],
    ),
    Row(Code.NO_ADDRESS_SPACE, "vfio", [CARD], large_windows, gpu={"bars": LARGE_BAR}),
    Row(Code.SPLIT_GROUP, "vfio", [CARD], guest_iommu),
    Row(Code.MEMLOCK_LIMIT, "vfio", [CARD], memlock),
    Row(
        Code.NO_IOMMUFD,
        "vfio",
        [VfioInfo(label="card", device="/dev/vfio/devices/vfio0")],
        device_node_alone,
        [CARD],
        warns=True,
    ),
    Row(Code.NOT_A_DISK, "tape", [DISK], queue(device__type="1", device__scsi_level="7")),
    Row(Code.ZONED, "disk", [DISK], queue(queue__zoned="host-managed")),
    Row(
        Code.HAS_INTEGRITY,
        "disk",
        [DISK],
        queue(integrity__format="T10-DIF-TYPE1-CRC"),
        warns=True,
    ),
    Row(Code.SECTOR_SIZE, "disk", [DISK], disk={"sector_bytes": 8192}),
    Row(Code.NO_AIO_CONTEXT, "disk", [disk(aio="native")], no_aio),
    Row(Code.NO_AIO_CONTEXT, "chosen", [DISK], no_aio, warns=True),
    Row(
        Code.UNUSABLE_IMAGE,
        "file",
        [image(COW, format="qcow2")],
        lambda w: w.tree.file(COW, qcow2()[:4096]),
    ),
    Row(Code.SPARSE_NVDIMM, "file", [image(block_driver="nvdimm")], sparse, warns=True),
    Row(
        Code.OPEN_BY_PROCESS,
        "vfio",
        [CARD],
        lambda w: w.tree.process(42, "qemu", "/dev/vfio/26"),
    ),
    Row(Code.OPEN_BY_PROCESS, "disk", [DISK], lambda w: w.tree.process(42, "mysqld", "/dev/sda")),
    Row(Code.OPEN_BY_PROCESS, "file", [image()], lambda w: w.tree.process(42, "dd", IMAGE)),
    Row(Code.UNKNOWN_USE, "vfio", [CARD], lambda w: (w.proc / "1/fd").rmdir(), warns=True),
    Row(Code.UNKNOWN_USE, "disk", [DISK], lambda w: (w.proc / "swaps").unlink(), warns=True),
    Row(
        Code.UNKNOWN_USE,
        "file",
        [image()],
        lambda w: (w.proc / "swaps").unlink(),
        warns=True,
    ),
    Row(Code.NO_RESET, "vfio", [CARD], gpu={"reset_methods": ()}, warns=True),
    Row(Code.NO_PORT, "vm", [disk(block_driver="virtio-blk")], lambda w: setattr(w, "ports", 0)),
    Row(Code.CANNOT_PLUG, "vm", [disk(block_driver="virtio-mmio")], without=[DISK]),
    Row(Code.PLUGGED_OTHERWISE, "reader", [disk(ro=True)], has(DISK), [DISK]),
    Row(Code.PLUGGED_OTHERWISE, "writer", [DISK], has(disk(ro=True)), [disk(ro=True)]),
    Row(Code.PLUGGED_OTHERWISE, "options", [disk(discard="unmap")], has(DISK), [DISK]),
    Row(Code.PLUGGED_OTHERWISE, "share", [share(ro=True)], has(share()), [share()]),
    Row(Code.REPLACED, "file", [image()], replaced_image),
    Row(Code.UNIDENTIFIED, "file", [image()], brought_over(image())),
    Row(Code.TAG_TAKEN, "share", [share("work", "/srv")], has(share()), [share()]),
    Row(Code.NO_SUCH_DEVICE, "disk", [disk("8:99")], without=[DISK]),
    Row(Code.NO_SUCH_DEVICE, "file", [image("/srv/none")], without=[image()]),
    Row(Code.NO_SUCH_DEVICE, "vfio", [VfioInfo(label="x", device="/dev/vfio/99")], without=[CARD]),
    Row(Code.NO_SUCH_DEVICE, "share", [share("x", "/srv/none")], without=[share()]),
    Row(Code.UNREADABLE, "disk", [SDB], odd_size, without=[DISK]),
    Row(Code.NOT_ALLOWED, "disk", [DISK], no_policy),
    Row(
        Code.HAS_HOLDERS,
        "vfio",
        [CARD],
        drive(lambda w: w.tree.hold("nvme0n1", "dm-0")),
        binds=True,
    ),
    Row(Code.IS_SWAP, "vfio", [CARD], drive(lambda w: w.tree.swap("/dev/nvme0n1")), binds=True),
    Row(
        Code.OPEN_BY_PROCESS,
        "its disk",
        [CARD],
        drive(lambda w: w.tree.process(42, "dd", "/dev/nvme0n1")),
        binds=True,
    ),
    Row(
        Code.WRONG_NODE,
        "vfio",
        [CARD],
        lambda w: w.tree.vfio_group(26).file("/dev/vfio/vfio").file("/dev/vfio/26"),
    ),
    Row(Code.IN_USE_BY_VM, "disk of another", [DISK], other_has(DISK)),
    Row(Code.IN_USE_BY_VM, "part of another", [DISK], other_has(PART)),
    Row(Code.IN_USE_BY_VM, "file of another", [image()], other_has(image())),
    Row(Code.IN_USE_BY_VM, "nvdimm of another", [nvdimm()], other_has(image())),
    Row(Code.REPLACED, "disk", [DISK], replaced_disk),
    Row(Code.REPLACED, "share", [share()], replaced_share),
    Row(Code.UNIDENTIFIED, "disk", [DISK], brought_over(DISK)),
    Row(Code.UNIDENTIFIED, "share", [share()], brought_over(share())),
    Row(Code.PLUGGED_OTHERWISE, "file", [image(discard="unmap")], has(image()), [image()]),
    Row(Code.SIZE_ZERO, "nvdimm", [nvdimm("/srv/0")], lambda w: w.tree.file("/srv/0"), [nvdimm()]),
    Row(Code.FORMAT_NOT_STATED, "nvdimm", [nvdimm(COW)], without=[image(COW, format="raw")]),
    Row(Code.NOT_THAT_FORMAT, "nvdimm", [nvdimm(format="qcow2")], without=[nvdimm()]),
    Row(
        Code.HAS_HOLDERS,
        "nvdimm",
        [nvdimm()],
        lambda w: w.tree.block_device(
            "7:0", "loop0", holders=("dm-0",), loop={"backing_file": f"{IMAGE}\n"}
        ),
    ),
    Row(Code.IMAGE_LOCKED, "nvdimm", [nvdimm()], lock),
    Row(Code.IS_SWAP, "nvdimm", [nvdimm()], lambda w: w.tree.swap(IMAGE)),
    Row(Code.IS_EXPORTED, "nvdimm", [nvdimm()], lambda w: export(w, IMAGE)),
    Row(Code.OPEN_BY_PROCESS, "nvdimm", [nvdimm()], lambda w: w.tree.process(42, "dd", IMAGE)),
    Row(Code.UNKNOWN_USE, "nvdimm", [nvdimm()], lambda w: (w.proc / "swaps").unlink(), warns=True),
    Row(Code.UNKNOWN_USE, "char", [CHAR], lambda w: (w.proc / "1/fd").rmdir(), warns=True),
    Row(
        Code.OPEN_BY_PROCESS,
        "char",
        [CHAR],
        lambda w: w.tree.process(42, "sshfs", "/dev/fuse"),
        warns=True,
    ),
    Row(
        Code.OPEN_BY_PROCESS,
        "share",
        [share()],
        lambda w: w.tree.process(42, "virtiofsd", "/srv/work"),
        warns=True,
    ),
    Row(Code.NO_SUCH_DEVICE, "nvdimm", [nvdimm("/srv/none")], without=[nvdimm()]),
    Row(Code.NO_SUCH_DEVICE, "net", [NET], without=[DISK]),
    Row(Code.NO_SUCH_DEVICE, "rng", [RngInfo(source="/dev/none")], without=[DISK]),
    Row(
        Code.NO_SUCH_DEVICE,
        "char",
        [CHAR],
        lambda w: (w.tree.path / "sys/dev/char/10:229").unlink(),
    ),
    Row(Code.UNREADABLE, "part", [PART], odd_partition),
    Row(Code.NO_PORT, "file", [image(block_driver="virtio-blk")], no_ports),
    Row(Code.NO_PORT, "share", [share()], no_ports),
    Row(Code.NO_PORT, "vfio", [CARD], no_ports),
    Row(Code.NO_PORT, "nvdimm", [nvdimm()], offers(memory_slots_used=frozenset(range(256)))),
    Row(Code.CANNOT_PLUG, "9p", [PLAN9], without=[share()]),
    Row(Code.CANNOT_PLUG, "file", [image(block_driver="virtio-mmio")], without=[image()]),
    Row(Code.CANNOT_PLUG, "nvdimm", [nvdimm()], offers(nvdimm=False)),
    Row(Code.CANNOT_PLUG, "share", [share()], offers(shared_memory=False)),
    Row(Code.NOT_ALLOWED, "file", [image()], no_policy),
    Row(Code.NOT_ALLOWED, "nvdimm", [nvdimm()], no_policy),
    Row(Code.NOT_ALLOWED, "share", [share()], no_policy),
    Row(Code.NOT_ALLOWED, "vfio", [CARD], no_policy),
    Row(Code.NOT_ALLOWED, "char", [CHAR], no_policy),
    Row(Code.NOT_ALLOWED, "net", [NET], socket_without_a_rule, [DISK]),
]

_LIVE = "unit/host/check/test_device_live.py::"
_VHOST_USER = "qemu/test_vhost_user.py::"
ELSEWHERE = {
    Code.NOT_RANDOM: "qemu/test_rng.py::test_a_device_that_gives_no_random_numbers_is_refused",
    Code.OPEN_EXCLUSIVELY: f"{_LIVE}test_a_device_opened_exclusively_by_anybody_is_found",
    Code.GIVEN_TO_POD: "unit/kubernetes/test_given_to_pod.py::test_check_and_host_say_it_too",
    Code.ODD_SIZE: "unit/drivers/test_block.py::test_a_disk_is_checked_against_its_options",
    Code.NO_DIRECT_IO: "unit/drivers/test_block.py::test_a_disk_is_checked_against_its_options",
    Code.BACKEND_BUSY: f"{_VHOST_USER}test_a_backend_of_another_qemu_is_told",
    Code.BACKEND_SILENT: f"{_VHOST_USER}test_a_silent_backend_is_told",
    Code.WRONG_BACKEND: f"{_VHOST_USER}test_a_backend_of_another_kind_is_told",
    Code.TOO_MANY_QUEUES: f"{_VHOST_USER}test_more_queues_than_the_backend_serves_are_refused",
}
"""Codes that need a live kernel, a process at the other end, a QEMU or a kubelet: their tests."""


def test_every_code_has_a_row_or_a_test() -> None:
    in_rows = {row.code for row in ROWS}
    assert in_rows | ELSEWHERE.keys() == set(Code)
    assert not in_rows & ELSEWHERE.keys()
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        text = (Path(tests.__file__).parent / file).read_text()
        assert f"def {name}(" in text, place


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    for descriptor in made.files:
        os.close(descriptor)


def refusals(checked: Sequence[CheckedRequest]) -> dict[Code, str]:
    return {
        finding.code: finding.message
        for request in checked
        for finding in request.findings
        if finding.severity is Severity.ERROR
    }


def attempt(
    act: Callable[..., object], asked: Sequence[Request], *, managed: bool
) -> DeviceError | None:
    try:
        act(asked, owner="c1", managed=managed)
    except DeviceError as error:
        return error
    return None


def prepared(row: Row, world: World, journal: Journal, *, with_fault: bool) -> DeviceManager:
    own = {"driver": "nouveau"} if row.binds else {}
    world.tree.pci_driver("vfio-pci")
    world.build({**own, **row.gpu} if with_fault else own, row.disk if with_fault else {})
    if with_fault:
        row.fault(world)
    if world.others:
        world.manager(journal, "sb2").attach_all(world.others, owner="c0")
    manager = world.manager(journal)
    if world.before:
        manager.attach_all(world.before, owner="c0")
    world.afterwards()
    return manager


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_check_refuses_plan_and_attach_refuse(
    row: Row, world: World, journal: Journal
) -> None:
    manager = prepared(row, world, journal, with_fault=True)
    checked = manager.check_places(row.asked, owner="c1", managed=row.binds)
    found = refusals(checked)
    if row.warns:
        assert row.code in {f.code for request in checked for f in request.findings}
        assert not found
        assert attempt(manager.plan, row.asked, managed=row.binds) is None
        return
    assert row.code in found
    held = manager.attachments()
    for act in (manager.plan, manager.attach_all):
        error = attempt(act, row.asked, managed=row.binds)
        assert error
        assert error.hint or isinstance(error, AttributeReadError)
        assert found[row.code] in error.message or isinstance(error, PolicyError)
        if isinstance(error, InUse):
            assert set(error.codes) == found.keys()
    assert manager.attachments() == held


@pytest.mark.slow  # fifteen requests for each fault
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_a_fault_is_to_any_other_kind_check_and_plan_agree_on(
    row: Row, world: World, journal: Journal
) -> None:
    manager = prepared(row, world, journal, with_fault=True)
    held = manager.attachments()
    for request in EACH:
        found = refusals(manager.check_places([request], owner="c1", managed=row.binds))
        acts = (manager.plan, manager.attach_all) if found else (manager.plan,)
        errors = [attempt(act, [request], managed=row.binds) for act in acts]
        assert [error is not None for error in errors] == [bool(found)] * len(errors), request
        refused = [set(error.codes) for error in errors if isinstance(error, InUse)]
        assert all(codes == found.keys() for codes in refused), request
    assert manager.attachments() == held


@pytest.mark.slow  # the table's own check: others attach what has no fault
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_without_the_fault_nothing_is_refused(row: Row, world: World, journal: Journal) -> None:
    manager = prepared(row, world, journal, with_fault=False)
    asked = row.without or row.asked
    assert refusals(manager.check_places(asked, owner="c1", managed=row.binds)) == {}
    assert attempt(manager.plan, asked, managed=row.binds) is None
    if not any(_opens_files(request) for request in asked):
        assert attempt(manager.attach_all, asked, managed=row.binds) is None


def _opens_files(request: Request) -> bool:
    """Whether a plug opens files of this machine, which the tree's are not."""
    return isinstance(request, VfioInfo) or "nvdimm" in request.driver_options.values()


def no_longer_writable(world: World) -> None:
    (world.tree.path / "sys/block/sda/ro").write_text("1\n")


HELD = {
    "file locked": ([image()], lock, None),
    "disk mounted": (
        [DISK],
        lambda w: w.tree.mount("/dev/sda", "/m", "8:0"),
        Code.MOUNTED_ON_HOST,
    ),
    "disk read-only": ([DISK], no_longer_writable, Code.READ_ONLY_DEVICE),
    "share": ([share()], take("/usr/libexec/virtiofsd"), Code.NO_BACKEND),
}
"""What the VM has, what happens to it then, and what `check` mentions."""


@pytest.mark.parametrize(("asked", "fault", "warned"), HELD.values(), ids=HELD)
def test_what_the_vm_has_is_counted_and_check_says_so(
    world: World,
    journal: Journal,
    asked: Sequence[Request],
    fault: Callable[[World], object],
    warned: Code | None,
) -> None:
    world.build({}, {})
    manager = world.manager(journal)
    manager.attach_all(asked, owner="c0")
    fault(world)
    checked = manager.check_places(asked, owner="c1")
    assert refusals(checked) == {}
    assert all(request.is_counted for request in checked)
    assert {f.code for request in checked for f in request.findings} == ({warned} - {None})
    assert attempt(manager.plan, asked, managed=False) is None
    held = manager.attach_all(asked, owner="c1")
    assert {hold.owner for hold in manager.attachments()} == {"c0", "c1"}
    assert {hold.device_id for hold in held} == {h.device_id for h in manager.attachments()}


def test_what_the_vm_has_is_refused_where_the_policy_does_not_allow_it(
    world: World, journal: Journal
) -> None:
    world.build({}, {})
    world.manager(journal).attach(DISK, owner="c0")
    no_policy(world)
    manager = world.manager(journal)
    assert refusals(manager.check_places([DISK], owner="c1")).keys() == {Code.NOT_ALLOWED}
    assert isinstance(attempt(manager.attach_all, [DISK], managed=False), PolicyError)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not row.warns and row.code not in NEVER_ALLOWED], ids=str
)
def test_what_is_allowed_to_check_is_allowed_to_plan(
    row: Row, world: World, journal: Journal
) -> None:
    manager = prepared(row, world, journal, with_fault=True)
    checked = manager.check_places(row.asked, owner="c1", allow=[row.code], managed=row.binds)
    refused = refusals(checked)
    assert row.code not in refused
    error: DeviceError | None = None
    try:
        manager.plan(row.asked, owner="c1", allow=[row.code], managed=row.binds)
    except DeviceError as raised:
        error = raised
    assert (error is not None) is bool(refused), error


@pytest.mark.parametrize("row", [row for row in ROWS if row.binds], ids=str)
@pytest.mark.parametrize("with_fault", [True, False], ids=["with", "without"])
def test_what_check_refuses_of_a_managed_function_bind_refuses(
    row: Row, world: World, journal: Journal, *, with_fault: bool
) -> None:
    manager = prepared(row, world, journal, with_fault=with_fault)
    found = refusals(manager.check_places(row.asked, owner="c1", managed=True))
    kernel = FakeKernel(world.tree, takes={"nouveau": [GPU]})
    group = find_vfio_device(GPU, kernel)
    if not with_fault:
        assert not found
        assert Binder(journal, kernel).bind(group)
        return
    assert found.keys() == {row.code}
    with pytest.raises(InUse) as caught:
        Binder(journal, kernel).bind(group)
    assert set(caught.value.codes) == {row.code}
    assert not kernel.writes
