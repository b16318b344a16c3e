"""`vmplug resize`."""

import click

from vmplug.cli.options import json_option, state_dir_option
from vmplug.cli.render.output import print_json, size
from vmplug.cli.render.text import one_line
from vmplug.cli.wiring import open_journal, open_manager
from vmplug.errors import NotAttached
from vmplug.host.root import HostRoot


@click.command("resize")
@click.argument("attachment")
@click.option(
    "--size", "size_bytes", type=click.IntRange(min=1), metavar="BYTES", help="Grow a file to it."
)
@state_dir_option
@json_option
def command(as_json: bool, state_dir: str, size_bytes: int | None, attachment: str) -> None:
    """Give the guest a disk's new size, while it runs.

    Without --size the guest is told the size that the host's device has now: grow that first.

    \b
    lvextend --size +1G vg/data && vmplug resize 0123456789abcdef
    vmplug resize 0123456789abcdef --size 2147483648
    """
    with open_journal(state_dir) as journal:
        hold = next((h for h in journal.attachments() if h.id == attachment), None)
    if hold is None:
        raise NotAttached(
            f"there is no attachment {attachment}", hint="vmplug list shows what there is"
        )
    with open_manager(hold.vm, state_dir, host=HostRoot()) as devices:
        now = devices.resize(attachment, size_bytes)
    if as_json:
        print_json({"id": attachment, "size_bytes": now})
    else:
        click.echo(f"{one_line(hold.host_path)} has {size(now)} in VM {hold.vm}")
