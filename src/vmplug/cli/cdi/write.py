"""What `vmplug cdi write` did: for people, and as JSON; once, or for as long as it watches."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NoReturn

import click
import msgspec

from vmplug.cli.options import open_store
from vmplug.cli.render.output import access, print_json
from vmplug.cli.render.table import path_column, print_table
from vmplug.cli.render.terminal import Style, say
from vmplug.errors import DeviceError
from vmplug.host.root import HostRoot
from vmplug.manager.naming.keep import keep_cdi_specs
from vmplug.manager.naming.specs import WrittenSpecs, write_cdi_specs
from vmplug.manager.setup import Setup
from vmplug.policy.find import find_policy
from vmplug.text import one_line


def setup_reader(
    host: HostRoot, *, policy: str | None, vhost_user_store: str | None
) -> Callable[[], Setup]:
    """Reads the policy, which may have changed since, and gives it with the rest."""
    store = open_store(vhost_user_store, host) if vhost_user_store else None
    return lambda: Setup(host=host, vhost_user_store=store, policy=find_policy(policy))


def write_once(directory: str, setup: Setup, *, dry_run: bool, as_json: bool) -> bool:
    """Write, print what was done, and return whether everything got its name."""
    done = write_cdi_specs(directory, dry_run=dry_run, setup=setup)
    if as_json:
        print_json(_written_json(done, dry_run=dry_run))
    else:
        _print_written(done, dry_run=dry_run)
    return not done.left_out


def _print_written(done: WrittenSpecs, *, dry_run: bool) -> None:
    """A table of the devices, then the files that were changed."""
    rows = [
        (str(device), f"{device.host_path} {access(read_only=device.read_only)}")
        for device in done.devices
    ]
    print_table(("DEVICE", path_column("NODE", 1)), rows)
    _print_changes(done, dry_run=dry_run)
    _print_left_out(done)


def _print_changes(done: WrittenSpecs, *, dry_run: bool) -> None:
    for paths, what in (
        (done.written, "would write" if dry_run else "wrote"),
        (done.removed, "would remove" if dry_run else "removed"),
        (done.unchanged, "unchanged:"),
    ):
        for path in paths:
            say(one_line(f"{what} {path}"))


def _print_left_out(done: WrittenSpecs) -> None:
    for each in done.left_out:
        said = f"vmplug: no name for {each.what}: {each.message}"
        say(one_line(said), Style.WARNING, err=True)


def _written_json(done: WrittenSpecs, *, dry_run: bool = False) -> dict[str, Any]:
    """The devices, the files, and what could get no name."""
    devices = [{**msgspec.to_builtins(device), "name": str(device)} for device in done.devices]
    for device in devices:
        del device["kind"]
    return {
        "ok": not done.left_out,
        "dry_run": dry_run,
        "devices": devices,
        "written": list(done.written),
        "removed": list(done.removed),
        "unchanged": list(done.unchanged),
        "left_out": [msgspec.to_builtins(each) for each in done.left_out],
    }


def keep_printing(directory: str, read_setup: Callable[[], Setup], *, as_json: bool) -> None:
    """Keep the files true, and print each change, until SIGINT or SIGTERM."""
    with _until_signal(), closing(keep_cdi_specs(directory, read_setup)) as changes:
        for number, change in enumerate(changes):
            if as_json:
                click.echo(json.dumps({"version": 1, **_change_json(change)}))
            elif isinstance(change, DeviceError):
                say(f"vmplug: {one_line(change.message)}", Style.WARNING, err=True)
            elif number:
                _print_changes(msgspec.structs.replace(change, unchanged=()), dry_run=False)
                _print_left_out(change)
            else:
                _print_written(change, dry_run=False)


def _change_json(change: WrittenSpecs | DeviceError) -> dict[str, Any]:
    if isinstance(change, WrittenSpecs):
        return _written_json(change)
    return {"error": {"code": change.code, "message": change.message, "hint": change.hint}}


@contextmanager
def _until_signal() -> Iterator[None]:
    """Returns at SIGINT and at SIGTERM, which is how a service is ended."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    former = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)
