"""Vhost-user backends: who listens on a socket, and does it answer?

A backend that accepts and then is silent freezes all of QEMU, so it is asked before QEMU is: three
messages, and the connection is closed again. Two are never connected to, as /proc tells enough of
them: a virtiofsd, which serves one connection in its life, and a backend that serves somebody.
Source: QEMU docs/interop/vhost-user.rst; virtio specification, 5.1 to 5.11, feature bits.
"""

import os
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from typing import NamedTuple

from vmplug.devnum import is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.device import VhostUserSocket
from vmplug.host.finding import Code, Finding
from vmplug.host.kind import DeviceType
from vmplug.host.peer import has_hung_up
from vmplug.host.root import HostRoot

_BLK_F_RO, _BLK_F_BLK_SIZE = 5, 6
_SCSI_FEATURES = 0b1111
_DEVICE_FEATURES = (1 << 24) - 1
"""Bits 0 to 23 are the device type's own. Source: virtio specification, 2.2."""


class Backend(NamedTuple):
    """What a vhost-user backend says of itself; `queues` is how many request queues it serves.

    `has_config` says that it answers for the device's configuration space, `has_memory_slots`
    that it maps guest memory in more than a few pieces.
    """

    features: int
    queues: int
    has_config: bool = False
    has_memory_slots: bool = False

    @property
    def is_read_only(self) -> bool:
        """Whether a vhost-user-blk backend takes no writes."""
        return bool(self.features >> _BLK_F_RO & 1)

    def can_be(self, kind: DeviceType) -> bool:
        """Whether a device of that kind could have these features.

        QEMU ends itself when a vhost-user-scsi device has another kind's backend, and asks that of
        a disk for its size, which is in the configuration space. Such a disk that tells its block
        size does not survive being taken for a network.
        """
        own = self.features & _DEVICE_FEATURES
        match kind:
            case DeviceType.VHOST_USER_SCSI:
                return not own & ~_SCSI_FEATURES
            case DeviceType.VHOST_USER_BLK:
                return self.has_config
            case DeviceType.VHOST_USER_NET:
                return not (self.has_config and self.features >> _BLK_F_BLK_SIZE & 1)
            case _:
                return True


PROBE_TIMEOUT_S = 2.0
"""A backend answers in a millisecond; one that serves another client does not answer at all."""

_HANG_UP_S = 0.1
"""How long a client is taken for a mere probe, such as vmplug's own, that is about to hang up."""

_HEADER, _NUMBER = struct.Struct("<III"), struct.Struct("<Q")
_VERSION = 0x1
_GET_FEATURES, _GET_PROTOCOL_FEATURES, _GET_QUEUE_NUM = 1, 15, 17
_F_PROTOCOL_FEATURES = 30
_PROTOCOL_F_MQ, _PROTOCOL_F_CONFIG, _PROTOCOL_F_MEMORY_SLOTS = 0, 9, 15

_SCSI_QUEUES_FIXED = 2
"""Of control and events, which a backend counts too. Source: virtio specification, 5.6.2."""

VIRTIOFSD = "virtiofsd"


class Failure(StrEnum):
    """Why a backend cannot be used."""

    ABSENT = "nobody listens on it"
    SILENT = "it accepts a connection and does not answer: it hangs, or serves another client"
    CLOSED = "it closes the connection: it speaks no vhost-user"


class Listener(NamedTuple):
    """The process behind a socket."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}, process {self.pid}"


def probe(path: str, *, timeout_s: float = PROBE_TIMEOUT_S) -> Backend | Failure:
    """Ask the backend at `path` for its features, and hang up."""
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(path)
            features, protocol, queues = _ask(connection, _GET_FEATURES, deadline), 0, 1
            if features >> _F_PROTOCOL_FEATURES & 1:
                protocol = _ask(connection, _GET_PROTOCOL_FEATURES, deadline)
            if protocol >> _PROTOCOL_F_MQ & 1:
                queues = _ask(connection, _GET_QUEUE_NUM, deadline)
        except (TimeoutError, BlockingIOError):  # the latter: its queue of clients is full
            return Failure.SILENT
        except (FileNotFoundError, ConnectionRefusedError):
            return Failure.ABSENT
        except (OSError, EOFError):
            return Failure.CLOSED
    has_config = bool(protocol >> _PROTOCOL_F_CONFIG & 1)
    return Backend(
        features=features,
        queues=max(queues, 1),
        has_config=has_config,
        has_memory_slots=bool(protocol >> _PROTOCOL_F_MEMORY_SLOTS & 1),
    )


def _ask(connection: socket.socket, request: int, deadline: float) -> int:
    """The number that answers `request`; EOFError when the answer is no number."""
    connection.sendall(_HEADER.pack(request, _VERSION, 0))
    _, _, size = _HEADER.unpack(_receive(connection, _HEADER.size, deadline))
    if size != _NUMBER.size:
        raise EOFError
    return int(_NUMBER.unpack(_receive(connection, size, deadline))[0])


def _receive(connection: socket.socket, length: int, deadline: float) -> bytes:
    data = b""
    while len(data) < length:
        connection.settimeout(max(deadline - time.monotonic(), 0))
        more = connection.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def ask_backend(device: VhostUserSocket, root: HostRoot) -> tuple[VhostUserSocket, list[Finding]]:
    """The device with what its backend says of itself, and what speaks against the backend.

    Only the running host's sockets lead anywhere; of another root nothing is said.
    """
    if not root.is_live:
        return device, []
    problem = _look(device, root)
    if problem or device.kind is DeviceType.VHOST_USER_FS:
        return device, [problem] if problem else []
    answer = probe(device.socket_path)
    if isinstance(answer, Failure):
        return device, [_failed(device, answer, root)]
    if not answer.can_be(device.kind):
        return device, [_wrong(device, _who(device.socket_path, root))]
    if device.kind is DeviceType.VHOST_USER_SCSI:
        answer = answer._replace(queues=max(answer.queues - _SCSI_QUEUES_FIXED, 1))
    return replace(device, backend=answer), []


def _look(device: VhostUserSocket, root: HostRoot) -> Finding | None:
    """What can be said against the backend without connecting to it."""
    path = device.socket_path
    if _stays_connected(path, root):
        return _busy(device, root)
    is_share = device.kind is DeviceType.VHOST_USER_FS
    if is_share and not is_listening(path, root):
        return _failed(device, Failure.ABSENT, root)
    virtiofsd = None if is_share else find_listener(path, root, name=VIRTIOFSD)
    return _wrong(device, str(virtiofsd)) if virtiofsd else None


def _failed(device: VhostUserSocket, failure: Failure, root: HostRoot) -> Finding:
    path = device.socket_path
    if failure is Failure.ABSENT:
        code, hint = Code.NO_BACKEND, "start the backend that serves it"
    else:
        code = Code.BACKEND_SILENT
        hint = f"look at {_who(path, root)}; restart it, or stop its other client"
    return Finding(code, f"{path} cannot be used: {failure}", hint)


def _busy(device: VhostUserSocket, root: HostRoot) -> Finding:
    return Finding(
        Code.BACKEND_BUSY,
        f"{_who(device.socket_path, root)} serves somebody on {device.socket_path} already",
        "stop its other client, or allow it if that backend takes several",
    )


def _wrong(device: VhostUserSocket, who: str) -> Finding:
    return Finding(
        Code.WRONG_BACKEND,
        f"{who}, which listens on {device.socket_path}, serves no {device.kind} device",
        "name the socket of the right backend; QEMU would not survive this one",
    )


def _who(path: str, root: HostRoot) -> str:
    listener = find_listener(path, root)
    return str(listener) if listener else "the backend"


_ACCEPTS = 0x10000
"""Source: Linux net/unix/af_unix.c, unix_seq_show: __SO_ACCEPTCON."""


_CONNECTED = 3
"""A socket that was accepted has the listener's path. Source: include/uapi/linux/net.h."""


def is_listening(path: str, root: HostRoot) -> bool:
    """Whether somebody listens on the socket at `path`; nobody is connected to."""
    return bool(_listeners(path, root))


def is_connected(path: str, root: HostRoot) -> bool:
    """Whether the listener on the socket at `path` serves a client that has not hung up.

    A busy host lets a backend notice late that its client has gone.
    """
    served = [socket for socket in _sockets(path, root) if socket.state == _CONNECTED]
    return any(not (root.is_live and has_hung_up(int(socket.inode))) for socket in served)


def _stays_connected(path: str, root: HostRoot) -> bool:
    deadline = time.monotonic() + _HANG_UP_S
    while is_connected(path, root):
        if time.monotonic() >= deadline:
            return True
        os.sched_yield()
    return False


def find_listener(path: str, root: HostRoot, *, name: str | None = None) -> Listener | None:
    """The process that holds the listening socket, if it can be seen; only one called `name`."""
    return _find_holder(_listeners(path, root), root, name)


def find_server(path: str, root: HostRoot) -> Listener | None:
    """The process behind a socket, also one that serves its only client and listens no more."""
    return _find_holder([socket.inode for socket in _sockets(path, root)], root, None)


def _find_holder(inodes: Iterable[str], root: HostRoot, name: str | None) -> Listener | None:
    links = {f"socket:[{inode}]" for inode in inodes}
    for pid in root.names("/proc") if links else ():
        if is_decimal(pid):
            with suppress(AttributeReadError):  # another user's process, or one that is ending
                comm = (root.read_text(f"/proc/{pid}/comm") or "").rstrip("\n")
                if name in {None, comm} and links & _open_files(pid, root):
                    return Listener(int(pid), comm)
    return None


def _open_files(pid: str, root: HostRoot) -> set[str | None]:
    directory = f"/proc/{pid}/fd"
    return {root.link(f"{directory}/{number}") for number in root.names(directory)}


class _Socket(NamedTuple):
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
            found.append(_Socket(fields[6], bool(flags & _ACCEPTS), state))
    return found


def _same_path(bound: str, path: str, root: HostRoot) -> bool:
    """Whether a socket bound as `bound` may be at the canonical `path`.

    A relative name may be anywhere, an absolute one lead through links, as /var/run does.
    """
    if bound.startswith("@") or os.path.basename(bound) != os.path.basename(path):
        return False
    return not bound.startswith("/") or root.real_path(bound) == path
