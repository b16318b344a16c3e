"""A QMP socket on which somebody says what he likes, whoever connects and whatever is asked."""

import os
import select
import socket
import threading
from contextlib import suppress
from functools import cache

from tests.support.memory import directory_of_this_process

GREETING = b'{"QMP": {"version": {"qemu": {}, "package": ""}, "capabilities": []}}\r\n'
AGREED = b'{"return": {}}\r\n'
QUIET_S = 5.0


class Says:
    """Says one thing to everybody who connects, one after each question, and then hangs up.

    Gives the path of its socket.
    """

    def __init__(self, *said: bytes) -> None:
        self._said = said
        self._listener = _listener()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> str:
        self._ended, self._end = os.pipe()
        self._thread.start()
        return str(self._listener.getsockname())

    def __exit__(self, *exception: object) -> None:
        os.close(self._end)
        self._thread.join()
        os.close(self._ended)

    def _serve(self) -> None:
        listener = self._listener.fileno()
        while listener in select.select([listener, self._ended], [], [])[0]:
            client, _ = self._listener.accept()
            with client, suppress(OSError):
                client.settimeout(QUIET_S)
                for index, said in enumerate(self._said):
                    if index and not client.recv(1 << 16):
                        break
                    client.sendall(said)
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):
                    pass


@cache
def _listener() -> socket.socket:
    """One socket for all, made once."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(directory_of_this_process("vmplug-says-"), "qmp.sock"))
    listener.listen()
    return listener
