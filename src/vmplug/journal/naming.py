"""Which attachment do people mean? By its id or that of its device, whole or as it begins."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from vmplug.errors import AmbiguousId, NotAttached
from vmplug.journal.records import Attachment
from vmplug.journal.state import State

_MOST_LISTED = 8


class _Holds:
    """Holds by their ids and those of their devices."""

    def __init__(self, holds: Iterable[Attachment]) -> None:
        self._by_id = defaultdict[str, list[Attachment]](list)
        for hold in holds:
            for known in {hold.id, hold.device_id}:
                self._by_id[known].append(hold)

    def find(self, name: str) -> list[Attachment]:
        """Everything that `name` may mean; a whole id means nothing else that begins so."""
        if name in self._by_id or not name:
            return self._by_id.get(name, [])
        begun = [holds for known, holds in self._by_id.items() if known.startswith(name)]
        return list({hold.id: hold for holds in begun for hold in holds}.values())


def choose_holds(
    names: Iterable[str], holds: Iterable[Attachment], absent: Callable[[str], NotAttached]
) -> list[Attachment]:
    """The one hold that each of the names means.

    Raises `absent` of a name, AmbiguousId, and NotAttached for one that its owner has released.
    """
    known = _Holds(holds)
    return [_choose_hold(name, known, absent) for name in names]


def _choose_hold(name: str, holds: _Holds, absent: Callable[[str], NotAttached]) -> Attachment:
    found = holds.find(name)
    if not found:
        raise absent(name)
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
    found = _Holds(holds).find(name)
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
