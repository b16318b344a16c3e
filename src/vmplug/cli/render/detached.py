"""What `vmplug detach` did: for people and as JSON."""

from collections.abc import Sequence
from typing import Any, assert_never

import click

from vmplug.cli.render.attachments import attachment_json
from vmplug.errors import counted
from vmplug.text import one_line
from vmplug.vms.attachments import Detached, DetachOutcome


def detached_json(done: Detached) -> dict[str, Any]:
    """An attachment, what happened to it, and the owners that hold the device now."""
    return {
        **attachment_json(done.attachment),
        "outcome": str(done.outcome),
        "held_by": list(done.held_by),
        "still_held": done.outcome is DetachOutcome.STILL_HELD,
        "retained": done.outcome is DetachOutcome.RETAINED,
    }


def print_detached(detached: Sequence[Detached]) -> None:
    """A line for each."""
    for done in detached:
        hold = done.attachment
        what = f"{hold.id}  {one_line(hold.host_path)}"
        click.echo(f"{_VERBS[done.outcome]} {what}  {_where(done)}  device {hold.device_id}")


_VERBS = {outcome: str(outcome) for outcome in DetachOutcome} | {
    DetachOutcome.RETAINED: "released"
}


def _where(done: Detached) -> str:
    """Where the device is now, and why."""
    hold = done.attachment
    match done.outcome:
        case DetachOutcome.DETACHED:
            return f"from VM {hold.vm}"
        case DetachOutcome.RETAINED:
            return f"stays in VM {hold.vm} until that ends"
        case DetachOutcome.STILL_HELD:
            more = counted(done.left_count, "more time")
            return f"in VM {hold.vm}: {one_line(hold.owner)} has attached it {more}"
        case DetachOutcome.RELEASED if hold.guest_address is None:
            return f"was only counted, never in VM {hold.vm}"
        case DetachOutcome.RELEASED:
            holders = ", ".join(map(one_line, done.held_by))
            return f"stays in VM {hold.vm}, held by {holders}"
        case _:
            assert_never(done.outcome)
