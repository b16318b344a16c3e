"""What the wire to QEMU does with the other end."""

import socket
from typing import Any

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
