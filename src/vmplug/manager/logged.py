"""What the log says of holds: who has which device of which VM, and nothing of what was asked."""

from collections.abc import Iterable

from vmplug.journal.records import Attachment
from vmplug.log import Log

log = Log(__name__)


def log_holds(done: str, holds: Iterable[Attachment]) -> None:
    """Log one line for each hold, such as `attached device 0123456789abcdef: VM sb1`."""
    for hold in holds:
        facts = {"vm": hold.vm, "owner": hold.owner, "device_id": hold.device_id}
        log.info("%s device %s: VM %s", done, hold.device_id, hold.vm, extra=facts)
