"""`vmplug list`."""

import click

from vmplug.cli.options import completes, json_option, state_dir_option
from vmplug.cli.render.attachments import attachments_json, host_json, print_attachments
from vmplug.cli.render.output import print_json
from vmplug.cli.render.terminal import Style, say
from vmplug.cli.render.vms import failed_disk_json, print_stopped_vms
from vmplug.host.use.claim import spoken_holder
from vmplug.manager.setup import Setup
from vmplug.vms.listing import list_attachments


@click.command("list")
@click.option("--vm", metavar="NAME", shell_complete=completes("vm"), help="Only of this VM.")
@state_dir_option
@json_option
def command(as_json: bool, state_dir: str, vm: str | None) -> None:
    """What is plugged where?

    Reads the journal; `vmplug reconcile` makes it and the VMs agree. HOST is the state of the
    device on the host, - where that cannot be known; `vmplug watch` prints changes as they happen.
    Asks each VM only which disk has stopped it; `vmplug vm resume` lets it run again.

    \b
    vmplug list
    vmplug list --vm sb1 --json
    """
    listing = list_attachments(vm=vm, setup=Setup(state_dir=state_dir))
    if as_json:
        holds = listing.attachments
        listed = [
            shown | host_json(listing.health.get(hold.device_id))
            for hold, shown in zip(holds, attachments_json(holds, holds), strict=True)
        ]
        stopped = {
            vm: [failed_disk_json(disk) for disk in disks]
            for vm, disks in listing.stopped_vms.items()
        }
        ended = list(listing.ended_vms)
        print_json({"attachments": listed, "ended_vms": ended, "stopped_vms": stopped})
        return
    print_attachments(listing.attachments, with_vm=True, health=listing.health)
    print_stopped_vms(listing.stopped_vms)
    for name in listing.ended_vms:
        who = spoken_holder(name)
        sentence = f"{who} seems to have ended: vmplug reconcile frees what it held"
        say(sentence, Style.WARNING)
    if not listing.attachments:
        click.echo("nothing is attached")
