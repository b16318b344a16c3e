"""HostDevice: the device behind a request on this host, with the facts from the kernel.

Values that `vmplug resolve` reads are NamedTuples, not Structs of msgspec as all others are: they
cost 3 ms at import together, msgspec 9, an eighth of the whole process. A frozen dataclass takes
1 ms, and the module `dataclasses` another.
"""

from typing import TYPE_CHECKING, NamedTuple

from vmplug.devnum import DevNum
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.kind import DeviceType, FoundBy, Identity, IdentityKind
from vmplug.host.pci.group import VfioGroup
from vmplug.host.vhost_user.device import VhostUserSocket

if TYPE_CHECKING:
    from vmplug.host.vhost_user.virtiofsd import Virtiofsd


class SharedDirectory(NamedTuple):
    """A directory to share under `tag`; `host_path` is its canonical path.

    `read_only`: its file system is read-only. `virtiofsd` is the host's program that shares it as
    virtio-fs, None when there is none or none is needed. `file_id` is as for a DiskFile.
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
    def identity(self) -> Identity:
        """The tag and the canonical path: a directory under two tags is two devices."""
        return Identity.of_share(self.tag, self.host_path)

    @property
    def related_identities(self) -> tuple[Identity, ...]:
        """Empty: a directory may be shared any number of times."""
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
    def identity(self) -> Identity:
        """The inode: two descriptors may be of one connection."""
        return Identity(IdentityKind.SOCKET, f"[{self.inode}]")

    @property
    def related_identities(self) -> tuple[Identity, ...]:
        """None."""
        return ()


class EntropySource(NamedTuple):
    """A character device that gives random numbers; `host_path` is its node.

    `file_id` is as for a DiskFile.
    """

    host_path: str
    file_id: str | None = None

    @property
    def devnum(self) -> DevNum | None:
        """The number of the node, whatever its name; None where it is unknown."""
        kind, _, number = (self.file_id or "").partition(" ")
        return DevNum.parse(number) if kind == "char" else None

    @property
    def kind(self) -> DeviceType:
        """Random numbers."""
        return DeviceType.VIRTIO_RNG

    @property
    def found_by(self) -> FoundBy:
        """The path itself."""
        return FoundBy.FILE

    @property
    def identity(self) -> Identity:
        """The path: every VM may have the same source."""
        return Identity(IdentityKind.RNG, self.host_path)

    @property
    def related_identities(self) -> tuple[Identity, ...]:
        """None."""
        return ()


class CharDevice(NamedTuple):
    """A character device or FIFO."""

    device_node: str
    devnum: DevNum | None
    found_by: FoundBy

    @property
    def kind(self) -> DeviceType:
        """No kind of its own: it is only counted."""
        return DeviceType.GENERIC

    @property
    def host_path(self) -> str:
        """The node."""
        return self.device_node

    @property
    def identity(self) -> Identity:
        """Kind and number; for a FIFO, which has no number, its path."""
        if self.devnum:
            return Identity(IdentityKind.CHAR, str(self.devnum))
        return Identity(IdentityKind.FIFO, self.device_node)

    @property
    def related_identities(self) -> tuple[Identity, ...]:
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
