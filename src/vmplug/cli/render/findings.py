"""What `vmplug check` found: for people, as JSON, and as an exit status."""

from collections.abc import Sequence

import click

from vmplug.cli.render.output import container_path
from vmplug.cli.render.text import one_line
from vmplug.host.finding import Code
from vmplug.manager.examine import CheckedRequest

_NOT_ALLOWED, _HOST_ERROR = 3, 4


def check_status(examined: Sequence[CheckedRequest]) -> int:
    """0 when all may be handed over, 3 for what the policy does not allow, else 4."""
    if not any(request.is_refused for request in examined):
        return 0
    codes = {finding.code for request in examined for finding in request.findings}
    return _NOT_ALLOWED if Code.NOT_ALLOWED in codes else _HOST_ERROR


def problems_json(examined: Sequence[CheckedRequest]) -> list[dict[str, str | None]]:
    """Every finding about every request."""
    return [
        {
            "container_path": container_path(request.info),
            "name": request.info.name,
            "code": str(finding.code),
            "message": finding.message,
            "hint": finding.hint,
            "severity": str(finding.severity),
        }
        for request in examined
        for finding in request.findings
    ]


def counted_json(examined: Sequence[CheckedRequest]) -> list[str]:
    """The names of the requests for what the VM has already."""
    return [request.info.name for request in examined if request.is_counted]


def print_findings(examined: Sequence[CheckedRequest]) -> None:
    """Each request with what was found, and the remedies."""
    for request in examined:
        path = one_line(request.info.name)
        for finding in request.findings:
            message = one_line(finding.message)
            click.echo(f"{path}: {finding.severity} {finding.code}: {message}")
            click.echo(f"{' ' * len(path)}  {one_line(finding.hint)}")
        if not request.is_refused and (request.is_counted or not request.findings):
            click.echo(f"{path}: ok, {one_line(_outcome(request))}")
    if not examined:
        click.echo("no devices are asked for")


def _outcome(request: CheckedRequest) -> str:
    """What attach does with a device that it does not refuse."""
    host_path = request.device.host_path if request.device else "-"
    if request.is_counted:
        return f"the VM has {host_path} already: attach only counts it"
    if request.driver is None:
        return f"{host_path} is counted, not given to the VM"
    return f"{host_path} may be handed over"
