"""What is at the other end of a unix socket, which /proc/net/unix does not show.

The kernel answers it for a single socket: whether the peer has hung up, which its process may not
have noticed, and which file the peer was bound to, whatever has its name by now. To find the one
it looks through all that there are, so what is asked of many is asked of all at once.
Source: sock_diag(7), Linux net/unix/diag.c and net/unix/af_unix.c, unix_release_sock.
"""

import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from vmplug.errors import AttributeReadError
from vmplug.host.root import THIS_HOST
from vmplug.host.use.enter import CLONE_NEWNET, ask_inside

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLMSG_ERROR = 4, 20, 2
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_SHOW_FILE, _SHOW_PEER = 0x2, 0x4
_DIAG_FILE, _DIAG_PEER, _DIAG_SHUTDOWN = 1, 2, 6
_RECEIVES_NO_MORE = 1
_ANY = 0xFFFFFFFF
_CLOSED = 0
"""The inode of a socket that no process has open any more. Source: sock_i_ino."""

_HEADER, _REQUEST, _ANSWER = struct.Struct("=IHHII"), struct.Struct("=BBHIIIII"), 16
_ATTRIBUTE, _NUMBER, _FILE = struct.Struct("=HH"), struct.Struct("=I"), struct.Struct("=II")
_MESSAGE, _PIECE_BYTES = struct.Struct("=IH14xI"), 1 << 16
"""The length, the kind and the inode."""
_MINOR_BITS = 20
"""Source: Linux include/linux/kdev_t.h."""

Facts = Mapping[int, bytes]
"""What the kernel said of sockets at one time, by inode."""
NOTHING: Facts = MappingProxyType({})

BoundFile = tuple[int, int]
"""A socket's inode, of which the kernel reports 32 bits, and its file system."""


def read_facts() -> Facts:
    """What the kernel says of all sockets of this network namespace.

    Nothing where it lacks sock_diag. One that comes or goes meanwhile may be missing.
    """
    try:
        with _kernel() as kernel:
            _send(kernel, 0, _SHOW_FILE, _NLM_F_REQUEST | _NLM_F_DUMP)
            return dict(_read_messages(kernel))
    except OSError:
        return NOTHING


def _read_messages(kernel: socket.socket) -> Iterator[tuple[int, bytes]]:
    """One for each socket with its inode, until the end or an error."""
    while True:
        piece, at = kernel.recv(_PIECE_BYTES), 0
        while at < len(piece):
            if len(piece) - at < _MESSAGE.size:  # the end
                return
            length, kind, inode = _MESSAGE.unpack_from(piece, at)
            if kind != _SOCK_DIAG_BY_FAMILY:
                return
            yield inode, piece[at : at + length]
            at += -(-length // 4) * 4


def has_hung_up(inode: int, known: Facts = NOTHING) -> bool:
    """Whether the peer of the connected socket with this inode cannot write any more.

    False where it is unknown: the kernel may lack sock_diag, or the socket be closed.
    """
    shut = _find_facts(inode, known).get(_DIAG_SHUTDOWN, b"\0")
    return bool(shut[0] & _RECEIVES_NO_MORE)


def _find_facts(inode: int, known: Facts) -> dict[int, bytes]:
    """The kernel is asked about one that is not known yet; empty where it does not answer."""
    if inode in known:
        return _attributes(known[inode])
    try:
        with _kernel() as kernel:
            return _ask(kernel, inode, _SHOW_FILE)
    except OSError:
        return {}


Mounts = Mapping[str, int]
"""The file systems of mounts, by the numbers of these."""


def read_own_mounts() -> Mounts:
    """Those of this process's mount namespace."""
    found = dict[str, int]()
    for line in (THIS_HOST.read_text("/proc/self/mountinfo") or "").splitlines():
        mount, _, number, *_ = line.split()
        major, minor = map(int, number.split(":"))
        found[mount] = major << _MINOR_BITS | minor
    return found


def find_bound_file(descriptor: int, mounts: Mounts | None = None) -> BoundFile | None:
    """The socket that a descriptor of this process names, as the kernel reports it of peers.

    On btrfs and overlayfs stat(2) has other numbers. None where the mount is unknown; `mounts` are
    those that were read already.
    """
    told = THIS_HOST.read_text(f"/proc/self/fdinfo/{descriptor}") or ""
    facts = dict(re.findall(r"^(\w+):\s*(\d+)$", told, re.MULTILINE))
    inode = int(facts.get("ino", os.fstat(descriptor).st_ino))  # Linux 5.14
    mount = facts.get("mnt_id", "")
    file_system = (mounts or {}).get(mount) or read_own_mounts().get(mount)
    return None if file_system is None else (inode & _ANY, file_system)


def find_file_at(path: str, mounts: Mounts | None = None) -> BoundFile | None:
    """The socket at a path, whatever others have given that name elsewhere."""
    try:
        pin = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return find_bound_file(pin, mounts)
    finally:
        os.close(pin)


def find_own_file(inode: int, known: Facts = NOTHING) -> BoundFile | None:
    """The file that the socket with this inode is bound to, whatever it called that.

    A connection that was accepted has its listener's. None where it is unknown.
    """
    file = _find_facts(inode, known).get(_DIAG_FILE)
    return _bound_file(file) if file else None


def _bound_file(told: bytes) -> BoundFile:
    number, file_system = _FILE.unpack(told)
    return number, file_system


def find_connections(pid: int) -> Mapping[int, BoundFile] | None:
    """By inode, the sockets of a process that are connected to a named one, and its file.

    None where that is unknown: its descriptors or its network namespace are closed to this user,
    or the kernel lacks sock_diag.
    """
    root, inside = THIS_HOST, f"/proc/{pid}/ns/net"
    try:
        inodes = _sockets_of(pid)
        is_here = root.read_link(inside) == root.read_link("/proc/self/ns/net")
    except AttributeReadError:
        return None
    if is_here:
        return _find_files(inodes)
    return ask_inside([inside], CLONE_NEWNET, lambda _: _find_files(inodes)).get(inside)


def find_peers_of(pid: int) -> set[int]:
    """By inode, the sockets that those of a process are connected to, as `find_peers`."""
    try:
        return find_peers(_sockets_of(pid))
    except AttributeReadError:  # another user's, or it has ended
        return set()


def find_peers(inodes: Iterable[int]) -> set[int]:
    """The sockets at the other ends of these; those of this network namespace, still open."""
    try:
        with _kernel() as kernel:
            told = [_ask(kernel, inode, _SHOW_PEER).get(_DIAG_PEER) for inode in inodes]
    except OSError:
        return set()
    return {_NUMBER.unpack(peer)[0] for peer in told if peer} - {_CLOSED}


def _sockets_of(pid: int) -> list[int]:
    root, directory = THIS_HOST, f"/proc/{pid}/fd"
    links = (root.read_link(f"{directory}/{number}") for number in root.list_dir(directory))
    sockets = (re.fullmatch(r"socket:\[(\d+)\]", link or "") for link in links)
    return [int(found[1]) for found in sockets if found]


def _find_files(inodes: Iterable[int]) -> Mapping[int, BoundFile] | None:
    """Only sockets of this network namespace are found."""
    found = dict[int, BoundFile]()
    one, other = socket.socketpair()
    try:
        with one, other, _kernel() as kernel:
            if _DIAG_PEER not in _ask(kernel, os.fstat(one.fileno()).st_ino, _SHOW_PEER):
                return None
            for inode in inodes:
                peer = _ask(kernel, inode, _SHOW_PEER).get(_DIAG_PEER)
                other_end = _NUMBER.unpack(peer)[0] if peer else 0
                if told := _ask(kernel, other_end, _SHOW_FILE).get(_DIAG_FILE):
                    found[inode] = _bound_file(told)
    except OSError:
        return None
    return found


def _kernel() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)


def _ask(kernel: socket.socket, inode: int, show: int) -> dict[int, bytes]:
    """The attributes of a socket; empty when there is no such socket."""
    _send(kernel, inode, show, _NLM_F_REQUEST)
    return _attributes(kernel.recv(1 << 12))


def _send(kernel: socket.socket, inode: int, show: int, flags: int) -> None:
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _ANY, inode, show, _ANY, _ANY)
    length = _HEADER.size + len(request)
    kernel.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, flags, 0, 0) + request)


def _attributes(message: bytes) -> dict[int, bytes]:
    length, kind, *_ = _HEADER.unpack_from(message)
    found, at = dict[int, bytes](), _HEADER.size + _ANSWER
    while kind != _NLMSG_ERROR and at < length:
        size, attribute = _ATTRIBUTE.unpack_from(message, at)
        found[attribute] = message[at + _ATTRIBUTE.size : at + size]
        at += max(-(-size // 4) * 4, _ATTRIBUTE.size)
    return found
