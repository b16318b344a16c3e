"""Does a process listen on a VM's QMP socket?"""

import errno
import socket


def is_listening(path: str) -> bool | None:
    """Whether a process listens on a unix socket; None when there is no such file.

    A QEMU listens for as long as it runs, also while it serves a client. A full queue of waiting
    clients means a listener too. Source: unix(7), connect(2).
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(0)
        number = client.connect_ex(path)
    return None if number == errno.ENOENT else number != errno.ECONNREFUSED
