"""What the block layer says of a disk that a guest's disk may not be able to carry.

Source: Documentation/ABI/stable/sysfs-block; Documentation/scsi/scsi-generic (types of devices);
drivers/cdrom/cdrom.c, /proc/sys/dev/cdrom/info.
"""

import re

import msgspec

from vmplug.host.root import HostRoot

_CDROM_INFO = "/proc/sys/dev/cdrom/info"
CD = 5
"""The SCSI type of CD and DVD drives."""
_BLOCK_BYTES_MAX = 2 << 20
"""Source: QEMU hw/core/qdev-properties-system.c, MAX_BLOCK_SIZE."""


class QueueFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of a disk's queue; a partition has those of its disk.

    `physical_bytes` is the unit that it writes without reading first, None when it is the logical
    one or does not begin at the device's start. `zoned` is `host-managed` or `host-aware`,
    `integrity` the format of protection information such as `T10-DIF-TYPE1-CRC`, None for none.
    `scsi_type` is None for what is not a SCSI device; `changer_slots` is how many discs a CD drive
    can choose from, 1 for any other device.
    """

    physical_bytes: int | None = None
    zoned: str | None = None
    integrity: str | None = None
    scsi_type: int | None = None
    changer_slots: int = 1


def read_queue(sysfs_path: str, disk_path: str, root: HostRoot) -> QueueFacts:
    """The facts of the disk at `disk_path`, or of its partition at `sysfs_path`."""
    name = disk_path.rpartition("/")[2]
    scsi_type = _scsi_type(disk_path, name, root)
    return QueueFacts(
        physical_bytes=_physical_bytes(sysfs_path, disk_path, root),
        zoned=_word(f"{disk_path}/queue/zoned", root),
        integrity=_word(f"{disk_path}/integrity/format", root),
        scsi_type=scsi_type,
        changer_slots=_slots(name, root) if scsi_type == CD else 1,
    )


def _word(path: str, root: HostRoot) -> str | None:
    data = root.read_attribute(path)
    word = data.decode(errors="replace").strip() if data else ""
    return word if word not in {"", "none"} else None


def _physical_bytes(sysfs_path: str, disk_path: str, root: HostRoot) -> int | None:
    """A partition off the grid shares its outer units with its neighbours."""
    size = root.read_int(f"{disk_path}/queue/physical_block_size") or 0
    is_power = size > 0 and not size & (size - 1)
    if not is_power or size > _BLOCK_BYTES_MAX or root.read_int(f"{sysfs_path}/alignment_offset"):
        return None
    return size


def _scsi_type(disk_path: str, name: str, root: HostRoot) -> int | None:
    """Other buses have a `type` of their own: `MMC`, or a number with another meaning."""
    is_scsi = name.startswith(("sd", "sr")) or root.stat_or_none(f"{disk_path}/device/scsi_level")
    return root.read_int(f"{disk_path}/device/type") if is_scsi else None


def _slots(name: str, root: HostRoot) -> int:
    table = root.read_text(_CDROM_INFO) or ""
    rows = {key: re.findall(r"\S+", rest) for key, _, rest in _rows(table)}
    slots = dict(zip(rows.get("drive name", ()), rows.get("drive # of slots", ()), strict=False))
    return int(slots[name]) if slots.get(name, "").isdecimal() else 1


def _rows(table: str) -> list[tuple[str, str, str]]:
    return [line.partition(":") for line in table.splitlines()]
