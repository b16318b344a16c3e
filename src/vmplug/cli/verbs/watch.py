"""`vmplug watch`."""

import json
from typing import Any

import click

from vmplug.cli.options import complete_vm, state_dir_option
from vmplug.cli.render.text import one_line
from vmplug.manager.watching.notice import DeviceEvent
from vmplug.manager.watching.watch import watch


@click.command("watch")
@click.option("--vm", metavar="NAME", shell_complete=complete_vm, help="Only of this VM.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Stop after this time; 0 prints only what is wrong now. Default: never.",
)
@state_dir_option
@click.option(
    "--json", "as_json", is_flag=True, help="Answer with one JSON document for each line."
)
def command(as_json: bool, state_dir: str, timeout_s: float | None, vm: str | None) -> None:
    """What happens to the host devices that VMs have?

    Prints what is already wrong, then what happens, until Ctrl-C: a disk or a function that is
    removed or given to another driver, a resized disk, a deleted image, a backend that ends or
    comes back, a VM that ends. Each event says what it means for the guest, and what to do.
    Changes nothing, and asks no VM.

    \b
    vmplug watch
    vmplug watch --vm sb1 --json | while read -r line; do logger -t vmplug "$line"; done
    vmplug watch --timeout 0
    """
    with watch(state_dir, vm=vm, timeout_s=timeout_s) as notices:
        for notice in notices:
            click.echo(json.dumps(_json(notice)) if as_json else _text(notice))


def _text(notice: DeviceEvent) -> str:
    """Three lines: what, to whom; what it means; what to do."""
    time = notice.time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    hold = notice.attachment
    whose = f"  VM {notice.vm}" if notice.vm else ""
    if hold:
        whose += f", {hold.name} of {hold.owner}, attachment {hold.id}"
    lines = [f"{time}  {notice.what}{whose}", notice.message, notice.meaning]
    lines.append(f"hint: {notice.hint}")
    return "\n  ".join(map(one_line, lines))


def _json(notice: DeviceEvent) -> dict[str, Any]:
    hold = notice.attachment
    return {
        "version": 1,
        "time": notice.time.isoformat(timespec="milliseconds"),
        "event": str(notice.what),
        "vm": notice.vm,
        "attachment": hold
        and {
            "id": hold.id,
            "owner": hold.owner,
            "name": hold.name,
            "container_path": hold.container_path,
            "host_path": hold.host_path,
            "kind": str(hold.kind),
        },
        "message": notice.message,
        "meaning": notice.meaning,
        "hint": notice.hint,
        "old_size_bytes": notice.old_size_bytes,
        "size_bytes": notice.size_bytes,
    }
