"""The listener of a socket and its clients, as far as /proc shows them."""

import os
import time
from collections.abc import Iterable
from contextlib import suppress

import msgspec

from vmplug.devnum import is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.peer import has_hung_up

HANG_UP_S = 0.1
"""How long a client may be just a probe, such as vmplug's own, that will soon disconnect."""

VIRTIOFSD = "virtiofsd"


class Listener(msgspec.Struct, frozen=True, kw_only=True):
    """The process behind a socket."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}, process {self.pid}"


_ACCEPTS = 0x10000
"""Source: Linux net/unix/af_unix.c, unix_seq_show: __SO_ACCEPTCON."""


_CONNECTED = 3
"""A socket that was accepted has the listener's path. Source: include/uapi/linux/net.h."""


def is_listening(path: str, root: HostRoot) -> bool:
    """Whether a process listens on the socket at `path`, without connecting to it."""
    return bool(_listeners(path, root))


def is_connected(path: str, root: HostRoot) -> bool:
    """Whether the listener on the socket at `path` serves a client that has not hung up.

    On a busy host a backend notices late that its client has gone.
    """
    served = [socket for socket in _sockets(path, root) if socket.state == _CONNECTED]
    return any(not (root.is_live and has_hung_up(int(socket.inode))) for socket in served)


def stays_connected(path: str, root: HostRoot, patience_s: float = HANG_UP_S) -> bool:
    """Whether the listener serves a client for longer than a probe lasts."""
    deadline = time.monotonic() + patience_s
    while is_connected(path, root):
        if time.monotonic() >= deadline:
            return True
        os.sched_yield()
    return False


def find_listener(path: str, root: HostRoot, *, name: str | None = None) -> Listener | None:
    """The process that holds the listening socket, if visible; only one called `name`."""
    return _find_holder(_listeners(path, root), root, name)


def find_server(path: str, root: HostRoot) -> Listener | None:
    """The process behind a socket, even if it serves its only client and no longer listens."""
    return _find_holder([socket.inode for socket in _sockets(path, root)], root, None)


def _find_holder(inodes: Iterable[str], root: HostRoot, name: str | None) -> Listener | None:
    links = {f"socket:[{inode}]" for inode in inodes}
    for pid in root.list_dir("/proc") if links else ():
        if is_decimal(pid):
            with suppress(AttributeReadError):  # another user's process, or one that is ending
                comm = (root.read_text(f"/proc/{pid}/comm") or "").rstrip("\n")
                if name in {None, comm} and links & _open_files(pid, root):
                    return Listener(pid=int(pid), name=comm)
    return None


def _open_files(pid: str, root: HostRoot) -> set[str | None]:
    directory = f"/proc/{pid}/fd"
    return {root.read_link(f"{directory}/{number}") for number in root.list_dir(directory)}


class _Socket(msgspec.Struct, frozen=True, kw_only=True):
    inode: str
    is_listener: bool
    state: int


def _listeners(path: str, root: HostRoot) -> list[str]:
    return [socket.inode for socket in _sockets(path, root) if socket.is_listener]


def _sockets(path: str, root: HostRoot) -> list[_Socket]:
    """The sockets that were bound to `path`. Source: proc_net(5), /proc/net/unix."""
    found, path = [], root.real_path(path)
    for line in (root.read_text("/proc/net/unix") or "").split("\n")[1:]:
        fields = line.split(None, 7)
        if len(fields) == 8 and _same_path(fields[7], path, root):
            try:
                flags, state = int(fields[3], 16), int(fields[5], 16)
            except ValueError as error:
                raise AttributeReadError("/proc/net/unix", why=str(error)) from error
            found.append(_Socket(inode=fields[6], is_listener=bool(flags & _ACCEPTS), state=state))
    return found


def _same_path(bound: str, path: str, root: HostRoot) -> bool:
    """Whether a socket bound as `bound` may be at the canonical `path`.

    A relative name may be anywhere; an absolute one may lead through links, as /var/run does.
    """
    if bound.startswith("@") or os.path.basename(bound) != os.path.basename(path):
        return False
    return not bound.startswith("/") or root.real_path(bound) == path
