"""One resource on its socket, registered with whatever kubelet runs."""

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from typing import Any, TypeVar

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream

from vmplug.aio.threads import Threads
from vmplug.errors import DeviceError, HostError, InUse, NoSuchDevice
from vmplug.kubernetes import device_plugin_pb2 as api
from vmplug.kubernetes.answer import describe_allocated, list_devices, prefer
from vmplug.kubernetes.board import Board
from vmplug.kubernetes.config import Resource
from vmplug.kubernetes.device_plugin_grpc import DevicePluginBase
from vmplug.kubernetes.keeper import Keeper
from vmplug.kubernetes.kubelet import (
    OPTIONS,
    SocketIdentity,
    identify_socket,
    is_served,
    register,
)
from vmplug.log import Log
from vmplug.text import join_hint, one_line

log = Log(__name__)

_POLL_S = 0.1
"""How often vmplug checks whether kubelet has a new socket."""
_OPEN_TIMEOUT_S = 10.0
_BACKOFF_S, _BACKOFF_MAX_S = 1.0, 30.0

T = TypeVar("T")


class ResourceService(DevicePluginBase):
    """Answers kubelet for one resource; `open_since` is when a stream began, None without one."""

    def __init__(
        self, resource: Resource, *, board: Board, keeper: Keeper, threads: Threads
    ) -> None:
        self.resource = resource
        self._board = board
        self._keeper = keeper
        self._threads = threads
        self.open_since: float | None = None
        self._streams = 0
        self._opened = asyncio.Event()
        self._logged = ""
        self._own: SocketIdentity | None = None
        digest = sha256(resource.name.encode()).hexdigest()[:12]
        self.endpoint = f"vmplug-{digest}.sock"
        directory = keeper.config.plugin_directory
        self._socket = os.path.join(directory, self.endpoint)
        self._kubelet = os.path.join(directory, "kubelet.sock")

    # what kubelet asks

    async def GetDevicePluginOptions(
        self, stream: Stream[api.Empty, api.DevicePluginOptions]
    ) -> None:
        """See the protocol."""
        await stream.recv_message()
        await stream.send_message(OPTIONS)

    async def ListAndWatch(self, stream: Stream[api.Empty, api.ListAndWatchResponse]) -> None:
        """Send the whole list, and again at each change; no list at the end."""
        await stream.recv_message()
        self._streams += 1
        self.open_since = asyncio.get_running_loop().time()
        self._opened.set()
        sent: list[api.Device] | None = None
        try:
            while not self._board.is_closed:
                changed = self._board.changed
                devices = list_devices(self._board.of(self.resource.name))
                if devices != sent:
                    await stream.send_message(api.ListAndWatchResponse(devices=devices))
                    sent = devices
                await changed.wait()
        finally:
            self._streams -= 1
            if not self._streams:
                self.open_since = None

    async def GetPreferredAllocation(
        self, stream: Stream[api.PreferredAllocationRequest, api.PreferredAllocationResponse]
    ) -> None:
        """Choose among what is free."""
        request = await _receive(stream)
        offers = self._board.of(self.resource.name)
        answers = [
            api.ContainerPreferredAllocationResponse(
                deviceIDs=prefer(
                    offers,
                    set(each.available_deviceIDs),
                    each.must_include_deviceIDs,
                    each.allocation_size,
                )
            )
            for each in request.container_requests
        ]
        await stream.send_message(api.PreferredAllocationResponse(container_responses=answers))

    async def Allocate(self, stream: Stream[api.AllocateRequest, api.AllocateResponse]) -> None:
        """Give devices to containers, all or none."""
        request = await _receive(stream)
        wanted = [list(each.devicesIDs) for each in request.container_requests]
        all_ids = [id_ for ids in wanted for id_ in ids]
        allocate = self._keeper.allocate
        units = await self._do(partial(allocate, self.resource.name, all_ids), all_ids)
        by_id = {unit.id: unit for unit in units}
        answers = [
            describe_allocated(self.resource, [by_id[id_] for id_ in ids]) for ids in wanted
        ]
        await stream.send_message(api.AllocateResponse(container_responses=answers))

    async def PreStartContainer(
        self, stream: Stream[api.PreStartContainerRequest, api.PreStartContainerResponse]
    ) -> None:
        """Make the devices of a container ready."""
        ids = list((await _receive(stream)).devicesIDs)
        await self._do(partial(self._keeper.prepare, self.resource.name, ids), ids)
        await stream.send_message(api.PreStartContainerResponse())

    async def _do(self, work: Callable[[], T], ids: Sequence[str]) -> T:
        """Do it in a thread. GRPCError with the sentence that the Pod's event shows."""
        try:
            done = await self._threads.call(work)
        except DeviceError as error:
            names = one_line(", ".join(ids))
            why = one_line(error.message)
            code = (error.codes if isinstance(error, InUse) else ())[:1] or (error.code,)
            facts = {"resource": self.resource.name, "ids": [*ids], "code": str(code[0])}
            log.warning("refused %s of %s: %s", names, self.resource.name, why, extra=facts)
            self._keeper.tally.refused(self.resource.name, code[0])
            unknown = isinstance(error, NoSuchDevice)
            status = Status.INVALID_ARGUMENT if unknown else Status.FAILED_PRECONDITION
            raise GRPCError(status, why) from None
        self._board.wanted.set()
        return done

    # being there for kubelet

    async def run(self) -> None:
        """Be registered, again whenever kubelet has started or the stream has ended."""
        backoff_s = _BACKOFF_S
        while True:
            await self._until_offered()
            kubelet = await self._until_kubelet()
            server = Server([self])
            try:
                await self._start(server)
                await register(self._kubelet, endpoint=self.endpoint, resource=self.resource.name)
                async with asyncio.timeout(_OPEN_TIMEOUT_S):
                    await self._opened.wait()
                self._log_once(f"kubelet has the resource {self.resource.name}")
                backoff_s = _BACKOFF_S
                await self._until_lost(kubelet)
                self._log_once(f"kubelet has left {self.resource.name}")
            except (DeviceError, OSError, TimeoutError) as error:
                self._log_once(_why(error) or f"kubelet does not ask for {self.resource.name}")
            finally:
                self._stop(server)
            if identify_socket(self._kubelet) == kubelet:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _BACKOFF_MAX_S)

    async def _start(self, server: Server) -> None:
        """Listen, in place of what a killed plugin left. Raises HostError for one that runs."""
        self._opened.clear()
        if await is_served(self._socket):
            raise HostError(
                f"another process offers {self.resource.name} at {self._socket}",
                hint="end it: it has another state directory, so neither knows what the other "
                "gave to pods",
            )
        with suppress(FileNotFoundError):
            os.unlink(self._socket)
        await server.start(path=self._socket)
        os.chmod(self._socket, 0o600)
        self._own = identify_socket(self._socket)

    def _stop(self, server: Server) -> None:
        with suppress(RuntimeError):  # it never listened
            server.close()
        own, self._own = self._own, None
        if own and identify_socket(self._socket) == own:
            with suppress(OSError):
                os.unlink(self._socket)

    async def _until_offered(self) -> None:
        """Wait for the first device: an empty list would end pods that run."""
        while not self._board.of(self.resource.name):
            empty = f"{self.resource.name} selects nothing on this node, so it is not registered"
            self._log_once(f"{empty}; vmplug device-plugin --dry-run shows what is selected")
            await self._board.changed.wait()
            await asyncio.sleep(0)  # once it is closed, too

    async def _until_kubelet(self) -> SocketIdentity:
        """Wait for kubelet: its directory may be mounted later."""
        while (kubelet := identify_socket(self._kubelet)) is None:
            missing = f"waiting for kubelet: there is no {self._kubelet}"
            self._log_once(f"{missing}; start kubelet, or mount its directory here")
            await asyncio.sleep(_POLL_S)
        return kubelet

    async def _until_lost(self, kubelet: SocketIdentity) -> None:
        while self._streams and identify_socket(self._kubelet) == kubelet:
            if identify_socket(self._socket) != self._own:
                return
            await asyncio.sleep(_POLL_S)

    def _log_once(self, what: str) -> None:
        """Log it, unless it is what was logged last."""
        if what != self._logged:
            self._logged = what
            log.info("%s", one_line(what), extra={"resource": self.resource.name})


def _why(error: Exception) -> str:
    if isinstance(error, DeviceError):
        return join_hint(error.message, error.hint)
    return str(error)


async def _receive(stream: Stream[T, Any]) -> T:
    message = await stream.recv_message()
    if message is None:
        raise GRPCError(Status.INVALID_ARGUMENT, "the request is empty")
    return message
