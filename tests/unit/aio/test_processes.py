"""A child of fork(2), an interpreter that ends, closed loops, and a hundred VMs in one loop."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.support.disks import disk_image
from tests.unit.aio.test_cancel import NEVER_S, OTHER, RNG, SOON_S, Machine, aio_threads, until
from tests.unit.manager.test_other_threads import in_child
from vmplug import DeviceInfo, DevType, HostRoot, InUse, Setup, aio
from vmplug.aio import AsyncDeviceManager, in_thread
from vmplug.journal.journal import Journal
from vmplug.journal.state import State


def opening(machine: Machine, state_dir: Path, vm: str = "sb1") -> Coroutine[Any, Any, Any]:
    return AsyncDeviceManager.open(
        vm=vm, host=HostRoot("/"), hypervisor=machine, state_dir=state_dir
    )


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_uses_what_its_parent_opened_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    setup = Setup(state_dir=tmp_path)

    async def main() -> None:
        async with await opening(Machine(), tmp_path) as devices, aio.watch(setup=setup) as events:
            await devices.attach(RNG)
            may_end = threading.Event()
            busy = [asyncio.create_task(in_thread(may_end.wait, SOON_S)) for _ in range(3)]
            await asyncio.sleep(0)
            calls = [
                lambda: devices.attach(OTHER),
                devices.attachments,
                devices.reconcile,
                events.__anext__,
                lambda: aio.list_vms(setup=setup),
            ]
            for call in calls:
                told = in_child(lambda call=call: call().send(None))  # type: ignore[misc]
                assert told.startswith(f"StateError: process {os.getpid()} opened this"), told
            for call in calls[:4]:
                told = in_child(lambda call=call: asyncio.run(call()))  # type: ignore[misc]
                assert told.startswith(f"StateError: process {os.getpid()} opened this"), told
            assert in_child(lambda: asyncio.run(aio.list_vms(setup=setup))) == "done"
            assert in_child(lambda: asyncio.run(devices.close())) == "done"
            may_end.set()
            await asyncio.gather(*busy)
            assert len(await devices.attachments()) == 1

    asyncio.run(main())


EXITS = """
import asyncio, sys, threading, vmplug
from vmplug import aio
from vmplug.hypervisor.fake.monitor import Guest

class Machine(vmplug.FakeHypervisor):
    begun = threading.Event()
    def plug(self, *arguments):
        self.begun.set()
        threading.Event().wait(0.3)
        super().plug(*arguments)

async def main():
    machine = Machine()
    devices = await aio.AsyncDeviceManager.open(
        vm="sb1", host=vmplug.HostRoot("/"), hypervisor=machine, state_dir=sys.argv[1])
    if sys.argv[2] == "attach":
        call = devices.attach(vmplug.RngInfo(), owner="ctr1")
    else:
        held = await devices.attach(vmplug.RngInfo())
        machine.monitor.guest = Guest.SILENT
        call = devices.detach(held.id, timeout_s=300)
    task = asyncio.create_task(call)
    await asyncio.to_thread(machine.begun.wait)
    while sys.argv[2] == "detach" and not machine.monitor.devices[machine.drivers()].unplugging:
        await asyncio.sleep(0.01)
    if sys.argv[3] == "cancel":
        task.cancel()

asyncio.run(main())
""".replace(
    "machine.drivers()", '[n for n in machine.monitor.devices if n.startswith("vmplug")][0]'
)


@pytest.mark.parametrize("how", ["cancel", pytest.param("return", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("what", "state"), [("attach", "attached"), ("detach", "detaching")])
def test_an_interpreter_that_ends_leaves_nothing_half(
    tmp_path: Path, what: str, state: str, how: str
) -> None:
    """It waits for the attach, and not for the guest."""
    tmp_path.chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-c", EXITS, str(tmp_path), what, how],
        capture_output=True,
        text=True,
        check=False,
        timeout=NEVER_S / 2,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with Journal.open(tmp_path) as journal:
        (device,) = journal.devices("sb1")
        assert device.state == State(state)
        assert device.in_progress_by is None or not device.in_progress_by.is_alive(journal.host)


def test_each_loop_has_its_own_threads_and_leaves_none(tmp_path: Path) -> None:
    async def main(number: int) -> AsyncDeviceManager:
        devices: AsyncDeviceManager = await opening(Machine(), tmp_path / str(number))
        await devices.attach(RNG)
        return devices

    forgotten = [asyncio.run(main(number)) for number in range(3)]
    with pytest.raises(RuntimeError, match="opened in another event loop"):
        asyncio.run(forgotten[0].attachments())

    async def last() -> None:
        await in_thread(lambda: None)

    asyncio.run(last())  # a new loop ends the threads of those that are closed
    until(lambda: not aio_threads())
    for devices in forgotten:
        devices._devices.close()
    for devices in forgotten:
        devices._devices.close()


VMS = 100


@pytest.mark.slow
def test_a_hundred_vms_in_one_loop(tmp_path: Path) -> None:
    """Each VM has a disk of its own, and all of them ask for one more disk that one may have."""
    contested = DeviceInfo(
        container_path="/dev/xvdb",
        dev_type=DevType.BLOCK,
        host_path=str(disk_image(tmp_path / "contested.img", 1, "for one")),
    )
    refused = list[str]()

    async def live(number: int) -> None:
        machine, name = Machine(), f"vm{number}"
        disk = DeviceInfo(
            container_path="/dev/xvda",
            dev_type=DevType.BLOCK,
            host_path=str(disk_image(tmp_path / f"{name}.img", 1, name)),
        )
        async with await opening(machine, tmp_path / "state", name) as devices:
            held = await devices.attach(disk, owner=name)
            try:
                await devices.attach(contested, owner=name)
            except InUse as error:
                refused.append(error.code)
            await devices.detach(held.id)
            await everybody.wait()
            assert len(machine.find_drivers()) == len(await devices.attachments())

    everybody = asyncio.Barrier(VMS)

    async def main() -> None:
        await asyncio.gather(*map(live, range(VMS)))

    asyncio.run(main())
    assert refused == ["in-use"] * (VMS - 1)
    with Journal.open(tmp_path / "state") as journal:
        assert [hold.host_path for hold in journal.attachments()] == [contested.host_path]
    until(lambda: not aio_threads())
