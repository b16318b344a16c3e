"""HostDevice: what a request turned out to be on this host, with the facts the kernel gives.

Small records of facts are NamedTuples: a dataclass costs 0.5 ms at import, ten times as much, and
this is on the way of every `vmplug resolve`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vmplug.devnum import DevNum
from vmplug.host.image import Qcow2Header
from vmplug.host.kind import DeviceType, FoundBy
from vmplug.host.loop import LoopBacking

if TYPE_CHECKING:
    from vmplug.host.backend import Backend
    from vmplug.host.mdev import MediatedDevice
    from vmplug.host.pci import PciFunction
    from vmplug.host.pmem import PfnInfo
    from vmplug.host.virtiofsd import Virtiofsd


class DiskPart(NamedTuple):
    """A partition of a disk, or the disk of a partition."""

    devnum: DevNum
    device_node: str
    holders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDevice:
    """A block device of the host.

    `holders` are kernel names (`dm-0`, `md0`) of what the kernel built on it. `relatives` are its
    partitions, or the disk it is a partition of; `below` are block devices that it is built on,
    `below_files` files that it or one of those loops to.
    `size_bytes` is None only when sysfs has no entry for the device, and then nothing else is
    known of it either. `sector_bytes` is the logical block size, in which the guest must see the
    disk too for its partition table to make sense.
    """

    kind: DeviceType = field(default=DeviceType.BLOCK, init=False)
    devnum: DevNum
    device_node: str
    found_by: FoundBy
    sysfs_path: str | None = None
    size_bytes: int | None = None
    sector_bytes: int = 512
    read_only: bool = False
    removable: bool = False
    holders: tuple[str, ...] = ()
    relatives: tuple[DiskPart, ...] = ()
    below: tuple[DevNum, ...] = ()
    below_files: tuple[str, ...] = ()
    backing: LoopBacking | None = None

    @property
    def host_path(self) -> str:
        """What QEMU opens."""
        return self.device_node

    @property
    def file_id(self) -> str:
        """What QEMU must have opened; see `vmplug.host.file_id`."""
        return f"block {self.devnum}"

    @property
    def direct_io(self) -> bool:
        """Always: the page cache can be passed by on every block device."""
        return True

    @property
    def identity(self) -> str:
        """Kind and number: no two devices share it, two requests for one device do."""
        return f"block:{self.devnum}"

    @property
    def related_identities(self) -> tuple[str, ...]:
        """Other devices that show the same bytes."""
        devnums = [*(part.devnum for part in self.relatives), *self.below]
        files = (f"file:{path}" for path in self.below_files)
        return (*(f"block:{devnum}" for devnum in devnums), *files)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFile:
    """A regular file that is to be a disk or an NVDIMM; `host_path` is its canonical path.

    `file_id` tells it from another file of that name (see `vmplug.host.file_id`), None where
    nobody looked. `read_only` says that its file system takes no writes, `direct_io` that it can
    be read past the page cache (O_DIRECT). `qcow2` is its header, None for anything but a qcow2
    image; `pfn` is the information block of persistent memory, None without one.
    """

    kind: DeviceType = field(default=DeviceType.BLOCK, init=False)
    found_by: FoundBy = FoundBy.FILE
    host_path: str
    size_bytes: int
    file_id: str | None = None
    read_only: bool = False
    qcow2: Qcow2Header | None = None
    pfn: "PfnInfo | None" = None
    direct_io: bool = False

    @property
    def sector_bytes(self) -> int:
        """The logical block size a disk image is made for."""
        return 512

    @property
    def identity(self) -> str:
        """The canonical path."""
        return f"file:{self.host_path}"

    @property
    def related_identities(self) -> tuple[str, ...]:
        """None: the loop devices on it are found as its holders."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostUserSocket:
    """The socket of a process that serves a device: a disk, a network, a directory.

    `devnum` is the number that stands for it in the vhost-user store; None when the request named
    the socket itself. `backend` is what the process said when it was asked, None before that.
    """

    kind: DeviceType
    found_by: FoundBy = FoundBy.VHOST_USER_STORE
    devnum: DevNum | None = None
    socket_path: str
    backend: "Backend | None" = None

    @property
    def host_path(self) -> str:
        """What QEMU connects to."""
        return self.socket_path

    @property
    def identity(self) -> str:
        """Kind and number, or the socket's canonical path."""
        return f"block:{self.devnum}" if self.devnum else f"socket:{self.socket_path}"

    @property
    def related_identities(self) -> tuple[str, ...]:
        """None are known: what the process serves cannot be seen from here."""
        return ()


class SharedDirectory(NamedTuple):
    """A directory to be shared under `tag`; `host_path` is its canonical path.

    `read_only` says that its file system takes no writes. `virtiofsd` is the host's program that
    shares it as virtio-fs, None when it has none or needs none. `file_id` is as for a DiskFile.
    """

    kind: DeviceType
    host_path: str
    tag: str
    read_only: bool = False
    virtiofsd: "Virtiofsd | None" = None
    file_id: str | None = None

    @property
    def found_by(self) -> FoundBy:
        """The path itself."""
        return FoundBy.FILE

    @property
    def identity(self) -> str:
        """The tag and the canonical path: under another tag it is another device."""
        return f"share:{self.tag}:{self.host_path}"

    @property
    def related_identities(self) -> tuple[str, ...]:
        """None: directories may be shared as often as one likes."""
        return ()


class OpenConnection(NamedTuple):
    """A connection to a virtiofsd that this process holds open; `inode` is the socket's."""

    descriptor: int
    inode: int

    @property
    def kind(self) -> DeviceType:
        """A shared directory."""
        return DeviceType.VHOST_USER_FS

    @property
    def found_by(self) -> FoundBy:
        """The descriptor itself."""
        return FoundBy.FILE

    @property
    def host_path(self) -> str:
        """The socket as /proc names it."""
        return f"socket:[{self.inode}]"

    @property
    def identity(self) -> str:
        """The socket as /proc names it."""
        return self.host_path

    @property
    def related_identities(self) -> tuple[str, ...]:
        """None."""
        return ()


class EntropySource(NamedTuple):
    """A character device that gives random numbers; `host_path` is its node.

    `file_id` is as for a DiskFile.
    """

    host_path: str
    file_id: str | None = None

    @property
    def kind(self) -> DeviceType:
        """Random numbers."""
        return DeviceType.VIRTIO_RNG

    @property
    def found_by(self) -> FoundBy:
        """The path itself."""
        return FoundBy.FILE

    @property
    def identity(self) -> str:
        """The path: every VM may have the same source."""
        return f"rng:{self.host_path}"

    @property
    def related_identities(self) -> tuple[str, ...]:
        """None."""
        return ()


class VfioGroup(NamedTuple):
    """An IOMMU group, which is handed over whole or not at all.

    `functions` are its PCI functions, `mediated` is its mediated device, `bridges` stay with the
    host. `strangers` are members of no kind that vmplug knows. `named` is the function or UUID
    that the request named, `device_node` the node; each None when it named the other. `number` is
    None for a device in no group: its host has no IOMMU. `cdev_nodes` are nodes of the members
    themselves, by name, when the request named one and iommufd can use them. `disks` are the
    block devices that the host has of the functions.
    """

    number: int | None
    device_node: str | None
    functions: tuple["PciFunction", ...]
    bridges: tuple["PciFunction", ...] = ()
    mediated: "MediatedDevice | None" = None
    strangers: tuple[str, ...] = ()
    named: str | None = None
    found_by: FoundBy = FoundBy.SYSFS
    cdev_nodes: tuple[tuple[str, str], ...] = ()
    disks: tuple[DiskPart, ...] = ()

    @property
    def kind(self) -> DeviceType:
        """VFIO."""
        return DeviceType.VFIO

    @property
    def members(self) -> tuple[str, ...]:
        """The BDFs of the functions, or the UUID of the mediated device."""
        return (
            (self.mediated.uuid,) if self.mediated else tuple(str(f.bdf) for f in self.functions)
        )

    @property
    def host_path(self) -> str:
        """The node that was named, or the one that the group has while VFIO holds it."""
        return self.device_node or (self.named or "" if self.number is None else self.group_node)

    @property
    def group_node(self) -> str:
        """The node that the group has while VFIO holds it, if the kernel makes such nodes."""
        return f"/dev/vfio/{self.number}"

    @property
    def identity(self) -> str:
        """The first member: group numbers are given anew when devices come and go."""
        return f"vfio:{self.members[0] if self.members else self.number}"

    @property
    def related_identities(self) -> tuple[str, ...]:
        """The other members, the physical function of a virtual one, and the disks."""
        others = self.members[1:]
        physfns = {str(f.physfn) for f in self.functions if f.physfn} - set(self.members)
        functions = (f"vfio:{name}" for name in (*others, *sorted(physfns)))
        return (*functions, *(f"block:{disk.devnum}" for disk in self.disks))


@dataclass(frozen=True, slots=True, kw_only=True)
class CharDevice:
    """A character device or FIFO."""

    kind: DeviceType = field(default=DeviceType.GENERIC, init=False)
    device_node: str
    devnum: DevNum | None
    found_by: FoundBy

    @property
    def host_path(self) -> str:
        """The node."""
        return self.device_node

    @property
    def identity(self) -> str:
        """Kind and number; a FIFO has none and goes by its path."""
        return f"char:{self.devnum}" if self.devnum else f"fifo:{self.device_node}"

    @property
    def related_identities(self) -> tuple[str, ...]:
        """None."""
        return ()


HostDevice = (
    BlockDevice
    | DiskFile
    | VhostUserSocket
    | SharedDirectory
    | OpenConnection
    | EntropySource
    | VfioGroup
    | CharDevice
)
