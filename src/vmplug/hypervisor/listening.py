"""Connect to a VM's QMP socket, whose path may be longer than a socket's address."""

import _socket as socket  # what `socket` adds takes 7 % of the time that importing click takes
import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

from vmplug.host.root import THIS_HOST
from vmplug.host.use.silent import NO_ANSWER, find_silent

_ADDRESS_BYTES_MAX = 107
"""Source: unix(7), sun_path."""


@contextmanager
def socket_address(path: str) -> Iterator[str]:
    """The address of the socket at `path` for connect(2) inside the `with`.

    Raises OSError, also for a path whose storage does not answer: connect(2) would wait for it.
    """
    if find_silent([path], THIS_HOST):
        raise OSError(errno.EIO, NO_ANSWER, path)
    if len(os.fsencode(path)) <= _ADDRESS_BYTES_MAX:
        yield path
        return
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def is_listening(path: str) -> bool | None:
    """Whether a process listens on a unix socket; None when no such file can be reached.

    A QEMU listens for as long as it runs, also while it serves a client. A full queue of waiting
    clients means a listener too. Source: unix(7), connect(2).
    """
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.settimeout(0)
        try:
            with socket_address(path) as address:
                number = client.connect_ex(address)
        except OSError:
            return None
    return None if number == errno.ENOENT else number != errno.ECONNREFUSED
