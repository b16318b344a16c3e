"""A disk: a block device of the host, or a file that becomes one in the VM."""

from typing import TYPE_CHECKING, NamedTuple

from vmplug.devnum import DevNum
from vmplug.host.block.loop import LoopBacking
from vmplug.host.kind import DeviceType, FoundBy, Identity, IdentityKind

if TYPE_CHECKING:
    from vmplug.host.block.image_faults import ImageFault
    from vmplug.host.block.pmem import PfnInfo
    from vmplug.host.block.qcow2 import ImageFile, Qcow2Header
    from vmplug.host.block.queue import QueueFacts


class DiskPart(NamedTuple):
    """Another device that shows bytes of a disk: a partition, its disk, another name.

    `is_whole`: it is the very device under another name, or what a loop device is on.
    """

    devnum: DevNum
    device_node: str
    holders: tuple[str, ...] = ()
    is_whole: bool = False


class BlockDevice(NamedTuple):
    """A block device of the host.

    `holders` are kernel names (`dm-0`, `md0`) of what the kernel built on it. `relatives` are its
    partitions, or the disk it is a partition of; `below` are block devices that it is built on,
    `below_files` files that it or one of those loops to. `sector_bytes` is the logical block size,
    which the guest must use too, as the partition table depends on it. A fact that sysfs does not
    give is None; without a `size_bytes` it has no entry for the device at all. `twins` are
    other names of the same LUN, `behind` the devices below it that others can use nevertheless:
    what a loop device is on, and other names of a LUN; `loops` are the loop devices on all of
    these with their partitions. All three are None until a check looks for them. `looks_like` is
    the format of its content, None for raw, or where the request states one; `is_silent`: it did
    not answer in time (see `vmplug.host.block.content`). `queue` is read only for `check` and
    `attach`, as are `own_name`, which is one for every way to the same LUN (see
    `vmplug.host.block.twins`), and `has_aio`: whether the host has a context left for aio=native.
    """

    devnum: DevNum
    device_node: str
    found_by: FoundBy
    sysfs_path: str | None = None
    size_bytes: int | None = None
    sector_bytes: int | None = None
    read_only: bool | None = None
    removable: bool | None = None
    holders: tuple[str, ...] | None = None
    relatives: tuple[DiskPart, ...] = ()
    below: tuple[DevNum, ...] = ()
    below_files: tuple[str, ...] = ()
    backing: LoopBacking | None = None
    twins: tuple[DiskPart, ...] | None = None
    behind: tuple[DiskPart, ...] | None = None
    loops: tuple[DevNum, ...] | None = None
    looks_like: str | None = None
    is_silent: bool = False
    queue: "QueueFacts | None" = None
    own_name: str | None = None
    has_aio: bool = True

    @property
    def same_bytes(self) -> tuple[DiskPart, ...]:
        """The relatives, the twins, and what is behind it."""
        return (*self.relatives, *(self.twins or ()), *(self.behind or ()))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Its node and those of all that shows the same bytes."""
        return (self.device_node, *(part.device_node for part in self.same_bytes))

    @property
    def kind(self) -> DeviceType:
        """A disk."""
        return DeviceType.BLOCK

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
        """Always true: every block device supports O_DIRECT."""
        return True

    @property
    def physical_bytes(self) -> int:
        """The unit that the disk writes without reading first; the logical block size at least."""
        known = self.queue.physical_bytes if self.queue else None
        return max(known or 0, self.sector_bytes or 0)

    @property
    def identity(self) -> Identity:
        """Kind and number: unique to a device, and the same for all requests for it."""
        return Identity.of_block(self.devnum)

    @property
    def related_identities(self) -> tuple[Identity, ...]:
        """Other devices that show the same bytes."""
        parts = (part.devnum for part in self.same_bytes)
        devnums = [*parts, *self.below, *(self.loops or ())]
        files = (Identity(IdentityKind.FILE, path) for path in self.below_files)
        return (*map(Identity.of_block, devnums), *files)


class DiskFile(NamedTuple):
    """A regular file that becomes a disk or an NVDIMM; `host_path` is its canonical path.

    `file_id` identifies the file, whatever has its name later (see `vmplug.host.file_id`); None
    where it was not read. `read_only`: its file system is read-only. `direct_io`: it can be read
    without the page cache (O_DIRECT). `qcow2` is its header, None for anything but a qcow2 image;
    `image` has the files that it makes QEMU open, None where they are not known or not followed;
    `written` are these with all that shows their bytes, `only_read` those that are only read.
    `pfn` is the information block of persistent memory, None without one. `other_names` lead to it
    through an overlay or a layer of one (see `vmplug.host.use.overlay`), and `loops` are the loop
    devices on it with their partitions, None until a check looks for them. `looks_like` is as for
    a BlockDevice; `faults` are those of an image whose format the request states as qcow2.

    For `check` and `attach` also: `direct_io_bytes` is the unit of direct I/O, None where it does
    not matter; `unallocated_bytes` are those of a sparse file that have no place on the disk yet,
    and `free_bytes` what its file system has left for them. `has_aio` is as for a BlockDevice.
    """

    host_path: str
    size_bytes: int
    found_by: FoundBy = FoundBy.FILE
    file_id: str | None = None
    read_only: bool = False
    qcow2: "Qcow2Header | None" = None
    image: "ImageFile | None" = None
    pfn: "PfnInfo | None" = None
    direct_io: bool = False
    other_names: tuple[str, ...] = ()
    loops: tuple[DevNum, ...] | None = None
    looks_like: str | None = None
    faults: "tuple[ImageFault, ...]" = ()
    written: tuple[Identity, ...] = ()
    only_read: tuple[Identity, ...] = ()
    direct_io_bytes: int | None = None
    unallocated_bytes: int = 0
    free_bytes: int | None = None
    has_aio: bool = True

    @property
    def nodes(self) -> tuple[str, ...]:
        """Its path, and its names in overlays."""
        return (self.host_path, *self.other_names)

    @property
    def kind(self) -> DeviceType:
        """A disk."""
        return DeviceType.BLOCK

    @property
    def sector_bytes(self) -> int:
        """The logical block size a disk image is made for."""
        return 512

    @property
    def physical_bytes(self) -> int:
        """That of the logical blocks: what is below the file system is not the guest's concern."""
        return self.sector_bytes

    @property
    def identity(self) -> Identity:
        """The canonical path."""
        return Identity(IdentityKind.FILE, self.host_path)

    @property
    def related_identities(self) -> tuple[Identity, ...]:
        """Its names in overlays, the loop devices on it, and the other files of the image."""
        names = (Identity(IdentityKind.FILE, path) for path in self.other_names)
        loops = map(Identity.of_block, self.loops or ())
        return (*names, *loops, *self.written, *self.only_read)
