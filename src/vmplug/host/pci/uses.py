"""The uses of a function of the host: its block devices and its network interfaces.

Everything is found from the classes, each entry of which is a link to its place in the device
tree: a disk of an NVMe drive, of a SCSI controller or of a virtio device is below the PCI function
that it comes from. So is everything behind a bridge or a volume management device.
Source: Documentation/admin-guide/sysfs-rules.rst; proc_net(5); net/ipv6/addrconf.c, route.c.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import msgspec

from vmplug.address import Bdf, find_bdf
from vmplug.cached import cached_property
from vmplug.devnum import DevNum, is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.block.sysfs import list_block_directories
from vmplug.host.root import HostRoot

if TYPE_CHECKING:
    from vmplug.host.use.interfaces import OwnNetwork

_BLOCK, _NET = "/sys/class/block", "/sys/class/net"
_RDMA, _VIRTUAL_RDMA = "/sys/class/infiniband", "/sys/devices/virtual/"
_NETCONSOLE = "/sys/kernel/config/netconsole"
_USUAL_TARGET = "../../devices/"

_NVME_PATH = re.compile(r"nvme([0-9]+)c[0-9]+(n[0-9]+)\Z", re.ASCII)
"""One path of a disk with several controllers, without a device number; the disk itself is not
below a PCI function. Source: nvme_mpath_set_disk_name, Linux drivers/nvme/host/multipath.c."""

_NVME_DISK = re.compile(r"(nvme[0-9]+n[0-9]+)(?:p[0-9]+)?\Z", re.ASCII)

_GUID_BYTES, _IS_LOCAL = 8, 0x02
"""An EUI-64 of an Ethernet address has FF FE in its middle, and this bit the other way round."""

_PACKET_FIELDS = 9
"""sk, RefCnt, Type, Proto, Iface, R, Rmem, User, Inode: the sockets of /proc/net/packet."""

RECORDED_NETWORK = "/vmplug-network"
"""Where a record has what only netlink says."""
_OWN_ADDRESS = re.compile(
    r"\|-- ((?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d))\n +/32 host LOCAL",
    re.ASCII,
)

_RTF_UP, _RTF_GATEWAY, _RTF_REJECT = 0x1, 0x2, 0x200
"""Source: include/uapi/linux/route.h."""
_RTF_ANYCAST, _RTF_LOCAL = 0x100000, 0x80000000
"""Source: include/uapi/linux/ipv6_route.h."""
_LINK_PREFIX, _MULTICAST_PREFIX = 0xFE80 >> 6, 0xFF
_IFF_UP = 0x1
_SCOPE_LINK = 0x20
"""Source: IPV6_ADDR_LINKLOCAL, include/net/ipv6.h."""


class NetInterface(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface and its uses by the host.

    `master` is the bridge or bond that it is part of, or else the first of `uppers`, the VLANs and
    the like built on it; None for neither. `rdma` are the devices of rdma_rxe and siw that send
    through it. The link-local address that every interface has does not count. In a copy of a
    host an IPv4 address is found by its route; `has_address` is None where another one has none.
    `has_only_a_route`: it has a route, and neither a default route nor an address.
    `has_default_route` and `has_address` are None on a host without these tables. `has_pppoe`: a
    PPP connection goes through it, which needs no address; `has_program`: it has a program of XDP,
    which takes its packets. `is_kept`: the master is a network card too, such as that of a VM
    whose fast path this is, and does not let it go. `listeners` are the inodes of the sockets that
    take its packets past the network stack (AF_PACKET), as those of a DHCP client or a sniffer do.
    `netconsoles` are the directories of the targets to which the kernel logs through it.
    """

    name: str
    has_default_route: bool | None
    has_address: bool | None
    master: str | None
    uppers: tuple[str, ...] = ()
    rdma: tuple[str, ...] = ()
    has_only_a_route: bool = False
    has_pppoe: bool = False
    has_program: bool = False
    is_kept: bool = False
    listeners: tuple[int, ...] = ()
    netconsoles: tuple[str, ...] = ()

    @property
    def is_used(self) -> bool:
        """Whether the host needs it."""
        return bool(self.uses)

    @property
    def uses(self) -> tuple[str, ...]:
        """What the host has given it, in words."""
        places = dict.fromkeys(filter(None, (self.master, *self.uppers, *self.rdma)))
        words = (
            "the default route" if self.has_default_route else None,
            "an address" if self.has_address else None,
            "a route" if self.has_only_a_route else None,
            f"a place in {', '.join(places)}" if places else None,
            "a PPPoE connection" if self.has_pppoe else None,
            "an XDP program" if self.has_program else None,
            "a console of the kernel (netconsole)" if self.netconsoles else None,
        )
        return tuple(filter(None, words))


class BlockDevices:
    """The host's block devices by the functions that they come from, read when first needed."""

    def __init__(self, root: HostRoot) -> None:
        self._root = root

    @cached_property
    def _paths(self) -> Mapping[str, str]:
        return read_block_paths(self._root)

    @cached_property
    def _names(self) -> Mapping[Bdf, Sequence[str]]:
        return group_by_function(self._paths)

    def of(self, bdf: Bdf) -> list[DevNum]:
        """The disks and partitions that come from a function. Raises AttributeReadError."""
        names = self._names.get(bdf, ())
        numbers = (self._root.read_devnum(f"{self._paths[name]}/dev") for name in names)
        return [number for number in numbers if number]


def read_block_paths(root: HostRoot) -> dict[str, str]:
    """The directory of every block device by its kernel name, without links."""
    paths = dict(class_paths(_BLOCK, root))
    if not root.is_live:
        for name, path in list_block_directories(root).items():
            if name not in paths:
                paths[name] = root.real_path(path)
    return paths


def group_by_function(paths: Mapping[str, str]) -> dict[Bdf, list[str]]:
    """The names of devices by the functions above their directories."""
    found: dict[Bdf, set[str]] = {}
    find = cache(find_bdf)
    for name, path in paths.items():
        for part in path.split("/") if ":" in path else ():  # most are virtual
            if bdf := find(part):
                found.setdefault(bdf, set()).add(name)
    heads: dict[str, set[str]] = {}
    for name in paths:
        if match := _NVME_DISK.match(name):
            heads.setdefault(match[1], set()).add(name)
    return {bdf: sorted(_with_heads(names, heads)) for bdf, names in found.items()}


def _with_heads(names: set[str], heads: Mapping[str, set[str]]) -> set[str]:
    """The names, and the multipath disks of those that are only paths, with their partitions."""
    matches = filter(None, map(_NVME_PATH.match, names))
    return names.union(*(heads.get(f"nvme{match[1]}{match[2]}", ()) for match in matches))


def read_network_interfaces(
    bdf: Bdf | str, root: HostRoot, read_uses: "Callable[[], NetworkUses] | None" = None
) -> list[NetInterface]:
    """The network interfaces that come from a function. Raises AttributeReadError.

    `read_uses` has the uses of all of the host's, where they are read for several functions.
    """
    directory = f"{root.pci_devices}/{bdf}"
    real = root.real_path(directory)
    below = {name for name, path in class_paths(_NET, root) if path.startswith(f"{real}/")}
    names = sorted(below | set(root.list_dir(f"{directory}/net")))
    if not names:
        return []
    uses = read_uses() if read_uses else read_network_uses(root)
    return [uses.interface(name) for name in names]


_OF_NAMESPACES = ("net", "infiniband", "ieee80211")
"""The classes of which a device is in one network namespace: interfaces, RDMA devices, radios."""


def read_net_parents(bdf: Bdf | str, root: HostRoot) -> dict[str, tuple[str, ...]]:
    """The names of a function's devices that have parts in a network namespace.

    With the classes of which none is here. They are the function itself, or a device below it: of
    virtio, of USB, a subfunction. A device whose driver made an interface has a directory `net`,
    in which sysfs shows only those of its own namespace.
    Source: net_namespace operations of struct class, net/core/net-sysfs.c,
    drivers/infiniband/core/device.c, net/wireless/sysfs.c; `net` measured with Linux 6.1 and 6.12.
    """
    paths = _devices_below(root.real_path(f"{root.pci_devices}/{bdf}"), root)
    found = {
        path: [k for k in _OF_NAMESPACES if root.stat_or_none(f"{path}/{k}")] for path in paths
    }
    return {
        path.rpartition("/")[2]: tuple(k for k in kinds if not root.list_dir(f"{path}/{k}"))
        for path, kinds in found.items()
        if kinds
    }


_DEVICES_DEEP = 6
"""As deep as the kernel lets one USB hub be behind another."""


def _devices_below(path: str, root: HostRoot, depth: int = 0) -> Iterator[str]:
    """The directory of a device, and of all that are in it; other functions are not.

    Each has a file uevent, which a copy of a host may lack.
    """
    yield path
    for name in root.list_dir(path) if depth < _DEVICES_DEEP else ():
        below = f"{path}/{name}"
        status = root.stat_or_none(below if not root.is_live else f"{below}/uevent")
        is_device = status and (root.is_live or stat.S_ISDIR(status.st_mode))
        if is_device and find_bdf(name) is None and root.real_path(below) == below:
            yield from _devices_below(below, root, depth + 1)


def read_net_paths(root: HostRoot) -> dict[str, str]:
    """The directory of every network interface by its name, without links."""
    return dict(class_paths(_NET, root))


def class_paths(directory: str, root: HostRoot) -> Iterator[tuple[str, str]]:
    """The directory of every device that a directory has links to, by their names."""
    for name in root.list_dir(directory):
        path = f"{directory}/{name}"
        try:
            target = root.read_link(path)
        except AttributeReadError:  # a file of that class, such as bonding_masters, or a copy
            target = None
        if target and target.startswith(_USUAL_TARGET) and "/../" not in target[len("../..") :]:
            yield name, f"/sys/{target.removeprefix('../../')}"
        else:
            yield name, root.real_path(path)


class NetworkUses(msgspec.Struct, frozen=True, kw_only=True):
    """The interfaces that have routes and addresses; None where there are no such tables.

    `has_other_addresses`: the host has an address, and no table says of which interface.
    `tunnels` are those that send through an interface and are not among its uppers in sysfs, which
    only the running host says; `rdma` the soft RDMA devices, each by the interface.
    `with_pppoe` have a PPPoE connection, `with_program` one of XDP. `listeners` are the inodes of
    packet sockets by the number of their interface, `netconsoles` targets by its name.
    """

    with_default_route: frozenset[str] | None
    with_address: frozenset[str] | None
    with_route: frozenset[str]
    has_other_addresses: bool = False
    tunnels: Mapping[str, Sequence[str]] = msgspec.field(default_factory=dict)
    rdma: Mapping[str, Sequence[str]] = msgspec.field(default_factory=dict)
    with_pppoe: frozenset[str] = frozenset()
    with_program: frozenset[str] = frozenset()
    listeners: Mapping[int, Sequence[int]] = msgspec.field(default_factory=dict)
    netconsoles: Mapping[str, Sequence[str]] = msgspec.field(default_factory=dict)
    root: HostRoot

    def interface(self, name: str) -> NetInterface:
        """The uses of one interface by the host. Raises AttributeReadError."""
        routed, addressed = self.with_default_route, self.with_address
        has_address = None if addressed is None else name in addressed
        if self.has_other_addresses and not has_address:
            has_address = None
        master, uppers = _read_above(name, self.root)
        uppers = tuple(dict.fromkeys((*uppers, *self.tunnels.get(name, ()))))
        return NetInterface(
            name=name,
            has_default_route=None if routed is None else name in routed,
            has_address=has_address,
            master=master or next(iter(uppers), None),
            uppers=uppers,
            rdma=tuple(self.rdma.get(name, ())),
            has_only_a_route=name in self.with_route - (routed or set()) - (addressed or set()),
            has_pppoe=name in self.with_pppoe,
            has_program=name in self.with_program,
            is_kept=master is not None and _has_device(master, self.root),
            listeners=self._listeners_of(name),
            netconsoles=tuple(self.netconsoles.get(name, ())),
        )

    def _listeners_of(self, name: str) -> tuple[int, ...]:
        if not self.listeners:
            return ()
        index = self.root.read_int(f"{_NET}/{name}/ifindex")
        return tuple(self.listeners.get(index, ())) if index else ()


def read_network_uses(root: HostRoot) -> NetworkUses:
    """Which interfaces the host has given routes and addresses. Raises AttributeReadError."""
    routes4 = _read_table("/proc/net/route", root, name=0, numbers=(1, 7, 3))
    routes6 = _read_table("/proc/net/ipv6_route", root, name=9, numbers=(0, 1, 8))
    addresses6 = _read_table("/proc/net/if_inet6", root, name=5, numbers=(3,))
    routed4 = [row for row in _routed(routes4 or ()) if not _is_down(row[0], root)]
    # The kernel's own default routes of IPv6, on `lo`, reject everything.
    defaults = {name for name, width in (*routed4, *_routed(routes6 or ())) if not width}
    addressed = {name for name, _ in routed4}
    addressed |= {name for name, (scope,) in addresses6 or () if scope != _SCOPE_LINK}
    others = {name for name, _ in _routed(row for row in routes6 or () if not _is_kernels(row))}
    own = _read_own(root)
    if own:
        addressed |= own.addressed
        others |= own.routed
    return NetworkUses(
        has_other_addresses=own is None and _has_unrouted(routes4 or (), root),
        tunnels=own.built if own else {},
        rdma=_read_soft_rdma(root),
        with_pppoe=frozenset(_read_pppoe(root)),
        with_program=own.programmed if own else frozenset(),
        listeners=_read_listeners(root),
        netconsoles=_read_netconsoles(root),
        with_route=frozenset(others),
        with_default_route=None if routes4 is None and routes6 is None else frozenset(defaults),
        with_address=None if routes4 is None and addresses6 is None else frozenset(addressed),
        root=root,
    )


def _is_kernels(route: tuple[str, list[int]]) -> bool:
    """Whether it is a route of IPv6 that the kernel made by itself, for addresses of the link."""
    _, (target, _, flags) = route
    is_of_link = target >> 118 == _LINK_PREFIX or target >> 120 == _MULTICAST_PREFIX
    return is_of_link or bool(flags & (_RTF_LOCAL | _RTF_ANYCAST))


def _read_own(root: HostRoot) -> "OwnNetwork | None":
    """What the kernel says by netlink, now or when a record was made; None for another copy."""
    text = None if root.is_live else root.read_text(RECORDED_NETWORK)
    if not root.is_live and text is None:
        return None
    from vmplug.host.use.interfaces import OwnNetwork, read_own  # noqa: PLC0415  socket: 2.5 ms

    if text is None:
        return read_own()
    import json  # noqa: PLC0415  for records: msgspec reads no name that is not UTF-8

    try:
        return msgspec.convert(json.loads(text), OwnNetwork)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise AttributeReadError(RECORDED_NETWORK, why=str(error)) from error


def _has_unrouted(routes: Iterable[tuple[str, list[int]]], root: HostRoot) -> bool:
    """Whether the host has an IPv4 address that is in no network of its routes.

    Source: fib_trie_seq_show, Linux net/ipv4/fib_trie.c.
    """
    near = [
        (target, mask) for _, (target, mask, flags) in routes if mask and not flags & _RTF_GATEWAY
    ]
    for text in dict.fromkeys(_OWN_ADDRESS.findall(root.read_text("/proc/net/fib_trie") or "")):
        number = int.from_bytes(bytes(map(int, text.split("."))), "little")  # as in the routes
        is_loopback = text.startswith("127.")
        if not is_loopback and not any(number & mask == target for target, mask in near):
            return True
    return False


def _read_soft_rdma(root: HostRoot) -> dict[str, list[str]]:
    """The RDMA devices that are only software, by the interface that each sends through.

    Source: parent_show, Linux drivers/infiniband/sw/rxe/rxe_verbs.c. siw has no such file; the
    interface of its address is known since Linux 6.5. Before, its GUID is made of that address.
    Source: siw_device_create, drivers/infiniband/sw/siw/siw_main.c; include/net/addrconf.h.
    """
    found: dict[str, list[str]] = {}
    for name, path in class_paths(_RDMA, root) if root.list_dir(_RDMA) else ():
        if path.startswith(_VIRTUAL_RDMA):
            files = (f"{path}/parent", f"{path}/ports/1/gid_attrs/ndevs/0")
            texts = ((root.read_attribute(file) or b"").strip() for file in files)
            interface = next(filter(None, texts), None)
            for owner in [os.fsdecode(interface)] if interface else _find_by_guid(path, root):
                found.setdefault(owner, []).append(name)
    return found


def _find_by_guid(path: str, root: HostRoot) -> Iterator[str]:
    """The interfaces whose address the GUID of an RDMA device was made of."""
    guid = _octets(f"{path}/node_guid", root)
    if len(guid) == _GUID_BYTES and guid[3:5] == b"\xff\xfe":
        address = bytes([guid[0] ^ _IS_LOCAL]) + guid[1:3] + guid[5:]
        for name in root.list_dir(_NET):
            if _octets(f"{_NET}/{name}/address", root) == address:
                yield name


def _octets(path: str, root: HostRoot) -> bytes:
    """What a file has in hexadecimal digits and colons; empty for anything else."""
    text = (root.read_attribute(path) or b"").decode(errors="replace").strip()
    try:
        return bytes.fromhex(text.replace(":", ""))
    except ValueError:
        return b""


def _read_pppoe(root: HostRoot) -> Iterator[str]:
    """The interfaces of PPPoE connections, each as long as its process.

    Source: pppoe_seq_show, Linux drivers/net/ppp/pppoe.c; measured with Linux 6.12.
    """
    for line in (root.read_text("/proc/net/pppoe") or "").splitlines()[1:]:
        yield line.rpartition(" ")[2]


def _read_listeners(root: HostRoot) -> dict[int, list[int]]:
    """The packet sockets that are bound to one interface. Source: Linux net/packet/af_packet.c."""
    found: dict[int, list[int]] = {}
    for line in (root.read_text("/proc/net/packet") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) >= _PACKET_FIELDS and is_decimal(fields[4]) and is_decimal(fields[8]):
            found.setdefault(int(fields[4]), []).append(int(fields[8]))
    return found


def _read_netconsoles(root: HostRoot) -> dict[str, list[str]]:
    """The targets that the kernel logs to, each by its interface, which needs no address.

    Source: Documentation/networking/netconsole.rst. Linux before 6.6 does not list those of its
    command line.
    """
    found: dict[str, list[str]] = {}
    for target in root.list_dir(_NETCONSOLE):
        base = f"{_NETCONSOLE}/{target}"
        if root.read_int(f"{base}/enabled"):
            name = os.fsdecode(root.read_attribute(f"{base}/dev_name") or b"").strip()
            found.setdefault(name, []).append(base)
    return found


def _routed(routes: Iterable[tuple[str, list[int]]]) -> list[tuple[str, int]]:
    """The interfaces of routes that lead somewhere; with 0 for a default route."""
    return [
        (name, target | length_or_mask)
        for name, (target, length_or_mask, flags) in routes
        if flags & _RTF_UP and not flags & _RTF_REJECT
    ]


def _is_down(name: str, root: HostRoot) -> bool:
    """Whether an interface is down: then only a route that has others too still names it."""
    flags = root.read_int(f"{_NET}/{name}/flags", base=16)
    return flags is not None and not flags & _IFF_UP


def _has_device(name: str, root: HostRoot) -> bool:
    """Whether an interface is that of a device: bridges, bonds and the like are virtual."""
    return root.stat_or_none(f"{_NET}/{name}/device") is not None


def _read_above(name: str, root: HostRoot) -> tuple[str | None, tuple[str, ...]]:
    """The interface's master, and what else is built on it: a master is listed as upper too."""
    directory = f"{_NET}/{name}"
    target = root.read_link(f"{directory}/master")
    master = target.rpartition("/")[2] if target else None
    entries = (entry for entry in root.list_dir(directory) if entry.startswith("upper_"))
    uppers = (entry.removeprefix("upper_") for entry in entries)
    return master, tuple(upper for upper in uppers if upper != master)


def _read_table(
    path: str, root: HostRoot, *, name: int, numbers: Sequence[int]
) -> list[tuple[str, list[int]]] | None:
    """The interface and some numbers of every line, by their columns; None when it is absent."""
    text = root.read_text(path)
    if text is None:
        return None
    rows = []
    for line in text.split("\n"):
        fields = line.split()
        if not fields or fields[0] == "Iface":
            continue
        try:
            rows.append((fields[name], [int(fields[column], 16) for column in numbers]))
        except (IndexError, ValueError):
            raise AttributeReadError(path, why=f"no route or address: {line[:60]!r}") from None
    return rows
