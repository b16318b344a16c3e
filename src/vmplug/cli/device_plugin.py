"""What `vmplug device-plugin` offers, prints and gives back."""

import asyncio
import json
import logging
from datetime import UTC, datetime
from typing import Any

import click

from vmplug.cli.progress import hearing
from vmplug.cli.render.output import print_json
from vmplug.cli.render.table import Column, path_column, print_table, reason_column, state_column
from vmplug.cli.render.terminal import Style, say
from vmplug.errors import HostError
from vmplug.kubernetes.config import read_config
from vmplug.kubernetes.picture import Offer
from vmplug.manager.setup import Setup
from vmplug.text import one_line

try:
    from vmplug.kubernetes.plugin import serve
    from vmplug.kubernetes.report import Report, give_back, report
except ImportError as error:
    raise HostError(
        f"Kubernetes needs libraries that are not there: {error}",
        hint="pip install 'vmplug[kubernetes]'",
    ) from error


_FACTS = ("resource", "ids", "state", "code", "device_id")
"""Of a record of the log, as JSON has it."""


def run(path: str, setup: Setup, *, as_json: bool) -> None:
    """Offer devices until SIGTERM; print on stderr what happens."""
    config = read_config(path)
    with hearing(_print_json_line if as_json else _print_line):
        asyncio.run(serve(config, setup))


def _print_json_line(record: logging.LogRecord) -> None:
    if record.levelno >= logging.INFO:
        time = datetime.fromtimestamp(record.created, UTC)
        document = {
            "version": 1,
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        facts = {name: vars(record)[name] for name in _FACTS if name in vars(record)}
        click.echo(json.dumps(document | facts), err=True)


def _print_line(record: logging.LogRecord) -> None:
    if record.levelno >= logging.INFO:
        style = Style.WARNING if record.levelno >= logging.WARNING else Style.PLAIN
        say(f"vmplug: {one_line(record.getMessage())}", style, err=True)


def print_report(path: str, setup: Setup, *, as_json: bool) -> None:
    """Print every device and its state."""
    found = report(read_config(path), setup=setup)
    if as_json:
        print_json(_report_json(found))
        return
    print_table(
        (
            "RESOURCE",
            "ID",
            state_column("STATE"),
            path_column("DEVICE"),
            Column("PODS", 1),
            reason_column("WHY"),
        ),
        [
            (
                o.resource,
                o.id,
                str(o.health.state),
                _title(o),
                " ".join(o.pods) or "-",
                one_line(o.health.reason),
            )
            for o in found.offers
        ],
    )
    for resource in found.empty:
        text = f"vmplug: {resource} selects nothing on this host, so kubelet does not get it"
        say(text, Style.WARNING, err=True)
    if found.unknown_pods:
        say(f"vmplug: {one_line(found.unknown_pods)}", Style.WARNING, err=True)


def _title(offer: Offer) -> str:
    return offer.unit.title if offer.unit else "-"


def _report_json(found: Report) -> dict[str, Any]:
    return {
        "devices": [
            {
                "resource": offer.resource,
                "id": offer.id,
                "state": offer.health.state,
                "healthy": offer.health.state.is_healthy,
                "reason": offer.health.reason or None,
                "pods": list(offer.pods),
                "addresses": list(offer.unit.members) if offer.unit else [],
                "nodes": [node.host_path for node in offer.unit.nodes] if offer.unit else [],
                "numa_node": offer.unit.numa_node if offer.unit else None,
            }
            for offer in found.offers
        ],
        "empty": list(found.empty),
        "unknown_pods": found.unknown_pods,
    }


def print_given_back(path: str, setup: Setup, *, as_json: bool) -> None:
    """Give back, and print what was and what stays."""
    done = give_back(read_config(path), setup=setup)
    if as_json:
        print_json(
            {
                "returned": [{"resource": row.resource, "id": row.id} for row in done.returned],
                "kept": [{"resource": row.resource, "id": row.id} for row in done.kept],
            }
        )
        return
    for row in done.returned:
        click.echo(f"gave {row.resource}={row.id} back")
    for row in done.kept:
        click.echo(f"{row.resource}={row.id} stays: a pod has it, or a process has it open")
    if not (done.returned or done.kept):
        click.echo("nothing to give back")
