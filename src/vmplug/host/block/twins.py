"""Other names of one disk: a LUN that the host reaches over several paths.

Each path is a disk of its own to the kernel, which does not keep one from being mounted while
another is written to. The LUN's name shows that they are one.
Source: Documentation/ABI/stable/sysfs-block, wwid; drivers/scsi/scsi_sysfs.c, wwid.
"""

import os
from collections.abc import Iterable, Iterator

from vmplug.host.block.device import DiskPart
from vmplug.host.block.loop import read_backing_file
from vmplug.host.root import HostRoot

_BLOCK = "/sys/block"


Lun = tuple[bytes, bytes | None]
"""The name and size of a LUN: card readers have one name for all of their slots."""


def read_luns(root: HostRoot) -> dict[Lun, list[str]]:
    """The disks of each LUN that has a name. Raises AttributeReadError."""
    found: dict[Lun, list[str]] = {}
    for disk in (f"{_BLOCK}/{name}" for name in root.list_dir(_BLOCK)):
        if lun := _read_lun(disk, root):
            found.setdefault(lun, []).append(disk)
    return found


def read_lun(sysfs_path: str, root: HostRoot) -> Lun | None:
    """The LUN of a disk, or of the disk of a partition; None where it has no name."""
    return _read_lun(_disk_of(sysfs_path, root), root)


def read_twins(sysfs_path: str, names: Iterable[str], root: HostRoot) -> list[DiskPart]:
    """The other names of the disk, or of the disk of the partition, with their partitions.

    Of a partition, only that partition under the other names, with their disks. `sysfs_path` has
    no links; `names` are the disks of its LUN. Raises AttributeReadError.
    """
    number = root.read_attribute(f"{sysfs_path}/partition")
    disk = _disk_of(sysfs_path, root)
    others = (other for other in names if root.real_path(other) != disk)
    return [part for other in others for part in _parts(other, number, root)]


def _disk_of(sysfs_path: str, root: HostRoot) -> str:
    is_part = root.read_attribute(f"{sysfs_path}/partition") is not None
    return sysfs_path.rpartition("/")[0] if is_part else sysfs_path


def read_own_name(sysfs_path: str, disk_path: str, root: HostRoot) -> str | None:
    """The name of a disk or partition that does not depend on the way to it; None without one.

    That is the LUN's, also for multipath over it; a volume's uuid; the file behind a loop device.
    Clones of a virtual disk may have one serial number, so that is not a name.
    """
    uuid = root.read_attribute(f"{disk_path}/dm/uuid") or b""
    luns = [disk_path]
    if uuid.startswith(b"mpath-"):
        luns = [f"{disk_path}/slaves/{name}" for name in root.list_dir(f"{disk_path}/slaves")]
    names = (wwid for lun in luns if (wwid := _wwid(lun, root)))
    name = next(names, None) or uuid.strip() or None
    if name is None:
        backing = read_backing_file(disk_path, root)
        if backing is None:
            return None
        name = os.fsencode(f"{backing.backing_file} {backing.offset_bytes}")
    part = root.read_attribute(f"{sysfs_path}/partition") or b""
    return os.fsdecode(b" part ".join(filter(None, (name, part.strip()))))


def _wwid(disk: str, root: HostRoot) -> bytes | None:
    found = (root.read_attribute(f"{disk}/{name}") for name in ("wwid", "device/wwid", "nguid"))
    return next((name for text in found if (name := (text or b"").strip())), None)


def _read_lun(disk: str, root: HostRoot) -> Lun | None:
    wwid = _wwid(disk, root)
    return (wwid, root.read_attribute(f"{disk}/size")) if wwid else None


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
