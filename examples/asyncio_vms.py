"""A service with several VMs: asyncio_vms.py DISK_DIRECTORY STATE_DIR VM..."""

import asyncio
import sys
from pathlib import Path

import vmplug
from vmplug import aio

directory, state_dir, *names = sys.argv[1:]
Path(state_dir).mkdir(mode=0o700, exist_ok=True)
setup = vmplug.Setup(state_dir=state_dir)


async def serve(name: str) -> None:
    """One VM: start it, plug a disk of its own, take it out again, stop it."""
    disk = vmplug.DeviceInfo(
        container_path="/dev/xvda",
        dev_type=vmplug.DevType.BLOCK,
        host_path=str(Path(directory, f"{name}.img")),
    )
    await aio.start_vm(vmplug.VmSpec(name=name, accel="tcg", memory_mib=64), setup=setup)
    try:
        async with await aio.connect_vm(name, setup=setup) as devices:
            held = await devices.attach(disk, owner=name)
            print(name, "has its disk at PCI", held.guest_address)
            try:
                async with asyncio.timeout(1):
                    await devices.detach(held.id)
            except TimeoutError:  # this guest has no system that would answer
                (left,) = await devices.attachments()
                print(name, "is", left.state)
    finally:
        await aio.stop_vm(name, timeout_s=0, setup=setup)


async def report() -> None:
    """Print what happens to the devices of all VMs, until it is cancelled."""
    async with aio.watch(setup=setup) as events:
        async for event in events:
            print(event.message)


async def main() -> None:
    """Serve all of them at once."""
    async with asyncio.TaskGroup() as group:
        reporting = group.create_task(report())
        await asyncio.wait([group.create_task(serve(name)) for name in names])
        reporting.cancel()
    print("left:", len(await aio.list_vms(setup=setup)), "VMs")


asyncio.run(main())
