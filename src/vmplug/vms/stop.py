"""End a VM that vmplug started, or forget one that it adopted."""

from contextlib import closing
from pathlib import Path

import msgspec

from vmplug.errors import ConnectError, HypervisorError, StillAttached
from vmplug.host.process import wait_for_end
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, VmRecord
from vmplug.manager.binding.binder import give_back_unused
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.vms.known import forget_vm, is_gone

POWER_DOWN_TIMEOUT_S = 10.0
_QUIT_TIMEOUT_S = 10.0


class StoppedVm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that the journal knows no more.

    `was_adopted`: it is only forgotten, and may still run. `released` is what it held.
    """

    name: str
    was_adopted: bool
    released: tuple[Attachment, ...]


def stop_vm(
    name: str,
    *,
    timeout_s: float = POWER_DOWN_TIMEOUT_S,
    setup: Setup = DEFAULT_SETUP,
) -> StoppedVm:
    """End a VM that vmplug started, and release what it held; forget a VM that was adopted.

    A running guest has `timeout_s` to power down, then QEMU is ended. Raises StateError when the
    VM is not known, StillAttached for an adopted one that runs and holds devices, and
    HypervisorError when QEMU does not end; then nothing is released.
    """
    with Journal.open(setup.state_dir) as journal:
        record = journal.require_vm(name)
        held = journal.attachments(name)
        never_came_up = record.is_ours and not record.pid and not Path(record.qmp_socket).exists()
        is_alive = not (never_came_up or is_gone(record, journal.host))
        if is_alive and not record.is_ours and held:
            raise StillAttached(
                f"{len(held)} attachments are left in the adopted VM {name}",
                hint="vmplug detach them first",
            )
        if is_alive and record.is_ours:
            _end(record, timeout_s)
        forget_vm(journal, record)
        give_back_unused(journal)
    return StoppedVm(name=name, was_adopted=not record.is_ours, released=tuple(held))


def _end(record: VmRecord, timeout_s: float) -> None:
    with closing(Qemu.connect(record.qmp_socket)) as qemu:
        if qemu.status() == "running" and timeout_s and record.pid:
            qemu.power_down()
            if wait_for_end(record.pid, timeout_s):
                return
        try:
            qemu.quit()
        except ConnectError:  # the guest has powered down just now, or QEMU has died
            if not record.pid:
                raise
    if record.pid and not wait_for_end(record.pid, _QUIT_TIMEOUT_S):
        raise HypervisorError(f"process {record.pid} of VM {record.name} does not end")
