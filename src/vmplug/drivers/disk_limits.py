"""What a disk of a guest cannot carry of the disk behind it."""

from collections.abc import Iterator

from vmplug.host.block.device import BlockDevice
from vmplug.host.block.queue import CD, QueueFacts
from vmplug.host.finding import Code, Finding, Severity

SECTOR_BYTES_MAX = 4096
"""Linux before 6.15 refuses larger sectors, as virtio-blk and as SCSI: those of a page at most."""

_RANDOM_ACCESS = {0: "disk", CD: "CD drive", 7: "optical disk", 14: "simplified disk", 20: "zoned"}
"""Types of SCSI devices that are read and written anywhere. Source: SPC-5, 6.7.2."""
_NAMES = {1: "tape drive", 4: "write-once device", 8: "medium changer"}


def check_limits(device: BlockDevice, *, read_only: bool) -> Iterator[Finding]:
    """Reasons why the guest would see less than a plain disk, or no disk at all."""
    if (device.sector_bytes or 0) > SECTOR_BYTES_MAX:
        yield Finding(
            Code.SECTOR_SIZE,
            f"{device.device_node} has sectors of {device.sector_bytes} bytes, which guests older "
            "than Linux 6.15 refuse",
            f"format it with sectors of at most {SECTOR_BYTES_MAX} bytes, or allow this finding "
            "if the guest can use it",
        )
    if facts := device.queue:
        yield from _kind_of_drive(device, facts, read_only=read_only)
        yield from _zones(device, facts)
        yield from _integrity(device, facts)


def _kind_of_drive(
    device: BlockDevice, facts: QueueFacts, *, read_only: bool
) -> Iterator[Finding]:
    kind = facts.scsi_type
    if kind is not None and kind not in _RANDOM_ACCESS:
        what = _NAMES.get(kind, f"SCSI device of type {kind}")
        yield Finding(
            Code.NOT_A_DISK,
            f"{device.device_node} is a {what}, which cannot be read and written as a disk",
            "hand over its controller instead (vfio), or a disk",
        )
    if facts.changer_slots > 1:
        yield Finding(
            Code.NOT_A_DISK,
            f"{device.device_node} is a CD changer with {facts.changer_slots} discs: the guest "
            "cannot choose one, and the host can change it",
            "hand over an image of the disc (dd), or a drive with one disc",
        )
    elif kind == CD and not (read_only or device.read_only):
        yield Finding(
            Code.NOT_A_DISK,
            f"{device.device_node} is a CD drive: its discs are burnt, not written as a disk",
            "request it read-only",
        )


def _zones(device: BlockDevice, facts: QueueFacts) -> Iterator[Finding]:
    if facts.zoned == "host-managed":
        yield Finding(
            Code.ZONED,
            f"{device.device_node} is a zoned disk (host-managed): the guest would not see its "
            "zones, and most of its writes would fail",
            "put dm-zoned on it (dmzadm) and hand that over, or hand over its controller (vfio)",
        )
    elif facts.zoned:
        yield Finding(
            Code.ZONED,
            f"{device.device_node} is a zoned disk ({facts.zoned}): the guest does not see its "
            "zones, and random writes are slow",
            "no action needed for a disk that is written in order",
            Severity.WARNING,
        )


def _integrity(device: BlockDevice, facts: QueueFacts) -> Iterator[Finding]:
    if facts.integrity:
        yield Finding(
            Code.HAS_INTEGRITY,
            f"{device.device_node} has protection information ({facts.integrity}): the host adds "
            "and verifies it, and it does not protect data on the way to the guest",
            "no action needed, unless the guest must verify it: then hand over its controller "
            "(vfio)",
            Severity.WARNING,
        )
