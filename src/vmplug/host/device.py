"""HostDevice: what a request turned out to be on this host, with the facts the kernel gives.

Small records of facts are NamedTuples: a dataclass costs 0.5 ms at import, ten times as much, and
this is on the way of every `vmplug resolve`.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from vmplug.devnum import DevNum
from vmplug.host.image import Qcow2Header
from vmplug.host.loop import LoopBacking


class DeviceType(StrEnum):
    """Kinds of device, in the words of Kata's config.go."""

    VFIO = "vfio"
    BLOCK = "block"
    GENERIC = "generic"
    VHOST_USER_SCSI = "vhost-user-scsi-pci"
    VHOST_USER_NET = "virtio-net-pci"
    VHOST_USER_BLK = "vhost-user-blk-pci"
    VHOST_USER_FS = "vhost-user-fs-pci"


class FoundBy(StrEnum):
    """Where the host path comes from."""

    SYSFS = "sysfs"
    VHOST_USER_STORE = "vhost-user-store"
    CONTAINER_PATH = "container-path"
    FILE = "file"


class DiskPart(NamedTuple):
    """A partition of a disk, or the disk of a partition."""

    devnum: DevNum
    device_node: str
    holders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDevice:
    """A block device of the host.

    `holders` are kernel names (`dm-0`, `md0`) of what the kernel built on it. `relatives` are its
    partitions, or the disk it is a partition of; `below` are block devices that it is built on.
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
    backing: LoopBacking | None = None

    @property
    def host_path(self) -> str:
        """What QEMU opens."""
        return self.device_node

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
        backing = self.backing
        files = (f"file:{backing.backing_file}",) if backing and not backing.deleted else ()
        devnums = [*(part.devnum for part in self.relatives), *self.below]
        return (*(f"block:{devnum}" for devnum in devnums), *files)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFile:
    """A regular file that is to be a disk; `host_path` is its canonical path.

    `read_only` says that its file system takes no writes, `direct_io` that it can be read past the
    page cache (O_DIRECT). `qcow2` is its header, None for anything but a qcow2 image.
    """

    kind: DeviceType = field(default=DeviceType.BLOCK, init=False)
    found_by: FoundBy = field(default=FoundBy.FILE, init=False)
    host_path: str
    size_bytes: int
    read_only: bool = False
    qcow2: Qcow2Header | None = None
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
    """The socket of a storage daemon that stands behind a vhost-user number."""

    kind: DeviceType
    found_by: FoundBy = field(default=FoundBy.VHOST_USER_STORE, init=False)
    devnum: DevNum
    socket_path: str

    @property
    def host_path(self) -> str:
        """What QEMU connects to."""
        return self.socket_path

    @property
    def identity(self) -> str:
        """Kind and number."""
        return f"block:{self.devnum}"

    @property
    def related_identities(self) -> tuple[str, ...]:
        """None are known: the daemon's disk cannot be seen from here."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CharDevice:
    """A character device or FIFO: `generic`, or `vfio` for the node of an IOMMU group."""

    kind: DeviceType
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


HostDevice = BlockDevice | DiskFile | VhostUserSocket | CharDevice
