"""End a VM that vmplug started, or forget one that it adopted."""

from contextlib import closing

import msgspec

from vmplug.errors import HypervisorError, StillAttached, counted
from vmplug.host.process import wait_for_end
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, VmRecord
from vmplug.log import Log
from vmplug.manager.binding.binder import give_back_unused
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.manager.vm_identity import find_process
from vmplug.vms.known import is_starting, require_started
from vmplug.vms.release import end_vm, keep_ended_logs, release_vm, still_runs
from vmplug.waiting import waiting

log = Log(__name__)

POWER_DOWN_TIMEOUT_S = 10.0
_QUIT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 2.0
"""How long QEMU may take to answer, unless the guest has more time to power down."""


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

    A running guest has `timeout_s` to power down, then QEMU is ended; so is a QEMU that hangs.
    Raises StateError when the VM is not known or a process is starting it, StillAttached for an
    adopted one that runs and holds devices, and HypervisorError when QEMU does not end; then
    nothing is released.
    """
    with Journal.open_existing(setup.state_dir) as journal:
        record = journal.require_vm(name)
        held = journal.attachments(name)
        if is_starting(record, journal.host):
            require_started(record, journal.host)
        is_alive = still_runs(record, journal)
        if is_alive and not record.is_ours and held:
            raise StillAttached(
                f"the adopted VM {name} still has {counted(len(held), 'attachment')}",
                hint="vmplug detach them first",
            )
        if is_alive and record.is_ours:
            if record.starting_by is None:
                record = _power_down(record, timeout_s, journal)
            end_vm(record)
        if not is_alive:
            keep_ended_logs(record)
        release_vm(journal, record)
        give_back_unused(journal)
    return StoppedVm(name=name, was_adopted=not record.is_ours, released=tuple(held))


def _power_down(record: VmRecord, timeout_s: float, journal: Journal) -> VmRecord:
    """Let the guest power down, and then QEMU quit; returns the VM with the process to end.

    One that does not answer is ended anyway.
    """
    patience_s = max(timeout_s, _ANSWER_TIMEOUT_S)
    try:
        with closing(
            Qemu.connect(record.qmp_socket, timeout_s=patience_s, command_timeout_s=patience_s)
        ) as qemu:
            record = find_process(record, journal, qemu)
            if qemu.status() == "running" and timeout_s and record.pid:
                qemu.power_down()
                with waiting(f"VM {record.name} to power down", timeout_s):
                    has_ended = wait_for_end(record.pid, timeout_s, started_at=record.started_at)
                if has_ended:
                    return record
            qemu.quit()
    except HypervisorError as error:  # it hangs, or has ended just now
        if not record.pid:
            raise
        facts = {"vm": record.name}
        log.info("VM %s is ended, as it does not answer: %s", record.name, error.code, extra=facts)
        return record
    if record.pid:
        with waiting(f"the QEMU of VM {record.name} to end", _QUIT_TIMEOUT_S):
            wait_for_end(record.pid, _QUIT_TIMEOUT_S, started_at=record.started_at)
    return record
