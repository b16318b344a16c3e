"""`vmplug check`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from vmplug.cli.options import (
    allow_option,
    complete_vm,
    json_option,
    managed_option,
    owner_option,
    parse_allow,
    policy_option,
    read_request,
    request_options,
    state_dir_option,
)
from vmplug.cli.render.output import container_path, print_json
from vmplug.cli.render.text import one_line
from vmplug.cli.wiring import find_policy, has_journal, open_journal, open_manager
from vmplug.host.device import HostDevice
from vmplug.host.finding import Claim, Code
from vmplug.manager.examine import CheckContext, CheckedRequest, FindClaims, examine
from vmplug.policy.gate import PolicyCheck

_NOT_ALLOWED, _HOST_ERROR = 3, 4


@click.command("check")
@request_options
@allow_option
@managed_option
@owner_option
@policy_option
@click.option(
    "--vm", metavar="NAME", shell_complete=complete_vm, help="Also whether this VM has a place."
)
@state_dir_option
@json_option
def command(
    *,
    as_json: bool,
    state_dir: str,
    allow: tuple[str, ...],
    managed: bool,
    vm: str | None,
    owner: str | None,
    policy: str | None,
    **request: object,
) -> None:
    """May it be handed over?

    Every problem is told at once with its remedy, and nothing is changed. `vmplug attach` refuses
    exactly what this refuses; the exit status is then 3 for what the operator's policy does not
    allow, 4 for everything else. Without --vm the policy is not asked for which VM it is.

    \b
    vmplug check bundle/
    vmplug check --device b:8:16 --read-only
    vmplug check bundle/ --allow mounted-on-host
    vmplug check --device vfio:0000:3b:00.0 --managed --vm sb1
    """
    asked = read_request(**request)  # type: ignore[arg-type]
    allowed = parse_allow(allow)
    owner, rules = owner or asked.name, find_policy(policy)
    if vm:
        with open_manager(
            vm, state_dir, host=asked.host, vhost_user_store=asked.vhost_user_store, policy=rules
        ) as devices:
            examined = devices.check_places(
                asked.requests, owner=owner, allow=allowed, managed=managed
            )
    else:
        with _claims(state_dir) as find_claims:
            examined = examine(
                asked.requests,
                asked.host,
                vhost_user_store=asked.vhost_user_store,
                known=CheckContext(
                    find_claims, gate=PolicyCheck(rules, owner=owner) if rules else None
                ),
                allowed=allowed,
                managed=managed,
            )
    is_ok = not any(request.is_refused for request in examined)
    if as_json:
        print_json({"ok": is_ok, "problems": _problems(examined)})
    else:
        _print(examined)
    if not is_ok:
        raise click.exceptions.Exit(_NOT_ALLOWED if _is_policys(examined) else _HOST_ERROR)


@contextmanager
def _claims(state_dir: str) -> Iterator[FindClaims]:
    """What VMs hold; a host where vmplug never ran has no journal, and none is made."""
    if not has_journal(state_dir):
        yield lambda _: ()
        return
    with open_journal(state_dir) as journal:

        def find_claims(device: HostDevice) -> Sequence[Claim]:
            return journal.find_claims(None, device.identity, device.related_identities)

        yield find_claims


def _is_policys(examined: Sequence[CheckedRequest]) -> bool:
    codes = {finding.code for request in examined for finding in request.findings}
    return Code.NOT_ALLOWED in codes


def _problems(examined: Sequence[CheckedRequest]) -> list[dict[str, str | None]]:
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


def _print(examined: Sequence[CheckedRequest]) -> None:
    for request in examined:
        path = one_line(request.info.name)
        for finding in request.findings:
            message = one_line(finding.message)
            click.echo(f"{path}: {finding.severity} {finding.code}: {message}")
            click.echo(f"{' ' * len(path)}  {one_line(finding.hint)}")
        if not request.findings:
            host_path = one_line(request.device.host_path if request.device else "-")
            click.echo(f"{path}: ok, {host_path} may be handed over")
    if not examined:
        click.echo("no devices are asked for")
