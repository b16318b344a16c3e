"""`vmplug list`."""

import click

from vmplug.cli.options import complete_vm, json_option, state_dir_option
from vmplug.cli.render.output import attachment_json, host_json, print_attachments, print_json
from vmplug.cli.wiring import find_ended, open_journal, read_attachments
from vmplug.host.root import HostRoot
from vmplug.journal.journal import Journal
from vmplug.manager.watching.health import DeviceHealth, HostSnapshot


@click.command("list")
@click.option("--vm", metavar="NAME", shell_complete=complete_vm, help="Only of this VM.")
@state_dir_option
@json_option
def command(as_json: bool, state_dir: str, vm: str | None) -> None:
    """What is plugged where?

    The journal is asked, no VM; `vmplug reconcile` makes the two agree. HOST says what has become
    of the device on the host, - where that cannot be told; `vmplug watch` tells it as it happens.

    \b
    vmplug list
    vmplug list --vm sb1 --json
    """
    with open_journal(state_dir) as journal:
        held = read_attachments(journal, vm)
        ended = find_ended(journal, {hold.vm for hold in held})
        looks = _look(journal, vm)
    if as_json:
        listed = [attachment_json(hold) | host_json(looks.get(hold.device_id)) for hold in held]
        print_json({"attachments": listed, "ended_vms": ended})
        return
    print_attachments(held, with_vm=True, looks=looks)
    for name in ended:
        click.echo(f"VM {name} seems to have ended: vmplug reconcile frees what it held")
    if not held:
        click.echo("nothing is attached")


def _look(journal: Journal, vm: str | None) -> dict[str, DeviceHealth]:
    """What has become of the devices on the host, by id, as far as it can be told."""
    vms = [record for record in journal.vms() if vm in {None, record.name}]
    looker = HostSnapshot(HostRoot(), vms)
    devices = (device for record in vms for device in journal.devices(record.name))
    return {device.id: look for device in devices if (look := looker.of(device))}
