"""Does /proc list every process of the host? One that it does not list gives no error."""

from vmplug.host.block.mounts import read_mount_points
from vmplug.host.process import has_capability
from vmplug.host.root import HostRoot

_INITIAL = "pid:[4026531836]"
"""Source: PROC_PID_INIT_INO, include/linux/proc_ns.h. Kernels without these namespaces have no
such file."""
_HIDING = {"hidepid=2", "hidepid=invisible", "hidepid=4", "hidepid=ptraceable"}
"""Modes in which only who may trace a process sees it. Source: proc(5)."""
_CAP_SYS_PTRACE = 19


def why_not_all_processes(root: HostRoot) -> str | None:
    """Which processes of the running host are not listed; None when all are."""
    if root.read_link("/proc/self/ns/pid") not in {_INITIAL, None}:
        return "outside of this PID namespace"
    proc = [mount for mount in read_mount_points(root) if mount.path == "/proc"]
    hides = bool(proc) and not _HIDING.isdisjoint(proc[-1].fs_options)
    if hides and not has_capability("self", _CAP_SYS_PTRACE, root):
        return "that /proc hides (hidepid)"
    return None
