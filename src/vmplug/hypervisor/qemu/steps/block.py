"""A disk, as QMP commands: the node that opens it, and the device the guest sees.

Source: QEMU qapi/block-core.json, qapi/qom.json; sequences and traps measured on QEMU 7.2.
"""

from typing import Any

from msgspec import structs

from vmplug.address import qemu_id
from vmplug.drivers.place import Place, ScsiPlace
from vmplug.drivers.plug import BlockDrive, Throttle
from vmplug.drivers.ports import Command, Step
from vmplug.host.block.formats import ImageFormat
from vmplug.host.block.qcow2 import ImageFile
from vmplug.hypervisor.qemu.steps.frontend import device_step, object_step, virtio_step


def plug_steps(drive: BlockDrive, place: Place) -> tuple[Step, ...]:
    """The commands that plug `drive` at `place`, each with its undo."""
    node = qemu_id(drive.id)
    steps = []
    if drive.throttle:
        limits = {"limits": _limits(drive.throttle)}
        steps.append(object_step("throttle-group", qemu_id(drive.id, "limits"), limits))
    if drive.iothread:
        steps.append(object_step("iothread", qemu_id(drive.id, "thread"), {}))
    steps.append(_node(node, _disk_node(drive)))
    if drive.throttle:
        top = qemu_id(drive.id, "limit")
        group = qemu_id(drive.id, "limits")
        limited = {"driver": "throttle", "throttle-group": group, "file": node}
        steps.append(_node(top, {**limited, **_how(drive)}))
        node = top
    steps.append(_front_end(drive, place, node))
    return tuple(steps)


def _node(name: str, options: dict[str, Any]) -> Step:
    return Step(
        do=Command("blockdev-add", {"node-name": name, **options}),
        undo=Command("blockdev-del", {"node-name": name}),
    )


def _disk_node(drive: BlockDrive) -> dict[str, Any]:
    """Format over protocol. `host_device` needs a block device and `file` a regular file."""
    how = _how(drive)
    file = {**_protocol(drive.file, is_device=drive.is_device), "aio": str(drive.aio), **how}
    others = _others(drive.backing, drive.data_file, how)
    return {"driver": str(drive.format), **how, "file": file} | (
        others if drive.format is ImageFormat.QCOW2 else {}
    )


def _how(drive: BlockDrive) -> dict[str, Any]:
    """What every node of a disk gets: none asks those above or below it.

    A node that may write is refused for a disk that may not, and one that ignores discards keeps
    them from those below. Source: QEMU block.c, bdrv_open_common; block/io.c, bdrv_co_pdiscard.
    """
    return {
        "read-only": drive.read_only,
        "cache": {"direct": drive.cache.direct, "no-flush": drive.cache.no_flush},
        "discard": "unmap" if drive.discard else "ignore",
    }


def _others(
    backing: ImageFile | None, data_file: ImageFile | None, how: dict[str, Any]
) -> dict[str, Any]:
    """What a qcow2 image opens besides itself, whatever its header says when QEMU reads it.

    QEMU takes no word for "no data file": see `vmplug.hypervisor.qemu.graph`.
    """
    others: dict[str, Any] = {"backing": _image(backing, how) if backing else None}
    if data_file:
        others["data-file"] = {**_protocol(data_file.path, is_device=data_file.is_device), **how}
    return others


def _image(image: ImageFile, how: dict[str, Any]) -> dict[str, Any]:
    how = {"read-only": True, "cache": how["cache"]}
    is_qcow2 = image.format is ImageFormat.QCOW2
    return {
        "driver": str(image.format),
        **how,
        "file": {**_protocol(image.path, is_device=image.is_device), **how},
        **(_others(image.backing, image.data_file, how) if is_qcow2 else {}),
    }


def _protocol(path: str, *, is_device: bool) -> dict[str, str]:
    return {"driver": "host_device" if is_device else "file", "filename": path}


def _front_end(drive: BlockDrive, place: Place, node: str) -> Step:
    common: dict[str, Any] = {
        "drive": node,
        "serial": drive.serial,
        "share-rw": drive.share_rw,
        "write-cache": "on" if drive.cache.write_cache else "off",
        "logical_block_size": drive.sector_bytes,
        "physical_block_size": max(drive.physical_bytes, drive.sector_bytes),
    }
    on_error = {"werror": drive.werror, "rerror": drive.rerror}
    common |= {name: str(action) for name, action in on_error.items() if action}
    if isinstance(place, ScsiPlace):
        address = {"scsi-id": place.address.scsi_id, "lun": place.address.lun}
        where = {"bus": place.bus, "channel": 0, **address}
        return device_step("scsi-hd", drive.id, where | common | _names(drive))
    thread = {"iothread": qemu_id(drive.id, "thread")} if drive.iothread else {}
    own = {"discard": drive.discard, **thread}
    return virtio_step("virtio-blk", drive.id, place, common | own)


def _names(drive: BlockDrive) -> dict[str, Any]:
    """By VPD page 0x83 a guest takes disks for paths to one disk. Source: SPC-5, 7.7.6."""
    names = {"device_id": drive.disk_id, "wwn": drive.wwn}
    return {key: name for key, name in names.items() if name is not None}


def _limits(throttle: Throttle) -> dict[str, int]:
    return {
        name.replace("_", "-"): limit
        for name, limit in structs.asdict(throttle).items()
        if limit is not None
    }
