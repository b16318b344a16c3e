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
from collections.abc import Iterator, Mapping
from contextlib import suppress

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


NodePaths = Mapping[tuple[int, DevNum], str]
"""The directory of every device that has a node, by kind and number, without links."""


def read_node_paths(root: HostRoot) -> NodePaths:
    """The directories of all devices of the host that have a node. Raises AttributeReadError."""
    return dict(_device_paths(root))


def read_nodes(bdf: object, paths: NodePaths, root: HostRoot) -> list[DeviceNode]:
    """The nodes of one function, block and character devices. Raises AttributeReadError."""
    directory = root.real_path(f"{root.pci_devices}/{bdf}")
    places = [f"{directory}/"]
    controllers = {
        match[1]
        for path in paths.values()
        if path.startswith(places[0]) and (match := _CONTROLLER.search(path))
    }
    places += _subsystems(controllers, root)
    found = [
        DeviceNode(path=_node_path(path, root), kind=kind, number=number)
        for (kind, number), path in paths.items()
        if path.startswith(tuple(places))
    ]
    return [*found, *_nvidia_nodes(bdf, root)]


def _device_paths(root: HostRoot) -> Iterator[tuple[tuple[int, DevNum], str]]:
    for name, kind in (("block", stat.S_IFBLK), ("char", stat.S_IFCHR)):
        for text, path in class_paths(f"{root.sys_dev}/{name}", root):
            with suppress(ValueError):  # a copy of a host may have any file there
                yield (kind, DevNum.parse(text)), path


def _subsystems(controllers: set[str], root: HostRoot) -> Iterator[str]:
    """The directories of the NVMe subsystems that these controllers are part of."""
    for name in root.list_dir(_SUBSYSTEMS) if controllers else ():
        if controllers & set(root.list_dir(f"{_SUBSYSTEMS}/{name}")):
            yield f"{root.real_path(f'{_SUBSYSTEMS}/{name}')}/"


def _node_path(directory: str, root: HostRoot) -> str:
    """Where devtmpfs has the node. Source: Documentation/admin-guide/sysfs-rules.rst, uevent."""
    uevent = os.fsdecode(root.read_attribute(f"{directory}/uevent") or b"")
    match = _DEVNAME.search(uevent)
    return f"/dev/{match[1] if match else directory.rpartition('/')[2].replace('!', '/')}"


def _nvidia_nodes(bdf: object, root: HostRoot) -> Iterator[DeviceNode]:
    text = root.read_text(f"{_NVIDIA}/{bdf}/information") or ""
    if match := _NVIDIA_MINOR.search(text):
        number = DevNum(_NVIDIA_MAJOR, int(match[1]))
        yield DeviceNode(path=f"/dev/nvidia{match[1]}", kind=stat.S_IFCHR, number=number)
