"""Leases in an event loop."""

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.loop_thread import watched
from tests.unit.aio.test_cancel import NEVER_S, in_loop, soon
from tests.unit.leases.test_lease import disk, image, process, rows, setup
from tests.unit.manager.test_other_threads import in_child
from vmplug import Setup, StateError, aio

__all__ = ("image", "setup")


@in_loop
async def test_a_lease_ends_with_the_process_that_it_is_given_to(
    setup: Setup, image: Path
) -> None:
    request = disk(image)
    with watched() as found:
        async with await aio.lease([request], owner="job", setup=setup) as lease:
            sleep = await aio.in_thread(subprocess.Popen, ["sleep", "300"])
            assert lease.descriptors
            await lease.give_to(sleep.pid)
            assert (lease.process, lease.descriptors) == (sleep.pid, ())
            (status,) = await aio.list_leases(setup=setup)
            assert (status.id, status.state) == ("job", "held")
            assert not await lease.wait(0.01)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await lease.wait(NEVER_S)
            waiting = asyncio.create_task(lease.wait())
            await asyncio.sleep(0.01)
            await aio.in_thread(sleep.kill)
            assert await waiting
            await aio.in_thread(sleep.wait)
    assert found == []
    assert rows(setup) == 0


@in_loop
async def test_a_wait_is_for_whoever_has_the_devices(setup: Setup, image: Path) -> None:
    async with await aio.lease([disk(image)], owner="job", setup=setup) as lease:
        with process() as vmm, process(*lease.descriptors) as child:
            await lease.give_to(vmm.pid)
            await aio.in_thread(vmm.kill)
            assert not await lease.wait(0.2)
            assert lease.process == child.pid
            waiting = asyncio.create_task(lease.wait())
            await asyncio.sleep(0.1)
            assert not waiting.done()
            await aio.in_thread(child.kill)
            assert await waiting
    assert rows(setup) == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@in_loop
async def test_a_child_of_fork_is_told_that_the_lease_is_its_parents(
    setup: Setup, image: Path
) -> None:
    async with await aio.lease([disk(image)], owner="job", setup=setup) as lease:
        with process() as vmm:
            await lease.give_to(vmm.pid)
            for call in (
                lambda: lease.give_to(vmm.pid),
                lease.wait,
                lease.settle,
                lease.release,
                lambda: lease.qemu_args("q35"),
            ):
                told = in_child(lambda call=call: call().send(None))  # type: ignore[misc]
                assert told.startswith(f"StateError: process {os.getpid()} opened this"), told
                told = in_child(lambda call=call: asyncio.run(call()))  # type: ignore[misc]
                assert told.startswith(f"StateError: process {os.getpid()} opened this"), told
            (status,) = await aio.list_leases(setup=setup)
            assert (status.state, status.process) == ("held", vmm.pid)
    assert rows(setup) == 0


@in_loop
async def test_words_for_a_qemu_are_made_in_a_thread(setup: Setup, image: Path) -> None:
    """Words that are made again stand for the first ones."""
    async with await aio.lease([disk(image)], owner="job", setup=setup) as lease:
        assert lease.devices[0].descriptor in lease.descriptors
        first = await lease.qemu_args("q35", memory="64")
        with watched() as found:
            words = await lease.qemu_args("q35", memory="64")
            (number,) = lease.descriptors
        assert lease.devices[0].descriptor is None
        assert (words[0], len(words)) == ("-add-fd", len(first))
        assert words[1].startswith(f"fd={number},set=")
        assert found == []
    assert rows(setup) == 0


@in_loop
async def test_what_was_given_to_nobody_is_given_back(setup: Setup, image: Path) -> None:
    async with await aio.lease([disk(image)], owner="job", setup=setup) as lease:
        with pytest.raises(StateError, match="was not given to a process"):
            await lease.wait()
    assert rows(setup) == 0


@in_loop
async def test_a_lease_that_is_cancelled_while_it_is_made_is_given_back(
    setup: Setup, image: Path
) -> None:
    for turns in range(4):
        task = asyncio.create_task(aio.lease([disk(image)], owner=f"job{turns}", setup=setup))
        await asyncio.sleep(0.002 * turns)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            await task.result().release()
        await soon(lambda: rows(setup) == 0)


@in_loop
async def test_leaving_the_block_while_the_process_runs_changes_nothing(
    setup: Setup, image: Path
) -> None:
    with process() as vmm:
        async with await aio.lease([disk(image)], owner="job", setup=setup) as lease:
            await lease.give_to(vmm.pid)
        (status,) = await aio.list_leases(setup=setup)
        assert status.process == vmm.pid
        vmm.kill()
        vmm.wait()
        await aio.end_lease("job", setup=setup)
    assert rows(setup) == 0
