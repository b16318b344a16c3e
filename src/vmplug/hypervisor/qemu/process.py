"""Which process is the QEMU that answers?

The kernel tells who began to listen on a socket (SO_PEERCRED), which is a launcher when that
passed the socket on. QEMU tells the threads of its CPUs, whose process is QEMU itself; it gives
numbers of its own pid namespace, so that they count only for a process that has the socket.
Source: unix(7), `query-cpus-fast` on QEMU 7.2, paused too.
"""

import os

from vmplug.drivers.base import Command
from vmplug.host.process import find_process_of_thread, has_listener
from vmplug.host.root import HostRoot
from vmplug.hypervisor.monitor import Monitor


def find_process(monitor: Monitor, socket: str, peer_pid: int | None) -> int | None:
    """QEMU's pid, or that of whoever made its socket; None if neither is known."""
    root, name = HostRoot(), os.path.basename(socket)
    for cpu in monitor.execute(Command("query-cpus-fast", {})):
        pid = find_process_of_thread(cpu.get("thread-id", 0), root)
        if pid == peer_pid or (pid and has_listener(pid, name, root)):
            return pid
    return peer_pid
