"""What thing a device is, whatever its name leads to later.

A name, a number and an address can each lead to another thing: a file is replaced under its name,
a loop device gets another file, a function is swapped. The text that `identify` makes differs
then. Only equal or not matters: see `vmplug.host.kind.is_other_thing`.
"""

import re
from typing import TYPE_CHECKING

from vmplug.devnum import DevNum
from vmplug.host.kind import Identity, is_other_thing
from vmplug.host.root import HostRoot
from vmplug.host.use.file_handle import identify_file

if TYPE_CHECKING:
    from vmplug.host.device import HostDevice

_PCI_ID = rb"(?m:^PCI_ID=([0-9A-F]+):([0-9A-F]+)$)"
_FILE = r"file ([0-9]+):([0-9]+) "
_ADDRESS_WORDS = 3
"""A function's address has two colons, the UUID of a mediated device none."""


def identify(device: "HostDevice", root: HostRoot) -> str | None:
    """The thing that a device is now; None for a kind without one, or where it is unknown.

    A file, directory or named socket is its device and inode with its handle, else its
    generation: a backend that starts again makes a new socket. A block
    device is its number and `diskseq`, a partition also its start: it may grow. A function is its
    address, vendor and device, with the inode of its directory in sysfs, which a swapped one does
    not have.
    Source: Documentation/ABI/testing/sysfs-block, diskseq. Raises AttributeReadError.
    """
    from vmplug.host.block.device import BlockDevice, DiskFile  # noqa: PLC0415  `list` has none
    from vmplug.host.device import SharedDirectory  # noqa: PLC0415
    from vmplug.host.pci.group import VfioGroup  # noqa: PLC0415
    from vmplug.host.vhost_user.device import VhostUserSocket  # noqa: PLC0415

    match device:
        case DiskFile() | SharedDirectory() | VhostUserSocket():
            return identify_file(device.host_path, root)
        case BlockDevice(sysfs_path=str(path)):
            return identify_block(device.devnum, path, root)
        case VfioGroup():
            parts = [identify_member(path, root) for path in device.member_paths.values()]
            return " ".join(["vfio", *parts]) if parts and all(parts) else None
        case _:
            return None


def find_place(thing: str) -> tuple[int, int] | None:
    """The file system and the inode in what `identify_file` has made; None for other things."""
    match = re.match(_FILE, thing)
    return (int(match[1]), int(match[2])) if match else None


def identities_in(thing: str) -> list[Identity]:
    """What others know it by: its functions, or its number, which holds in one boot alone."""
    kind, *words = thing.split(" ")
    match kind:
        case "vfio":
            return [Identity.of_vfio(_name_of(word)) for word in words]
        case "block":
            return [Identity.of_block(DevNum.parse(words[0]))]
        case _:
            return []


def identify_block(number: DevNum, sysfs_path: str, root: HostRoot) -> str:
    """The block device that has a number now; the path has no links. Raises AttributeReadError."""
    from vmplug.host.block.sysfs import find_disk_path  # noqa: PLC0415

    disk = find_disk_path(sysfs_path, root)
    names = [f"{disk}/diskseq", *([f"{sysfs_path}/start"] if disk != sysfs_path else [])]
    words = [root.read_int(name) for name in names]
    return " ".join(["block", str(number), *(str(word or "-") for word in words)])


def identify_function(path: str, root: HostRoot) -> str | None:
    """`identify` of the function, or mediated device, that has a directory in sysfs now."""
    member = identify_member(path, root)
    return f"vfio {member}" if member else None


def identify_member(path: str, root: HostRoot) -> str:
    """The function or mediated device that has a directory in sysfs now; empty when absent.

    In the copy of a host the inode is the copy's. Raises AttributeReadError.
    """
    status = root.stat_or_none(path)
    return f"{name_member(path, root)}:{status.st_ino}" if status else ""


def name_member(path: str, root: HostRoot) -> str:
    """A function by its address, vendor and device, or a mediated device by its UUID."""
    name = path.rpartition("/")[2]
    ids = [root.read_attribute(f"{path}/{file}") for file in ("vendor", "device")]
    if not any(ids) and not root.is_live:  # a kernel that unbinds it lets nobody read its uevent
        match = re.search(_PCI_ID, root.read_attribute(f"{path}/uevent") or b"")
        ids = list(match.groups()) if match else []
    words = (text.decode().strip().lower().removeprefix("0x") for text in ids if text)
    return ":".join([name, *words])


def has_changed(thing: str | None, root: HostRoot) -> bool:
    """Whether a block device, or a function, is surely another one at its number or address now.

    False for what is gone, and for files: vmplug holds those open, whatever their names are.
    Raises AttributeReadError.
    """
    kind, *words = (thing or "").split(" ")
    now = ""
    if kind == "block":
        from vmplug.host.block.sysfs import find_block_directory  # noqa: PLC0415

        number = DevNum.parse(words[0])
        path = root.real_path(find_block_directory(number, root))
        now = identify_block(number, path, root) if root.stat_or_none(path) else ""
    elif kind == "vfio":
        members = [identify_member(_path_of(word), root) for word in words]
        now = " ".join([kind, *members]) if all(members) else ""
    return is_other_thing(thing, now)


def _path_of(member: str) -> str:
    """The directory of a member, of which the text is that of `identify_member`."""
    name = _name_of(member)
    if ":" in name:
        return f"/sys/bus/pci/devices/{name}"
    from vmplug.host.pci.mdev import MDEV_DEVICES  # noqa: PLC0415  0.6 ms

    return f"{MDEV_DEVICES}/{name}"


def _name_of(member: str) -> str:
    """The address or the UUID in the text of `identify_member`."""
    words = member.split(":")
    return ":".join(words[:_ADDRESS_WORDS]) if len(words) > _ADDRESS_WORDS else words[0]
