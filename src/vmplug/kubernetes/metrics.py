"""What a plugin has done and offers, as numbers for Prometheus.

It needs the library `prometheus_client` only where the configuration names an address.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from vmplug.errors import HostError
from vmplug.kubernetes.board import Board
from vmplug.kubernetes.config import Address
from vmplug.kubernetes.health import UnitState
from vmplug.kubernetes.tally import Tally

_TIMEOUT_S = 5.0
"""Prometheus itself waits for 10 seconds."""
_CONNECTIONS_MAX = 16
"""Descriptors are needed for devices: who connects more often is hung up on."""
_BIND_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Kubelet waits 30 seconds for PreStartContainer."""


class Metrics(Tally):
    """A tally that Prometheus can read."""

    def __init__(self, board: Board, resources: Iterable[str]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Devices(board, tuple(resources)))

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"vmplug_{name}", what, labels, registry=self._registry)

        self._allocated = counter("allocations", "Devices that Allocate gave.", "resource")
        self._refused = counter(
            "refusals",
            "Calls of kubelet that were refused, by the finding or error that says why.",
            "resource",
            "code",
        )
        self._reconciled = counter(
            "reconciles", "Times that the pods of kubelet were compared.", "result"
        )
        self._bound = Histogram(
            "vmplug_bind_seconds",
            "Time to bind a device to VFIO, all functions of its group.",
            ("resource",),
            registry=self._registry,
            buckets=_BIND_S,
        )

    def allocated(self, resource: str, count: int) -> None:
        """See `Tally`."""
        self._allocated.labels(resource).inc(count)

    def refused(self, resource: str, code: str) -> None:
        """See `Tally`."""
        self._refused.labels(resource, code).inc()

    def reconciled(self, result: str) -> None:
        """See `Tally`."""
        self._reconciled.labels(result).inc()

    def bound(self, resource: str, took_s: float) -> None:
        """See `Tally`."""
        self._bound.labels(resource).observe(took_s)

    def text(self) -> bytes:
        """All of it, in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Devices(Collector):
    """The devices as kubelet knows them at the time of the question."""

    def __init__(self, board: Board, resources: Iterable[str]) -> None:
        self._board = board
        self._resources = resources

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """See the library."""
        family = GaugeMetricFamily(
            "vmplug_devices", "Devices of a resource.", labels=("resource", "state")
        )
        for resource in self._resources:
            states = [offer.health.state for offer in self._board.of(resource)]
            for state in UnitState:
                family.add_metric((resource, state), states.count(state))
        yield family


@asynccontextmanager
async def serving(metrics: Metrics, address: Address) -> AsyncIterator[None]:
    """Answer HTTP at an address until the end of the `with`. Raises HostError."""
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            if connections <= _CONNECTIONS_MAX:
                async with asyncio.timeout(_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(_reply(head, metrics))
                    await writer.drain()
        except (TimeoutError, EOFError, asyncio.LimitOverrunError, ConnectionError):
            pass  # it is the client's matter
        finally:
            connections -= 1
            writer.close()

    try:
        server = await asyncio.start_server(answer, address.host, address.port)
    except OSError as error:
        raise HostError(
            f"the metrics cannot be served at {address}: {error.strerror}",
            hint="name another address, or a port that is free, as `metrics`",
        ) from error
    try:
        yield
    finally:
        server.close()


def _reply(head: bytes, metrics: Metrics) -> bytes:
    path = head.split(b" ", 2)[1:2]
    found = head.startswith(b"GET ") and path[0].partition(b"?")[0] == b"/metrics"
    status, kind = ("200 OK", CONTENT_TYPE_LATEST) if found else ("404 Not Found", "text/plain")
    body = metrics.text() if found else b"only GET /metrics is here\n"
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body
