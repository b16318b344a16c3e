"""`vmplug plan`."""

import click

from vmplug.cli.options import (
    allow_option,
    json_option,
    managed_option,
    owner_option,
    parse_allow,
    state_dir_option,
    vm_option,
)
from vmplug.cli.progress import is_verbose
from vmplug.cli.render.output import print_json
from vmplug.cli.render.terminal import Style, say, wrapped
from vmplug.cli.request import read_request, request_options
from vmplug.cli.steps import raw, sentences
from vmplug.drivers.ports import Command, Step
from vmplug.text import one_line
from vmplug.vms.connect import connect_vm


@click.command("plan")
@request_options
@vm_option
@allow_option
@managed_option
@owner_option
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
    **request: object,
) -> None:
    """What would `vmplug attach` do? Every step with the one that undoes it.

    Asks the VM what it offers, and changes nothing. Device ids are drawn at random each time. -v
    adds the command of each step, and --json has only those.

    \b
    vmplug plan bundle/ --vm sb1
    vmplug plan --device b:7:0 --vm sb1 --json
    """
    asked = read_request(**request)  # type: ignore[arg-type]
    setup = asked.setup(state_dir)
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
        _print(number, step)
    if not steps:
        click.echo("nothing to plug: every device is there already, or only counted")


def _json(command: Command | None) -> dict[str, object] | None:
    if command is None:
        return None
    return {"execute": command.execute, "arguments": dict(command.arguments)}


def _print(number: int, step: Step) -> None:
    """The sentence of a step, and below it what undoes it; with -v also the commands."""
    do, undo = sentences(step)
    for label, sentence, command in (
        (f"{number:2}  ", do, step.do),
        ("    undo: ", undo, step.undo),
    ):
        for line in wrapped(one_line(sentence), first=label, rest=" " * 8):
            say(line)
        if is_verbose() and command:
            say(f"        {one_line(raw(command))}", Style.DETAIL)
