"""Paths whose storage does not answer: those of a server that is gone, or of a suspended disk.

A look at one never ends, and the kernel ends nothing that waits for storage. So another process
looks first. That takes some milliseconds, and only paths that lead through such storage pay for
it.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from threading import Thread
from typing import TypeVar

from vmplug.errors import AttributeReadError
from vmplug.host.root import HostRoot

_MAY_BE_SILENT = frozenset(
    {
        *("fuse", "fuseblk", "nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "afs"),
        *("autofs", "glusterfs", "lustre", "ocfs2", "gfs2", "gpfs", "beegfs", "orangefs"),
        *("pvfs2", "coda"),
    }
)
"""File systems whose files another machine or process has; those of FUSE also have the name of
their program, such as `fuse.sshfs`."""
_ESCAPED = str.maketrans({char: f"\\{ord(char):03o}" for char in " \t\n\\"})
"""As the table writes paths. Source: fs/proc_namespace.c, show_mountinfo."""
NO_ANSWER = "its storage does not answer"
REMEDY = "bring its server or its disk back (see dmesg), or unmount it: umount --lazy"
_LINKS_MAX = 40
"""Source: path_resolution(7)."""

T = TypeVar("T")


def find_silent(paths: Collection[str], root: HostRoot) -> set[str]:
    """Those of the paths that do not answer within some seconds, which they share.

    Nothing is looked for in the copy of a host.
    """
    if not paths or not root.is_live:
        return set()
    # Not abspath: `..` behind a link leads elsewhere than the text says. Not getcwd(3), which
    # fails where the directory was deleted.
    here = root.read_link("/proc/self/cwd") or "/"
    absolute = {path: os.path.join(here, path) for path in paths if "\0" not in path}
    asked = _choose_at_risk(absolute, root)
    if not asked:
        return set()
    from vmplug.host.program import Looks, ask_content  # noqa: PLC0415  subprocess: 6 ms

    with Looks(ask=ask_content) as looks:
        silent = looks.find_silent(sorted(set(asked.values())))
    return {path for path, absolute in asked.items() if absolute in silent}


def require_answer(path: str, root: HostRoot) -> None:
    """AttributeReadError for a path whose storage does not answer."""
    if find_silent([path], root):
        raise no_answer(path)


def no_answer(path: str) -> AttributeReadError:
    """The error for such a path."""
    error = AttributeReadError(path, why=NO_ANSWER)
    error.hint = REMEDY
    return error


def answer_within(timeout_s: float | None, ask: Callable[[], T]) -> T | None:
    """What `ask` returns; None when that takes longer, as for what a tenant can keep waiting.

    For what only this process can ask: a thread is left in it then, which ends with the process.
    """
    answers = list[T]()
    thread = Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else None


def _choose_at_risk(absolute: Mapping[str, str], root: HostRoot) -> Mapping[str, str]:
    """Those that lead through storage that may not answer; where / is such, all wait anyway."""
    volumes = (name for name in root.list_dir("/sys/block") if name.startswith("dm-"))
    if any(root.read_int(f"/sys/block/{name}/dm/suspended") for name in volumes):
        return absolute  # which file systems are on it is not asked
    table = root.read_text("/proc/self/mountinfo") or ""
    remote = set(_remote_mounts(table)) - {"/"}
    return {
        name: path
        for name, path in absolute.items()
        if remote and _leads_through(path, remote, root)
    }


def _remote_mounts(table: str) -> Iterator[str]:
    """Where such file systems are, as the kernel's table of mounts writes paths.

    Source: proc_pid_mountinfo(5).
    """
    for line in table.split("\n"):
        mount, _, kind = line.partition(" - ")
        name, dot, _ = kind.partition(" ")[0].partition(".")
        if name in _MAY_BE_SILENT and (not dot or name == "fuse"):
            yield mount.split(" ")[4]


def _leads_through(path: str, remote: AbstractSet[str], root: HostRoot) -> bool:
    """Whether a path leads to or through a mount of that kind, without asking that.

    True also where the text does not show the way: behind a link of /proc.
    """
    here, rest, links = "", path.split("/")[::-1], 0
    while rest:
        name = rest.pop()
        if name == "..":
            here = here.rpartition("/")[0]
        elif name not in {"", "."}:
            here = f"{here}/{name}"
            if here.translate(_ESCAPED) in remote:
                return True
            if not os.path.islink(here):
                continue
            links += 1
            if here.startswith("/proc/") or links > _LINKS_MAX:
                return True
            target = root.read_link(here) or ""
            rest += target.split("/")[::-1]
            here = "" if target.startswith("/") else here.rpartition("/")[0]
    return False
