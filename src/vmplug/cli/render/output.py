"""What stands on stdout: one JSON document, and words that several verbs have in common."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.device import HostDevice
from vmplug.host.kind import FoundBy
from vmplug.host.pci.group import VfioGroup
from vmplug.oci.info import DeviceInfo

if TYPE_CHECKING:
    from vmplug.oci.requests import Request

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def print_json(document: Mapping[str, Any]) -> None:
    """One document, version first."""
    print_document({"version": 1, **document})


def print_document(document: Mapping[str, Any]) -> None:
    """One document in a format that others have specified."""
    import json  # noqa: PLC0415  3 ms, 4 % of `resolve` without --json

    click.echo(json.dumps(document, indent=2))


def size(size_bytes: int) -> str:
    """`16 MiB`, exact to one decimal."""
    amount, unit = float(size_bytes), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.1f}".removesuffix(".0") + f" {_UNITS[unit]}"


def access(*, read_only: bool | None) -> str:
    """`ro` or `rw`; `?` where it is unknown."""
    if read_only is None:
        return "?"
    return "ro" if read_only else "rw"


def container_path(info: "Request") -> str | None:
    """The path in the container; None for what has none there."""
    return info.container_path if isinstance(info, DeviceInfo) else None


def info_json(info: "Request") -> dict[str, Any]:
    """What is asked for; what OCI has no word for has neither path, type nor number.

    What a CDI name brought has `cdi_names`.
    """
    device = info if isinstance(info, DeviceInfo) else None
    return {
        "name": info.name,
        "container_path": container_path(info),
        "device_type": str(device.dev_type) if device else None,
        "major": device.major if device else None,
        "minor": device.minor if device else None,
        "read_only": info.read_only,
        **({"cdi_names": list(device.cdi_names)} if device and device.cdi_names else {}),
    }


def resolved_json(annotations: Sequence[str]) -> dict[str, Any]:
    """The annotations of the bundle that no guest may get; no key where there are none."""
    return {"resolved_annotations": list(annotations)} if annotations else {}


def device_json(device: HostDevice) -> dict[str, Any]:
    """What it is on the host."""
    facts: dict[str, Any] = {
        "host_path": device.host_path,
        "kind": str(device.kind),
        "found_by": str(device.found_by),
    }
    if isinstance(device, BlockDevice | DiskFile):
        facts["size_bytes"] = device.size_bytes
        facts["host_read_only"] = device.read_only
    if isinstance(device, BlockDevice):
        facts["sysfs_path"] = device.sysfs_path
        if device.backing:
            facts["backing_file"] = device.backing.backing_file
            facts["backing_offset_bytes"] = device.backing.offset_bytes
            facts["backing_size_limit_bytes"] = device.backing.size_limit_bytes
            facts["backing_deleted"] = device.backing.deleted
    if isinstance(device, VfioGroup):
        facts["iommu_group"] = device.number
        facts["members"] = list(device.members)
    if isinstance(device, DiskFile):
        facts["pmem"] = device.found_by is FoundBy.BACKING_FILE
    return facts
