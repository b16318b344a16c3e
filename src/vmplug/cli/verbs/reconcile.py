"""`vmplug reconcile`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from vmplug.cli.options import complete_vm, json_option, state_dir_option, timeout_option
from vmplug.cli.render.output import print_json, print_table, progress
from vmplug.cli.render.text import one_line
from vmplug.cli.wiring import find_vm, forget_vm, is_gone, open_journal, open_manager
from vmplug.errors import DeviceError, HypervisorError
from vmplug.host.kind import DeviceType
from vmplug.host.root import HostRoot
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner
from vmplug.journal.journal import Journal
from vmplug.journal.records import VmRecord
from vmplug.journal.salvage import Salvage, check_journal
from vmplug.journal.salvage import set_aside as put_aside
from vmplug.manager.binding.binder import Binder, Returned
from vmplug.manager.reconcile import Repair, RepairOutcome

_LOCK_TIMEOUT_S = 10.0
"""A function that is slow to let go is told as in progress."""

Failure = tuple[str | None, DeviceError]
"""What could not be done, in a VM or on the host."""


@click.command("reconcile")
@click.option("--vm", metavar="NAME", shell_complete=complete_vm, help="Only this VM.")
@click.option(
    "--set-aside",
    is_flag=True,
    help="Put a new journal in the place of a damaged one, which is kept.",
)
@timeout_option
@state_dir_option
@json_option
def command(
    as_json: bool, state_dir: str, timeout_s: float, vm: str | None, *, set_aside: bool
) -> None:
    """Make the journal and the VMs agree, after a crash of anybody.

    What an interrupted attach left is taken back, what was detaching is finished, and what a dead
    VM held is free again. PCI functions that were bound for it go back to their former drivers.

    With --set-aside, what can still be read of a damaged journal is carried over into a new one.
    What the VMs hold and that does not know is told and left; the next reconcile takes it out.

    \b
    vmplug reconcile
    vmplug reconcile --vm sb1 --json
    vmplug reconcile --set-aside
    """
    salvage = put_aside(state_dir) if set_aside else None
    with open_journal(state_dir) as journal:
        check_journal(journal.path)
        vms = [find_vm(journal, vm)] if vm else journal.vms()
        how = _ReconcileOptions(state_dir, timeout_s, keep_unknown=salvage is not None)
        repairs, failures = _repair_all(vms, journal, how)
        # What was bound for a device that the journal has lost is not to go back yet either.
        binder = Binder(journal, HostRoot())
        returned = [] if salvage else binder.recover(lock_timeout_s=_LOCK_TIMEOUT_S)
    failures += [(None, told.error) for told in returned if told.error]
    if as_json:
        errors = [
            {"vm": name, "code": error.code, "message": error.message, "hint": error.hint}
            for name, error in failures
        ]
        listed = [_json(name, repair) for name, repair in repairs]
        functions = [_returned_json(told) for told in returned]
        told = {"salvage": _salvage_json(salvage)} if salvage else {}
        print_json({"repairs": listed, "bindings": functions, "errors": errors, **told})
    else:
        if salvage:
            _tell_salvage(salvage)
        rows = [
            (name, r.device_id, r.host_path or "-", str(r.outcome), r.reason)
            for name, r in repairs
        ]
        rows += [("-", str(r.former.bdf), "-", str(r.outcome), r.reason) for r in returned]
        print_table(("VM", "DEVICE", "HOST PATH", "DONE", "WHY"), rows)
        if not rows and not failures and not salvage:
            click.echo("the journal and the VMs agree")
    if failures:
        raise failures[0][1]


@dataclass(frozen=True, slots=True)
class _ReconcileOptions:
    """With which journal, how patiently, and what is to stay."""

    state_dir: str
    timeout_s: float
    keep_unknown: bool


def _repair_all(
    vms: Sequence[VmRecord], journal: Journal, how: _ReconcileOptions
) -> tuple[list[tuple[str, Repair]], list[Failure]]:
    """What was done in each VM; one that does not answer keeps no other from it."""
    repairs: list[tuple[str, Repair]] = []
    failures: list[Failure] = []
    for record in vms:
        try:
            found = _repair(record, journal, how)
        except HypervisorError as error:
            failures.append((record.name, error))
        else:
            repairs += [(record.name, repair) for repair in found]
    return repairs, failures


def _repair(record: VmRecord, journal: Journal, how: _ReconcileOptions) -> list[Repair]:
    if not is_gone(record):
        with (
            open_manager(record.name, how.state_dir, host=HostRoot()) as devices,
            progress(f"making the journal agree with VM {record.name}"),
        ):
            return devices.reconcile(timeout_s=how.timeout_s, keep_unknown=how.keep_unknown)
    held = journal.devices(record.name)
    shares = [device.id for device in held if device.kind is DeviceType.VHOST_USER_FS]
    HostVirtiofsdRunner(record.qmp_socket).end(shares)
    forget_vm(journal, record)
    reason = "the VM is not running any more"
    if record.is_of_earlier_boot:
        reason = "the host has booted since"
    return [
        Repair(device.id, device.host_path, RepairOutcome.FORGOTTEN, reason) for device in held
    ]


def _json(vm: str, repair: Repair) -> dict[str, str | None]:
    return {
        "vm": vm,
        "device": repair.device_id,
        "host_path": repair.host_path,
        "outcome": str(repair.outcome),
        "reason": repair.reason,
    }


def _returned_json(told: Returned) -> dict[str, str | None]:
    return {
        "address": str(told.former.bdf),
        "driver": told.former.driver,
        "outcome": str(told.outcome),
        "reason": told.reason,
    }


def _salvage_json(salvage: Salvage) -> dict[str, Any]:
    return {
        "kept_as": salvage.kept_as,
        "damage": salvage.damage,
        "carried": dict(salvage.carried),
        "lost": salvage.lost,
    }


def _tell_salvage(salvage: Salvage) -> None:
    carried = ", ".join(f"{count} of {table}" for table, count in salvage.carried.items())
    click.echo(f"the journal was damaged ({one_line(salvage.damage)})")
    click.echo(f"it is kept as {salvage.kept_as}; carried over: {carried or 'nothing'}")
    for what in salvage.lost:
        click.echo(f"lost: {one_line(what)}")
