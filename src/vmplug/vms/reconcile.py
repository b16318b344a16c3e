"""Make the journal agree with all VMs and with the host, after a crash of anybody."""

import msgspec

from vmplug.errors import DeviceError, UnplugTimeout
from vmplug.journal import has_journal
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord, VmRecord
from vmplug.journal.salvage import Salvage, check_journal
from vmplug.journal.salvage import set_aside as put_aside
from vmplug.leases.life import leases_of, repair_lease
from vmplug.manager import UNPLUG_TIMEOUT_S
from vmplug.manager.binding.binder import Binder, Returned
from vmplug.manager.reconcile import Repair, RepairOutcome
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.vms.connect import connect_vm
from vmplug.vms.known import is_starting
from vmplug.vms.release import (
    EndedLogs,
    end_vm,
    keep_ended_logs,
    list_ended_logs,
    release_vm,
    still_runs,
)

_LOCK_TIMEOUT_S = 10.0
"""A function that is slow to let go is reported as in progress."""


class VmRepair(msgspec.Struct, frozen=True, kw_only=True):
    """What was done about one device of a VM."""

    vm: str
    repair: Repair


class RepairFailure(msgspec.Struct, frozen=True, kw_only=True):
    """What could not be done, in a VM or, where `vm` is None, on the host."""

    vm: str | None
    error: DeviceError


class HostRepairs(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that did not agree, and what was done about it.

    `returned` are PCI functions that were to go back to their drivers. `salvage` says
    what was carried over from a damaged journal. `failures` is empty when all agrees now, except
    for what the outcomes report as in progress or waiting for a guest. `kept_logs` are those of
    the VMs that vmplug found to have ended.
    """

    repairs: tuple[VmRepair, ...]
    returned: tuple[Returned, ...]
    failures: tuple[RepairFailure, ...]
    salvage: Salvage | None
    kept_logs: tuple[EndedLogs, ...]

    def require(self) -> "HostRepairs":
        """This, when all is done; an error, with a note for each further one, when it is not.

        UnplugTimeout stands for devices that guests did not release: they are still detaching.
        """
        told = [(f"VM {f.vm}: " if f.vm else "", f.error) for f in self.failures]
        told += [("", error) for error in [self._still_detaching()] if error]
        if not told:
            return self
        (_, first), *others = told
        for of_vm, error in others:
            first.add_note(of_vm + error.message)
        raise first

    def _still_detaching(self) -> UnplugTimeout | None:
        left = [r for r in self.repairs if r.repair.outcome is RepairOutcome.STILL_DETACHING]
        if not left:
            return None
        names = ", ".join(f"{r.repair.host_path or r.repair.device_id} in VM {r.vm}" for r in left)
        return UnplugTimeout(
            tuple(r.repair.device_id for r in left),
            f"still detaching: {names}",
            hint="reconcile again when the guest can release it: it has booted and unmounted it",
        )


def reconcile_host(
    *,
    vm: str | None = None,
    set_aside: bool = False,
    take_over: bool = False,
    timeout_s: float = UNPLUG_TIMEOUT_S,
    setup: Setup = DEFAULT_SETUP,
) -> HostRepairs:
    """Make the journal agree with the VMs and with the drivers of the host's PCI functions.

    An interrupted attach is undone, an interrupted detach is finished, and what a VM that has
    ended held is free again, as are leases whose process has. `vm` restricts that to one VM; PCI
    functions are given back all the same. Guests have `timeout_s` to let go. `set_aside` puts a
    new journal in place of a damaged one, with what can still be read. What VMs have of other
    journals, or of one that was lost, is reported and left alone, unless `take_over` unplugs it.

    Raises StateError for an unknown VM, StoreError for a damaged journal.
    """
    salvage = put_aside(setup.state_dir) if set_aside else None
    repairs, failures = list[VmRepair](), list[RepairFailure]()
    logs = list_ended_logs(setup=setup)
    with Journal.open_existing(setup.state_dir) as journal:
        if has_journal(setup.state_dir):
            check_journal(journal.path)
        for record in [journal.require_vm(vm)] if vm else journal.vms():
            try:
                done = _repair(record, journal, timeout_s, setup, take_over=take_over)
            except DeviceError as error:  # what stops one VM stops no other
                failures.append(RepairFailure(vm=record.name, error=error))
            else:
                repairs += [VmRepair(vm=record.name, repair=repair) for repair in done]
        for record in () if vm else leases_of(journal):
            try:
                done = repair_lease(record, journal, journal.host)
            except DeviceError as error:
                failures.append(RepairFailure(vm=record.name, error=error))
            else:
                repairs += [VmRepair(vm=record.name, repair=repair) for repair in done]
        # A device that the damaged journal has lost may still use what was bound for it.
        binder = Binder(journal, journal.host)
        returned = [] if salvage else binder.recover(lock_timeout_s=_LOCK_TIMEOUT_S)
    failures += [RepairFailure(vm=None, error=r.error) for r in returned if r.error]
    return HostRepairs(
        repairs=tuple(repairs),
        returned=tuple(returned),
        failures=tuple(failures),
        salvage=salvage,
        kept_logs=tuple(kept for kept in list_ended_logs(setup=setup) if kept not in logs),
    )


def _repair(
    record: VmRecord, journal: Journal, timeout_s: float, setup: Setup, *, take_over: bool
) -> list[Repair]:
    if is_starting(record, journal.host):
        return [_starting(record, device) for device in journal.devices(record.name)]
    if record.starting_by or not still_runs(record, journal):
        return release_ended(record, journal)
    with connect_vm(record.name, setup=setup) as devices:
        return devices.reconcile(timeout_s=timeout_s, take_over=take_over)


def _starting(record: VmRecord, device: DeviceRecord) -> Repair:
    assert record.starting_by
    reason = f"process {record.starting_by.pid} is starting the VM"
    return Repair(device.id, device.host_path, RepairOutcome.IN_PROGRESS, reason)


def release_ended(record: VmRecord, journal: Journal) -> list[Repair]:
    """Forget a VM that has ended, or whose start was interrupted; return what it held."""
    reason = "the VM is not running any more"
    if record.is_of_earlier_boot:
        reason = "the host has booted since"
    elif record.starting_by:
        end_vm(record)
        reason = "the start of its VM was interrupted"
    keep_ended_logs(record)
    held = release_vm(journal, record)
    return [Repair(d.id, d.host_path, RepairOutcome.FORGOTTEN, reason) for d in held]
