"""Close the files that a paused QEMU 7.2 keeps of devices that were plugged.

It was given them in fd sets, as its user may not open them, and closes the files of a set only
while it runs. So each verb that meets the VM asks again. See `vmplug.hypervisor.qemu.handover`.
"""

from collections.abc import Collection
from functools import partial

from vmplug.drivers.ports import Hypervisor
from vmplug.journal.journal import Journal


def close_left_files(vm: str, journal: Journal, hypervisor: Hypervisor) -> None:
    """Close those of this journal's devices, except what a running process plugs at present."""
    hypervisor.close_left_files(partial(choose_left, vm, journal))


def choose_left(vm: str, journal: Journal, found: Collection[str]) -> set[str]:
    """Those of the devices whose files will be closed.

    The VM was asked before the journal: what a process plugs meanwhile is in the journal.
    """
    plugging = {
        record.id
        for record in journal.devices(vm)
        if record.in_progress_by and record.in_progress_by.is_alive(journal.host)
    }
    return set(found) - plugging - journal.find_foreign(found)
