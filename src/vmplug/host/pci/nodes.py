"""The device nodes of a function: what the drivers have made of it, in every class.

A link /sys/dev/char/MAJOR:MINOR leads to the directory of one device, which is below the directory
of the function that it comes from. Two kinds are elsewhere: disks of an NVMe subsystem, which may
have several controllers, and the nodes of NVIDIA's own driver, which sysfs does not have.
Source: Documentation/admin-guide/sysfs-rules.rst; drivers/nvme/host/multipath.c; NVIDIA's README,
chapter "Sample /proc/driver/nvidia".
"""

import os
import re
import stat
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from operator import itemgetter

from vmplug.devnum import DevNum
from vmplug.host.pci.uses import class_paths
from vmplug.host.root import HostRoot
from vmplug.host.use.openers import DeviceNode

_SUBSYSTEMS = "/sys/class/nvme-subsystem"
_CONTROLLER = re.compile(r"/nvme/(nvme[0-9]+)\Z", re.ASCII)
_DEVNAME = re.compile(r"^DEVNAME=(.+)$", re.MULTILINE)
_NVIDIA = "/proc/driver/nvidia/gpus"
_NVIDIA_MAJOR = 195
_NVIDIA_MINOR = re.compile(r"^Device Minor:\s*([0-9]{1,3})\s*$", re.MULTILINE | re.ASCII)


NodePaths = Sequence[tuple[str, int, DevNum]]
"""The directory of every device that has a node, without links, its kind and number; sorted."""
_get_path = itemgetter(0)


def read_node_paths(root: HostRoot) -> NodePaths:
    """The directories of all devices of the host that have a node. Raises AttributeReadError."""
    return sorted(_device_paths(root), key=_get_path)


def read_nodes(bdf: object, paths: NodePaths, root: HostRoot) -> list[DeviceNode]:
    """The nodes of one function, block and character devices. Raises AttributeReadError."""
    directory = root.real_path(f"{root.pci_devices}/{bdf}")
    nodes = [*_below(directory, paths)]
    controllers = {match[1] for path, _, _ in nodes if (match := _CONTROLLER.search(path))}
    for subsystem in _subsystems(controllers, root):
        nodes += _below(subsystem, paths)
    found = [
        DeviceNode(path=node_path(path, root), kind=kind, number=number)
        for path, kind, number in nodes
    ]
    return [*found, *_nvidia_nodes(bdf, root)]


def _below(directory: str, paths: NodePaths) -> NodePaths:
    """The devices in a directory, which are beside each other."""
    start = bisect_left(paths, f"{directory}/", key=_get_path)
    return paths[start : bisect_left(paths, f"{directory}0", start, key=_get_path)]  # "0" > "/"


def _device_paths(root: HostRoot) -> Iterator[tuple[str, int, DevNum]]:
    for name, kind in (("block", stat.S_IFBLK), ("char", stat.S_IFCHR)):
        for text, path in class_paths(f"{root.sys_dev}/{name}", root):
            with suppress(ValueError):  # a copy of a host may have any file there
                yield path, kind, DevNum.parse(text)


def _subsystems(controllers: set[str], root: HostRoot) -> Iterator[str]:
    """The directories of the NVMe subsystems that these controllers are part of."""
    for name in root.list_dir(_SUBSYSTEMS) if controllers else ():
        if controllers & set(root.list_dir(f"{_SUBSYSTEMS}/{name}")):
            yield root.real_path(f"{_SUBSYSTEMS}/{name}")


def node_path(directory: str, root: HostRoot) -> str:
    """Where devtmpfs has the node. Source: Documentation/admin-guide/sysfs-rules.rst, uevent."""
    uevent = os.fsdecode(root.read_attribute(f"{directory}/uevent") or b"")
    match = _DEVNAME.search(uevent)
    return f"/dev/{match[1] if match else directory.rpartition('/')[2].replace('!', '/')}"


def _nvidia_nodes(bdf: object, root: HostRoot) -> Iterator[DeviceNode]:
    text = root.read_text(f"{_NVIDIA}/{bdf}/information") or ""
    if match := _NVIDIA_MINOR.search(text):
        number = DevNum(_NVIDIA_MAJOR, int(match[1]))
        yield DeviceNode(path=f"/dev/nvidia{match[1]}", kind=stat.S_IFCHR, number=number)
