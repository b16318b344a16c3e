"""Connect QEMU to the vhost-user socket that was checked, whatever has its name by now.

Where QEMU takes a connection, vmplug connects, and passes it on. It takes none for a network
("does not support FD passing"), and none where it shall connect again to a backend that was lost
(7.2 and 11 refuse the two together). There QEMU connects by name, and vmplug asks the kernel for
the other end of its new connection, which has no inode before the backend accepts it.
Source: measured on QEMU 7.2 and 10; QEMU chardev/char-socket.c; Linux net/unix/diag.c.
"""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import msgspec

from vmplug.drivers.plug import VhostUserDevice
from vmplug.drivers.ports import Command
from vmplug.errors import BackendError
from vmplug.host.file_id import check_path, file_replaced, pinned
from vmplug.host.kind import DeviceType
from vmplug.host.root import THIS_HOST
from vmplug.host.vhost_user.peer import BoundFile, find_bound_file, find_connections
from vmplug.hypervisor.qmp.monitor import Talk

_TIMEOUT_S = 5.0
"""QEMU connects within milliseconds, in the background, and an idle backend accepts that."""


def takes_connection(plug: VhostUserDevice) -> bool:
    """Whether QEMU takes an open connection for the device, instead of a socket's name."""
    return not plug.reconnect_s and plug.type is not DeviceType.VHOST_USER_NET


@contextmanager
def connected(path: str, pin: int) -> Iterator[int]:
    """A connection to the pinned socket at `path`, for QEMU. Raises BackendError."""
    from vmplug.host.vhost_user.probe import connect_to  # noqa: PLC0415  3 ms, with its peers

    connection = connect_to(pin)
    if isinstance(connection, OSError):
        raise BackendError(
            path,
            f"vmplug cannot connect to {path}: {connection.strerror}",
            hint="start the backend that listens there",
        ) from connection
    with connection:
        yield connection.fileno()


class CheckedSocket(msgspec.Struct, frozen=True):
    """A socket with its id (see `vmplug.host.file_id`), and a descriptor that names it."""

    path: str
    file_id: str
    pin: int


def connect_by_name(checked: CheckedSocket, pid: int | None, add: Command) -> Talk:
    """Let `add` make QEMU connect to the path; NoSuchDevice unless it is the checked socket.

    `pid` is QEMU's process, None where it may not be read: then the path must still lead to that
    socket. Also raises CommandError and BackendError. It is one talk, so that vmplug makes no
    other connection meanwhile.
    """
    wanted = find_bound_file(checked.pin)
    before = find_connections(pid) if pid else None
    yield add
    if pid is None or before is None or wanted is None:
        check_path(checked.path, checked.file_id)
        return
    deadline = time.monotonic() + _TIMEOUT_S
    while not (new := _new_peers(pid, before)):
        if time.monotonic() > deadline:
            raise _not_connected(checked)
        yield Command("query-chardev", {})  # QEMU goes on in between
    if new != {wanted}:
        raise file_replaced(checked.path, THIS_HOST)


def _not_connected(checked: CheckedSocket) -> BackendError:
    check_path(checked.path, checked.file_id)
    return BackendError(
        checked.path,
        f"QEMU did not connect to {checked.path} within {_TIMEOUT_S:g} s",
        hint="check that its backend accepts connections",
    )


def _new_peers(pid: int, before: Collection[int]) -> set[BoundFile]:
    return {file for inode, file in (find_connections(pid) or {}).items() if inode not in before}


def check_connected(pid: int, sockets: Iterable[tuple[str, str]]) -> None:
    """NoSuchDevice unless a QEMU that has started is connected to each of these sockets.

    They are paths with the ids of the sockets that were checked.
    """
    found = find_connections(pid)
    left = None if found is None else Counter(found.values())
    for path, checked in sockets:
        with pinned(path, checked) as pin:
            file = find_bound_file(pin)
        if file and left is not None:
            left[file] -= 1
            if left[file] < 0:
                raise file_replaced(path, THIS_HOST)
