"""Persistent memory, as QMP commands: memory on a file, and the module the guest sees.

Source: QEMU docs/nvdimm.txt, qapi/qom.json; sequences and traps measured on QEMU 7.2.
"""

from vmplug.address import qemu_id
from vmplug.drivers.place import MemorySlot
from vmplug.drivers.plug import BlockDrive
from vmplug.drivers.ports import Command, Step
from vmplug.hypervisor.qemu.steps.frontend import device_step, object_step

MEMORY = "memory"
"""The part of a device that is its memory."""


def lock_name(device_id: str) -> str:
    """What the open file with the lock is called in QEMU, for as long as it has the memory."""
    return qemu_id(device_id, "lock")


def plug_steps(drive: BlockDrive, slot: MemorySlot) -> tuple[Step, ...]:
    """The commands that plug it; QEMU cannot unplug the device itself.

    QEMU takes no lock on the file of a memory. So it keeps one of vmplug's, on an open file of
    its own, under a name until `closefd` or its end: see `vmplug.hypervisor.qemu.nvdimm_lock`.
    """
    from vmplug.drivers.pmem import PAGE_BYTES  # noqa: PLC0415  4 ms, with the checks of disks

    memory = qemu_id(drive.id, MEMORY)
    name = {"fdname": lock_name(drive.id)}
    keep = Step(do=Command("getfd", name, descriptor=drive.lock), undo=Command("closefd", name))
    backing = {
        "mem-path": drive.file,
        "size": (drive.size_bytes or 0) // PAGE_BYTES * PAGE_BYTES,  # else QEMU refuses it
        "share": True,
        "readonly": drive.read_only,
    }
    module = {"memdev": memory, "slot": slot.slot, "unarmed": drive.read_only}
    device = device_step("nvdimm", drive.id, module)
    return (
        *([keep] if drive.file_id else []),  # a file that nobody checked is not opened
        object_step("memory-backend-file", memory, backing),
        Step(do=device.do, undo=None),
    )
