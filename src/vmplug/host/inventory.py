"""The inventory: every device of a host that could be handed over, with its users.

One pass over each of the kernel's classes, whose links lead back to the functions: so a function's
disks, interfaces and virtual functions are found without reading its directory.
"""

import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import msgspec
from msgspec import structs

from vmplug.address import Bdf, find_bdf
from vmplug.devnum import DevNum, is_decimal
from vmplug.errors import AttributeReadError, HostError
from vmplug.host.block.inventory import Disk, DiskUses, Pmem, Use, read_disks, read_pmem
from vmplug.host.block.usage import read_usage
from vmplug.host.kind import DeviceType, Identity
from vmplug.host.pci.consoles import Consoles
from vmplug.host.pci.function import PciFunction, read_functions, read_reset_methods
from vmplug.host.pci.iommu import NOIOMMU, find_group
from vmplug.host.pci.mdev import (
    MDEV_DEVICES,
    MdevType,
    MediatedDevice,
    read_mdev_types,
    read_mediated,
)
from vmplug.host.pci.uses import (
    NetInterface,
    NetworkUses,
    group_by_function,
    read_block_paths,
    read_net_paths,
    read_network_uses,
)
from vmplug.host.root import HostRoot, node_number

if TYPE_CHECKING:
    from vmplug.host.vhost_user.store import VhostUserStore

_MAY_BE_CONSOLE = {0x03, 0x07}
"""Displays, and serial ports."""
_CDEVS = "/sys/class/vfio-dev"

T = TypeVar("T")
P = ParamSpec("P")


class Kind(StrEnum):
    """The parts of an inventory."""

    PCI = "pci"
    BLOCK = "block"
    VHOST_USER = "vhost-user"
    PMEM = "pmem"
    MDEV = "mdev"


class HostFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A PCI function, with facts about it from elsewhere on the host.

    `group_node` and `cdev_node` are its nodes while VFIO holds it. `disks` and `networks` are the
    host's devices behind it, `uses` the uses of them by the host or a VM. `reset_methods` are None
    where they are unknown, and until `with_reset_methods` has read them.
    """

    function: PciFunction
    virtfns: tuple[Bdf, ...] = ()
    group_node: str | None = None
    cdev_node: str | None = None
    disks: tuple[str, ...] = ()
    networks: tuple[NetInterface, ...] = ()
    uses: tuple[Use, ...] = ()
    reset_methods: tuple[str, ...] | None = None


class HostMediated(msgspec.Struct, frozen=True, kw_only=True):
    """A mediated device; where `device` is None, `unreadable` is the reason."""

    uuid: str
    device: MediatedDevice | None
    mdev_type: str | None = None
    iommu_group: int | None = None
    group_node: str | None = None
    cdev_node: str | None = None
    uses: tuple[Use, ...] = ()
    unreadable: tuple[str, ...] = ()


class StoredSocket(msgspec.Struct, frozen=True, kw_only=True):
    """A number of the vhost-user store; without a `socket_path`, `problem` is the reason."""

    devnum: DevNum
    kind: DeviceType
    device_node: str
    socket_path: str | None = None
    problem: str | None = None
    uses: tuple[Use, ...] = ()


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of the host; a kind that was not requested is empty.

    `unreadable` are sentences about files that belong to no single device.
    """

    pci: tuple[HostFunction, ...] = ()
    block: tuple[Disk, ...] = ()
    vhost_user: tuple[StoredSocket, ...] = ()
    pmem: tuple[Pmem, ...] = ()
    mdev_types: tuple[MdevType, ...] = ()
    mdev: tuple[HostMediated, ...] = ()
    unreadable: tuple[str, ...] = ()


def read_inventory(
    root: HostRoot,
    *,
    vhost_user_store: "VhostUserStore | None" = None,
    kinds: Collection[Kind] = frozenset(Kind),
    vms: Mapping[Identity, str] | None = None,
) -> Inventory:
    """Every device of these kinds, as far as it can be read; one bad device does not make it fail.

    `vms` are VMs by the identities of what they hold (`block:8:0`, `vfio:0000:3b:00.0`). Raises
    NoSuchDevice when the given vhost-user store does not exist.
    """
    reader = _Reader(root, vms or {})
    wants_disks = not {Kind.PCI, Kind.BLOCK, Kind.PMEM}.isdisjoint(kinds)
    disks = reader.disks() if wants_disks else {}
    return Inventory(
        pci=tuple(reader.functions(disks)) if Kind.PCI in kinds else (),
        block=tuple(disks.values()) if Kind.BLOCK in kinds else (),
        vhost_user=tuple(reader.sockets(vhost_user_store))
        if vhost_user_store and Kind.VHOST_USER in kinds
        else (),
        pmem=tuple(reader.pmem(disks)) if Kind.PMEM in kinds else (),
        mdev_types=tuple(reader.mdev_types()) if Kind.MDEV in kinds else (),
        mdev=tuple(reader.mediated()) if Kind.MDEV in kinds else (),
        unreadable=tuple(reader.unreadable),
    )


class _Reader:
    """Reads the parts in turn, and continues after one that cannot be read."""

    def __init__(self, root: HostRoot, vms: Mapping[Identity, str]) -> None:
        self._root = root
        self._vms = vms
        self.unreadable: list[str] = []
        self._consoles = Consoles(root)
        self._block_paths = self._attempt({}, read_block_paths, root)
        self._group_nodes = self._read_group_nodes()
        self._cdev_nodes = self._read_cdev_nodes()

    def _attempt(self, otherwise: T, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `read`, or the other value with a sentence why it failed."""
        try:
            return read(*args, **kwargs)
        except AttributeReadError as error:
            self.unreadable.append(error.message)
            return otherwise

    def _names(self, directory: str) -> list[str]:
        return self._attempt([], self._root.list_dir, directory)

    def _read_group_nodes(self) -> dict[int | None, str]:
        names = {*self._names("/sys/class/vfio"), *self._names("/dev/vfio")}
        numbers = {name: name.removeprefix(NOIOMMU) for name in names}
        return {int(n): f"/dev/vfio/{name}" for name, n in numbers.items() if is_decimal(n)}

    def _read_cdev_nodes(self) -> dict[str, str]:
        """The nodes of devices by their BDF or UUID, as far as they are in /dev."""
        there, found = set(self._names("/dev/vfio/devices")), {}
        for name in self._names(_CDEVS):
            real = self._attempt("", self._root.real_path, f"{_CDEVS}/{name}")
            device, is_one, _ = real.rpartition("/vfio-dev/")
            if is_one and name in there:
                found[device.rpartition("/")[2]] = f"/dev/vfio/devices/{name}"
        return found

    def disks(self) -> dict[str, Disk]:
        """All block devices by name."""
        usage = read_usage(self._root)
        mounts = self._attempt(None, lambda: usage.mounts)
        swaps = self._attempt(None, lambda: usage.swaps)
        unknown = {
            "mount": mounts is None or usage.unknown_mounts,
            "swap": swaps is None or usage.unknown_swap,
        }
        uses = DiskUses(
            mounts=mounts or (),
            swaps=swaps or (),
            loops=self._attempt((), lambda: usage.loops),
            unknown=tuple(kind for kind, is_unknown in unknown.items() if is_unknown),
        )
        found = self._attempt([], read_disks, self._block_paths, uses, self._vms, self._root)
        return {disk.name: disk for disk in found}

    def pmem(self, disks: Mapping[str, Disk]) -> list[Pmem]:
        """Persistent memory."""
        return self._attempt([], read_pmem, self._block_paths, disks, self._root)

    def functions(self, disks: Mapping[str, Disk]) -> Iterator[HostFunction]:
        """All PCI functions."""
        functions = self._attempt([], read_functions, self._root)
        disks_of = group_by_function(self._block_paths)
        networks_of = self._networks()
        cdevs = {bdf: node for n, node in self._cdev_nodes.items() if (bdf := find_bdf(n))}
        virtfns: dict[Bdf, list[Bdf]] = {}
        for function in functions:
            if function.physfn is not None:
                virtfns.setdefault(function.physfn, []).append(function.bdf)
        # Most functions have nothing of this, so the common case is kept cheap.
        rich = disks_of.keys() | networks_of.keys() | cdevs.keys() | virtfns.keys()
        group_nodes, vms = self._group_nodes, self._vms
        for function in functions:
            bdf, class_code = function.bdf, function.class_code
            entry = HostFunction(
                function=function, group_node=group_nodes.get(function.iommu_group)
            )
            if bdf in rich:
                entry = structs.replace(
                    entry, virtfns=tuple(virtfns.get(bdf, ())), cdev_node=cdevs.get(bdf)
                )
                if not function.is_bridge:
                    own = [disks[name] for name in disks_of.get(bdf, ()) if name in disks]
                    entry = _with_holdings(entry, own, networks_of.get(bdf, ()))
            if class_code is not None and class_code >> 16 in _MAY_BE_CONSOLE:
                entry = self._with_console(entry)
            if vms:
                by_vms = self._vm_uses(Identity.of_vfio(bdf), str(bdf))
                entry = structs.replace(entry, uses=(*entry.uses, *by_vms))
            yield entry

    def _vm_uses(self, identity: Identity, device: str) -> Iterator[Use]:
        if vm := self._vms.get(identity):
            yield Use("vm", device, vm)

    def _with_console(self, entry: HostFunction) -> HostFunction:
        """What the host's screen or console is on."""
        if not self._attempt([], self._consoles.list_of, entry.function):
            return entry
        return structs.replace(entry, uses=(*entry.uses, Use("console", str(entry.function.bdf))))

    def _networks(self) -> dict[Bdf, list[NetInterface]]:
        by_function = group_by_function(self._attempt({}, read_net_paths, self._root))
        unknown = NetworkUses(
            with_default_route=None, with_address=None, with_route=frozenset(), root=self._root
        )
        uses = self._attempt(unknown, read_network_uses, self._root) if by_function else unknown
        return {
            bdf: [
                self._attempt(
                    NetInterface(name=name, has_default_route=None, has_address=None, master=None),
                    uses.interface,
                    name,
                )
                for name in names
            ]
            for bdf, names in by_function.items()
        }

    def mdev_types(self) -> list[MdevType]:
        """The mediated device types that devices offer."""
        return self._attempt([], read_mdev_types, self._root)

    def mediated(self) -> Iterator[HostMediated]:
        """All mediated devices."""
        for uuid in self._names(MDEV_DEVICES):
            path = f"{MDEV_DEVICES}/{uuid}"
            try:
                device = read_mediated(path, self._root)
                group = find_group(path, self._root)
                link = self._root.read_link(f"{path}/mdev_type")
            except AttributeReadError as error:
                yield HostMediated(uuid=uuid, device=None, unreadable=(error.message,))
                continue
            yield HostMediated(
                uuid=uuid,
                device=device,
                mdev_type=link.rpartition("/")[2] if link else None,
                iommu_group=group,
                group_node=None if group is None else self._group_nodes.get(group),
                cdev_node=self._cdev_nodes.get(uuid),
                uses=tuple(self._vm_uses(Identity.of_vfio(uuid), uuid)),
            )

    def sockets(self, vhost_user_store: "VhostUserStore") -> Iterator[StoredSocket]:
        """The numbers of a vhost-user store."""
        for socket in read_sockets(vhost_user_store, self._root):
            uses = self._vm_uses(Identity.of_block(socket.devnum), socket.device_node)
            yield structs.replace(socket, uses=tuple(uses))


def with_reset_methods(entry: HostFunction, root: HostRoot) -> HostFunction:
    """The function with its reset methods, which cost as much to read as all its other files.

    A file that cannot be read is listed in `function.unreadable`.
    """
    try:
        return structs.replace(entry, reset_methods=read_reset_methods(entry.function.bdf, root))
    except AttributeReadError as error:
        unreadable = (*entry.function.unreadable, error.message)
        return structs.replace(
            entry, function=structs.replace(entry.function, unreadable=unreadable)
        )


def _with_holdings(
    entry: HostFunction, disks: Sequence[Disk], networks: Sequence[NetInterface]
) -> HostFunction:
    return structs.replace(
        entry,
        disks=tuple(disk.device_node for disk in disks),
        networks=tuple(networks),
        uses=(
            *(use for disk in disks for use in disk.uses),
            *(_network_use(network) for network in networks if network.is_used),
        ),
    )


def _network_use(network: NetInterface) -> Use:
    return Use("network", network.name, ", ".join(network.uses))


def read_sockets(vhost_user_store: "VhostUserStore", root: HostRoot) -> list[StoredSocket]:
    """Every number of the store, with its socket or the reason why there is none.

    Raises NoSuchDevice when there is no store, AttributeReadError when it cannot be read.
    """
    directory = f"{vhost_user_store.path}/block/devices"
    nodes: dict[DevNum, str] = {}
    for name in root.list_dir(directory):
        status = root.stat_or_none(f"{directory}/{name}")
        if status and stat.S_ISBLK(status.st_mode):
            devnum = node_number(status)
            if vhost_user_store.owns(devnum):
                nodes.setdefault(devnum, f"{directory}/{name}")
    return [
        StoredSocket(
            devnum=devnum,
            kind=vhost_user_store.kind_of(devnum),
            device_node=nodes[devnum],
            socket_path=None if isinstance(answer, HostError) else answer.socket_path,
            problem=answer.message if isinstance(answer, HostError) else None,
        )
        for devnum, answer in vhost_user_store.find_sockets(nodes).items()
    ]
