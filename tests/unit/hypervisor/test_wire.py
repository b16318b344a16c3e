"""What the wire to QEMU does with the other end."""

import math
import socket
from pathlib import Path
from typing import Any

import pytest

from vmplug.hypervisor.qmp.wire import Wire


class Obeyed(socket.socket):
    """One whose peer has done what it was told, and has gone, before send returns."""

    peer: socket.socket

    def sendmsg(self, *arguments: Any) -> int:
        sent = super().sendmsg(*arguments)
        self.peer.close()
        return sent


def test_a_peer_that_ends_as_it_was_told_got_the_message() -> None:
    ours, theirs = socket.socketpair()
    with Obeyed(ours.family, ours.type, fileno=ours.detach()) as obeyed, theirs:
        obeyed.peer = theirs
        Wire(obeyed).send({"execute": "quit"})


@pytest.mark.parametrize("timeout_s", [3e6, 1e18, math.inf])
def test_a_wait_may_be_longer_than_the_kernel_can_wait(tmp_path: Path, timeout_s: float) -> None:
    path = str(tmp_path / "qmp.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        wire = Wire.connect(path, timeout_s)
        theirs, _ = listener.accept()
        theirs.sendall(b'{"QMP": {}}\n')
        assert wire.receive(timeout_s) == {"QMP": {}}
        theirs.close()
        wire.close()
