"""Persistent memory, as QMP commands: memory on a file, and the module the guest sees.

Source: QEMU docs/nvdimm.txt, qapi/qom.json; sequences and traps measured on QEMU 7.2.
"""

from vmplug.address import qemu_id
from vmplug.drivers.place import MemorySlot
from vmplug.drivers.plug import BlockDrive
from vmplug.drivers.pmem import PAGE_BYTES
from vmplug.drivers.ports import Step
from vmplug.hypervisor.qemu.steps.frontend import device_step, object_step


def plug_steps(drive: BlockDrive, slot: MemorySlot) -> tuple[Step, ...]:
    """The commands that plug it; QEMU cannot unplug the device itself."""
    memory = qemu_id(drive.id, "memory")
    backing = {
        "mem-path": drive.file,
        "size": (drive.size_bytes or 0) // PAGE_BYTES * PAGE_BYTES,  # else QEMU refuses it
        "share": True,
        "readonly": drive.read_only,
    }
    module = {"memdev": memory, "slot": slot.slot, "unarmed": drive.read_only}
    device = device_step("nvdimm", drive.id, module)
    return (
        object_step("memory-backend-file", memory, backing),
        Step(do=device.do, undo=None),
    )
