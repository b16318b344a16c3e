"""Every kind of plug as steps; hot plug sends them, cold plug writes them on the command line."""

import os
from typing import assert_never

from vmplug.drivers.free_places import cold_plug_only
from vmplug.drivers.place import MemorySlot, MmioPlace, Place
from vmplug.drivers.plug import BlockDrive, Plug, RNGDevice, SharedFS, VFIODevices, VhostUserDevice
from vmplug.drivers.ports import Step
from vmplug.errors import CannotPlug
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


def opened_file(plug: Plug) -> tuple[str, str] | None:
    """The path that QEMU itself opens for it, and the id of the file that must be at that path."""
    match plug:
        case BlockDrive(file=path, file_id=str(checked)):
            return path, checked
        case RNGDevice(filename=path, file_id=str(checked)):
            return path, checked
        case SharedFS(directory=path, file_id=str(checked)):
            return path, checked
        case _:
            return None


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
