"""A kubelet as far as a device plugin sees it: both sockets, admission, restart, its checkpoint.

It does what the real one does (Kubernetes 1.20, pkg/kubelet/cm/devicemanager), in the event loop
of the test.
"""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import msgspec
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.server import Server, Stream

from vmplug.kubernetes import device_plugin_pb2 as plugin_api
from vmplug.kubernetes import pod_resources_pb2 as pods_api
from vmplug.kubernetes.device_plugin_grpc import DevicePluginStub, RegistrationBase
from vmplug.kubernetes.pod_resources_grpc import PodResourcesListerBase

VERSION = "v1beta1"
_WAIT_S = 60.0
_DIAL_S = 10.0
SETTLE_S = 0.1
"""After it both ends of a connection, which are in one loop, have closed it."""
_PRE_START_S = 30.0


class AdmissionError(Exception):
    """The status of the Pod: kubelet gave it no devices."""


class StartError(Exception):
    """The Pod has its devices, and its container could not be started: kubelet tries again."""


class Assignment(msgspec.Struct, kw_only=True):
    """What one container of a pod has of one resource: what the checkpoint keeps."""

    pod: str
    namespace: str
    container: str
    resource: str
    ids: tuple[str, ...]
    response: plugin_api.ContainerAllocateResponse
    has_ended: bool = False


class PluginEndpoint:
    """One registered resource: its stream, and the list that arrived last."""

    def __init__(self, request: plugin_api.RegisterRequest, socket: Path) -> None:
        self.resource = request.resource_name
        self.options = request.options
        self.socket = socket
        self.lists: list[list[plugin_api.Device]] = []
        self.is_open = False
        self.channel = Channel(path=str(socket))
        self.stub = DevicePluginStub(self.channel)
        self.task: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> set[str]:
        """Those of the last list; none when the plugin is gone."""
        last = self.lists[-1] if self.is_open and self.lists else []
        return {device.ID for device in last if device.health == "Healthy"}

    def stop(self) -> None:
        if self.task:
            self.task.cancel()
        self.channel.close()


class StandInKubelet:
    """`directory` is its /var/lib/kubelet.

    `supported` is the version that it knows. `list_error` makes List fail, `forgets` makes it
    empty, as that of a kubelet which has just started; `names_ended` leaves their devices to
    pods that have ended, which 1.20 does not. `calls` are what it was asked and what it
    asked, in order.
    """

    def __init__(self, directory: Path, *, supported: str = VERSION) -> None:
        self.directory = directory
        self.plugins = directory / "device-plugins"
        self.socket = self.plugins / "kubelet.sock"
        self.pod_resources = directory / "pod-resources" / "kubelet.sock"
        self.supported = supported
        self.endpoints: dict[str, PluginEndpoint] = {}
        self.known: set[str] = set()
        self.assignments: list[Assignment] = []
        self.killed: dict[str, str] = {}
        self.calls: list[str] = []
        self.list_error: Status | None = None
        self.forgets = False
        self.names_ended = False
        self.other_pods = ["kube-proxy"]
        self.ended_pods: list[tuple[str, str]] = []
        self._to_admit_again: set[str] = set()
        self._servers: list[Server] = []
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Empty device-plugins/ and make the sockets, as kubelet does when it starts."""
        for path in (self.plugins, self.pod_resources.parent):
            path.mkdir(parents=True, exist_ok=True)
        for left in self.plugins.iterdir():
            left.unlink()
        self.pod_resources.unlink(missing_ok=True)
        for path, service in (
            (self.pod_resources, _PodResources(self)),
            (self.socket, _Registration(self)),
        ):
            server = Server([service])
            await server.start(path=str(path))
            self._servers.append(server)

    async def stop(self) -> None:
        """End it: the streams are closed; what it had assigned is in its checkpoint."""
        for server in self._servers:
            server.close()
            await server.wait_closed()
        self._servers.clear()
        for endpoint in self.endpoints.values():
            endpoint.stop()
        self.endpoints.clear()
        for socket in (self.socket, self.pod_resources):
            socket.unlink(missing_ok=True)
        await asyncio.sleep(SETTLE_S)

    async def restart(self) -> None:
        """Stop and start: the first list of a resource must have what its running pods have."""
        await self.stop()
        self._to_admit_again = {one.resource for one in self.assignments if not one.has_ended}
        await self.start()

    # what the plugin asks of it

    def register(self, request: plugin_api.RegisterRequest) -> None:
        """Take a resource, and call the plugin back."""
        if request.version != self.supported:
            raise GRPCError(
                Status.UNKNOWN,
                f'requested API version "{request.version}" is not supported by kubelet. '
                f'Supported version is ["{self.supported}"]',
            )
        if "/" not in request.resource_name:
            raise GRPCError(
                Status.UNKNOWN, f'the ResourceName "{request.resource_name}" is invalid'
            )
        self.calls.append(f"Register {request.resource_name}")
        self.known.add(request.resource_name)
        if older := self.endpoints.pop(request.resource_name, None):
            older.stop()
        endpoint = PluginEndpoint(request, self.plugins / request.endpoint)
        self.endpoints[request.resource_name] = endpoint
        endpoint.task = asyncio.create_task(self._watch(endpoint))

    def list_pods(self) -> pods_api.ListPodResourcesResponse:
        """What podresources answers."""
        self.calls.append("List")
        if self.list_error:
            raise GRPCError(self.list_error, "the stand-in was told to fail")
        return self._pod_resources()

    def _pod_resources(self) -> pods_api.ListPodResourcesResponse:
        if self.forgets:
            return pods_api.ListPodResourcesResponse()
        if not self.names_ended:
            self._forget_ended()
        pods = [
            pods_api.PodResources(
                name=name,
                namespace=namespace,
                containers=[pods_api.ContainerResources(name="main")],
            )
            for name, namespace in (
                *((name, "kube-system") for name in self.other_pods),
                *self.ended_pods,
            )
        ]
        for one in self.assignments:
            devices = pods_api.ContainerDevices(resource_name=one.resource, device_ids=one.ids)
            container = pods_api.ContainerResources(name=one.container, devices=[devices])
            pods.append(
                pods_api.PodResources(
                    name=one.pod, namespace=one.namespace, containers=[container]
                )
            )
        return pods_api.ListPodResourcesResponse(pod_resources=pods)

    async def _watch(self, endpoint: PluginEndpoint) -> None:
        """Read the stream until it ends: then all devices of the resource are unhealthy."""
        try:
            async with endpoint.stub.ListAndWatch.open(timeout=None) as stream:
                await asyncio.wait_for(stream.send_message(plugin_api.Empty(), end=True), _DIAL_S)
                endpoint.is_open = True
                async for message in stream:
                    endpoint.lists.append(list(message.devices))
                    self._admit_again(endpoint)
                    await self._tell()
        except (GRPCError, StreamTerminatedError, OSError):
            pass
        finally:
            endpoint.is_open = False
            endpoint.channel.close()
        await self._tell()

    def _admit_again(self, endpoint: PluginEndpoint) -> None:
        """Kill the pods whose devices are not in the first list after a restart."""
        if endpoint.resource not in self._to_admit_again:
            return
        self._to_admit_again.discard(endpoint.resource)
        for one in list(self.assignments):
            lost = set(one.ids) - endpoint.healthy
            if one.resource == endpoint.resource and lost and not one.has_ended:
                self.killed[one.pod] = (
                    f"Pod Allocate failed due to no healthy devices present; cannot allocate "
                    f"unhealthy devices {one.resource}, which is unexpected"
                )
                self.assignments.remove(one)

    # what a test does with it

    async def admit(
        self,
        pod: str,
        resource: str,
        count: int,
        *,
        container: str = "main",
        namespace: str = "default",
        must_include: Iterable[str] = (),
        start: bool = True,
    ) -> plugin_api.ContainerAllocateResponse:
        """Give a pod devices and, with `start`, start its container.

        GetPreferredAllocation, Allocate, and after it PreStartContainer, as the resource asks for.
        """
        self._forget_ended()
        endpoint = self.endpoints.get(resource)
        healthy = endpoint.healthy if endpoint else set()
        free = sorted(healthy - self.in_use(resource))
        if endpoint is None or len(free) < count:
            assert resource in self.known, f"{resource} was never registered"
            raise AdmissionError(
                f"Pod Allocate failed due to requested number of devices unavailable for "
                f"{resource}. Requested: {count}, Available: {len(free)}, which is unexpected"
            )
        ids = await self._choose(endpoint, free, list(must_include), count)
        response = await self.allocate(resource, ids)
        self.assignments.append(
            Assignment(
                pod=pod,
                namespace=namespace,
                container=container,
                resource=resource,
                ids=tuple(ids),
                response=response,
            )
        )
        if start:
            await self.start_container(pod)
        return response

    async def _choose(
        self, endpoint: PluginEndpoint, free: list[str], must_include: list[str], count: int
    ) -> list[str]:
        """What the plugin prefers, if it answers with free devices; else the first ones."""
        if endpoint.options.get_preferred_allocation_available:
            self.calls.append(f"GetPreferredAllocation {endpoint.resource}")
            answer = await endpoint.stub.GetPreferredAllocation(
                plugin_api.PreferredAllocationRequest(
                    container_requests=[
                        plugin_api.ContainerPreferredAllocationRequest(
                            available_deviceIDs=free,
                            must_include_deviceIDs=must_include,
                            allocation_size=count,
                        )
                    ]
                )
            )
            if answer.container_responses:
                wanted = [i for i in answer.container_responses[0].deviceIDs if i in free]
                rest = [one for one in free if one not in wanted]
                return [*wanted, *rest][:count]
        rest = [one for one in free if one not in must_include]
        return [*must_include, *rest][:count]

    async def allocate(
        self, resource: str, ids: Iterable[str]
    ) -> plugin_api.ContainerAllocateResponse:
        """Allocate without a pod. Raises AdmissionError with the words of the status."""
        self.calls.append(f"Allocate {resource}")
        request = plugin_api.ContainerAllocateRequest(devicesIDs=ids)
        try:
            answer = await self.endpoints[resource].stub.Allocate(
                plugin_api.AllocateRequest(container_requests=[request])
            )
        except (GRPCError, StreamTerminatedError, OSError) as error:
            raise AdmissionError(
                f"Pod Allocate failed due to {_in_words(error)}, which is unexpected"
            ) from error
        return answer.container_responses[0]

    async def start_container(self, pod: str) -> None:
        """PreStartContainer for all that the pod has. Raises StartError."""
        for one in [one for one in self.assignments if one.pod == pod]:
            endpoint = self.endpoints[one.resource]
            if not endpoint.options.pre_start_required:
                continue
            self.calls.append(f"PreStartContainer {one.resource}")
            request = plugin_api.PreStartContainerRequest(devicesIDs=one.ids)
            try:
                await endpoint.stub.PreStartContainer(request, timeout=_PRE_START_S)
            except (GRPCError, StreamTerminatedError, OSError) as error:
                raise StartError(
                    f"device plugin PreStartContainer rpc failed with err: {_in_words(error)}"
                ) from error

    def delete(self, pod: str) -> None:
        """Delete a pod: nothing tells the plugin."""
        self.ended_pods = [(name, space) for name, space in self.ended_pods if name != pod]
        self.assignments = [one for one in self.assignments if one.pod != pod]

    def end(self, pod: str) -> None:
        """Let a pod end: its devices are free for others.

        List names the pod until it is deleted, without devices.
        """
        for one in self.assignments:
            one.has_ended |= one.pod == pod

    def _forget_ended(self) -> None:
        """Take the devices of pods that have ended."""
        ended = [one for one in self.assignments if one.has_ended]
        self.ended_pods += dict.fromkeys((one.pod, one.namespace) for one in ended)
        self.assignments = [one for one in self.assignments if not one.has_ended]

    def in_use(self, resource: str) -> set[str]:
        """The devices that it has assigned to pods that have not ended."""
        running = (a for a in self.assignments if a.resource == resource and not a.has_ended)
        return {one for assignment in running for one in assignment.ids}

    def allocatable(self, resource: str) -> int:
        """What node.status.allocatable says: the healthy devices, whoever has them."""
        endpoint = self.endpoints.get(resource)
        return len(endpoint.healthy) if endpoint else 0

    def devices(self, resource: str) -> dict[str, str]:
        """The health of each device of the last list."""
        return {device.ID: device.health for device in self.endpoints[resource].lists[-1]}

    def pods(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """The devices of each pod, by resource."""
        found: dict[str, dict[str, tuple[str, ...]]] = {}
        for one in self.assignments:
            of_pod = found.setdefault(one.pod, {})
            of_pod[one.resource] = (*of_pod.get(one.resource, ()), *one.ids)
        return found

    async def wait_for(self, resource: str, *, allocatable: int | None = None) -> None:
        """Wait until a resource is registered and has sent a list, of so many healthy devices."""

        def is_there() -> bool:
            endpoint = self.endpoints.get(resource)
            return bool(
                endpoint
                and endpoint.is_open
                and endpoint.lists
                and allocatable in {None, len(endpoint.healthy)}
            )

        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(is_there), _WAIT_S)

    async def wait_gone(self, resource: str) -> None:
        """Wait until the stream of a resource is closed."""
        async with self._changed:
            await asyncio.wait_for(
                self._changed.wait_for(lambda: not self.endpoints[resource].is_open), _WAIT_S
            )

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class _Registration(RegistrationBase):
    def __init__(self, kubelet: StandInKubelet) -> None:
        self._kubelet = kubelet

    async def Register(self, stream: Stream[plugin_api.RegisterRequest, plugin_api.Empty]) -> None:
        request = await stream.recv_message()
        assert request
        self._kubelet.register(request)
        await stream.send_message(plugin_api.Empty())


class _PodResources(PodResourcesListerBase):
    def __init__(self, kubelet: StandInKubelet) -> None:
        self._kubelet = kubelet

    async def List(
        self, stream: Stream[pods_api.ListPodResourcesRequest, pods_api.ListPodResourcesResponse]
    ) -> None:
        await stream.recv_message()
        await stream.send_message(self._kubelet.list_pods())


def _in_words(error: GRPCError | StreamTerminatedError | OSError) -> str:
    """As Go's gRPC prints it: `rpc error: code = FailedPrecondition desc = ...`."""
    if isinstance(error, GRPCError):
        name = "".join(part.capitalize() for part in error.status.name.split("_"))
        return f"rpc error: code = {name} desc = {error.message}"
    return f"rpc error: code = Unavailable desc = {error}"
