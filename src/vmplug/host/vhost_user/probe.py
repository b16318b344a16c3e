"""Vhost-user backends: check that one listens on a socket and answers.

A backend that accepts and then is silent freezes QEMU, so vmplug asks it before QEMU connects:
three messages, then it closes the connection. It never connects to two of them, as /proc shows
enough: a virtiofsd, which serves only one connection, and a backend that has a client.
Source: QEMU docs/interop/vhost-user.rst; virtio specification, 5.1 to 5.11, feature bits.
"""

import socket
import struct
import time
from enum import StrEnum

from vmplug.host.finding import Code, Finding, UsedBy
from vmplug.host.kind import DeviceType
from vmplug.host.root import HostRoot
from vmplug.host.use.questions import PATIENCE_S, Questions
from vmplug.host.vhost_user.device import Backend, VhostUserSocket
from vmplug.host.vhost_user.sockets import (
    HANG_UP_S,
    VIRTIOFSD,
    UnixSockets,
    stays_connected,
)

_HEADER, _NUMBER = struct.Struct("<III"), struct.Struct("<Q")
_VERSION = 0x1
_GET_FEATURES, _GET_PROTOCOL_FEATURES, _GET_QUEUE_NUM = 1, 15, 17
_F_PROTOCOL_FEATURES = 30
_PROTOCOL_F_MQ, _PROTOCOL_F_CONFIG, _PROTOCOL_F_MEMORY_SLOTS = 0, 9, 15

_SCSI_QUEUES_FIXED = 2
"""The queues for control and events, which a backend counts too. Source: virtio specification,
5.6.2."""


class Failure(StrEnum):
    """Why a backend cannot be used."""

    ABSENT = "no process listens on it"
    SILENT = (
        "the backend accepts a connection and does not answer: it hangs, or serves another client"
    )
    UNASKED = "vmplug did not ask its backend, as others in the request did not answer in time"
    CLOSED = "the backend closes the connection: it does not speak vhost-user"


def probe(path: str, *, timeout_s: float = PATIENCE_S) -> Backend | Failure:
    """Ask the backend at `path` for its features, and disconnect."""
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


def connect_to(pin: int) -> socket.socket | OSError:
    """A connection to the socket that a descriptor names (O_PATH), or why there is none."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(0)  # the queue of a listener may be full
        connection.connect(f"/proc/self/fd/{pin}")
    except OSError as error:
        connection.close()
        return error
    connection.settimeout(None)
    return connection


def _ask(connection: socket.socket, request: int, deadline: float) -> int:
    """The number that answers `request`; EOFError when it is not a number."""
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


def ask_backend(
    device: VhostUserSocket, root: HostRoot, questions: Questions | None = None
) -> tuple[VhostUserSocket, list[Finding]]:
    """The device with the features of its backend, and the findings about the backend.

    A request has one value of `questions`: it asks each backend once, and all that are silent
    share its patience. Only sockets of the running host can be asked; for another root there are
    no findings.
    """
    if not root.is_live:
        return device, []
    asked = questions or Questions()
    problem = _look(device, root, asked)
    if problem or device.kind is DeviceType.VHOST_USER_FS:
        return device, [problem] if problem else []
    path = device.socket_path
    answer = asked.once(("features", path), lambda: _ask_once(path, asked))
    if isinstance(answer, Failure):
        return device, [_failed(device, answer, root, asked)]
    if not answer.can_be(device.kind):
        return device, [_wrong(device, _who(path, root, asked))]
    if device.kind is DeviceType.VHOST_USER_SCSI:
        answer = answer._replace(queues=max(answer.queues - _SCSI_QUEUES_FIXED, 1))
    return device._replace(backend=answer), []


def _ask_once(path: str, asked: Questions) -> Backend | Failure:
    if not asked.patience_s:
        return Failure.UNASKED
    return asked.within(
        lambda patience_s: probe(path, timeout_s=patience_s),
        PATIENCE_S,
        is_vain=lambda answer: answer is Failure.SILENT,
    )


def _look(device: VhostUserSocket, root: HostRoot, asked: Questions) -> Finding | None:
    """A finding about the backend that needs no connection to it."""
    path = device.socket_path
    if busy := find_client(device, root, asked):
        return busy
    if device.kind is DeviceType.VHOST_USER_FS:
        is_served = _sockets(root, asked).is_listening(path)
        return None if is_served else _failed(device, Failure.ABSENT, root, asked)
    virtiofsd = _sockets(root, asked).find_listener(path, name=VIRTIOFSD)
    return _wrong(device, str(virtiofsd)) if virtiofsd else None


def _sockets(root: HostRoot, asked: Questions) -> UnixSockets:
    """As of the first question of a request."""
    return asked.once(UnixSockets, lambda: UnixSockets(root))


def find_client(
    device: VhostUserSocket, root: HostRoot, questions: Questions | None = None
) -> Finding | None:
    """The use of the backend by a client that it has already; nothing connects to it."""
    asked, path = questions or Questions(), device.socket_path

    def has_client() -> bool:
        return asked.within(
            lambda patience_s: stays_connected(path, _sockets(root, asked), root, patience_s),
            HANG_UP_S,
            is_vain=bool,
        )

    has = asked.once(("client", path), has_client)
    return _busy(device, root, asked) if has else None


def _failed(
    device: VhostUserSocket, failure: Failure, root: HostRoot, asked: Questions
) -> Finding:
    path = device.socket_path
    if failure is Failure.ABSENT:
        code, hint = Code.NO_BACKEND, "start its backend"
    elif failure is Failure.UNASKED:
        code, hint = Code.BACKEND_SILENT, "mend the others first: vmplug check names them"
    else:
        code = Code.BACKEND_SILENT
        hint = f"check {_who(path, root, asked)}: restart it, or stop its other client"
    return Finding(code, f"{path} cannot be used: {failure}", hint)


def _busy(device: VhostUserSocket, root: HostRoot, asked: Questions) -> Finding:
    who = _who(device.socket_path, root, asked)
    return Finding(
        Code.BACKEND_BUSY,
        f"{who} already serves a client on {device.socket_path}",
        "stop that client, or allow this finding if the backend serves several",
        used_by=UsedBy(
            on=device.socket_path,
            who=f"a client of {who}",
            how="/proc/net/unix",
        ),
    )


def _wrong(device: VhostUserSocket, who: str) -> Finding:
    return Finding(
        Code.WRONG_BACKEND,
        f"{who}, which listens on {device.socket_path}, does not serve a {device.kind} device",
        "name the socket of the right backend: QEMU would crash with this one",
    )


def _who(path: str, root: HostRoot, asked: Questions) -> str:
    listener = _sockets(root, asked).find_listener(path)
    return str(listener) if listener else "the backend"
