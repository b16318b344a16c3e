"""What uses the devices of the host: one value for each request, which reads each table once."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from vmplug.cached import cached_property
from vmplug.devnum import DevNum
from vmplug.host.block.loop_files import Loop, LoopIndex, read_loops
from vmplug.host.root import HostRoot
from vmplug.host.use.claim import VmProcess
from vmplug.host.use.mounts import MountedDevice, parse_mounted_devices, read_swaps
from vmplug.host.use.questions import Questions

if TYPE_CHECKING:
    from vmplug.host.block.twins import LunName
    from vmplug.host.use.interfaces import MovedInterface, OtherNetworks
    from vmplug.host.use.kernel_users import KernelUsers
    from vmplug.host.use.namespaces import Namespaces
    from vmplug.host.use.openers import OpenFiles
    from vmplug.host.use.overlay import Overlay

T = TypeVar("T")
_ZFS = " - zfs "
NO_VMS: Mapping[int, VmProcess] = MappingProxyType({})


class HostUsage:
    """Everything on the host that can use a device, each table read when it is first needed.

    One request has one, so that what is asked of all processes is asked once, and the answers of
    one request agree. `vms` are the processes of vmplug's own VMs, with what the journal says that
    each has: it explains the files of these that are open. `questions` are those to things that
    may not answer. `may_claim`: disks may be opened exclusively, which for that moment keeps
    everybody else from it: a mount, mkfs.
    """

    def __init__(
        self, root: HostRoot, *, vms: Mapping[int, VmProcess] = NO_VMS, may_claim: bool = True
    ) -> None:
        self._root = root
        self.questions = Questions()
        self.vms = vms
        self.may_claim = may_claim

    @cached_property
    def open_files(self) -> "OpenFiles":
        """What processes have open."""
        from vmplug.host.use.openers import read_open_files  # noqa: PLC0415  ctypes: 2 ms

        return read_open_files(self._root)

    @cached_property
    def namespaces(self) -> "Namespaces":
        """The namespaces for mounts and networks."""
        from vmplug.host.use.namespaces import read_namespaces  # noqa: PLC0415  2 ms

        return read_namespaces(self.open_files, self._root)

    @cached_property
    def mounts(self) -> tuple[MountedDevice, ...]:
        """The mounts of every mount namespace that can be seen."""
        return tuple(parse_mounted_devices(self.namespaces.tables, self._root))

    @property
    def unknown_mounts(self) -> str | None:
        """Why not all mounts are known; None when they are."""
        why = self.namespaces.unread
        return f"mounts ({why})" if why else None

    @cached_property
    def unknown_members(self) -> str | None:
        """The disks of file systems that no file lists; an exclusive open finds them."""
        has_zfs = self._root.stat_or_none("/sys/module/zfs")
        mounts = (_ZFS in table for table in self.namespaces.tables.values())
        return "disks of ZFS pools (no file lists them)" if has_zfs or any(mounts) else None

    @cached_property
    def mounts_of(self) -> Mapping[DevNum, Sequence[MountedDevice]]:
        """The same by device."""
        found: dict[DevNum, list[MountedDevice]] = {}
        for mount in self.mounts:
            found.setdefault(mount.devnum, []).append(mount)
        return found

    @cached_property
    def swaps(self) -> tuple[str, ...]:
        """The swap areas."""
        return tuple(self._swap_table or ())

    @property
    def unknown_swap(self) -> str | None:
        """Why the swap areas are unknown; None when they are not."""
        # The kernel of a running host may be built without swap.
        has_table = self._swap_table is not None or self._root.is_live
        return None if has_table else "swap space (no /proc/swaps)"

    @cached_property
    def _swap_table(self) -> list[str] | None:
        return read_swaps(self._root)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The loop devices that have a file."""
        return tuple(read_loops(self._root))

    @cached_property
    def loop_index(self) -> LoopIndex:
        """The same by what they are on."""
        return LoopIndex(self.loops, self._root)

    @cached_property
    def luns(self) -> "Mapping[LunName, Sequence[str]]":
        """The disks that have each name of a LUN."""
        from vmplug.host.block.twins import read_luns  # noqa: PLC0415

        return read_luns(self._root)

    @cached_property
    def kernel_users(self) -> "KernelUsers":
        """What the kernel itself uses devices and files for."""
        from vmplug.host.use.kernel_users import read_kernel_users  # noqa: PLC0415  with all findings

        return read_kernel_users(self._root)

    @cached_property
    def overlays(self) -> "Sequence[Overlay]":
        """The overlays of every mount namespace."""
        if not self._root.is_live or not self._root.list_dir("/sys/module/overlay"):
            return ()
        from vmplug.host.use.overlay import read_overlays  # noqa: PLC0415  few hosts have them

        return read_overlays(self.namespaces.tables, self._root)

    def other_names(self, path: str) -> tuple[str, ...]:
        """The names of a file in the layers of an overlay, and in overlays over it."""
        if not self.overlays:
            return ()
        from vmplug.host.use.overlay import find_other_names  # noqa: PLC0415  as above

        return tuple(find_other_names(path, self.overlays, self._root))

    def once(self, read: Callable[[HostRoot], T]) -> T:
        """What a reader of the whole host answers, which is asked once."""
        return self.questions.once(read, lambda: read(self._root))

    @cached_property
    def other_networks(self) -> "OtherNetworks":
        """The network interfaces in other namespaces; none in a copy."""
        from vmplug.host.use.interfaces import OtherNetworks, read_others  # noqa: PLC0415  socket

        if not self.namespaces.networks:
            return OtherNetworks(moved={}, built={})
        return read_others(self.namespaces.networks.values())

    @property
    def moved_interfaces(self) -> "Mapping[str, MovedInterface]":
        """Those that were moved there, by their devices."""
        return self.other_networks.moved


def read_usage(
    root: HostRoot, *, vms: Mapping[int, VmProcess] = NO_VMS, may_claim: bool = True
) -> HostUsage:
    """What uses the devices of the host now, for one request."""
    return HostUsage(root, vms=vms, may_claim=may_claim)
