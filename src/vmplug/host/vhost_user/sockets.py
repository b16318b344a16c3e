"""The listener of a socket and its clients, as far as /proc shows them."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, partial

import msgspec

from vmplug.cached import cached_property
from vmplug.devnum import is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.peer import (
    Facts,
    Mounts,
    find_file_at,
    find_own_file,
    has_hung_up,
    read_facts,
    read_own_mounts,
)

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


class UnixSockets:
    """The unix sockets of this network namespace, and who has them open, as of one look.

    Each table is read when it is first needed.
    """

    def __init__(self, root: HostRoot) -> None:
        self._root = root
        self._holders_of = cache(partial(_read_holders, root))
        self._at = cache(self._read_at)

    @cached_property
    def _facts(self) -> Facts:
        return read_facts()

    @cached_property
    def _mounts(self) -> Mounts:
        return read_own_mounts()

    @cached_property
    def _lines(self) -> Mapping[str, Sequence[str]]:
        """The lines of /proc/net/unix by the last name of their path. Source: proc_net(5)."""
        found: dict[str, list[str]] = {}
        for line in (self._root.read_text(_TABLE) or "").split("\n")[1:]:
            _, slash, name = line.rpartition("/")
            if not slash and len(fields := line.split(None, 7)) == 8:
                name = fields[7]
            if slash or name != line:
                found.setdefault(name, []).append(line)
        return found

    def is_listening(self, path: str) -> bool:
        """Whether a process listens on the socket at `path`, without connecting to it."""
        return any(socket.is_listener for socket in self._at(path))

    def is_connected(self, path: str) -> bool:
        """Whether the listener on the socket at `path` serves a client that has not hung up.

        On a busy host a backend notices late that its client has gone.
        """
        served = self.served_at(path)
        return any(
            not (self._root.is_live and has_hung_up(inode, self._facts)) for inode in served
        )

    def served_at(self, path: str) -> list[int]:
        """By inode, the server's ends of the connections to the socket at `path`."""
        return [int(socket.inode) for socket in self._at(path) if socket.state == _CONNECTED]

    def find_listener(self, path: str, *, name: str | None = None) -> Listener | None:
        """The process that holds the listening socket, if visible; only one called `name`."""
        return self._find_holder([s for s in self._at(path) if s.is_listener], name)

    def find_server(self, path: str) -> Listener | None:
        """The process behind a socket, even if it serves its only client and does not listen."""
        return self._find_holder(self._at(path), None)

    def _find_holder(self, sockets: Sequence["_Socket"], name: str | None) -> Listener | None:
        holders = self._holders_of(name) if sockets else {}
        found = (holders.get(f"socket:[{socket.inode}]") for socket in sockets)
        return next(filter(None, found), None)

    def _read_at(self, path: str) -> list["_Socket"]:
        """The sockets that were bound to `path`, as far as their names and the kernel say."""
        found, path = [], self._root.real_path(path)
        lines = self._lines.get(os.path.basename(path), ())
        bound = find_file_at(path, self._mounts) if lines and self._root.is_live else None
        for line in lines:
            fields = line.split(None, 7)
            if len(fields) == 8 and _same_path(fields[7], path, self._root):
                try:
                    flags, state = int(fields[3], 16), int(fields[5], 16)
                except ValueError as error:
                    raise AttributeReadError(_TABLE, why=str(error)) from error
                is_listener = bool(flags & _ACCEPTS)
                # Any user can bind a name like it in another directory or mount namespace.
                if bound is None or find_own_file(int(fields[6]), self._facts) in {None, bound}:
                    found.append(_Socket(inode=fields[6], is_listener=is_listener, state=state))
        return found


_TABLE = "/proc/net/unix"


class _Socket(msgspec.Struct, frozen=True, kw_only=True):
    inode: str
    is_listener: bool
    state: int


def stays_connected(
    path: str, first: UnixSockets, root: HostRoot, patience_s: float = HANG_UP_S
) -> bool:
    """Whether the listener serves a client at the first look, and longer than a probe lasts."""
    deadline, sockets = time.monotonic() + patience_s, first
    while sockets.is_connected(path):
        if time.monotonic() >= deadline:
            return True
        os.sched_yield()
        sockets = UnixSockets(root)
    return False


def _read_holders(root: HostRoot, name: str | None) -> Mapping[str, Listener]:
    """The first process that has each socket open, by the socket's link; only those of a name."""
    holders: dict[str, Listener] = {}
    for pid in filter(is_decimal, root.list_dir("/proc")):
        with suppress(AttributeReadError):  # another user's process, or one that is ending
            comm = (root.read_text(f"/proc/{pid}/comm") or "").rstrip("\n")
            for link in _open_files(pid, root) if name in {None, comm} else ():
                holders.setdefault(link, Listener(pid=int(pid), name=comm))
    return holders


def _open_files(pid: str, root: HostRoot) -> list[str]:
    directory = f"/proc/{pid}/fd"
    links = (root.read_link(f"{directory}/{number}") for number in root.list_dir(directory))
    return [link for link in links if link and link.startswith("socket:")]


def _same_path(bound: str, path: str, root: HostRoot) -> bool:
    """Whether a socket bound as `bound` may be at the canonical `path`, which is its own real one.

    A relative name may be anywhere; an absolute one may lead through links, as /var/run does.
    """
    if bound.startswith("@") or os.path.basename(bound) != os.path.basename(path):
        return False
    return not bound.startswith("/") or bound == path or root.real_path(bound) == path
