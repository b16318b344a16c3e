"""What `vmplug check` found: for people, as JSON, and as an exit status."""

import sys
from collections.abc import Sequence

from vmplug.cli.device_json import container_path
from vmplug.cli.render.terminal import Style, paint, say, width_of, wrapped
from vmplug.host.finding import Code, Severity
from vmplug.manager.examine import CheckedRequest
from vmplug.text import one_line

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
            style = Style.ERROR if finding.severity is Severity.ERROR else Style.WARNING
            told = f"{finding.severity} {finding.code}: {one_line(finding.message)}"
            _print_told(path, told, str(finding.severity), style)
            below = _below(path)
            for line in wrapped(one_line(finding.hint), first=below, rest=below):
                say(line)
        says_more = request.is_counted or request.driver is None or not request.findings
        if says_more and not request.is_refused:
            _print_told(path, f"ok, {one_line(_outcome(request))}", "ok", Style.OK)
    if not examined:
        say("no devices are asked for")


def _print_told(path: str, told: str, word: str, style: Style) -> None:
    """`PATH: WORD ...`, the word in its colour."""
    first, *others = wrapped(told, first=f"{path}: ", rest=_below(path))
    after = first.removeprefix(f"{path}: {word}")
    say(f"{path}: {paint(word, style)}{after}")
    for line in others:
        say(line)


def _below(path: str) -> str:
    """The space before what goes on below the path; few terminals have room beside a long one."""
    width = width_of(sys.stdout)
    return " " * (len(path) + 2 if width is None else min(len(path) + 2, width // 4))


def _outcome(request: CheckedRequest) -> str:
    """What attach does with a device that it does not refuse."""
    host_path = request.device.host_path if request.device else "-"
    if request.is_counted:
        return f"the VM has {host_path} already: attach only counts it"
    if request.driver is None:
        return f"{host_path} is counted, not given to the VM"
    return f"{host_path} may be handed over"
