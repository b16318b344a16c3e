"""What the plugin would offer, or offers, and how all of it is taken back."""

import asyncio
import time

import msgspec

from vmplug.errors import HostError
from vmplug.journal.journal import Journal
from vmplug.journal.pod_devices import PodDevice
from vmplug.kubernetes.config import Config
from vmplug.kubernetes.keeper import LISTS_TO_FREE, Keeper
from vmplug.kubernetes.kubelet import list_pods, socket_made_at
from vmplug.kubernetes.picture import Offer
from vmplug.kubernetes.plugin import only_one
from vmplug.manager.setup import DEFAULT_SETUP, Setup

_BETWEEN_LISTS_S = 1.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All devices of all resources; `empty` are the resources without any.

    `unknown_pods` is why kubelet did not say which pods have what; None if it did.
    """

    offers: tuple[Offer, ...]
    empty: tuple[str, ...]
    unknown_pods: str | None = None


class GivenBack(msgspec.Struct, frozen=True, kw_only=True):
    """The devices that were given back, and those that stay, as pods or processes have them."""

    returned: tuple[PodDevice, ...]
    kept: tuple[PodDevice, ...]


def report(config: Config, *, setup: Setup = DEFAULT_SETUP) -> Report:
    """Return every device that the configuration selects, and its state. Nothing is changed.

    Raises PolicyError for a device that is selected twice, AttributeReadError, StoreError.
    """
    with Journal.open_existing(setup.state_dir, host=setup.host) as journal:
        keeper = Keeper(config, journal, setup.host)
        why = _note_pods(keeper, is_settled=False)
        offers = keeper.check(may_claim=True).offers
    found = {offer.resource for offer in offers}
    empty = tuple(each.name for each in config.resources if each.name not in found)
    return Report(offers=offers, empty=empty, unknown_pods=why)


def give_back(config: Config, *, setup: Setup = DEFAULT_SETUP) -> GivenBack:
    """Give back every device that the plugin holds and no pod has, and return all of them.

    What pods have stays, and so does what a process has open; without an answer of kubelet also
    all that pods were given. Raises StateError while the plugin runs, and StoreError.
    """
    with Journal.open(setup.state_dir, host=setup.host) as journal, only_one(journal):
        keeper = Keeper(config, journal, setup.host)
        for number in range(LISTS_TO_FREE):
            time.sleep(_BETWEEN_LISTS_S if number else 0)
            _note_pods(keeper, is_settled=_is_settled(config))
        keeper.look()
        returned, kept = keeper.give_back_all()
        return GivenBack(returned=tuple(returned), kept=tuple(kept))


def _is_settled(config: Config) -> bool:
    """Whether kubelet has run for a whole period: without a plugin, its socket says since when."""
    made_at_s = socket_made_at(config.pod_resources_socket)
    return made_at_s is not None and time.time() - made_at_s >= config.reconcile_s


def _note_pods(keeper: Keeper, *, is_settled: bool) -> str | None:
    """Ask kubelet once; returns why it did not answer."""
    try:
        answer = asyncio.run(list_pods(keeper.config.pod_resources_socket))
    except HostError as error:
        return error.message
    keeper.note_pods(answer.pods, has_any=answer.has_any, is_settled=is_settled)
    return None
