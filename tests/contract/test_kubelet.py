"""The stand-in kubelet does to a device plugin what the real one does, with the same words."""

import asyncio
import itertools
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from grpclib.exceptions import GRPCError

from tests.contract.small_plugin import HEALTHY, UNHEALTHY, SmallPlugin, list_pods
from tests.support.kubelet import AdmissionError, StandInKubelet, StartError
from tests.support.kubernetes.kubelet import RealKubelet, real_kubelet
from tests.support.kubernetes.node import find_missing

Kubelet = StandInKubelet | RealKubelet

TIMEOUT_S = 300.0
_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def real() -> Iterator[RealKubelet]:
    if missing := find_missing("kubelet"):
        pytest.skip(missing)
    with (
        tempfile.TemporaryDirectory(prefix="k-", dir="/tmp") as directory,
        real_kubelet(Path(directory) / "n") as kubelet,
    ):
        yield kubelet


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.root)])
def kubelet(request: pytest.FixtureRequest) -> Iterator[Kubelet]:
    if request.param == "real":
        yield request.getfixturevalue("real")
        return
    with tempfile.TemporaryDirectory(prefix="k-", dir="/tmp") as directory:
        yield StandInKubelet(Path(directory))


def with_plugin(
    test: Callable[[Kubelet, SmallPlugin], Awaitable[None]],
) -> Callable[[Kubelet], None]:
    """Run a test in a loop, with a kubelet and a plugin that has sent its first list."""

    async def run(kubelet: Kubelet) -> None:
        resource = f"vmplug.test/r{next(_NUMBERS)}"
        async with kubelet, SmallPlugin(kubelet.plugins, resource, "abc") as plugin:
            await kubelet.wait_for(resource, allocatable=3)
            await test(kubelet, plugin)

    def in_loop(kubelet: Kubelet) -> None:
        asyncio.run(asyncio.wait_for(run(kubelet), TIMEOUT_S))

    return in_loop


@with_plugin
async def test_who_registers_is_asked_for_a_list_alone(
    kubelet: Kubelet, plugin: SmallPlugin
) -> None:
    assert plugin.calls == [("ListAndWatch", [])]


@with_plugin
async def test_another_version_is_refused(kubelet: Kubelet, plugin: SmallPlugin) -> None:
    with pytest.raises(GRPCError) as caught:
        await plugin.register(version="v2")
    said = 'requested API version "v2" is not supported by kubelet. '
    assert caught.value.message == said + 'Supported version is ["v1beta1"]'
    assert caught.value.status.name == "UNKNOWN"


@with_plugin
async def test_a_name_that_is_no_extended_resource_is_refused(
    kubelet: Kubelet, plugin: SmallPlugin
) -> None:
    with pytest.raises(GRPCError) as caught:
        await plugin.register(resource="disks")
    assert caught.value.message == 'the ResourceName "disks" is invalid'
    assert caught.value.status.name == "UNKNOWN"


@with_plugin
async def test_a_pod_gets_what_was_answered(kubelet: Kubelet, plugin: SmallPlugin) -> None:
    given = await kubelet.admit("p1", plugin.resource, 2)
    _, allocate, start = plugin.calls
    name, devices = allocate
    assert name == "Allocate"
    assert len(devices) == 2
    assert start == ("PreStartContainer", devices)
    assert given.envs == {"GIVEN": " ".join(devices)}
    assert [node.container_path for node in given.devices] == [f"/dev/of-{d}" for d in devices]


@with_plugin
async def test_a_plugin_that_asks_for_nothing_is_only_asked_to_allocate(
    kubelet: Kubelet, plugin: SmallPlugin
) -> None:
    plugin.options.pre_start_required = False
    await ended(kubelet, plugin)
    await registered_again(kubelet, plugin)
    await kubelet.admit("p1", plugin.resource, 1)
    assert [name for name, _ in plugin.calls] == ["ListAndWatch", "Allocate"]


@with_plugin
async def test_what_the_plugin_prefers_is_chosen(kubelet: Kubelet, plugin: SmallPlugin) -> None:
    plugin.options.get_preferred_allocation_available = True
    plugin.preferred = ["c", "a"]
    await ended(kubelet, plugin)
    await registered_again(kubelet, plugin)
    await kubelet.admit("p1", plugin.resource, 2)
    assert plugin.calls[1:] == [
        ("GetPreferredAllocation", ["a", "b", "c"]),
        ("Allocate", ["a", "c"]),
        ("PreStartContainer", ["a", "c"]),
    ]


@with_plugin
async def test_what_a_pod_has_or_is_unhealthy_is_not_chosen(
    kubelet: Kubelet, plugin: SmallPlugin
) -> None:
    await kubelet.admit("p1", plugin.resource, 1)
    (taken,) = plugin.calls[1][1]
    broken, left = sorted({"a", "b", "c"} - {taken})
    plugin.tell(**{broken: UNHEALTHY})
    await kubelet.wait_for(plugin.resource, allocatable=2)
    with pytest.raises(AdmissionError) as caught:
        await kubelet.admit("p2", plugin.resource, 2)
    assert str(caught.value) == too_few(plugin, requested=2, available=1)
    await kubelet.admit("p3", plugin.resource, 1)
    assert plugin.calls[-2] == ("Allocate", [left])
    plugin.tell(**{broken: HEALTHY})
    await kubelet.wait_for(plugin.resource, allocatable=3)
    await kubelet.admit("p4", plugin.resource, 1)
    assert plugin.calls[-2] == ("Allocate", [broken])


@with_plugin
async def test_the_words_of_a_refusal_are_the_pods(kubelet: Kubelet, plugin: SmallPlugin) -> None:
    plugin.refusals["Allocate"] = "a is used by VM sb1: unplug it"
    with pytest.raises(AdmissionError) as caught:
        await kubelet.admit("p1", plugin.resource, 3)
    assert str(caught.value) == (
        "Pod Allocate failed due to rpc error: code = FailedPrecondition "
        "desc = a is used by VM sb1: unplug it, which is unexpected"
    )
    del plugin.refusals["Allocate"]
    await kubelet.admit("p2", plugin.resource, 3)
    assert [name for name, _ in plugin.calls] == [
        *("ListAndWatch", "Allocate", "Allocate", "PreStartContainer")
    ]


@with_plugin
async def test_a_container_that_is_not_to_start_is_tried_again(
    kubelet: Kubelet, plugin: SmallPlugin
) -> None:
    plugin.refusals["PreStartContainer"] = "a is another device now"
    with pytest.raises(StartError) as caught:
        await kubelet.admit("p1", plugin.resource, 1)
    assert str(caught.value) == (
        "device plugin PreStartContainer rpc failed with err: rpc error: "
        "code = FailedPrecondition desc = a is another device now"
    )
    assert await assigned(kubelet, plugin) == {"p1": plugin.calls[1][1]}
    del plugin.refusals["PreStartContainer"]
    await kubelet.start_container("p1")
    names = [name for name, _ in plugin.calls]
    assert names[:2] == ["ListAndWatch", "Allocate"]
    assert {*names[2:]} == {"PreStartContainer"}


@with_plugin
async def test_a_plugin_that_is_killed_takes_its_devices_along(
    kubelet: Kubelet, plugin: SmallPlugin
) -> None:
    await kubelet.admit("p1", plugin.resource, 1)
    before = await assigned(kubelet, plugin)
    await ended(kubelet, plugin)
    with pytest.raises(AdmissionError) as caught:
        await kubelet.admit("p2", plugin.resource, 1)
    assert str(caught.value) == too_few(plugin, requested=1, available=0)
    assert await assigned(kubelet, plugin) == before
    await registered_again(kubelet, plugin)
    await kubelet.admit("p3", plugin.resource, 2)
    assert not {*plugin.calls[1][1]} & {*before["p1"]}


@with_plugin
async def test_a_kubelet_that_starts_removes_sockets_and_knows_its_pods(
    kubelet: Kubelet, plugin: SmallPlugin
) -> None:
    await kubelet.admit("p1", plugin.resource, 1)
    before = await assigned(kubelet, plugin)
    await kubelet.restart()
    assert not plugin.socket.exists()
    assert kubelet.socket.exists()
    with pytest.raises(AdmissionError) as caught:
        await kubelet.admit("p2", plugin.resource, 1)
    assert str(caught.value) == too_few(plugin, requested=1, available=0)
    await plugin.stop()
    await registered_again(kubelet, plugin)
    assert plugin.calls == [("ListAndWatch", [])]
    assert await assigned(kubelet, plugin) == before
    await kubelet.admit("p3", plugin.resource, 2)
    assert not {*plugin.calls[1][1]} & {*before["p1"]}
    assert "p1" not in kubelet.killed


@with_plugin
async def test_podresources_names_the_devices_of_each_container(
    kubelet: Kubelet, plugin: SmallPlugin
) -> None:
    await kubelet.admit("p1", plugin.resource, 2, container="c1", namespace="n1")
    (pod,) = [pod for pod in await list_pods(kubelet.pod_resources) if name_of(pod.name) == "p1"]
    assert pod.namespace == "n1"
    (container,) = pod.containers
    assert container.name == "c1"
    (given,) = container.devices
    assert (given.resource_name, sorted(given.device_ids)) == (plugin.resource, plugin.calls[1][1])


@with_plugin
async def test_a_pod_that_has_ended_is_named_without_devices(
    kubelet: Kubelet, plugin: SmallPlugin
) -> None:
    await kubelet.admit("p1", plugin.resource, 3)
    kubelet.end("p1")
    assert await assigned(kubelet, plugin) == {}
    assert "p1" in await names_of_pods(kubelet)
    await kubelet.admit("p2", plugin.resource, 1)
    assert await assigned(kubelet, plugin) == {"p2": plugin.calls[-1][1]}


@with_plugin
async def test_nobody_is_told_of_a_pod_that_is_deleted(
    kubelet: Kubelet, plugin: SmallPlugin
) -> None:
    await kubelet.admit("p1", plugin.resource, 3)
    calls = [*plugin.calls]
    kubelet.delete("p1")
    deadline = time.monotonic() + TIMEOUT_S
    while "p1" in await names_of_pods(kubelet):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert plugin.calls == calls
    await kubelet.admit("p2", plugin.resource, 3)


def name_of(pod: str) -> str:
    """Without the node's, which a pod has that no API server has made."""
    return pod.removesuffix("-node1")


def too_few(plugin: SmallPlugin, *, requested: int, available: int) -> str:
    return (
        "Pod Allocate failed due to requested number of devices unavailable for "
        f"{plugin.resource}. Requested: {requested}, Available: {available}, which is unexpected"
    )


async def ended(kubelet: Kubelet, plugin: SmallPlugin) -> None:
    """End the plugin, and wait until kubelet knows it: it may hear of the next one before."""
    await plugin.stop()
    await kubelet.wait_gone(plugin.resource)


async def registered_again(kubelet: Kubelet, plugin: SmallPlugin) -> None:
    """Start a plugin that has ended; only what it is asked from then on is in `calls`."""
    plugin.calls.clear()
    await plugin.start()
    await kubelet.wait_for(plugin.resource, allocatable=len(plugin.health))
    deadline = time.monotonic() + TIMEOUT_S
    while not plugin.calls:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def assigned(kubelet: Kubelet, plugin: SmallPlugin) -> dict[str, list[str]]:
    """The devices of each pod, as podresources says."""
    return {
        name_of(pod.name): sorted(devices.device_ids)
        for pod in await list_pods(kubelet.pod_resources)
        for container in pod.containers
        for devices in container.devices
        if devices.resource_name == plugin.resource
    }


async def names_of_pods(kubelet: Kubelet) -> set[str]:
    return {name_of(pod.name) for pod in await list_pods(kubelet.pod_resources)}
