"""Other names of one disk: a LUN that the host reaches over several paths.

Each path is a disk of its own to the kernel, which does not keep one from being mounted while
another is written to. The LUN's name shows that they are one.
Source: Documentation/ABI/stable/sysfs-block, wwid; drivers/scsi/scsi_sysfs.c, wwid.
"""

import os
import re
from collections.abc import Iterable, Iterator

from vmplug.host.block.device import DiskPart
from vmplug.host.block.loop_files import read_loop
from vmplug.host.root import HostRoot

_BLOCK = "/sys/block"
_NAMELESS = ("loop", "ram", "zram", "nbd", "dm-", "md", "bcache")


LunName = tuple[str, bytes | None]
"""A name and the size of a LUN: card readers have one name for all of their slots."""


def read_luns(root: HostRoot) -> dict[LunName, list[str]]:
    """The disks that have each name of a LUN. Raises AttributeReadError."""
    found: dict[LunName, list[str]] = {}
    names = (name for name in root.list_dir(_BLOCK) if not name.startswith(_NAMELESS))
    for disk in (f"{_BLOCK}/{name}" for name in names):
        for name in _read_names(disk, root):
            found.setdefault(name, []).append(disk)
    return found


def read_lun_names(sysfs_path: str, root: HostRoot) -> list[LunName]:
    """Every name of the LUN of a disk, or of the disk of a partition; empty where it has none."""
    return _read_names(_disk_of(sysfs_path, root), root)


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

    That is the LUN's, also for multipath over it; the uuid of a volume or an array, else the name
    that its administrator chose; the file behind a loop device. Clones of a virtual disk may have
    one serial number, so that is not a name.
    """
    uuid = root.read_attribute(f"{disk_path}/dm/uuid") or b""
    luns = [disk_path]
    if uuid.startswith(b"mpath-"):
        luns = [f"{disk_path}/slaves/{name}" for name in root.list_dir(f"{disk_path}/slaves")]
    given = (root.read_attribute(f"{disk_path}/{file}") or b"" for file in ("md/uuid", "dm/name"))
    names = [*(_wwid(lun, root) for lun in luns), uuid.strip(), *(text.strip() for text in given)]
    name = next(filter(None, names), None)
    if name is None:
        loop = read_loop(disk_path, root)
        if loop is None:
            return None
        name = os.fsencode(loop.own_name(root))
    part = root.read_attribute(f"{sysfs_path}/partition") or b""
    return os.fsdecode(b" part ".join(filter(None, (name, part.strip()))))


def _wwid(disk: str, root: HostRoot) -> bytes | None:
    """A name that is made of a serial number counts with the size, as in `LunName`."""
    found = (root.read_attribute(f"{disk}/{name}") for name in ("wwid", "device/wwid", "nguid"))
    name = next((name for text in found if (name := (text or b"").strip())), None)
    if name and name.startswith((b"t10.", b"nvme.")):
        size = root.read_attribute(f"{disk}/size") or b""
        return b" ".join((name, size.strip()))
    return name


def _read_names(disk: str, root: HostRoot) -> list[LunName]:
    """Each path may show other names, or a copy of a host only some of their files."""
    texts = [
        *((f"{kind}{_word(f'{disk}/{file}', root)}") for file, kind in _NAME_FILES),
        *_designators(root.read_attribute(f"{disk}/device/vpd_pg83") or b""),
    ]
    names = dict.fromkeys(text for text in texts if text.rpartition(".")[2].strip("0-"))
    size = root.read_attribute(f"{disk}/size") if names else None
    return [(name, size) for name in names]


_NAME_FILES = (
    ("wwid", ""),
    ("device/wwid", ""),
    ("nguid", "eui."),
    ("eui", "eui."),
    ("uuid", "uuid."),
)
"""Where a disk has its names, and what the kernel puts before those in its `wwid`.

Source: wwid_show, Linux drivers/nvme/host/sysfs.c.
"""


def _word(path: str, root: HostRoot) -> str:
    text = (root.read_attribute(path) or b"").decode(errors="replace").strip().lower()
    if path.endswith("/uuid"):
        return text
    return re.sub("[- ]", "", text) if path.endswith(("/nguid", "/eui")) else text


_PAGE_83, _HEADER_BYTES = 0x83, 4


def _designators(page: bytes) -> Iterator[str]:
    """The names of the LUN itself in its VPD page 0x83, as the kernel writes them in `wwid`.

    Those of a vendor say nothing by themselves. Source: SPC-4, 7.8.6; scsi_vpd_lun_id.
    """
    if len(page) < _HEADER_BYTES or page[1] != _PAGE_83:
        return
    at = _HEADER_BYTES
    while at + _HEADER_BYTES <= len(page):
        kind, length = page[at + 1], page[at + 3]
        name = page[at + _HEADER_BYTES : at + _HEADER_BYTES + length]
        at += _HEADER_BYTES + length
        if kind & 0x30:  # of a port or a target
            continue
        match kind & 0xF:
            case 2:
                yield f"eui.{name.hex()}"
            case 3:
                yield f"naa.{name.hex()}"
            case 8:
                yield name.rstrip(b"\0").decode(errors="replace").lower()
            case _:
                pass


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
            is_whole = (directory == disk) is (number is None)
            yield DiskPart(devnum, f"/dev/{name}", holders, is_whole)
