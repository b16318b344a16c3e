"""`vmplug reconcile`."""

from collections.abc import Sequence

import click

from vmplug.cli.options import complete_vm, json_option, state_dir_option, timeout_option
from vmplug.cli.output import print_json, print_table, progress
from vmplug.cli.wiring import find_vm, forget_vm, is_gone, open_journal, open_manager
from vmplug.errors import HypervisorError
from vmplug.host.device import DeviceType
from vmplug.host.root import HostRoot
from vmplug.hypervisor.daemon import HostDaemons
from vmplug.manager.reconcile import Outcome, Repair
from vmplug.manager.records import VmRecord
from vmplug.manager.store import Store


@click.command("reconcile")
@click.option("--vm", metavar="NAME", shell_complete=complete_vm, help="Only this VM.")
@timeout_option
@state_dir_option
@json_option
def command(as_json: bool, state_dir: str, timeout_s: float, vm: str | None) -> None:
    """Make the journal and the VMs agree, after a crash of anybody.

    What an interrupted attach left is taken back, what was detaching is finished, and what a dead
    VM held is free again.

    \b
    vmplug reconcile
    vmplug reconcile --vm sb1 --json
    """
    with open_journal(state_dir) as journal:
        vms = [find_vm(journal, vm)] if vm else journal.vms()
        repairs, failures = _repair_all(vms, journal, state_dir, timeout_s)
    if as_json:
        errors = [
            {"vm": name, "code": error.code, "message": error.message, "hint": error.hint}
            for name, error in failures
        ]
        print_json({"repairs": [_json(name, r) for name, r in repairs], "errors": errors})
    else:
        print_table(
            ("VM", "DEVICE", "HOST PATH", "DONE", "WHY"),
            [(name, r.device_id, r.host_path or "-", r.outcome, r.reason) for name, r in repairs],
        )
        if not repairs and not failures:
            click.echo("the journal and the VMs agree")
    if failures:
        raise failures[0][1]


def _repair_all(
    vms: Sequence[VmRecord], journal: Store, state_dir: str, timeout_s: float
) -> tuple[list[tuple[str, Repair]], list[tuple[str, HypervisorError]]]:
    """What was done in each VM; one that does not answer keeps no other from it."""
    repairs, failures = [], []
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
    return [Repair(device.id, device.host_path, Outcome.FORGOTTEN, reason) for device in held]


def _json(vm: str, repair: Repair) -> dict[str, str | None]:
    return {
        "vm": vm,
        "device": repair.device_id,
        "host_path": repair.host_path,
        "outcome": str(repair.outcome),
        "reason": repair.reason,
    }
