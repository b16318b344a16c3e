"""The device that a person means: by address, number, node, path, UUID or name of the kernel."""

import re
import stat
from typing import TYPE_CHECKING

from vmplug.address import Bdf
from vmplug.devnum import DevNum
from vmplug.errors import NoSuchDevice, SpecError
from vmplug.host.block.sysfs import list_block_directories, read_disk_file
from vmplug.host.device import HostDevice
from vmplug.host.inventory import Kind, read_inventory
from vmplug.host.kind import FoundBy
from vmplug.host.pci.mdev import UUID
from vmplug.host.pci.nodes import node_path, read_node_paths
from vmplug.host.pci.vfio import (
    CDEV_NODE,
    GROUP_NODE,
    check_exists,
    find_vfio_device,
    find_vfio_group,
)
from vmplug.host.resolve import resolve
from vmplug.host.root import HostRoot, node_number
from vmplug.host.use.silent import require_answer
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import ShareInfo

if TYPE_CHECKING:
    from vmplug.host.vhost_user.store import VhostUserStore

_NUMBER = re.compile(r"(?:([bcu]):)?([0-9]{1,9}:[0-9]{1,9})\Z", re.ASCII)
_GROUP = re.compile(r"[0-9]{1,9}\Z", re.ASCII)

_ANY_TAG = "any"
"""A directory is one thing, whatever the tags that VMs have it under."""

SEE = (
    "vmplug host shows everything; a name is an address, the number of a group, a node, a UUID, "
    "b:MAJOR:MINOR, or the path of a file, a directory or a socket"
)


def no_such(name: str) -> NoSuchDevice:
    """The error for a name that nothing has."""
    return NoSuchDevice(name, f"nothing on this host goes by {name!r}", found="nothing", hint=SEE)


def find_named_device(
    name: str, root: HostRoot, store: "VhostUserStore | None" = None
) -> HostDevice:
    """The device of that name, with its facts.

    Raises SpecError for a number that no device can have, NoSuchDevice, AttributeReadError.
    """
    if match := _NUMBER.match(name):
        try:
            number = DevNum.parse(match[2])
        except ValueError as error:
            raise SpecError(repr(name), str(error), hint="write b:8:16") from None
        return _numbered(DevType(match[1] or "b"), number, root, store)
    if _GROUP.match(name):
        return _group(f"/dev/vfio/{name}", root)
    if UUID.match(name.lower()):
        return find_vfio_device(name.lower(), root)
    try:
        return find_vfio_device(str(Bdf.parse_written(name)), root)
    except ValueError:
        pass
    if "/" not in name:
        try:
            return _of_kernel(name, root, store)
        except NoSuchDevice:
            if not (root.is_live and name):
                raise
    return _at_path(name, root, store)


def _numbered(
    kind: DevType, number: DevNum, root: HostRoot, store: "VhostUserStore | None"
) -> HostDevice:
    path = f"/dev/{kind}{number}"  # a name that no node has: only the number counts
    return resolve(DeviceInfo(container_path=path, dev_type=kind, devnum=number), root, store)


def _group(node: str, root: HostRoot) -> HostDevice:
    group = find_vfio_group(node, root, devnum=None, found_by=FoundBy.FILE)
    check_exists(group)
    return group


def _at_path(name: str, root: HostRoot, store: "VhostUserStore | None") -> HostDevice:
    require_answer(name, root)
    path = root.real_path(name)
    if GROUP_NODE.match(path) or CDEV_NODE.match(path):
        return _group(path, root)
    status = root.stat(path)
    kind = stat.S_IFMT(status.st_mode) if status else 0
    if status and kind in {stat.S_IFBLK, stat.S_IFCHR}:
        is_block = kind == stat.S_IFBLK
        number = node_number(status)
        return _numbered(DevType.BLOCK if is_block else DevType.CHAR, number, root, store)
    if kind in {stat.S_IFDIR, stat.S_IFSOCK}:
        return resolve(ShareInfo(tag=_ANY_TAG, source=path), root)
    # A copy of a host may have an empty file for a node; the host may have files in /dev/shm.
    if kind == stat.S_IFREG and (root.is_live or not path.startswith("/dev/")):
        return read_disk_file(path, root)
    if path.startswith("/dev/"):
        return _of_kernel(path.removeprefix("/dev/").replace("/", "!"), root, store)
    raise no_such(name)


def _of_kernel(name: str, root: HostRoot, store: "VhostUserStore | None") -> HostDevice:
    """A device by its node, a disk by the kernel's name or that of persistent memory."""
    directory = list_block_directories(root).get(name)
    number = root.read_devnum(f"{directory}/dev") if directory else None
    if number:
        return _numbered(DevType.BLOCK, number, root, store)
    for memory in read_inventory(root, kinds={Kind.PMEM}).pmem:
        node = memory.device_node
        if memory.name == name and node:
            return _of_kernel(node.removeprefix("/dev/"), root, store)
        if node == f"/dev/{name}":
            number = root.read_devnum(f"/sys/bus/dax/devices/{name}/dev")
            if number:
                return _numbered(DevType.CHAR, number, root, store)
    node = f"/dev/{name.replace('!', '/')}"
    for path, kind, number in read_node_paths(root):
        if kind == stat.S_IFCHR and node_path(path, root) == node:
            return _numbered(DevType.CHAR, number, root, store)
    raise no_such(name)
