"""`vmplug list`."""

import click

from vmplug.cli.options import complete_vm, json_option, state_dir_option
from vmplug.cli.output import attachment_json, print_attachments, print_json
from vmplug.cli.wiring import find_ended, open_journal, read_attachments


@click.command("list")
@click.option("--vm", metavar="NAME", shell_complete=complete_vm, help="Only of this VM.")
@state_dir_option
@json_option
def command(as_json: bool, state_dir: str, vm: str | None) -> None:
    """What is plugged where?

    The journal is asked, no VM; `vmplug reconcile` makes the two agree.

    \b
    vmplug list
    vmplug list --vm sb1 --json
    """
    with open_journal(state_dir) as journal:
        held = read_attachments(journal, vm)
        ended = find_ended(journal, {hold.vm for hold in held})
    if as_json:
        listed = [attachment_json(hold) for hold in held]
        print_json({"attachments": listed, "ended_vms": ended})
        return
    print_attachments(held, with_vm=True)
    for name in ended:
        click.echo(f"VM {name} seems to have ended: vmplug reconcile frees what it held")
    if not held:
        click.echo("nothing is attached")
