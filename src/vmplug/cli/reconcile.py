"""`vmplug reconcile`."""

from collections.abc import Sequence

import click

from vmplug.cli.options import complete_vm, json_option, state_dir_option, timeout_option
from vmplug.cli.output import print_json, print_table, progress
from vmplug.cli.wiring import find_vm, forget_vm, is_gone, open_journal, open_manager
from vmplug.errors import DeviceError, HypervisorError
from vmplug.host.device import DeviceType
from vmplug.host.root import HostRoot
from vmplug.hypervisor.daemon import HostDaemons
from vmplug.manager.binder import Binder, Returned
from vmplug.manager.reconcile import Outcome, Repair
from vmplug.manager.records import VmRecord
from vmplug.manager.store import Store

Failure = tuple[str | None, DeviceError]
"""What could not be done, in a VM or on the host."""


@click.command("reconcile")
@click.option("--vm", metavar="NAME", shell_complete=complete_vm, help="Only this VM.")
@timeout_option
@state_dir_option
@json_option
def command(as_json: bool, state_dir: str, timeout_s: float, vm: str | None) -> None:
    """Make the journal and the VMs agree, after a crash of anybody.

    What an interrupted attach left is taken back, what was detaching is finished, and what a dead
    VM held is free again. PCI functions that were bound for it go back to their former drivers.

    \b
    vmplug reconcile
    vmplug reconcile --vm sb1 --json
    """
    with open_journal(state_dir) as journal:
        vms = [find_vm(journal, vm)] if vm else journal.vms()
        repairs, failures = _repair_all(vms, journal, state_dir, timeout_s)
        returned = Binder(journal, HostRoot()).recover()
    failures += [(None, told.error) for told in returned if told.error]
    if as_json:
        errors = [
            {"vm": name, "code": error.code, "message": error.message, "hint": error.hint}
            for name, error in failures
        ]
        listed = [_json(name, repair) for name, repair in repairs]
        functions = [_returned_json(told) for told in returned]
        print_json({"repairs": listed, "bindings": functions, "errors": errors})
    else:
        rows = [
            (name, r.device_id, r.host_path or "-", str(r.outcome), r.reason)
            for name, r in repairs
        ]
        rows += [("-", str(r.former.bdf), "-", str(r.outcome), r.reason) for r in returned]
        print_table(("VM", "DEVICE", "HOST PATH", "DONE", "WHY"), rows)
        if not rows and not failures:
            click.echo("the journal and the VMs agree")
    if failures:
        raise failures[0][1]


def _repair_all(
    vms: Sequence[VmRecord], journal: Store, state_dir: str, timeout_s: float
) -> tuple[list[tuple[str, Repair]], list[Failure]]:
    """What was done in each VM; one that does not answer keeps no other from it."""
    repairs: list[tuple[str, Repair]] = []
    failures: list[Failure] = []
    for record in vms:
        try:
            found = _repair(record, journal, state_dir, timeout_s)
        except HypervisorError as error:
            failures.append((record.name, error))
        else:
            repairs += [(record.name, repair) for repair in found]
    return repairs, failures


def _repair(record: VmRecord, journal: Store, state_dir: str, timeout_s: float) -> list[Repair]:
    if not is_gone(record):
        with (
            open_manager(record.name, state_dir, host=HostRoot()) as devices,
            progress(f"making the journal agree with VM {record.name}"),
        ):
            return devices.reconcile(timeout_s=timeout_s)
    held = journal.devices(record.name)
    shares = [device.id for device in held if device.kind is DeviceType.VHOST_USER_FS]
    HostDaemons(record.qmp_socket).end(shares)
    forget_vm(journal, record)
    reason = "the VM is not running any more"
    if record.is_of_earlier_boot:
        reason = "the host has booted since"
    return [Repair(device.id, device.host_path, Outcome.FORGOTTEN, reason) for device in held]


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
