"""Plugin: the process of a node that offers its resources to kubelet."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial

from vmplug.aio.threads import Threads
from vmplug.errors import DeviceError, HostError, StateError, StoreError
from vmplug.host.events import HostEvents
from vmplug.journal.database import alone, is_locked
from vmplug.journal.journal import Journal
from vmplug.kubernetes.board import Board
from vmplug.kubernetes.config import Config, Managed
from vmplug.kubernetes.health import UnitState
from vmplug.kubernetes.keeper import Keeper
from vmplug.kubernetes.kubelet import list_pods
from vmplug.kubernetes.picture import Picture
from vmplug.kubernetes.service import ResourceService
from vmplug.log import Log
from vmplug.manager.setup import Setup
from vmplug.text import join_hint, one_line

log = Log(__name__)

_LOOK_S = 5.0
"""For what the kernel has no event of: a process that opens or closes a device, a CDI file."""
_EVENTS_S = 0.05
"""Events come in bursts: a card has several functions."""
_REST = 3
"""So many times as long as a check of all devices took, the next one waits, whatever happens."""
_LOCK = "device-plugin.lock"


class Plugin:
    """Offers the resources of a configuration; see `serve`."""

    def __init__(self, config: Config, journal: Journal, setup: Setup) -> None:
        self.config = config
        self.keeper = Keeper(config, journal, setup.host)
        self.threads = Threads.of_loop()
        self.board = Board()
        self._services = [
            ResourceService(resource, board=self.board, keeper=self.keeper, threads=self.threads)
            for resource in config.resources
        ]
        self._logged = dict[str, str]()

    async def start(self) -> None:
        """Finish what a crash left, and look at everything once. Raises DeviceError."""
        await self.threads.call(self.keeper.recover)
        await self._note_pods()
        await self._show(await self.threads.call(self.keeper.check))
        if await self._take_in():
            await self._look()

    async def run(self) -> None:
        """Offer the resources, until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for service in self._services:
                tasks.create_task(service.run())
            tasks.create_task(self._keep_looking())
            tasks.create_task(self._keep_asking())

    def stop(self) -> None:
        """Close the streams. No list is sent."""
        self.board.close()

    def look_soon(self) -> None:
        """Look at the devices before the time for it."""
        self.board.wanted.set()

    async def _keep_looking(self) -> None:
        took_s = 0.0
        with _events(self.look_soon) as drain:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self.board.wanted.wait()
                await asyncio.sleep(max(_EVENTS_S, _REST * took_s))
                drain()
                self.board.wanted.clear()
                begun_s = time.monotonic()
                await self._look_again()
                took_s = time.monotonic() - begun_s

    async def _look_again(self) -> None:
        try:
            await self._look()
            self._warn_once("look", "")
        except DeviceError as error:
            self._warn_once("look", f"cannot look at the devices: {error.message}")

    async def _keep_asking(self) -> None:
        while True:
            await asyncio.sleep(self.config.reconcile_s)
            try:
                has_answer = await self._note_pods()
                await self._take_in()
                await self.threads.call(self.keeper.bind_offered)
                self.look_soon()
                self._warn_once("reconcile", "")
                self.keeper.tally.reconciled("done" if has_answer else "no-answer")
            except DeviceError as error:
                self._warn_once("reconcile", f"cannot reconcile: {error.message}")
                self.keeper.tally.reconciled("failed")

    async def _note_pods(self) -> bool:
        """Ask kubelet which pods have what; False if it did not answer."""
        is_settled = self._is_settled()
        try:
            answer = await list_pods(self.config.pod_resources_socket)
        except HostError as error:
            self._warn_once("pods", join_hint(error.message, error.hint))
            return False
        self._warn_once("pods", "")
        await self.threads.call(
            partial(
                self.keeper.note_pods, answer.pods, has_any=answer.has_any, is_settled=is_settled
            )
        )
        return True

    async def _take_in(self) -> bool:
        """Take in what pods have, and give back what none has; True if anything was done."""
        has_adopted = await self.threads.call(self.keeper.adopt)
        return await self.threads.call(self.keeper.give_back_unused) or has_adopted

    def _is_settled(self) -> bool:
        """Whether kubelet has had every resource for a whole period."""
        now = asyncio.get_running_loop().time()
        since = [s.open_since for s in self._services if self.board.of(s.resource.name)]
        return bool(since) and all(
            begun is not None and now - begun >= self.config.reconcile_s for begun in since
        )

    async def _look(self) -> None:
        """Look at everything again."""
        await self._show(await self.threads.call(self.keeper.look))

    async def _show(self, picture: Picture) -> None:
        """Bind what must be bound, write the CDI files, and then let kubelet have the picture."""
        if any(
            offer.unit
            and offer.unit.resource.managed is Managed.START
            and offer.health.state is UnitState.BINDABLE
            for offer in picture.offers
        ) and await self.threads.call(self.keeper.bind_offered):
            picture = await self.threads.call(self.keeper.look)
        try:
            await self.threads.call(self.keeper.write_specs)
            self._warn_once("specs", "")
        except DeviceError as error:
            self._warn_once("specs", join_hint(error.message, error.hint))
        self._log_changes(picture)
        self.board.publish(picture)

    def _log_changes(self, picture: Picture) -> None:
        former = {offer.key: offer.health for offer in self.board.picture.offers}
        for offer in picture.offers:
            if former.get(offer.key) != offer.health:
                name = f"{offer.resource}={offer.id}"
                why = f": {offer.health.reason}" if offer.health.reason else ""
                level = log.info if offer.health.state.is_healthy else log.warning
                facts = {
                    "resource": offer.resource,
                    "ids": [offer.id],
                    "state": str(offer.health.state),
                    "code": offer.health.code and str(offer.health.code),
                }
                level("%s is %s%s", name, offer.health.state, one_line(why), extra=facts)

    def _warn_once(self, about: str, what: str) -> None:
        """Log it, unless it is what was logged last of the same."""
        if what and self._logged.get(about) != what:
            log.warning("%s", one_line(what))
        self._logged[about] = what


@contextmanager
def _events(report: Callable[[], None]) -> Iterator[Callable[[], object]]:
    """Call `report` for each event of the kernel, until they are taken with what this gives."""
    try:
        events = HostEvents()
    except HostError as error:
        log.warning("%s", error.message)
        yield lambda: None
        return
    loop = asyncio.get_running_loop()
    loop.add_reader(events.fileno(), report)
    try:
        yield partial(events.wait, 0)
    finally:
        loop.remove_reader(events.fileno())
        events.close()


async def serve(config: Config, setup: Setup) -> None:
    """Offer the resources until SIGTERM or SIGINT.

    Raises DeviceError for what cannot begin, StateError while another process does it.
    """
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    with Journal.open(setup.state_dir, host=setup.host) as journal, only_one(journal):
        plugin = Plugin(config, journal, setup)
        async with counting(plugin):
            await plugin.start()
            running = asyncio.create_task(plugin.run())
            stopping = asyncio.create_task(stopped.wait())
            await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
            plugin.stop()
            await asyncio.sleep(0)  # the streams end
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


@asynccontextmanager
async def counting(plugin: Plugin) -> AsyncIterator[None]:
    """Let Prometheus ask what the plugin does, where the configuration says so.

    Raises HostError for an address that is not to be had, or without the library.
    """
    address = plugin.config.metrics
    if address is None:
        yield
        return
    try:
        from vmplug.kubernetes.metrics import Metrics, serving  # noqa: PLC0415  110 ms
    except ImportError as error:
        raise HostError(
            f"{plugin.config.name} asks for metrics, and a library for them is not there: {error}",
            hint="pip install 'vmplug[metrics]', or remove `metrics` from the configuration",
        ) from error
    names = [resource.name for resource in plugin.config.resources]
    plugin.keeper.tally = metrics = Metrics(plugin.board, names)
    async with serving(metrics, address):
        yield


@contextmanager
def only_one(journal: Journal) -> Iterator[None]:
    """Keep every other process from offering or giving back. Raises StateError."""
    path = os.path.join(os.path.dirname(journal.path), _LOCK)
    with ExitStack() as locked:
        try:
            locked.enter_context(alone(path, 0))
        except StoreError as error:
            if not is_locked(error):
                raise
            raise StateError(
                "a vmplug device-plugin runs on this node already",
                state="running",
                required="stopped",
                hint="end it first: vmplug device-plugin status shows what it offers",
            ) from error
        yield
