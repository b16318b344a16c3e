"""Uses that could not be looked for: unknown is not no.

Each check yields what it could not look for, such as the open files of a process that vmplug does
not see, and one finding for the device lists it all.
"""

from collections.abc import Iterable, Iterator, Sequence

from vmplug.host.finding import Code, Finding, Severity, UsedBy
from vmplug.host.process import has_capability
from vmplug.host.root import HostRoot
from vmplug.host.use.mounts import read_mount_points
from vmplug.host.use.openers import OpenFiles


def not_looked_for(what: str) -> Finding:
    """One use that could not be looked for, such as `swap space (no /proc/swaps)`."""
    return Finding(Code.UNKNOWN_USE, what, "")


def gather_unknown(findings: Iterable[Finding], name: str, root: HostRoot) -> list[Finding]:
    """The findings about the device of that name, with all unknown uses as one.

    It is a warning for a copy of a host, which never has everything.
    """
    found, unknown = list[Finding](), dict[str, None]()
    for finding in findings:
        if finding.code is Code.UNKNOWN_USE:
            unknown[finding.message] = None
        else:
            found.append(finding)
    if unknown:
        found.append(
            Finding(
                Code.UNKNOWN_USE,
                f"{name} may be in use: vmplug could not look for {', '.join(unknown)}",
                "run vmplug as root, with CAP_SYS_PTRACE, in the host's own PID namespace"
                if root.is_live
                else "run vmplug on that host, or add these files to the copy",
                Severity.ERROR if root.is_live else Severity.WARNING,
                used_by=UsedBy(
                    on=name,
                    who="a user that could not be looked for, perhaps",
                    how="what vmplug could not read",
                ),
            )
        )
    return found


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
