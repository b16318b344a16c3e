"""`vmplug watch`."""

import json
from typing import Any

import click

from vmplug.cli.options import Seconds, completes, state_dir_option
from vmplug.cli.render.terminal import paint, say, style_of, wrapped
from vmplug.errors import counted
from vmplug.manager.setup import Setup
from vmplug.manager.watching.notice import DeviceEvent
from vmplug.manager.watching.watch import Looked
from vmplug.text import one_line
from vmplug.vms.watch import watch


@click.command("watch")
@click.option("--vm", metavar="NAME", shell_complete=completes("vm"), help="Only of this VM.")
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(),
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
    comes back, a VM that ends or that an error on a disk has stopped. Each event says what it
    means for the guest, and what to do. Changes nothing, and asks a VM only which disk has stopped
    it.

    \b
    vmplug watch
    vmplug watch --vm sb1 --json | while read -r line; do logger -t vmplug "$line"; done
    vmplug watch --timeout 0
    """
    with watch(vm=vm, timeout_s=timeout_s, setup=Setup(state_dir=state_dir)) as events:
        is_quiet = True
        for event in events:
            is_quiet = False
            if as_json:
                click.echo(json.dumps(_json(event)))
            else:
                _print(event)
        if is_quiet and not as_json:
            for line in wrapped(_nothing(events.looked), rest="  "):
                click.echo(line)


def _nothing(looked: Looked) -> str:
    """What was found to be in order, and what could not be checked."""
    if not looked.vms:
        return "nothing is attached"
    known = looked.devices - looked.unknown
    told = [f"nothing is wrong: {counted(looked.vms, 'VM')}, {counted(known, 'device')} checked"]
    if looked.unknown:
        told.append(f"the state of {counted(looked.unknown, 'device')} cannot be known")
    told += [f"VM {name} did not answer" for name in looked.silent_vms]
    return "; ".join(told)


def _print(event: DeviceEvent) -> None:
    """What, to whom; what it means; what to do."""
    time = event.time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    hold = event.attachment
    whose = f"  VM {event.vm}" if event.vm else ""
    if hold:
        whose += f", {hold.name} of {hold.owner}, attachment {hold.id}, device {hold.device_id}"
    first, *others = wrapped(one_line(f"{event.what}{whose}"), first=f"{time}  ", rest="    ")
    style = style_of(event.what)
    say(first.replace(str(event.what), paint(str(event.what), style), 1))
    for sentence in (event.message, event.meaning, f"hint: {event.hint}"):
        others += wrapped(one_line(sentence), first="  ", rest="    ")
    for line in others:
        say(line)


def _json(event: DeviceEvent) -> dict[str, Any]:
    hold = event.attachment
    return {
        "version": 1,
        "time": event.time.isoformat(timespec="milliseconds"),
        "event": str(event.what),
        "vm": event.vm,
        "attachment": hold
        and {
            "id": hold.id,
            "device_id": hold.device_id,
            "owner": hold.owner,
            "name": hold.name,
            "container_path": hold.container_path,
            "host_path": hold.host_path,
            "kind": str(hold.kind),
        },
        "message": event.message,
        "meaning": event.meaning,
        "hint": event.hint,
        "old_size_bytes": event.old_size_bytes,
        "size_bytes": event.size_bytes,
    }
