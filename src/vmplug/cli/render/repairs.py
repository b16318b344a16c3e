"""What `vmplug reconcile` did: for people and as JSON."""

from typing import Any

import click

from vmplug.cli.render.table import name_column, path_column, print_table, reason_column
from vmplug.cli.render.vms import logs_json, print_logs
from vmplug.journal.salvage import Salvage
from vmplug.manager.binding.binder import Returned
from vmplug.text import one_line
from vmplug.vms.reconcile import HostRepairs, RepairFailure, VmRepair


def repairs_json(done: HostRepairs) -> dict[str, Any]:
    """Everything that did not agree."""
    logs = {"logs": [*map(logs_json, done.kept_logs)]} if done.kept_logs else {}
    salvage = {"salvage": _salvage_json(done.salvage)} if done.salvage else {}
    return {
        "repairs": [_repair_json(repair) for repair in done.repairs],
        "bindings": [_returned_json(returned) for returned in done.returned],
        "errors": [_failure_json(failure) for failure in done.failures],
        **logs,
        **salvage,
    }


def print_repairs(done: HostRepairs) -> None:
    """A table of what was done."""
    if done.salvage:
        _print_salvage(done.salvage)
    rows = [
        (one.vm, r.device_id, r.host_path or "-", str(r.outcome), r.reason)
        for one in done.repairs
        for r in [one.repair]
    ]
    rows += [("-", str(r.former.bdf), "-", str(r.outcome), r.reason) for r in done.returned]
    print_table(
        (
            name_column("VM"),
            "DEVICE",
            path_column("HOST PATH", 1),
            "DONE",
            reason_column("WHY"),
        ),
        rows,
    )
    if not rows and not done.failures and not done.salvage:
        click.echo("the journal and the VMs agree")
    print_logs(done.kept_logs)


def _repair_json(done: VmRepair) -> dict[str, str | None]:
    return {
        "vm": done.vm,
        "device": done.repair.device_id,
        "host_path": done.repair.host_path,
        "outcome": str(done.repair.outcome),
        "reason": done.repair.reason,
    }


def _returned_json(returned: Returned) -> dict[str, str | None]:
    return {
        "address": str(returned.former.bdf),
        "driver": returned.former.driver,
        "outcome": str(returned.outcome),
        "reason": returned.reason,
    }


def _failure_json(failure: RepairFailure) -> dict[str, str | None]:
    error = failure.error
    return {"vm": failure.vm, "code": error.code, "message": error.message, "hint": error.hint}


def _salvage_json(salvage: Salvage) -> dict[str, Any]:
    return {
        "kept_as": salvage.kept_as,
        "damage": salvage.damage,
        "carried": dict(salvage.carried),
        "lost": salvage.lost,
    }


def _print_salvage(salvage: Salvage) -> None:
    carried = ", ".join(f"{count} of {table}" for table, count in salvage.carried.items())
    click.echo(f"the journal was damaged ({one_line(salvage.damage)})")
    click.echo(f"it is kept as {salvage.kept_as}; carried over: {carried or 'nothing'}")
    for what in salvage.lost:
        click.echo(f"lost: {one_line(what)}")
