"""`vmplug check`."""

import click

from vmplug.cli.options import (
    allow_option,
    completes,
    json_option,
    managed_option,
    owner_option,
    parse_allow,
    state_dir_option,
)
from vmplug.cli.render.findings import (
    check_status,
    counted_json,
    print_findings,
    problems_json,
)
from vmplug.cli.render.output import print_json
from vmplug.cli.request import read_request, request_options
from vmplug.vms.check import check_requests


@click.command("check")
@request_options
@allow_option
@managed_option
@owner_option
@click.option(
    "--vm",
    metavar="NAME",
    shell_complete=completes("vm"),
    help="Also check that this VM has a place for each.",
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
    **request: object,
) -> None:
    """May it be handed over?

    Prints every problem with its remedy, and changes nothing. With --vm and --owner it refuses
    what `vmplug attach` would refuse before it plugs. Without --vm it does not know which devices
    that VM has already, nor whether it has a place, and takes rules of the policy for single VMs
    to match. The exit status is 3 for what the operator's policy does not allow, 4 for every other
    problem.

    \b
    vmplug check bundle/
    vmplug check /dev/sdb:ro
    vmplug check --device /dev/disk/by-id/wwn-0x5000c500a1b2c3d4
    vmplug check bundle/ --allow mounted-on-host
    vmplug check --device vfio:0000:3b:00.0 --managed --vm sb1
    """
    asked = read_request(**request)  # type: ignore[arg-type]
    examined = check_requests(
        asked.requests,
        vm=vm,
        owner=owner or asked.name,
        allow=parse_allow(allow),
        managed=managed,
        setup=asked.setup(state_dir),
    )
    status = check_status(examined)
    if as_json:
        answer = {"ok": status == 0, "problems": problems_json(examined)}
        print_json(answer | ({"counted": counted_json(examined)} if vm else {}))
    else:
        print_findings(examined)
    if status:
        raise click.exceptions.Exit(status)
