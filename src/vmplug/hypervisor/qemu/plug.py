"""Every kind of plug as steps; hot plug sends them, cold plug writes them on the command line."""

import os
from typing import assert_never

from vmplug.drivers.base import (
    BlockDrive,
    Plug,
    RNGDevice,
    SharedFS,
    Step,
    VFIODevices,
    VhostUserDevice,
)
from vmplug.drivers.choose import cold_plug_only
from vmplug.drivers.place import MemorySlot, MmioPlace, Place
from vmplug.errors import CannotPlug
from vmplug.host.held import HeldFile
from vmplug.hypervisor.qemu import block, nvdimm, rng, share, vfio, vhost_user


def plug_steps(plug: Plug, place: Place) -> tuple[Step, ...]:
    """The commands that plug it there, each with the one that takes it back."""
    match plug:
        case BlockDrive():
            if isinstance(place, MemorySlot):
                return nvdimm.plug_steps(plug, place)
            return block.plug_steps(plug, place)
        case VhostUserDevice():
            return vhost_user.plug_steps(plug, place)
        case SharedFS():
            return share.plug_steps(plug, place)
        case RNGDevice():
            return rng.plug_steps(plug, place)
        case VFIODevices():
            return vfio.plug_steps(plug, place)
        case _:
            assert_never(plug)


def check_hot(plug: Plug, place: Place) -> None:
    """CannotPlug for what a running QEMU does not take, before anything is sent."""
    if isinstance(plug, SharedFS):
        raise cold_plug_only("a virtio-9p share")
    if isinstance(place, MmioPlace):
        raise cold_plug_only("a virtio-mmio device")
    check_file(plug, place)


def check_file(plug: Plug, place: Place) -> None:
    """CannotPlug when the file of an NVDIMM has gone: QEMU would make an empty one."""
    match plug, place:
        case BlockDrive(file=path), MemorySlot() if not os.path.exists(path):
            raise CannotPlug(
                "no-such-file",
                f"{path} is not there any more",
                hint="nothing was changed; bring it back, or leave the device out",
            )
        case _:
            pass


def check_same(file: HeldFile, path: str) -> None:
    """CannotPlug when another file is there now, such as one that QEMU has made."""
    if not file.is_same():
        raise CannotPlug(
            "no-such-file",
            f"{path} was removed or replaced while it was being plugged",
            hint=f"nothing was plugged; an empty {path} may be one that QEMU has made: delete it, "
            "and bring the right one back",
        )
