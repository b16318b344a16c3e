"""What `vmplug detach` did: for people and as JSON."""

from collections.abc import Sequence
from typing import Any

import click

from vmplug.cli.render.attachments import attachment_json
from vmplug.cli.render.text import one_line
from vmplug.vms.attachments import Detached, DetachOutcome


def detached_json(done: Detached) -> dict[str, Any]:
    """An attachment, and whether it is detached."""
    return {
        **attachment_json(done.attachment),
        "still_held": done.outcome is DetachOutcome.STILL_HELD,
        "retained": done.outcome is DetachOutcome.RETAINED,
    }


def print_detached(detached: Sequence[Detached]) -> None:
    """A line for each."""
    for done in detached:
        hold = done.attachment
        what = f"{hold.id}  {one_line(hold.host_path)}"
        if done.outcome is DetachOutcome.RETAINED:
            click.echo(f"released {what}  stays in VM {hold.vm} until that ends")
        else:
            click.echo(f"{done.outcome} {what}  from VM {hold.vm}")
