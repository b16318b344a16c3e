"""The numbers of a device node of the host, where a spec leaves them out."""

import os
import stat
from collections.abc import Callable

import msgspec

from vmplug.cdi.spec import DeviceNode
from vmplug.errors import NoSuchDevice


class HostNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node: `type` is b, c or p; a FIFO has the numbers 0 and 0."""

    type: str
    major: int
    minor: int


class OtherType(NoSuchDevice):
    """The node on the host is of another type than the spec says."""

    code = "other-device-type"


FindNode = Callable[[str], HostNode]
"""The node of a path on the host; NoSuchDevice if there is none."""

_TYPES = {stat.S_IFBLK: "b", stat.S_IFCHR: "c", stat.S_IFIFO: "p"}
_OTHERS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
}


def find_node(path: str) -> HostNode:
    """The node of this host at a path, which is not followed if it is a link.

    A link in /dev/disk/by-id may lead elsewhere when the container starts.
    """
    try:
        found = os.lstat(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise NoSuchDevice(path, f"{path} is not a device node: {why}") from error
    kind = stat.S_IFMT(found.st_mode)
    if kind not in _TYPES:
        other = _OTHERS.get(kind, "something else")
        hint = f"name {os.path.realpath(path)}" if kind == stat.S_IFLNK else None
        message = f"{path} is not a device node, it is {other}"
        raise NoSuchDevice(path, message, found=other, hint=hint)
    device = found.st_rdev
    return HostNode(type=_TYPES[kind], major=os.major(device), minor=os.minor(device))


def complete(node: DeviceNode, find: FindNode) -> HostNode:
    """The type and numbers of a node, from the host where the spec leaves them out.

    Source: the reference library, container-edits_unix.go, fillMissingInfo.
    """
    if node.type and (node.major or node.type == "p"):
        return HostNode(type=node.type, major=node.major or 0, minor=node.minor or 0)
    path = node.host_path or node.path
    found = find(path)
    if node.type and node.type != found.type:
        message = f"{path} is of type {found.type} on the host, the spec says {node.type}"
        raise OtherType(path, message, found=found.type)
    if node.major or found.type == "p":
        return HostNode(type=found.type, major=node.major or 0, minor=node.minor or 0)
    return found
