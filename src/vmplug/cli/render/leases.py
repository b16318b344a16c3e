"""Leases: for people, as JSON, and in a file for a launcher."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from msgspec import structs

from vmplug.cli.render.output import access
from vmplug.cli.render.table import name_column, path_column, print_table, state_column
from vmplug.cli.render.terminal import Style, say
from vmplug.text import one_line

if TYPE_CHECKING:
    from vmplug.leases.lease import Lease
    from vmplug.leases.life import LeaseStatus


def lease_json(lease: "Lease") -> dict[str, Any]:
    """A lease with all that a launcher needs."""
    return {
        "id": lease.id,
        "owner": lease.owner,
        "process": lease.process,
        "devices": [
            structs.asdict(device) | {"functions": [structs.asdict(f) for f in device.functions]}
            for device in lease.devices
        ],
    }


def lease_text(lease: "Lease") -> str:
    """The same as a document for a launcher."""
    return json.dumps({"version": 1, "lease": lease_json(lease)}, indent=2) + "\n"


def status_json(status: "LeaseStatus") -> dict[str, Any]:
    """A lease of the journal."""
    return {
        "id": status.id,
        "owner": status.owner,
        "state": str(status.state),
        "process": status.process,
        "program": status.program,
        "devices": [
            {
                "name": hold.name,
                "kind": hold.kind.word,
                "host_path": hold.host_path,
                "read_only": hold.read_only,
            }
            for hold in status.devices
        ],
    }


def print_leases(leases: "Sequence[LeaseStatus]") -> None:
    """A table, one line for each device."""
    rows = [
        (
            status.id,
            str(status.state),
            f"{status.process or '-'}" + (f" ({status.program})" if status.program else ""),
            hold.name,
            hold.host_path,
            access(read_only=hold.read_only),
        )
        for status in leases
        for hold in status.devices
    ]
    columns = (
        name_column("LEASE"),
        state_column("STATE"),
        name_column("PROCESS", 2),
        name_column("DEVICE", 3),
        path_column("HOST PATH"),
        "RO/RW",
    )
    print_table(columns, rows)
    if not leases:
        click.echo("nothing is leased")


def print_running(user: str | None) -> None:
    """Report on stderr who uses the devices after the command has ended."""
    if user:
        say(f"vmplug: {one_line(user)}", Style.WARNING, err=True)
