"""What the plugin would offer, or offers, and how all of it is taken back."""

import asyncio

import msgspec

from vmplug.errors import HostError
from vmplug.journal.journal import Journal
from vmplug.journal.pod_devices import PodDevice
from vmplug.kubernetes.config import Config
from vmplug.kubernetes.keeper import Keeper, Offer
from vmplug.kubernetes.kubelet import list_pods
from vmplug.kubernetes.plugin import only_one
from vmplug.manager.setup import DEFAULT_SETUP, Setup


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
        keeper.check()
        why = _note_pods(keeper, is_settled=False)
        return Report(
            offers=keeper.look().offers, empty=tuple(keeper.find_empty()), unknown_pods=why
        )


def give_back(config: Config, *, setup: Setup = DEFAULT_SETUP) -> GivenBack:
    """Give back every device that the plugin holds and no pod has, and return all of them.

    What pods have stays, and so does what a process has open. Raises StateError while the plugin
    runs, HostError when kubelet does not say which pods have what, and StoreError.
    """
    with Journal.open(setup.state_dir, host=setup.host) as journal, only_one(journal):
        keeper = Keeper(config, journal, setup.host)
        _note_pods(keeper, is_settled=False)
        keeper.look()
        returned, kept = keeper.give_back_all()
        return GivenBack(returned=tuple(returned), kept=tuple(kept))


def _note_pods(keeper: Keeper, *, is_settled: bool) -> str | None:
    """Ask kubelet once; returns why it did not answer."""
    try:
        answer = asyncio.run(list_pods(keeper.config.pod_resources_socket))
    except HostError as error:
        return error.message
    keeper.note_pods(answer.pods, has_any=answer.has_any, is_settled=is_settled)
    return None
