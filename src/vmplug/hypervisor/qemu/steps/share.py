"""virtio-9p: a directory that QEMU itself shares, only from its start.

QMP has no command for it, so the step is only for the command line.
Source: QEMU docs/system/devices/virtio-9p; fsdev/qemu-fsdev-opts.c.
"""

from vmplug.address import qemu_id
from vmplug.drivers.place import Place
from vmplug.drivers.plug import SharedFS
from vmplug.drivers.ports import Command, Step
from vmplug.hypervisor.qemu.steps.frontend import virtio_step


def plug_steps(share: SharedFS, place: Place) -> tuple[Step, ...]:
    """An fsdev, and the device on it."""
    fsdev = qemu_id(share.id, "fs")
    options = {
        "id": fsdev,
        "path": share.directory,
        "security_model": "none",
        "multidevs": "remap",
        "readonly": share.read_only,
    }
    device = virtio_step("virtio-9p", share.id, place, {"fsdev": fsdev, "mount_tag": share.tag})
    return Step(do=Command("fsdev", options), undo=None), device
