"""What the plugin asks of kubelet: to take a resource, and which pods have what."""

import asyncio
import os

import msgspec
from grpclib.client import Channel
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from h2.exceptions import H2Error

from vmplug.errors import HostError
from vmplug.kubernetes.device_plugin_grpc import RegistrationStub
from vmplug.kubernetes.device_plugin_pb2 import DevicePluginOptions, RegisterRequest
from vmplug.kubernetes.picture import Key
from vmplug.kubernetes.pod_resources_grpc import PodResourcesListerStub
from vmplug.kubernetes.pod_resources_pb2 import ListPodResourcesRequest

VERSION = "v1beta1"
OPTIONS = DevicePluginOptions(pre_start_required=True, get_preferred_allocation_available=True)

_TIMEOUT_S = 10.0
"""How long kubelet itself waits for a plugin."""
_FAILURES = (
    GRPCError,
    StreamTerminatedError,
    ProtocolError,
    H2Error,
    OSError,
    asyncio.TimeoutError,
    AttributeError,  # grpclib 0.4.9: the connection was lost before its first use
)

SocketIdentity = tuple[int, int, int]


class PodList(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of kubelet: the pods of each device; `has_any`: it names a pod at all."""

    pods: dict[Key, tuple[str, ...]]
    has_any: bool


def identify_socket(path: str) -> SocketIdentity | None:
    """The socket that has this path now: a kubelet that starts makes a new one. None for none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def socket_made_at(path: str) -> float | None:
    """When the socket was made, in seconds since the epoch; None where there is none."""
    identity = identify_socket(path)
    return identity[2] / 1e9 if identity else None


async def is_served(socket: str) -> bool:
    """Whether a process answers at a socket; a killed one leaves it without."""
    try:
        _, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False
    writer.close()
    return True


async def register(kubelet_socket: str, *, endpoint: str, resource: str) -> None:
    """Register a resource, which kubelet then asks for at `endpoint`. Raises HostError."""
    channel = Channel(path=kubelet_socket)
    request = RegisterRequest(
        version=VERSION, endpoint=endpoint, resource_name=resource, options=OPTIONS
    )
    try:
        await RegistrationStub(channel).Register(request, timeout=_TIMEOUT_S)
    except _FAILURES as error:
        raise HostError(
            f"kubelet does not take the resource {resource}: {_in_words(error)}",
            hint=f"vmplug speaks version {VERSION} of the interface, which Kubernetes has since "
            "1.10; see the log of kubelet",
        ) from error
    finally:
        channel.close()


async def list_pods(socket: str) -> PodList:
    """The devices of all pods. Raises HostError."""
    channel = Channel(path=socket)
    try:
        answer = await PodResourcesListerStub(channel).List(
            ListPodResourcesRequest(), timeout=_TIMEOUT_S
        )
    except _FAILURES as error:
        raise HostError(
            f"kubelet does not say which pods have devices ({socket}): {_in_words(error)}",
            hint="it does since Kubernetes 1.20, in pod-resources/kubelet.sock of its directory",
        ) from error
    finally:
        channel.close()
    found = dict[Key, tuple[str, ...]]()
    for pod in answer.pod_resources:
        for container in pod.containers:
            for devices in container.devices:
                for id_ in devices.device_ids:
                    key = devices.resource_name, id_
                    found[key] = (*found.get(key, ()), f"{pod.namespace}/{pod.name}")
    return PodList(pods=found, has_any=bool(answer.pod_resources))


def _in_words(error: BaseException) -> str:
    match error:
        case GRPCError(message=str(message)):
            return message
        case OSError(strerror=str(why)):
            return why.lower()
        case asyncio.TimeoutError():
            return f"no answer within {_TIMEOUT_S:g} seconds"
        case AttributeError():
            return "it has closed the connection"
        case _:
            return str(error) or type(error).__name__
