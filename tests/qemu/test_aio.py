"""Eight real VMs in one event loop."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

import vmplug
from tests.support.disks import disk_image
from vmplug import DeviceInfo, DevType, Setup, VmSpec, aio

pytestmark = [pytest.mark.root, pytest.mark.qemu]

EXAMPLE = Path(__file__).parents[2] / "examples/asyncio_vms.py"
NAMES = [f"vm{number}" for number in range(8)]
NEVER_S, SOON_S = 300.0, 240.0


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    setup = Setup(state_dir=tmp_path / "state")
    (tmp_path / "state").mkdir(mode=0o700)
    yield setup
    for vm in vmplug.list_vms(setup=setup):
        vmplug.stop_vm(vm.name, timeout_s=0, setup=setup)


def spec(name: str) -> VmSpec:
    """A machine that stands still before its firmware, and so releases nothing."""
    return VmSpec(name=name, accel="tcg", memory_mib=64, extra=("-S",))


def disk(directory: Path, name: str) -> DeviceInfo:
    image = disk_image(directory / f"{name}.img", 1, name)
    return DeviceInfo(container_path="/dev/xvda", dev_type=DevType.BLOCK, host_path=str(image))


def test_eight_vms_live_in_one_loop(setup: Setup, tmp_path: Path) -> None:
    disks = {name: disk(tmp_path, name) for name in NAMES}

    async def live(name: str) -> None:
        started = await aio.start_vm(spec(name), setup=setup)
        async with await aio.connect_vm(name, setup=setup) as devices:
            held = await devices.attach(disks[name], owner=name)
            assert str(held.guest_address).startswith("PCI ")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await devices.detach(held.id, timeout_s=NEVER_S)
            assert [one.state for one in await devices.attachments()] in (
                ["detaching"],
                ["attached"],  # it had not begun yet
            )
        assert started.pid

    async def main() -> None:
        async with asyncio.timeout(SOON_S):
            await asyncio.gather(*map(live, NAMES))
            vms = await aio.list_vms(setup=setup)
            assert sorted(vm.name for vm in vms) == NAMES
            await asyncio.gather(*(aio.stop_vm(n, timeout_s=0, setup=setup) for n in NAMES))
            assert await aio.list_vms(setup=setup) == []

    asyncio.run(main())


def test_a_cancelled_start_is_done_before_the_vm_is_stopped(setup: Setup, tmp_path: Path) -> None:
    """QEMU starts no further than to a pipe that nobody reads until the call is cancelled."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    held = replace(spec("sb1"), extra=("-S", "-chardev", f"file,id=held,path={pipe}"))

    async def main() -> None:
        async with asyncio.timeout(SOON_S):
            task = asyncio.create_task(aio.start_vm(held, setup=setup))
            while not await aio.list_vms(setup=setup):
                pass
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
            stopped = await aio.stop_vm("sb1", timeout_s=0, setup=setup)
            assert (stopped.name, stopped.was_adopted) == ("sb1", False)
            os.close(reading)

    asyncio.run(main())


def test_the_example_runs_as_written(tmp_path: Path) -> None:
    names = NAMES[:2]
    for name in names:
        disk_image(tmp_path / f"{name}.img", 1, name)
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path, tmp_path / "state", *names],
        capture_output=True,
        text=True,
        check=False,
        timeout=SOON_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    # A machine that is slow enough has not begun to detach within a second.
    assert all(
        {f"{name} is {state}" for state in ("detaching", "attached")} & {*lines} for name in names
    )
    assert sum("has its disk at PCI" in line for line in lines) == len(names)
    assert lines[-1] == "left: 0 VMs"
