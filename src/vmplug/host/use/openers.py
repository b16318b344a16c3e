"""Find the processes that have a device node open.

Source: proc_pid_fd(5): a link there leads to the open file, whatever its name is now.
"""

import os
import stat
from collections.abc import Collection, Mapping
from typing import Self

import msgspec

from vmplug.devnum import DevNum, is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.root import HostRoot, node_number


class DeviceNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node in /dev; `kind` is S_IFBLK or S_IFCHR. `number` is None where no node is there."""

    path: str
    kind: int
    number: DevNum | None

    @classmethod
    def of_char(cls, path: str, root: HostRoot) -> Self:
        """A character device by its path."""
        status = root.stat_or_none(path)
        is_char = status is not None and stat.S_ISCHR(status.st_mode)
        return cls(
            path=path,
            kind=stat.S_IFCHR,
            number=node_number(status) if status and is_char else None,
        )


class Opener(msgspec.Struct, frozen=True, kw_only=True):
    """A process that has a node open. `name` is its command; `path` that of the node."""

    pid: int
    name: str
    path: str


class Openers(msgspec.Struct, frozen=True, kw_only=True):
    """The processes that have nodes open; `unknown` are those whose files could not be read."""

    found: tuple[Opener, ...]
    unknown: tuple[int, ...]


def find_openers(nodes: Collection[DeviceNode], root: HostRoot) -> Openers:
    """The processes that have one of the nodes open, each with the first of them; not this one.

    A node is known by its number, so another name of it, or a chroot, does not hide it; below
    another root, where there may be no nodes, also by its path. Source: proc_pid_fd(5).
    """
    numbers = {(node.kind, node.number): node for node in nodes if node.number}
    paths = {} if root.is_live else {node.path: node for node in nodes}
    found, unknown = list[Opener](), list[int]()
    for pid in root.list_dir("/proc") if numbers or paths else ():
        if not is_decimal(pid) or int(pid) == os.getpid():
            continue
        try:
            if node := _find_open(f"/proc/{pid}/fd", paths, numbers, root):
                name = root.read_text(f"/proc/{pid}/comm") or ""
                found.append(Opener(pid=int(pid), name=name.strip(), path=node.path))
        except AttributeReadError:
            unknown.append(int(pid))
    return Openers(found=tuple(found), unknown=tuple(unknown))


def _find_open(
    directory: str,
    paths: Mapping[str, DeviceNode],
    numbers: Mapping[tuple[int, DevNum], DeviceNode],
    root: HostRoot,
) -> DeviceNode | None:
    for name in root.list_dir(directory):
        target = root.read_link(f"{directory}/{name}") or ""
        node = paths.get(target)
        if not node and numbers and target.startswith("/"):  # not pipe:[..], anon_inode:..
            number = _read_number(f"{directory}/{name}", root)
            node = numbers.get(number) if number else None
        if node:
            return node
    return None


def _read_number(link: str, root: HostRoot) -> tuple[int, DevNum] | None:
    """What a descriptor is open on; a file system that hangs is not waited for."""
    if root.is_live:
        from vmplug.host.use.statx import read_node  # noqa: PLC0415  ctypes costs 2 ms

        return read_node(link)
    status = root.stat_or_none(root.read_link(link) or "")
    return (stat.S_IFMT(status.st_mode), node_number(status)) if status else None
