"""The host's virtiofsd: there are two programs of that name, so vmplug asks for the options.

QEMU before 8.0 contains one in C; the later one, in Rust, has different options.
"""

import re

import msgspec

from vmplug.host.root import HostRoot

VIRTIOFSD_PROGRAMS = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")
"""Where distributions put it: Debian 13 and Fedora, Debian 12, Arch."""

_OPTION = re.compile(r"^ +(?:-\w,? +)?(--[a-z-]+|-o [a-z_]+)", re.MULTILINE)
_HELP_TIMEOUT_S = 10.0


class Virtiofsd(msgspec.Struct, frozen=True, kw_only=True):
    """A virtiofsd at `path`.

    `options` are those that its --help lists, as `--shared-dir` or `-o source`; None where it was
    not asked, as on another root.
    """

    path: str
    options: frozenset[str] | None = None


def find_virtiofsd(root: HostRoot) -> Virtiofsd | None:
    """The first installed virtiofsd. On a live root vmplug runs it with --help."""
    path = next((path for path in VIRTIOFSD_PROGRAMS if root.stat(path)), None)
    if path is None:
        return None
    return Virtiofsd(path=path, options=ask_options(path) if root.is_live else None)


def ask_options(path: str) -> frozenset[str]:
    """The options that the program lists, which takes 4 ms; none if it cannot be run."""
    from vmplug.host.program import run_program  # noqa: PLC0415  subprocess: 2 ms

    asked = run_program([path, "--help"], timeout_s=_HELP_TIMEOUT_S)
    return frozenset(_OPTION.findall(asked.stdout))
