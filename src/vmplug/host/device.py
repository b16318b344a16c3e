"""HostDevice: what a request turned out to be on this host, with the facts the kernel gives.

Small records of facts are NamedTuples: a dataclass costs 0.5 ms at import, ten times as much, and
this is on the way of every `vmplug resolve`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vmplug.devnum import DevNum
from vmplug.host.block.device import BlockDevice, DiskFile, DiskPart
from vmplug.host.kind import DeviceType, FoundBy

if TYPE_CHECKING:
    from vmplug.host.backend import Backend
    from vmplug.host.mdev import MediatedDevice
    from vmplug.host.pci import PciFunction
    from vmplug.host.virtiofsd import Virtiofsd


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
