"""The smallest device plugin: its devices are names, and what it was asked is a list."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream

from vmplug.kubernetes import device_plugin_pb2 as api
from vmplug.kubernetes import pod_resources_pb2 as pods_api
from vmplug.kubernetes.device_plugin_grpc import DevicePluginBase, RegistrationStub
from vmplug.kubernetes.pod_resources_grpc import PodResourcesListerStub

HEALTHY, UNHEALTHY = "Healthy", "Unhealthy"
Message = TypeVar("Message")


class SmallPlugin(DevicePluginBase):
    """One of a kubelet whose plugins are in `directory`. Entered, it is served and registered.

    `health` are its devices; `tell` sends them. `refusals` are the texts with which it refuses
    calls, by their names. `preferred` is what it answers to GetPreferredAllocation, if anything.
    """

    def __init__(self, directory: Path, resource: str, devices: str) -> None:
        self.directory = directory
        self.resource = resource
        self.socket = directory / f"{resource.replace('/', '-')}.sock"
        self.health = dict.fromkeys(devices, HEALTHY)
        self.options = api.DevicePluginOptions(pre_start_required=True)
        self.preferred: Sequence[str] = ()
        self.refusals: dict[str, str] = {}
        self.calls: list[tuple[str, list[str]]] = []
        self._server = Server([self])
        self._changed = asyncio.Event()
        self._connections: list[asyncio.WriteTransport] = []

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Serve, then register."""
        self._server = Server([self])
        self.socket.unlink(missing_ok=True)
        await self._server.start(path=str(self.socket))
        await self.register()

    async def stop(self) -> None:
        """End as a process that is killed: without a word, and its socket stays."""
        for connection in self._connections:
            connection.abort()
        self._connections.clear()
        self._server.close()
        await self._server.wait_closed()

    async def register(self, version: str = "v1beta1", resource: str | None = None) -> None:
        """Register. Raises GRPCError."""
        request = api.RegisterRequest(
            version=version,
            endpoint=self.socket.name,
            resource_name=self.resource if resource is None else resource,
            options=self.options,
        )
        async with connected(self.directory / "kubelet.sock") as channel:
            await RegistrationStub(channel).Register(request, timeout=60)

    def tell(self, **health: str) -> None:
        """Send the list, of which some devices have changed."""
        self.health |= health
        self._changed.set()

    async def GetDevicePluginOptions(
        self, stream: Stream[api.Empty, api.DevicePluginOptions]
    ) -> None:
        await self._note(stream, "GetDevicePluginOptions")
        await stream.send_message(self.options)

    async def ListAndWatch(self, stream: Stream[api.Empty, api.ListAndWatchResponse]) -> None:
        self._connections.append(stream.peer._transport)
        await self._note(stream, "ListAndWatch")
        while True:
            self._changed.clear()
            devices = [api.Device(ID=name, health=health) for name, health in self.health.items()]
            await stream.send_message(api.ListAndWatchResponse(devices=devices))
            await self._changed.wait()

    async def GetPreferredAllocation(
        self, stream: Stream[api.PreferredAllocationRequest, api.PreferredAllocationResponse]
    ) -> None:
        request = await self._receive(stream)
        (asked,) = request.container_requests
        self._record("GetPreferredAllocation", [*asked.available_deviceIDs])
        answer = api.ContainerPreferredAllocationResponse(
            deviceIDs=self.preferred[: asked.allocation_size]
        )
        await stream.send_message(api.PreferredAllocationResponse(container_responses=[answer]))

    async def Allocate(self, stream: Stream[api.AllocateRequest, api.AllocateResponse]) -> None:
        request = await self._receive(stream)
        (asked,) = request.container_requests
        names = sorted(asked.devicesIDs)
        self._record("Allocate", names)
        nodes = [
            api.DeviceSpec(
                container_path=f"/dev/of-{name}", host_path="/dev/null", permissions="r"
            )
            for name in names
        ]
        answer = api.ContainerAllocateResponse(envs={"GIVEN": " ".join(names)}, devices=nodes)
        await stream.send_message(api.AllocateResponse(container_responses=[answer]))

    async def PreStartContainer(
        self, stream: Stream[api.PreStartContainerRequest, api.PreStartContainerResponse]
    ) -> None:
        request = await self._receive(stream)
        self._record("PreStartContainer", [*request.devicesIDs])
        await stream.send_message(api.PreStartContainerResponse())

    async def _note(self, stream: Stream[api.Empty, Any], name: str) -> None:
        await self._receive(stream)
        self._record(name, [])

    async def _receive(self, stream: Stream[Message, Any]) -> Message:
        request = await stream.recv_message()
        assert request is not None
        return request

    def _record(self, name: str, devices: list[str]) -> None:
        self.calls.append((name, sorted(devices)))
        if name in self.refusals:
            raise GRPCError(Status.FAILED_PRECONDITION, self.refusals[name])


@asynccontextmanager
async def connected(socket: Path) -> AsyncIterator[Channel]:
    """A connection to one of kubelet's sockets."""
    async with Channel(path=str(socket)) as channel:
        yield channel


async def list_pods(socket: Path) -> list[pods_api.PodResources]:
    """What podresources says."""
    async with connected(socket) as channel:
        request = pods_api.ListPodResourcesRequest()
        answer = await PodResourcesListerStub(channel).List(request, timeout=60)
    return [*answer.pod_resources]
