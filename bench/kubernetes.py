"""The device plugin on a host with 1 000 devices: its first list, and an Allocate."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.kubelet import StandInKubelet
from tests.unit.kubernetes.world import NICS, Node

from bench.timing import Ratio, compare, scaled
from vmplug.kubernetes.device_plugin_pb2 import DevicePluginOptions, Empty


def rows() -> Iterator[Ratio]:
    """Each against an empty call of the same plugin."""
    with (
        TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as name,
        asyncio.Runner() as loop,
    ):
        node = Node(Path(name))
        count = scaled(1000)
        for number in range(count):
            bdf = f"0001:{number // 32 + 64:02x}:{number % 32:02x}.0"
            node.function(bdf, 1000 + number, numa_node=number % 2)
        yield from _measure(node, count, loop)
        node.close()


def _measure(node: Node, count: int, loop: asyncio.Runner) -> Iterator[Ratio]:
    kubelet = StandInKubelet(node.kubelet_directory)
    running = node.plugin(node.config(reconcile_s=3600))
    loop.run(kubelet.start())
    plugin = loop.run(running.__aenter__())
    loop.run(kubelet.wait_for(NICS))
    stub = kubelet.endpoints[NICS].stub

    async def ask() -> DevicePluginOptions:
        return await stub.GetDevicePluginOptions(Empty())

    yield compare(
        f"an Allocate of one of {count} devices / an empty call",
        lambda: loop.run(kubelet.allocate(NICS, ["1001"])),
        lambda: loop.run(ask()),
        lambda answer, options: len(answer.devices) == 2 and options.pre_start_required,
        target=60.0,
        size=(31, 1),
    )
    yield compare(
        f"the first list of {count} devices, with all checks / an empty call",
        plugin.keeper.check,
        lambda: loop.run(ask()),
        lambda picture, options: len(picture.offers) > count and options.pre_start_required,
        target=2500.0,
        size=(7, 1),
    )
    loop.run(running.__aexit__(None, None, None))
    loop.run(kubelet.stop())
