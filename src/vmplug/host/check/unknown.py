"""Uses that could not be looked for: unknown is not no.

Each check yields what it could not look for, and one finding for the device lists it all.
"""

from collections.abc import Iterable

from vmplug.host.finding import Code, Finding, Severity, UsedBy
from vmplug.host.root import HostRoot


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
