"""How long an event loop stands still while vmplug serves many VMs for it."""

import asyncio
import gc
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.timing import Ratio, of_pairs, rounds, scaled
from vmplug import DeviceInfo, DevType, FakeHypervisor, HostRoot
from vmplug.aio import AsyncDeviceManager

_VMS = scaled(100)
_MOST_S = 0.010
_TICK_S = 0.001


def rows() -> Iterator[Ratio]:
    """The longest time by which a turn of the loop was late, in each round."""
    with TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as directory:
        infos = [_disk(Path(directory), number) for number in range(_VMS)]
        gc.disable()  # as for every row: how long it takes is the whole program's
        try:
            pairs = [(asyncio.run(_round(directory, n, infos)), _MOST_S) for n in rounds(5)]
        finally:
            gc.enable()
    yield of_pairs("the longest that a loop with 100 VMs stood still / 10 ms", pairs, target=1.0)


def _disk(directory: Path, number: int) -> DeviceInfo:
    image = directory / f"{number}.img"
    image.touch()
    os.truncate(image, 1 << 20)
    return DeviceInfo(container_path="/dev/a", dev_type=DevType.BLOCK, host_path=str(image))


async def _round(directory: str, number: int, infos: list[DeviceInfo]) -> float:
    """Attach and detach a disk in each VM, all at once; returns the longest time."""
    gaps = list[float]()
    clock = asyncio.create_task(_watch_clock(gaps))
    machines = [FakeHypervisor() for _ in infos]
    with TemporaryDirectory(dir=directory) as state_dir:

        async def live(index: int) -> None:
            async with await AsyncDeviceManager.open(
                vm=f"vm{number}-{index}",
                host=HostRoot("/"),
                hypervisor=machines[index],
                state_dir=state_dir,
            ) as devices:
                held = await devices.attach(infos[index])
                assert len(machines[index].find_drivers()) == 1
                await devices.detach(held.id)
                assert await devices.attachments() == []

        gaps.clear()
        await asyncio.gather(*map(live, range(len(infos))))
        longest_s = max(gaps)
    clock.cancel()
    with suppress(asyncio.CancelledError):
        await clock
    return longest_s


async def _watch_clock(gaps: list[float]) -> None:
    """Note by how much each turn is late.

    Only as far as this process computed meanwhile: the rest is time that the machine gave to other
    processes.
    """
    while True:
        before_s, used_s = time.perf_counter(), time.process_time()
        await asyncio.sleep(_TICK_S)
        late_s = time.perf_counter() - before_s - _TICK_S
        gaps.append(min(late_s, time.process_time() - used_s))
