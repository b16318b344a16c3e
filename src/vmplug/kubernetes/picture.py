"""What kubelet is to know: every device of every resource at one time."""

from collections.abc import Collection, Mapping

import msgspec

from vmplug.kubernetes.health import Health
from vmplug.kubernetes.units import Unit

Key = tuple[str, str]
"""A resource, and the ID of a device."""
PodNames = Mapping[Key, Collection[str]]
"""The pods that kubelet says have a device."""


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One device as kubelet is to know it; `unit` is None for one that has gone."""

    resource: str
    id: str
    health: Health
    unit: Unit | None = None
    pods: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """Its resource and its ID."""
        return self.resource, self.id


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """All devices of all resources at one time; `clash` is one that is selected twice, if any."""

    offers: tuple[Offer, ...] = ()
    clash: str | None = None

    def of(self, resource: str) -> tuple[Offer, ...]:
        """Those of one resource."""
        return tuple(offer for offer in self.offers if offer.resource == resource)
