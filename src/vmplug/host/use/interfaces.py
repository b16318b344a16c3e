"""The network interfaces of the host, as the kernel says by netlink.

The kernel names the device behind an interface in every namespace; sysfs shows only the interfaces
of the namespace that it was mounted in, and /proc/net only some of their routes and addresses.
Source: rtnetlink(7); include/uapi/linux/{if_link,if_addr,rtnetlink,net_namespace}.h;
IFLA_PARENT_DEV_NAME since Linux 5.14.
"""

import _socket as socket  # what `socket` adds takes 7 % of the time that importing click takes
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing

import msgspec

from vmplug.host.use.enter import CLONE_NEWNET, ask_inside

_RTM_GETLINK, _RTM_GETADDR, _RTM_GETROUTE, _RTM_GETNSID, _RTM_GETNEXTHOP = 18, 22, 26, 90, 106
_NLMSG_DONE, _NLMSG_ERROR = 3, 2
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_IFLA_IFNAME, _IFLA_LINK, _IFLA_LINK_NETNSID, _IFLA_XDP, _IFLA_PARENT_DEV_NAME = 3, 5, 37, 43, 56
_IFLA_XDP_ATTACHED = 2
_NETNSA_NSID, _NETNSA_PID = 1, 2
_RTA_OIF, _RTA_MULTIPATH, _NHA_OIF = 4, 9, 5
_RTNH_F_DEAD = 1
_RTN_UNICAST, _RTPROT_KERNEL, _SCOPE_LINK = 1, 2, 253
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, index, flags, change."""
_ADDRESS = struct.Struct("=BBBBi")
"""struct ifaddrmsg: family, length, flags, scope, index."""
_ROUTE = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, two lengths, tos, table, protocol, scope, type, flags."""
_HOP = struct.Struct("=HBBi")
"""struct rtnexthop: length, flags, hops, index."""
_NEXTHOP = struct.Struct("=BBBxI")
"""struct nhmsg: family, scope, protocol, flags."""
_NAMESPACE = struct.Struct("=Bxxx")
"""struct rtgenmsg."""
_NUMBER = struct.Struct("=i")
_BUFFER_BYTES = 1 << 18


class MovedInterface(msgspec.Struct, frozen=True, kw_only=True):
    """An interface in another network namespace; `namespace` is a file that leads to that."""

    name: str
    namespace: str


class OtherNetworks(msgspec.Struct, frozen=True, kw_only=True):
    """The interfaces of other network namespaces that concern devices of the host.

    `moved` are by their devices: a BDF, or `virtio4`. `built` are those that were built on an
    interface of this namespace (VLAN, macvlan, ipvlan), by the number of that.
    """

    moved: Mapping[str, MovedInterface]
    built: Mapping[int, Sequence[MovedInterface]]


class OwnNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """The interfaces of this namespace that have addresses, and those with routes, by their names.

    Those that every interface has do not count: its link-local address of IPv6 and the routes that
    the kernel makes for addresses. `built` are the interfaces that send through each: a tunnel
    with a device is not one of its uppers in sysfs. `programmed` have an XDP program, which takes
    packets off them, often for the AF_XDP sockets of a process.
    """

    addressed: frozenset[str]
    routed: frozenset[str]
    built: Mapping[str, Sequence[str]]
    programmed: frozenset[str] = frozenset()


def read_others(namespaces: Iterable[str]) -> OtherNetworks:
    """The interfaces of other network namespaces.

    `namespaces` are files that lead to them. A namespace that may not be entered has none.
    """
    links = ask_inside(namespaces, CLONE_NEWNET, lambda _: list(_dump_links()))
    moved, built = dict[str, MovedInterface](), dict[int, list[MovedInterface]]()
    for namespace, found in links.items():
        for link in found:
            interface = MovedInterface(name=link.name, namespace=namespace)
            if link.device:
                moved[link.device] = interface
            if link.ours is not None:
                built.setdefault(link.ours, []).append(interface)
    return OtherNetworks(moved=moved, built=built)


def read_own() -> OwnNetwork:
    """The interfaces of this namespace that the host uses, in any table of routes."""
    addresses = (_ADDRESS.unpack_from(body) for body in _dump(_RTM_GETADDR, _ADDRESS.size))
    links = {link.index: link for link in _dump_links()}
    names = {index: link.name for index, link in links.items()}
    built = dict[str, list[str]]()
    for index, link in links.items():
        below = links.get(link.below) if link.below else None
        if below and below.below != index:  # of a veth pair each names the other
            built.setdefault(below.name, []).append(link.name)
    addressed = {
        index
        for family, *_, scope, index in addresses
        if not (family == socket.AF_INET6 and scope == _SCOPE_LINK)
    }
    return OwnNetwork(
        addressed=frozenset(names[index] for index in addressed if index in names),
        routed=frozenset(names[index] for index in _dump_routed() if index in names),
        built=built,
        programmed=frozenset(link.name for link in links.values() if link.has_program),
    )


def _dump_routed() -> Iterator[int]:
    """The numbers of the interfaces that routes lead to, except those that the kernel made.

    A route may have several, and may name an object that has them (ip-nexthop(8)), which goes with
    its interface too.
    """
    for body in _dump(_RTM_GETROUTE, _ROUTE.size):
        *_, protocol, _, kind, _ = _ROUTE.unpack_from(body)
        if kind == _RTN_UNICAST and protocol != _RTPROT_KERNEL:
            more = dict(_attributes(body[_ROUTE.size :]))
            yield from _number(more, _RTA_OIF)
            yield from _live_hops(more.get(_RTA_MULTIPATH, b""))
    for body in _dump(_RTM_GETNEXTHOP, _NEXTHOP.size):
        yield from _number(dict(_attributes(body[_NEXTHOP.size :])), _NHA_OIF)


def _number(attributes: Mapping[int, bytes], kind: int) -> Iterator[int]:
    if kind in attributes:
        yield _NUMBER.unpack(attributes[kind])[0]


def _live_hops(data: bytes) -> Iterator[int]:
    """The interfaces of a route with several; one that is down keeps its place in IPv4."""
    while len(data) >= _HOP.size:
        length, flags, _, index = _HOP.unpack_from(data)
        if not flags & _RTNH_F_DEAD:
            yield index
        data = data[max(_aligned(length), _HOP.size) :]


class _Link(msgspec.Struct, frozen=True, kw_only=True):
    """An interface; `below` is the number of the one that it sends through, in its namespace.

    `ours` is that number where it is one of this process's namespace.
    """

    index: int
    name: str
    device: str | None
    below: int | None
    ours: int | None
    has_program: bool


def _dump_links() -> Iterator[_Link]:
    here = _own_id()
    for body in _dump(_RTM_GETLINK, _LINK.size):
        more = dict(_attributes(body[_LINK.size :]))
        _, _, index, _, _ = _LINK.unpack_from(body)
        number = _NUMBER.unpack(more[_IFLA_LINK])[0] if _IFLA_LINK in more else None
        namespace = more.get(_IFLA_LINK_NETNSID)
        yield _Link(
            index=index,
            name=_text(more.get(_IFLA_IFNAME, b"")),
            device=_text(more.get(_IFLA_PARENT_DEV_NAME, b"")) or None,
            below=number if namespace is None else None,
            ours=number if namespace is not None and namespace == here else None,
            has_program=_has_program(more.get(_IFLA_XDP, b"")),
        )


def _has_program(nested: bytes) -> bool:
    """Whether a program of XDP is attached, in whatever mode."""
    return any(dict(_attributes(nested)).get(_IFLA_XDP_ATTACHED, b""))


def _own_id() -> bytes | None:
    """What this thread's namespace calls that of the process; None when it has no word for it."""
    who = _ATTRIBUTE.pack(_ATTRIBUTE.size + _NUMBER.size, _NETNSA_PID) + _NUMBER.pack(os.getpid())
    asked = _ask(_RTM_GETNSID, _NAMESPACE.pack(0) + who, 0)
    answers = (dict(_attributes(body[_NAMESPACE.size :])) for body in asked)
    number = next(answers, {}).get(_NETNSA_NSID)
    return None if number == _NUMBER.pack(-1) else number


def _dump(kind: int, length: int) -> Iterator[bytes]:
    """What the kernel says of every entry of this thread's namespace."""
    return _ask(kind, bytes(length), _NLM_F_DUMP)


def _ask(kind: int, body: bytes, flags: int) -> Iterator[bytes]:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    with closing(netlink):
        head = _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, 1, 0)
        netlink.send(head + body)
        while True:
            for answer, content in _messages(netlink.recv(_BUFFER_BYTES)):
                if answer in {_NLMSG_DONE, _NLMSG_ERROR}:
                    return
                yield content
            if not flags:
                return


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The messages of a datagram."""
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[max(_aligned(length), _HEADER.size) :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a message."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[max(_aligned(length), _ATTRIBUTE.size) :]


def _text(data: bytes) -> str:
    return os.fsdecode(data.rstrip(b"\0"))


def _aligned(length: int) -> int:
    return (length + 3) & ~3
