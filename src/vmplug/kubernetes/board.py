"""Board: the devices as kubelet is to know them, for all streams."""

import asyncio

from vmplug.kubernetes.picture import Offer, Picture


class Board:
    """One for a plugin, used in its event loop alone.

    `changed` is set when there is another picture, or none any more: `is_closed`. `wanted` is set
    by those who want a new picture.
    """

    def __init__(self) -> None:
        self.picture = Picture()
        self.changed = asyncio.Event()
        self.wanted = asyncio.Event()
        self.is_closed = False

    def of(self, resource: str) -> tuple[Offer, ...]:
        """The devices of one resource."""
        return self.picture.of(resource)

    def publish(self, picture: Picture) -> None:
        """Show another picture to all who wait, unless it is the same."""
        if picture != self.picture:
            self.picture = picture
            former, self.changed = self.changed, asyncio.Event()
            former.set()

    def close(self) -> None:
        """Let every stream end without another list."""
        self.is_closed = True
        self.changed.set()
