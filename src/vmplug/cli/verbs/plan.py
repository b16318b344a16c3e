"""`vmplug plan`."""

import json

import click

from vmplug.cli.options import (
    allow_option,
    json_option,
    managed_option,
    owner_option,
    parse_allow,
    policy_option,
    read_request,
    request_options,
    state_dir_option,
    vm_option,
)
from vmplug.cli.render.output import print_json
from vmplug.drivers.ports import Command
from vmplug.policy.find import find_policy
from vmplug.vms.connect import connect_vm


@click.command("plan")
@request_options
@vm_option
@allow_option
@managed_option
@owner_option
@policy_option
@state_dir_option
@json_option
def command(
    *,
    as_json: bool,
    state_dir: str,
    allow: tuple[str, ...],
    managed: bool,
    vm: str,
    owner: str | None,
    policy: str | None,
    **request: object,
) -> None:
    """What would `vmplug attach` do? Every step with the one that undoes it.

    Asks the VM what it offers, and changes nothing. Device ids are drawn at random each time.

    \b
    vmplug plan bundle/ --vm sb1
    vmplug plan --device b:7:0 --vm sb1 --json
    """
    asked = read_request(**request)  # type: ignore[arg-type]
    setup = asked.setup(state_dir, find_policy(policy))
    with connect_vm(vm, setup=setup) as devices:
        steps = devices.plan(
            asked.requests,
            owner=owner or asked.name,
            allow=parse_allow(allow),
            managed=managed,
        )
    if as_json:
        listed = [{"do": _json(step.do), "undo": _json(step.undo)} for step in steps]
        print_json({"vm": vm, "steps": listed})
        return
    for number, step in enumerate(steps, 1):
        click.echo(f"{number:2}  {_text(step.do)}")
        click.echo(f"    undo: {_text(step.undo)}")
    if not steps:
        click.echo("nothing to plug: every device is there already, or only counted")


def _json(command: Command | None) -> dict[str, object] | None:
    if command is None:
        return None
    return {"execute": command.execute, "arguments": dict(command.arguments)}


def _text(command: Command | None) -> str:
    if command is None:
        return "none, QEMU cannot take it back"
    return f"{command.execute} {json.dumps(dict(command.arguments))}"
