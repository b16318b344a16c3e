"""Paths whose storage does not answer: those of a server that is gone, or of a suspended disk.

A look at one never ends, and the kernel ends nothing that waits for storage. So another process
looks first. That takes some milliseconds, and only a host that has such storage pays for it.
"""

import os
import re
from collections.abc import Collection

from vmplug.errors import AttributeReadError
from vmplug.host.root import HostRoot

_MAY_BE_SILENT = re.compile(
    r" - (?:fuse(?:\.\S*)?|fuseblk|nfs4?|cifs|smb3|ceph|9p|virtiofs|afs|glusterfs|lustre"
    r"|ocfs2|gfs2|gpfs|beegfs|orangefs|pvfs2|coda) "
)
"""File systems whose files another machine or process has, in the kernel's table of mounts."""


def find_silent(paths: Collection[str], root: HostRoot) -> set[str]:
    """Those of the paths that do not answer within some seconds, which they share.

    Nothing is looked for in the copy of a host.
    """
    if not paths or not root.is_live or not _may_be_silent(root):
        return set()
    from vmplug.host.program import Looks, ask_content  # noqa: PLC0415  subprocess: 6 ms

    # Not abspath: `..` behind a link leads elsewhere than the text says.
    asked = {
        path: path if path.startswith("/") else os.path.join(os.getcwd(), path)
        for path in paths
        if "\0" not in path
    }
    with Looks(ask=ask_content) as looks:
        silent = looks.find_silent(sorted(set(asked.values())))
    return {path for path, absolute in asked.items() if absolute in silent}


def require_answer(path: str, root: HostRoot) -> None:
    """AttributeReadError for a path whose storage does not answer."""
    if find_silent([path], root):
        raise no_answer(path)


def no_answer(path: str) -> AttributeReadError:
    """The error for such a path."""
    error = AttributeReadError(path, why="its storage does not answer")
    error.hint = "bring its server or its disk back (see dmesg), or unmount it: umount --lazy"
    return error


def _may_be_silent(root: HostRoot) -> bool:
    if _MAY_BE_SILENT.search(root.read_text("/proc/self/mountinfo") or ""):
        return True
    volumes = (name for name in root.list_dir("/sys/block") if name.startswith("dm-"))
    return any(root.read_int(f"/sys/block/{name}/dm/suspended") for name in volumes)
