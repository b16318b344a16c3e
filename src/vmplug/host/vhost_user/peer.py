"""Whether the peer of a unix socket has hung up, which its process may not have noticed.

/proc/net/unix does not show it; the kernel answers it for a single socket. Source: sock_diag(7),
Linux net/unix/diag.c and net/unix/af_unix.c, unix_release_sock.
"""

import socket
import struct

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, _NLMSG_ERROR = 4, 20, 1, 2
_DIAG_SHUTDOWN = 6
_RECEIVES_NO_MORE = 1
_ANY = 0xFFFFFFFF

_HEADER, _REQUEST, _ANSWER = struct.Struct("=IHHII"), struct.Struct("=BBHIIIII"), 16
_ATTRIBUTE = struct.Struct("=HH")


def has_hung_up(inode: int) -> bool:
    """Whether the peer of the connected socket with this inode cannot write any more.

    False where it is unknown: the kernel may lack sock_diag, or the socket be closed.
    """
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _ANY, inode, 0, _ANY, _ANY)
    length = _HEADER.size + len(request)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
            header = _HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
            kernel.send(header + request)
            return bool(_shutdown(kernel.recv(1 << 12)) & _RECEIVES_NO_MORE)
    except OSError:
        return False


def _shutdown(message: bytes) -> int:
    """Which directions of a socket are shut; 0 when that is not in the kernel's answer."""
    length, kind, *_ = _HEADER.unpack_from(message)
    at = _HEADER.size + _ANSWER
    while kind != _NLMSG_ERROR and at < length:
        size, attribute = _ATTRIBUTE.unpack_from(message, at)
        if attribute == _DIAG_SHUTDOWN:
            return message[at + _ATTRIBUTE.size]
        at += max(-(-size // 4) * 4, _ATTRIBUTE.size)
    return 0
