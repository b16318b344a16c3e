"""Every path of a device on the host, with all symlinks resolved.

Only names from the kernel or the host's udev count, not those that a guest can write into a disk,
such as a label or a partition's name.
Source: Documentation/ABI/testing/sysfs-block-dm; systemd src/libsystemd/sd-device, the S: lines of
/run/udev/data.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from vmplug.devnum import DevNum
from vmplug.host.block.device import BlockDevice
from vmplug.host.device import CharDevice, HostDevice, OpenConnection
from vmplug.host.file_id import pinned, real_path_of
from vmplug.host.pci.group import VfioGroup
from vmplug.host.root import HostRoot

_BY_ID = "S:disk/by-id/"
_UDEV_LINKS = (_BY_ID, "S:disk/by-path/")
"""By hardware and position; the other links come from data on the disk."""
_FROM_DATA = f"{_BY_ID}lvm-pv-uuid-"
_PRIORITY = "L:"


def find_paths(device: HostDevice, root: HostRoot) -> tuple[str, ...]:
    """The paths of the device; empty for a connection or a group.

    A group's functions have their own; a loop device also has the path of its file. Raises
    AttributeReadError, and NoSuchDevice where another file than the one that was found has the
    path by now.
    """
    match device:
        case OpenConnection() | VfioGroup():
            return ()
        case BlockDevice():
            return (root.real_path(device.host_path), *_block_names(device, root))
        case CharDevice():
            return (root.real_path(device.host_path),)
        case _:
            return (_path_of(device.host_path, device.file_id, root),)


def _path_of(path: str, found: str | None, root: HostRoot) -> str:
    """The path of the file of that id: on the running host, that of the file itself.

    Resolved for itself, it may be another one: a tenant can make a link of a file for a moment.
    """
    if found is None or not root.is_live:
        return root.real_path(path)
    with pinned(path, found) as pin:
        return real_path_of(pin, path)


def _block_names(device: BlockDevice, root: HostRoot) -> Iterator[str]:
    if device.backing and not device.backing.deleted:
        named = device.backing.backing_file
        yield named if root.is_live else root.real_path(named)  # the kernel's text has no links
    if device.sysfs_path and (mapped := root.read_attribute(f"{device.sysfs_path}/dm/name")):
        yield f"/dev/mapper/{os.fsdecode(mapped).removesuffix(chr(10))}"
    for line in _read_udev(device.devnum, root):
        if line.startswith(_UDEV_LINKS):
            yield f"/dev/{line.removeprefix('S:')}"


def _read_udev(devnum: DevNum, root: HostRoot) -> list[str]:
    """What udev keeps of a block device, a fact in each line. Raises AttributeReadError."""
    return (root.read_text(f"/run/udev/data/b{devnum}") or "").split("\n")


def find_stable_names(
    devnums: Iterable[DevNum], root: HostRoot
) -> tuple[dict[str, DevNum], dict[str, tuple[DevNum, ...]]]:
    """The block devices of this host by their names in /dev/disk/by-id.

    The second are names that several devices have alike, such as disks with one serial number.
    Of devices that share a name, udev gives it to the one of highest priority: a multipath device
    before its paths. A name that comes from data on the disk is left out. Raises
    AttributeReadError. Source: systemd src/udev/udev-node.c; the L: lines of /run/udev/data.
    """
    claims = dict[str, list[tuple[int, DevNum]]]()
    for devnum in devnums:
        lines = _read_udev(devnum, root)
        said = next((line for line in lines if line.startswith(_PRIORITY)), "")
        with suppress(ValueError):
            priority = int(said.removeprefix(_PRIORITY) or 0)
            for line in lines:
                if line.startswith(_BY_ID) and not line.startswith(_FROM_DATA):
                    name = line.removeprefix(_BY_ID)
                    claims.setdefault(name, []).append((priority, devnum))
    owners = {name: _of_highest(claimed) for name, claimed in claims.items()}
    alike = {name: found for name, found in owners.items() if len(found) > 1}
    return {name: found[0] for name, found in owners.items() if name not in alike}, alike


def _of_highest(claimed: Sequence[tuple[int, DevNum]]) -> tuple[DevNum, ...]:
    highest = max(priority for priority, _ in claimed)
    return tuple(devnum for priority, devnum in claimed if priority == highest)
