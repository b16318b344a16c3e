"""Does vmplug see every process of the host, and its open files?"""

from collections.abc import Iterator, Sequence

from vmplug.host.process import has_capability
from vmplug.host.root import HostRoot
from vmplug.host.use.mounts import read_mount_points
from vmplug.host.use.openers import OpenFiles

_INITIAL = "pid:[4026531836]"
"""Source: PROC_PID_INIT_INO, include/linux/proc_ns.h. Kernels without these namespaces have no
such file."""
_HIDING = {"hidepid=2", "hidepid=invisible", "hidepid=4", "hidepid=ptraceable"}
"""Modes in which only who may trace a process sees it. Source: proc(5)."""
_CAP_SYS_PTRACE = 19


def find_unread(opened: OpenFiles, pids: Sequence[int]) -> Iterator[str]:
    """The open files that are unknown: those of these processes; those of all in a copy."""
    if pids:
        more = f" and of {len(pids) - 1} more" if len(pids) > 1 else ""
        yield f"open files of process {pids[0]}{more} (permission denied)"
    if not opened.is_known:
        yield "open files of processes (no /proc/PID/fd)"


def why_not_all_processes(root: HostRoot) -> str | None:
    """Which processes of the running host /proc does not list; None when it lists all."""
    if root.read_link("/proc/self/ns/pid") not in {_INITIAL, None}:
        return "outside of this PID namespace"
    proc = [mount for mount in read_mount_points(root) if mount.path == "/proc"]
    hides = bool(proc) and not _HIDING.isdisjoint(proc[-1].fs_options)
    if hides and not has_capability("self", _CAP_SYS_PTRACE, root):
        return "that /proc hides (hidepid)"
    return None
