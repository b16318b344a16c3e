"""`vmplug resize`."""

import click

from vmplug.cli.options import completes, json_option, state_dir_option
from vmplug.cli.progress import at_work
from vmplug.cli.render.output import print_json, size
from vmplug.drivers.options import number
from vmplug.manager.setup import Setup
from vmplug.text import one_line
from vmplug.vms.attachments import resize_attachment

_parse = number(1, (1 << 63) - 1)
"""A size as the limits of a disk are written. The most is that of a file. Source: lseek(2)."""


def _parse_size(ctx: click.Context, param: click.Parameter, said: str | None) -> int | None:
    try:
        return None if said is None else _parse(said)
    except ValueError as error:
        raise click.BadParameter(f"{said!r} is not {error}.", ctx, param) from None


@click.command("resize")
@click.argument("attachment", shell_complete=completes("attachment"))
@click.option(
    "--size",
    "size_bytes",
    callback=_parse_size,
    metavar="BYTES",
    help="Grow a file to it; K, M, G and T are powers of 1024.",
)
@state_dir_option
@json_option
def command(as_json: bool, state_dir: str, size_bytes: int | None, attachment: str) -> None:
    """Give the guest a disk's new size, while it runs.

    ATTACHMENT is an id of `vmplug list`, of the disk or of an attachment, or as much of its
    beginning as no other id has. Without --size the guest gets the size that the host's device
    has now: grow that first.

    \b
    lvextend --size +1G vg/data && vmplug resize 0123456789abcdef
    vmplug resize 0123456789abcdef --size 2G
    """
    setup = Setup(state_dir=state_dir)
    with at_work("resizing", setup):
        hold, now = resize_attachment(attachment, size_bytes, setup=setup)
    if as_json:
        print_json({"id": hold.id, "device_id": hold.device_id, "size_bytes": now})
    else:
        click.echo(f"{one_line(hold.host_path)} has {size(now)} in VM {hold.vm}")
