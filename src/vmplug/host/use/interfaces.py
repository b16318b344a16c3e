"""Find the network namespace that an interface was moved to.

The kernel names the device behind an interface in every namespace; sysfs shows only the interfaces
of the namespace that it was mounted in.
Source: rtnetlink(7), RTM_GETLINK; IFLA_PARENT_DEV_NAME since Linux 5.14.
"""

import os
import socket
import struct
from collections.abc import Iterable, Iterator

import msgspec

from vmplug.host.use.enter import CLONE_NEWNET, ask_inside

_RTM_GETLINK, _NLMSG_DONE, _NLMSG_ERROR = 18, 3, 2
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_IFLA_IFNAME, _IFLA_PARENT_DEV_NAME = 3, 56
_HEADER = struct.Struct("=IHHII")
_LINK_BYTES = 16
_ATTRIBUTE = struct.Struct("=HH")
_BUFFER_BYTES = 1 << 18


class MovedInterface(msgspec.Struct, frozen=True, kw_only=True):
    """An interface in another network namespace; `namespace` is a file that leads to that."""

    name: str
    namespace: str


def read_moved(namespaces: Iterable[str]) -> dict[str, MovedInterface]:
    """The interfaces of other network namespaces, by their devices: a BDF, or `virtio4`.

    `namespaces` are files that lead to them. A namespace that may not be entered has none.
    """
    links = ask_inside(namespaces, CLONE_NEWNET, lambda _: list(_dump_links()))
    return {
        parent: MovedInterface(name=name, namespace=namespace)
        for namespace, found in links.items()
        for name, parent in found
    }


def _dump_links() -> Iterator[tuple[str, str]]:
    for body in _dump_bodies():
        texts = dict(_attributes(body[_LINK_BYTES:]))
        if parent := texts.get(_IFLA_PARENT_DEV_NAME):
            yield texts.get(_IFLA_IFNAME, ""), parent


def _dump_bodies() -> Iterator[bytes]:
    """What the kernel says of every link of this thread's namespace."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        length = _HEADER.size + _LINK_BYTES
        netlink.send(_HEADER.pack(length, _RTM_GETLINK, flags, 1, 0) + bytes(_LINK_BYTES))
        while True:
            for kind, body in _messages(netlink.recv(_BUFFER_BYTES)):
                if kind in {_NLMSG_DONE, _NLMSG_ERROR}:
                    return
                yield body


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The messages of a datagram."""
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[max(_aligned(length), _HEADER.size) :]


def _attributes(data: bytes) -> Iterator[tuple[int, str]]:
    """The attributes of a message that are texts."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if kind in {_IFLA_IFNAME, _IFLA_PARENT_DEV_NAME}:
            yield kind, os.fsdecode(data[_ATTRIBUTE.size : length].rstrip(b"\0"))
        data = data[max(_aligned(length), _ATTRIBUTE.size) :]


def _aligned(length: int) -> int:
    return (length + 3) & ~3
