"""What Kata's Go runtime writes down of a sandbox, and the commands it sends to QEMU.

Source: what Kata saved and sent when it ran; the keys are in the order in which Go writes them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DISK_ID = "0123456789abcdef"


def block(
    file: str,
    *,
    name: str = DISK_ID,
    number: str = "-1:0",
    driver: str = "virtio-scsi",
    **more: Any,
) -> dict[str, Any]:
    """A disk that is attached once; `more` are other fields of its drive."""
    major, minor = map(int, number.split(":"))
    drive = {
        "File": file,
        "Format": "raw",
        "ID": f"drive-{name}",
        "MmioAddr": "",
        "SCSIAddr": "",
        "NvdimmID": "",
        "VirtPath": "",
        "DevNo": "",
        "PCIPath": {},
        "Index": 0,
        "ShareRW": False,
        "ReadOnly": False,
        "DiscardUnmap": False,
        "Pmem": False,
        "Swap": False,
    }
    return {
        "DriverOptions": {"block-driver": driver},
        "BlockDrive": {**drive, **more},
        "ID": name,
        "Type": "block",
        "DevType": "b",
        "RefCount": 1,
        "AttachCount": 1,
        "Major": major,
        "Minor": minor,
        "ColdPlug": False,
    }


def device(kind: str, dev_type: str = "c", **more: Any) -> dict[str, Any]:
    """Any other device that is attached once."""
    common = {"DriverOptions": None, "ID": "fedcba9876543210", "Type": kind, "DevType": dev_type}
    counts = {"RefCount": 1, "AttachCount": 1, "Major": 4, "Minor": 2, "ColdPlug": False}
    return {**common, **counts, **more}


def vfio(name: str, **more: Any) -> dict[str, Any]:
    """A function of a group."""
    path = f"/sys/bus/pci/devices/{more.get('BDF', '')}"
    return {"ID": name, "BDF": "", "SysfsDev": path, "GuestPciPath": {}, "Type": 1, **more}


def write_sandbox(
    directory: Path,
    *devices: Mapping[str, Any],
    holds: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> Path:
    """The state of a sandbox; `holds` are device ids and paths by container."""
    directory.mkdir(parents=True, exist_ok=True)
    hypervisor: dict[str, Any] = {
        "BlockIndexMap": {"0": {}},
        "Bridges": None,
        "HotPlugVFIO": "no-port",
    }
    sandbox = {"PersistVersion": 2, "State": "running", "HypervisorState": hypervisor}
    state = directory / "persist.json"
    state.write_text(json.dumps({**sandbox, "Devices": devices}))
    for container, maps in (holds or {}).items():
        (directory / container).mkdir(exist_ok=True)
        entries = [
            {
                "ID": name,
                "ContainerPath": path,
                "FileMode": 432,
                "UID": 0,
                "GID": 0,
                "Shared": False,
            }
            for name, path in maps
        ]
        saved = {"State": "running", "DeviceMaps": entries}
        (directory / container / "persist.json").write_text(json.dumps(saved))
    return state


def plug_commands(
    file: str, front: Mapping[str, Any], *, device_id: str = DISK_ID
) -> list[tuple[str, dict[str, Any]]]:
    """What Kata sends to plug a file or block device; `front` is the device and where it sits."""
    name = f"drive-{device_id}"
    driver = "host_device" if Path(file).is_block_device() else "file"
    protocol = {"aio": "threads", "driver": driver, "filename": file}
    node = {"driver": "raw", "file": protocol, "node-name": name, "read-only": False}
    return [
        ("blockdev-add", node),
        ("device_add", {"drive": name, "id": f"virtio-{name}", "share-rw": True, **front}),
    ]
