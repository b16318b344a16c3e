"""Mediated devices: parts of a device that its driver provides, each with a UUID.

Source: Documentation/driver-api/vfio-mediated-device.rst, Documentation/arch/s390/vfio-ap.rst.
"""

import re
from collections.abc import Collection
from enum import StrEnum

import msgspec

from vmplug.devnum import is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.root import HostRoot

MDEV_DEVICES = "/sys/bus/mdev/devices"
_MDEV_BUS = "/sys/class/mdev_bus"
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z", re.ASCII)


class VFIODeviceType(StrEnum):
    """The types of VFIO device, as in Kata's config.go, and one that it does not have."""

    NORMAL = "vfio-pci"
    MEDIATED = "vfio-mdev"
    AP = "vfio-ap"
    CCW = "vfio-ccw"


class MediatedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a device that its driver provides: of a GPU, of a crypto adapter, of a DASD.

    `parent` is the name of the device that it is a part of; `ap_queues` are the queues of an
    adapter, `05.0004`, and empty for everything else.
    """

    uuid: str
    type: VFIODeviceType
    parent: str
    sysfs_path: str
    ap_queues: tuple[str, ...] = ()


def read_mediated(path: str, root: HostRoot) -> MediatedDevice:
    """The mediated device at `path`, a link or directory below /sys."""
    real = root.real_path(path)
    parent, _, uuid = real.rpartition("/")
    api = (
        (root.read_attribute(f"{path}/mdev_type/device_api") or b"")
        .decode(errors="replace")
        .strip()
    )
    if api == "vfio-ap" or "/devices/vfio_ap/" in real:
        kind = VFIODeviceType.AP
    elif api == "vfio-ccw" or "/devices/css" in real:
        kind = VFIODeviceType.CCW
    else:
        kind = VFIODeviceType.MEDIATED
    return MediatedDevice(
        uuid=uuid,
        type=kind,
        parent=parent.rpartition("/")[2],
        sysfs_path=real,
        ap_queues=_read_ap_queues(path, root) if kind is VFIODeviceType.AP else (),
    )


def read_children(parents: Collection[str], root: HostRoot) -> list[MediatedDevice]:
    """The mediated devices that are parts of these devices, which are named as in sysfs."""
    uuids = list_children(parents, root)
    return [read_mediated(f"{MDEV_DEVICES}/{uuid}", root) for uuid in uuids]


def list_children(parents: Collection[str], root: HostRoot) -> list[str]:
    """Their UUIDs, for which only links are read."""
    paths = [root.real_path(f"{MDEV_DEVICES}/{name}") for name in root.list_dir(MDEV_DEVICES)]
    split = (path.split("/")[-2:] for path in paths)
    return [uuid for parent, uuid in split if parent in parents]


def _read_ap_queues(path: str, root: HostRoot) -> tuple[str, ...]:
    """The queues of a matrix device, `05.0004`, one a line. Source: s390/vfio-ap.rst."""
    return tuple((root.read_attribute(f"{path}/matrix") or b"").decode(errors="replace").split())


class MdevType(msgspec.Struct, frozen=True, kw_only=True):
    """A type of mediated device that a parent can make; `available` is how many more it can make.

    `unreadable` are sentences about files that are there and could not be read or made no sense.
    """

    parent: str
    name: str
    title: str | None
    available: int | None
    device_api: str | None
    unreadable: tuple[str, ...] = ()


def read_mdev_types(root: HostRoot) -> list[MdevType]:
    """Every type that the devices of the host can make, by parent."""
    return [
        _read_type(parent, name, root)
        for parent in root.list_dir(_MDEV_BUS)
        for name in root.list_dir(f"{_MDEV_BUS}/{parent}/mdev_supported_types")
    ]


def _read_type(parent: str, name: str, root: HostRoot) -> MdevType:
    base = f"{_MDEV_BUS}/{parent}/mdev_supported_types/{name}"
    unreadable: list[str] = []

    def word(file: str) -> str | None:
        try:
            data = root.read_attribute(f"{base}/{file}")
        except AttributeReadError as error:
            unreadable.append(error.message)
            return None
        return data.decode(errors="replace").strip() if data else None

    title, api, available = word("name"), word("device_api"), word("available_instances")
    if available is not None and not is_decimal(available):
        why = f"{available[:40]!r} is not a number"
        unreadable.append(f"cannot read {base}/available_instances: {why}")
        available = None
    count = None if available is None else int(available)
    return MdevType(
        parent=parent,
        name=name,
        title=title,
        available=count,
        device_api=api,
        unreadable=tuple(unreadable),
    )
