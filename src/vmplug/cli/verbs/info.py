"""`vmplug info`."""

import click

from vmplug.cli.device_json import info_json
from vmplug.cli.options import json_option
from vmplug.cli.render.output import access, print_json, resolved_json
from vmplug.cli.render.table import Column, name_column, path_column, print_table
from vmplug.cli.request import read_request, request_options
from vmplug.oci.info import DeviceInfo
from vmplug.oci.requests import Named, NetInfo, Request, VfioInfo


@click.command("info")
@request_options
@json_option
def command(as_json: bool, **request: object) -> None:
    """What does the container ask for?

    BUNDLE is an OCI bundle directory, a config.json, or - for standard input. Reads no device of
    the host, except to find mounts whose source is a block device.

    \b
    vmplug info bundle/
    crictl inspect ID | jq .info.runtimeSpec | vmplug info - --json
    """
    asked = read_request(**request)  # type: ignore[arg-type]
    if as_json:
        devices = [_json(info) for info in asked.requests]
        resolved = resolved_json(asked.resolved_annotations)
        print_json({"name": asked.name, "devices": devices, **resolved})
        return
    if not asked.requests:
        click.echo("no devices are asked for")
    columns: list[Column | str] = [
        path_column("CONTAINER PATH"),
        "TYPE",
        path_column("NUMBER"),
        "RO/RW",
        "MODE",
        "UID",
        "GID",
    ]
    names = [", ".join(_cdi_names(info)) for info in asked.requests]
    if any(names):
        columns.append(name_column("CDI NAME"))
    print_table(
        columns,
        [
            (*_row(info), name or "-")[: len(columns)]
            for info, name in zip(asked.requests, names, strict=True)
        ],
    )


def _cdi_names(info: Request) -> tuple[str, ...]:
    return info.cdi_names if isinstance(info, DeviceInfo) else ()


def _json(info: Request) -> dict[str, object]:
    device = info if isinstance(info, DeviceInfo) else None
    return {
        **info_json(info),
        "host_path": info.host_path if isinstance(info, DeviceInfo) else _source(info),
        "pmem": device.pmem if device else False,
        "file_mode": device.file_mode if device else None,
        "uid": device.uid if device else None,
        "gid": device.gid if device else None,
        "options": dict(info.driver_options),
    }


def _row(info: Request) -> tuple[str, ...]:
    if not isinstance(info, DeviceInfo):
        kind = info.name.partition(":")[0]
        return (info.name, kind, _source(info), access(read_only=info.read_only), "-", "-", "-")
    mode = "-" if info.file_mode is None else f"{info.file_mode:04o}"
    owners = ("-" if number is None else str(number) for number in (info.uid, info.gid))
    what = str(info.devnum or info.host_path or "-")
    return (info.name, info.dev_type, what, access(read_only=info.read_only), mode, *owners)


def _source(info: Named) -> str:
    """The other end that the request names."""
    match info:
        case NetInfo():
            return info.socket_path
        case VfioInfo():
            return info.device
        case _:
            return info.source
