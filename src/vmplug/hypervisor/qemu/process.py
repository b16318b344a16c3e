"""Which process is the QEMU that answers?

The kernel tells who began to listen on a socket (SO_PEERCRED), which is a launcher when that
passed the socket on. QEMU tells the threads of its CPUs, whose process is QEMU itself; it gives
numbers of its own pid namespace, so that they count only for a process that has the socket.
Source: unix(7), `query-cpus-fast` on QEMU 7.2, paused too.
"""

import os

from vmplug.drivers.base import Command
from vmplug.host.process import find_process_of_thread, has_listener, is_running
from vmplug.host.root import HostRoot
from vmplug.hypervisor.monitor import Monitor


def is_alive(pid: int | None) -> bool:
    """Whether a process of that number runs; not for None."""
    return pid is not None and is_running(pid, None, HostRoot())


def find_process(monitor: Monitor, socket: str) -> int | None:
    """QEMU's pid, or that of whoever made its socket; None if neither is known."""
    root, name = HostRoot(), os.path.basename(socket)
    cpus = monitor.execute(Command("query-cpus-fast", {}))
    peer_pid = monitor.peer_pid  # of the conversation that there is by now
    for cpu in cpus:
        pid = find_process_of_thread(cpu.get("thread-id", 0), root)
        if (pid and pid == peer_pid) or (pid and has_listener(pid, name, root)):
            return pid
    return peer_pid
