"""Other names of one disk: a LUN that the host reaches over several paths.

Each path is a disk of its own to the kernel, which does not keep one from being mounted while
another is written to. The LUN's name shows that they are one.
Source: Documentation/ABI/stable/sysfs-block, wwid; drivers/scsi/scsi_sysfs.c, wwid.
"""

from collections.abc import Iterator

from vmplug.host.block.device import DiskPart
from vmplug.host.root import HostRoot

_BLOCK = "/sys/block"


def read_twins(sysfs_path: str, root: HostRoot) -> list[DiskPart]:
    """The other names of the disk, or of the disk of the partition, with their partitions.

    Of a partition, only that partition under the other names, with their disks. `sysfs_path` has
    no links. Empty for a disk whose LUN has no name. Raises AttributeReadError.
    """
    number = root.read_attribute(f"{sysfs_path}/partition")
    disk = sysfs_path if number is None else sysfs_path.rpartition("/")[0]
    own = _lun_of(disk, root)
    if own is None:
        return []
    others = (f"{_BLOCK}/{name}" for name in root.list_dir(_BLOCK))
    return [
        part
        for other in others
        if root.real_path(other) != disk and _lun_of(other, root) == own
        for part in _parts(other, number, root)
    ]


def _lun_of(disk: str, root: HostRoot) -> tuple[bytes, bytes | None] | None:
    """The name and size of a disk's LUN: card readers have one name for all of their slots."""
    wwid = root.read_attribute(f"{disk}/wwid") or root.read_attribute(f"{disk}/device/wwid")
    return (wwid, root.read_attribute(f"{disk}/size")) if wwid and wwid.strip() else None


def _parts(disk: str, number: bytes | None, root: HostRoot) -> Iterator[DiskPart]:
    directories = [disk]
    for name in root.list_dir(disk):
        found = root.read_attribute(f"{disk}/{name}/partition")
        if found is not None and number in {None, found}:
            directories.append(f"{disk}/{name}")
    for directory in directories:
        name = directory.rpartition("/")[2].replace("!", "/")
        holders = tuple(root.list_dir(f"{directory}/holders"))
        if devnum := root.read_devnum(f"{directory}/dev"):
            yield DiskPart(devnum=devnum, device_node=f"/dev/{name}", holders=holders)
