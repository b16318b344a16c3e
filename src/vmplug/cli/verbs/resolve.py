"""`vmplug resolve`."""

from typing import TYPE_CHECKING

import click

from vmplug.cli.device_json import device_json, info_json
from vmplug.cli.options import json_option
from vmplug.cli.render.output import print_json, size
from vmplug.cli.render.table import path_column, print_table
from vmplug.cli.render.terminal import Style, say
from vmplug.cli.request import read_request, request_options
from vmplug.errors import HostError
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.device import HostDevice
from vmplug.host.pci.group import VfioGroup
from vmplug.host.resolve import resolve_all
from vmplug.text import one_line

if TYPE_CHECKING:
    from vmplug.oci.requests import Request

_HOST_ERROR = 4


@click.command("resolve")
@request_options
@json_option
def command(as_json: bool, **request: object) -> None:
    """What is that on this host?

    Prints every device; the exit status is 4 when the host lacks one of them.

    \b
    vmplug resolve bundle/
    vmplug resolve --device /dev/sdb --device c:10:229:/dev/fuse
    vmplug resolve --device b:241:0 --vhost-user-store /run/vhost-user --json
    """
    asked = read_request(**request)  # type: ignore[arg-type]
    found = resolve_all(asked.requests, asked.host, asked.vhost_user_store)
    answers = list(map(_existing, found))
    pairs = list(zip(asked.requests, answers, strict=True))
    if as_json:
        print_json({"devices": [_json(info, answer) for info, answer in pairs]})
    else:
        print_table(
            (path_column("CONTAINER PATH"), path_column("HOST PATH"), "KIND", "SIZE", "FOUND BY"),
            [_row(info, answer) for info, answer in pairs if not isinstance(answer, HostError)],
        )
        if not pairs:
            click.echo("no devices are asked for")
    errors = [answer for answer in answers if isinstance(answer, HostError)]
    if not as_json:
        for error in errors:
            say(f"vmplug: {one_line(error.message)}", Style.ERROR, err=True)
            if error.hint:
                say(f"hint: {one_line(error.hint)}", err=True)
    if errors:
        raise click.exceptions.Exit(_HOST_ERROR)


def _existing(answer: HostDevice | HostError) -> HostDevice | HostError:
    """The error for a node of VFIO without a device, of which `check` has a finding."""
    if isinstance(answer, VfioGroup):
        from vmplug.host.pci.vfio import check_exists  # noqa: PLC0415  msgspec: 9 ms

        try:
            check_exists(answer)
        except HostError as error:
            return error
    return answer


def _json(info: "Request", answer: HostDevice | HostError) -> dict[str, object]:
    if isinstance(answer, HostError):
        error = {"code": answer.code, "message": answer.message, "hint": answer.hint}
        return {**info_json(info), "error": error}
    return {**info_json(info), **device_json(answer)}


def _row(info: "Request", device: HostDevice) -> tuple[str, ...]:
    size_bytes = device.size_bytes if isinstance(device, BlockDevice | DiskFile) else None
    return (
        info.name,
        device.host_path,
        device.kind.word,
        "-" if size_bytes is None else size(size_bytes),
        device.found_by,
    )
