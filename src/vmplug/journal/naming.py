"""Which attachment do people mean? By its id or that of its device, whole or as it begins."""

from collections.abc import Iterable, Sequence

from vmplug.errors import AmbiguousId, NotAttached
from vmplug.journal.records import Attachment
from vmplug.journal.state import State

_MOST_LISTED = 8


def find_holds(name: str, holds: Iterable[Attachment]) -> list[Attachment]:
    """Everything that `name` may mean; a whole id means nothing else that begins so."""
    known = list(holds)
    exact = [hold for hold in known if name in {hold.id, hold.device_id}]
    if exact or not name:
        return exact
    return [hold for hold in known if hold.id.startswith(name) or hold.device_id.startswith(name)]


def choose_hold(name: str, holds: Iterable[Attachment], absent: NotAttached) -> Attachment:
    """The one hold that `name` means.

    Raises `absent`, AmbiguousId, and NotAttached for one that its owner has released.
    """
    found = find_holds(name, holds)
    if not found:
        raise absent
    if len(found) > 1:
        raise _ambiguous(name, found)
    (hold,) = found
    if hold.state is State.RETAINED:
        raise NotAttached(
            f"{hold.owner} has released {hold.host_path} already: it stays in VM {hold.vm} until "
            "that ends, as QEMU cannot unplug it",
            hint="no action needed",
        )
    return hold


def choose_device(name: str, holds: Iterable[Attachment], absent: NotAttached) -> Attachment:
    """A hold on the one device that `name` means. Raises `absent` and AmbiguousId."""
    found = find_holds(name, holds)
    if not found:
        raise absent
    if len({hold.device_id for hold in found}) > 1:
        raise _ambiguous(name, found)
    return found[0]


def _ambiguous(name: str, found: Sequence[Attachment]) -> AmbiguousId:
    listed = [
        f"{hold.id} of {hold.owner} ({hold.host_path} in VM {hold.vm})"
        for hold in found[:_MOST_LISTED]
    ]
    more = len(found) - len(listed)
    return AmbiguousId(
        name,
        f"{name} means {len(found)} attachments: {', '.join(listed)}"
        + (f" and {more} more" if more else ""),
        ids=tuple(hold.id for hold in found),
        hint="pass the id of one of them",
    )
