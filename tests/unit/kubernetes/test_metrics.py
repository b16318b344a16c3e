"""What Prometheus reads of the plugin, over its real socket."""

import asyncio
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.kubelet import AdmissionError, StandInKubelet
from tests.unit.kubernetes.world import (
    GPUS,
    MANAGED_LINES,
    NIC_LINES,
    NICS,
    Node,
    until,
)
from vmplug.errors import HostError
from vmplug.kubernetes.plugin import Plugin, counting
from vmplug.kubernetes.tally import Tally

Samples = dict[str, float]
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n"


def metrics_lines(port: int) -> str:
    return f'metrics = "127.0.0.1:{port}"\n{NIC_LINES}{MANAGED_LINES}'


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


async def ask(port: int, request: bytes = REQUEST) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = (await reader.read()).decode()
    writer.close()
    return answer


async def scrape(port: int) -> Samples:
    head, _, text = (await ask(port)).partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK")
    assert f"Content-Length: {len(text)}" in head
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape_until(port: int, name: str) -> Samples:
    """All of it, once that is more than 0."""
    async with asyncio.timeout(60):
        while not (found := await scrape(port)).get(name):  # noqa: ASYNC110  as Prometheus does
            await asyncio.sleep(0.02)
    return found


def test_what_is_offered_done_and_refused_is_counted(node: Node, port: int) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        async with counting(plugin):
            await kubelet.wait_for(NICS, allocatable=2)
            await kubelet.wait_for(GPUS, allocatable=1)
            found = await scrape(port)
            assert found[f"vmplug_devices {NICS} free"] == 2
            assert found[f"vmplug_devices {NICS} used"] == 0
            assert found[f"vmplug_devices {GPUS} bindable"] == 1
            await kubelet.admit("pod1", NICS, 1)
            await kubelet.admit("pod2", GPUS, 1)
            node.open("/dev/vfio/28", name="dpdk")
            for id_ in ("28", "99"):
                with pytest.raises(AdmissionError):
                    await kubelet.allocate(NICS, [id_])
            await scrape_until(port, f"vmplug_devices {NICS} assigned")
            await scrape_until(port, "vmplug_reconciles_total done")
            found = await scrape_until(port, f"vmplug_devices {NICS} used")
            assert found[f"vmplug_devices {GPUS} assigned"] == 1
            assert found[f"vmplug_allocations_total {NICS}"] == 1
            assert found[f"vmplug_refusals_total open-by-process {NICS}"] == 1
            assert found[f"vmplug_refusals_total no-such-device {NICS}"] == 1
            assert found[f"vmplug_bind_seconds_count {GPUS}"] == 1
            assert 0 < found[f"vmplug_bind_seconds_sum {GPUS}"] < 60
            assert f"vmplug_bind_seconds_count {NICS}" not in found

    node.run(scenario, metrics_lines(port))


def test_a_kubelet_that_does_not_answer_is_counted(node: Node, port: int) -> None:
    async def play() -> None:
        async with node.plugin(node.config(metrics_lines(port))) as plugin, counting(plugin):
            await scrape_until(port, "vmplug_reconciles_total no-answer")

    asyncio.run(play())


@pytest.mark.parametrize(
    "request_", [b"GET / HTTP/1.1\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n", b"\r\n\r\n"]
)
def test_only_the_metrics_are_there(node: Node, port: int, request_: bytes) -> None:
    async def play() -> None:
        async with node.plugin(node.config(metrics_lines(port))) as plugin, counting(plugin):
            assert (await ask(port, request_)).startswith("HTTP/1.1 404 ")
            assert await scrape(port)

    asyncio.run(play())


def test_clients_that_say_nothing_take_no_more_than_some_connections(
    node: Node, port: int
) -> None:
    async def play() -> None:
        async with node.plugin(node.config(metrics_lines(port))) as plugin, counting(plugin):
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(16)]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b""  # hung up on
            writer.close()
            for _, each in silent:
                each.close()
            answers = list[str]()
            async with asyncio.timeout(60):
                while not answers or not answers[-1]:
                    answers.append(await ask(port))
            assert answers[-1].startswith("HTTP/1.1 200 OK")

    asyncio.run(play())


def test_an_address_that_another_has_is_a_sentence(node: Node, port: int) -> None:
    async def play() -> None:
        async with node.plugin(node.config(metrics_lines(port))) as plugin:
            with pytest.raises(HostError, match="the metrics cannot be served at") as caught:
                async with counting(plugin):
                    pass
            assert "in use" in caught.value.message
            assert "name another address" in str(caught.value.hint)

    with socket.create_server(("127.0.0.1", port)):
        asyncio.run(play())


def test_nothing_listens_unless_the_configuration_says_where(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        async with counting(plugin):
            await until(lambda: bool(kubelet.endpoints))
            assert type(plugin.keeper.tally) is Tally

    node.run(scenario)
