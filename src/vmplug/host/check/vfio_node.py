"""Are the nodes in /dev that QEMU will open the ones that the kernel made for the group?

A node outlives its group where a container or a static /dev has a copy of it, and numbers are
given again. Without the node in /dev QEMU cannot open the group at all.
Source: vfio_group_create and vfio_device_add, Linux drivers/vfio/; Documentation/admin-guide/
devices.txt.
"""

import stat
from collections.abc import Iterator
from shlex import quote

from vmplug.devnum import DevNum
from vmplug.host.block.usage import HostUsage
from vmplug.host.finding import Code, Finding
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.vfio import is_vfio_driver
from vmplug.host.root import HostRoot, describe, node_number
from vmplug.host.use.mounts import find_mount_point, read_mount_points

_NODES, _CLASS = "/dev/vfio", "/sys/class/vfio"


def check_nodes(group: VfioGroup, usage: HostUsage, root: HostRoot) -> Iterator[Finding]:
    """Every reason why the group cannot be opened by the nodes that QEMU will get."""
    if group.number is None or group.is_noiommu:
        return
    if not group.cdev_nodes:
        yield from check_group_node(group, root)
    for node in [node for _, node in group.cdev_nodes] or [group.group_node]:
        yield from _without_devices(node, usage, root)
    paths = group.member_paths
    for name, node in group.cdev_nodes:
        number = root.read_devnum(f"{paths[name]}/vfio-dev/{node.rpartition('/')[2]}/dev")
        if number:
            yield from _wrong(node, name, number, root)


def check_group_node(group: VfioGroup, root: HostRoot) -> Iterator[Finding]:
    """Whether the group's own node is there, and is the kernel's."""
    node, what = group.group_node, f"group {group.number}"
    number = root.read_devnum(f"{_CLASS}/{group.number}/dev")
    is_there = root.stat_or_none(node) is not None
    if number and is_there:
        yield from _wrong(node, what, number, root)
    elif number:
        if _shows(_NODES, root):
            yield Finding(
                Code.NO_NODE,
                f"VFIO has {what}, and {node} is not in /dev: it was renamed or removed, or /dev "
                "is a container's",
                f"mknod {node} c {number.major} {number.minor}; in a container, share the host's "
                "/dev/vfio",
            )
    elif _is_held(group, root):
        if _shows(_CLASS, root):
            yield Finding(
                Code.NO_NODE,
                f"VFIO has {what}, and this kernel makes no node for it (CONFIG_VFIO_GROUP=n)",
                _by_device_nodes(group, root),
            )
    elif is_there:
        yield Finding(
            Code.WRONG_NODE,
            f"{node} was left behind: VFIO does not have {what}",
            f"rm {node}; the kernel makes it again when VFIO gets the group",
        )


def _wrong(node: str, what: str, number: DevNum, root: HostRoot) -> Iterator[Finding]:
    """A node that is not the kernel's. An absent one is another finding."""
    status = root.stat_or_none(node)
    if status and not (stat.S_ISCHR(status.st_mode) and node_number(status) == number):
        yield Finding(
            Code.WRONG_NODE,
            f"{node} must be char device {number} for {what}, but it is {describe(status)}",
            f"rm {node}; mknod {node} c {number.major} {number.minor}",
        )


def _without_devices(node: str, usage: HostUsage, root: HostRoot) -> Iterator[Finding]:
    """A node where nothing opens devices, as in the /dev of some containers.

    It may not be there before VFIO has the group.
    """
    mount = find_mount_point(node, usage.once(read_mount_points))
    if mount and not mount.has_devices and (root.is_live or root.stat_or_none(node)):
        yield Finding(
            Code.WRONG_NODE,
            f"{node} cannot be opened: {mount.path} is mounted nodev",
            f"mount -o remount,bind,dev {quote(mount.path)}",
        )


def _is_held(group: VfioGroup, root: HostRoot) -> bool:
    return bool(group.mediated) or any(is_vfio_driver(f, root) for f in group.functions)


def _shows(directory: str, root: HostRoot) -> bool:
    """Whether the host shows such entries; a copy of another one may have been made without."""
    return root.is_live or bool(root.list_dir(directory))


def _by_device_nodes(group: VfioGroup, root: HostRoot) -> str:
    paths = [group.mediated.sysfs_path] if group.mediated else []
    paths += [function.sysfs_path for function in group.functions]
    names = [name for path in paths for name in root.list_dir(f"{path}/vfio-dev")]
    if not names:
        return "use a kernel that makes nodes of groups (CONFIG_VFIO_GROUP=y)"
    return f"request it by its own node, which needs iommufd: {_NODES}/devices/{names[0]}"
