"""Every kind of plug as steps; hot plug sends them, cold plug writes them on the command line."""

import os
from collections.abc import Iterator, Mapping
from typing import assert_never

from msgspec.structs import replace

from vmplug.drivers.free_places import cold_plug_only
from vmplug.drivers.place import MemorySlot, MmioPlace, Place
from vmplug.drivers.plug import BlockDrive, Plug, RNGDevice, SharedFS, VFIODevices, VhostUserDevice
from vmplug.drivers.ports import Step
from vmplug.errors import CannotPlug
from vmplug.host.block.qcow2 import ImageFile
from vmplug.host.file_id import CheckedFile
from vmplug.hypervisor.qemu.abilities import Abilities
from vmplug.hypervisor.qemu.steps import block, nvdimm, rng, share, vfio, vhost_user


def plug_steps(plug: Plug, place: Place, can: Abilities) -> tuple[Step, ...]:
    """The commands that plug it there, each with its undo.

    They depend on QEMU's abilities.
    """
    match plug:
        case BlockDrive():
            if isinstance(place, MemorySlot):
                return nvdimm.plug_steps(plug, place)
            return block.plug_steps(plug, place)
        case VhostUserDevice():
            return vhost_user.plug_steps(plug, place, can)
        case SharedFS():
            return share.plug_steps(plug, place)
        case RNGDevice():
            return rng.plug_steps(plug, place)
        case VFIODevices():
            return vfio.plug_steps(plug, place)
        case _:
            assert_never(plug)


def check_hot(plug: Plug, place: Place) -> None:
    """CannotPlug for a device that QEMU accepts only at its start, before anything is sent."""
    if isinstance(plug, SharedFS):
        raise cold_plug_only("a virtio-9p share")
    if isinstance(place, MmioPlace):
        raise cold_plug_only("a virtio-mmio device")
    check_file(plug, place)


def opened_files(plug: Plug) -> tuple[CheckedFile, ...]:
    """The files that QEMU itself opens for it, where it was checked which those are."""
    match plug:
        case BlockDrive(file_id=str(checked)):
            direct = plug.cache.direct
            own = CheckedFile(plug.file, checked, plug.read_only, direct)
            others = _other_files(plug.backing, plug.data_file, read_only=plug.read_only)
            return own, *(file._replace(direct=direct) for file in others)
        case RNGDevice(filename=path, file_id=str(checked)):
            return (CheckedFile(path, checked, read_only=True),)
        case _:
            return ()


def _other_files(
    backing: ImageFile | None, data_file: ImageFile | None, *, read_only: bool
) -> Iterator[CheckedFile]:
    """Backing files are opened only for reading, with their data files."""
    if data_file:
        yield CheckedFile(data_file.path, data_file.file_id, read_only)
    if backing:
        yield CheckedFile(backing.path, backing.file_id, read_only=True)
        yield from _other_files(backing.backing, backing.data_file, read_only=True)


def renamed(plug: Plug, names: Mapping[str, str]) -> Plug:
    """The plug with other names of its files, by their paths."""
    match plug:
        case BlockDrive():
            backing, data_file = (_renamed(i, names) for i in (plug.backing, plug.data_file))
            file = names.get(plug.file, plug.file)
            return replace(plug, file=file, backing=backing, data_file=data_file)
        case RNGDevice():
            return replace(plug, filename=names.get(plug.filename, plug.filename))
        case _:
            return plug


def _renamed(image: ImageFile | None, names: Mapping[str, str]) -> ImageFile | None:
    return image and image._replace(
        path=names.get(image.path, image.path),
        backing=_renamed(image.backing, names),
        data_file=_renamed(image.data_file, names),
    )


def check_file(plug: Plug, place: Place) -> None:
    """CannotPlug when the file of an NVDIMM has gone: QEMU would create an empty one."""
    match plug, place:
        case BlockDrive(file=path), MemorySlot() if not os.path.exists(path):
            raise CannotPlug(
                "no-such-file",
                f"{path} no longer exists",
                hint="the VM is unchanged; restore it, or leave the device out",
            )
        case _:
            pass
