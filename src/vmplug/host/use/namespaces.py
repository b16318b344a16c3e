"""Find the network namespace that an interface was moved to.

The kernel names the device behind an interface in every namespace; sysfs shows only the interfaces
of the namespace that it was mounted in.
Source: rtnetlink(7), RTM_GETLINK; IFLA_PARENT_DEV_NAME since Linux 5.14; setns(2).
"""

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from threading import Thread

import msgspec

from vmplug.devnum import is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.root import THIS_HOST

_NAMED = "/run/netns"
"""Where ip-netns(8) and container engines keep the namespaces that have a name."""

_CLONE_NEWNET = 0x40000000
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


def find_moved(parents: frozenset[str]) -> MovedInterface | None:
    """The interface of the device of one of these names, such as a BDF or `virtio4`.

    None when no namespace that can be seen has it. This enters the other namespaces, in threads.
    """
    for path in _namespaces():
        for name, parent in _read_links(path):
            if parent in parents:
                return MovedInterface(name=name, namespace=path)
    return None


def _namespaces() -> Iterator[str]:
    """One file for each network namespace other than this process's."""
    known = {os.stat("/proc/self/ns/net").st_ino}
    names = [f"{_NAMED}/{name}" for name in THIS_HOST.list_dir(_NAMED)]
    pids = [pid for pid in THIS_HOST.list_dir("/proc") if is_decimal(pid)]
    for path in (*names, *(f"/proc/{pid}/ns/net" for pid in pids)):
        status = THIS_HOST.stat_or_none(path)
        if status and status.st_ino not in known:
            known.add(status.st_ino)
            yield path


def _read_links(namespace: str) -> list[tuple[str, str]]:
    """The names of interfaces and of the devices behind them; empty where it may not be seen."""
    links = list[tuple[str, str]]()

    def read() -> None:
        with suppress(OSError, AttributeReadError):
            _enter(namespace)
            links.extend(_dump_links())

    thread = Thread(target=read)
    thread.start()
    thread.join()
    return links


def _enter(namespace: str) -> None:
    """Move this thread, which must end afterwards, into a network namespace."""
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns", namespace)
    finally:
        os.close(descriptor)


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
