"""Lease devices to any process, from an event loop."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Self, TypeVar

from vmplug.aio.threads import Threads
from vmplug.arguments import checked
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.start.foreign import DEFAULT_MEMORY, DEFAULT_PROGRAM
from vmplug.leases import lease as leases
from vmplug.leases.device import LeasedDevice
from vmplug.leases.holder import DEFAULT_TERMS, LeaseTerms
from vmplug.leases.lease import Lease
from vmplug.leases.life import STEP_S
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.oci.requests import Request

R = TypeVar("R")

checked(Lease)
_lease: Callable[..., Lease] = checked(leases.lease)


class AsyncLease:
    """Devices that this process has leased: `Lease` with coroutines.

    Leaving `async with` gives the devices back, unless a process that was given them still runs,
    also when it is cancelled.
    """

    def __init__(self, lease: Lease, threads: Threads) -> None:
        self._lease = lease
        self._threads = threads
        self.id = lease.id
        self.owner = lease.owner
        self.devices: tuple[LeasedDevice, ...] = lease.devices

    @property
    def process(self) -> int | None:
        """See Lease.process."""
        return self._lease.process

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The open files for the process to inherit, as `pass_fds`; none once it was given."""
        return self._lease.descriptors

    def render(
        self, template: str | Sequence[str], *, kind: str | None = None, name: str | None = None
    ) -> list[str]:
        """See Lease.render; it only computes."""
        return self._lease.render(template, kind=kind, name=name)

    async def qemu_args(
        self,
        machine: str,
        *,
        memory: str = DEFAULT_MEMORY,
        shared_memory: bool = False,
        kvm: bool = False,
        program: str = DEFAULT_PROGRAM,
    ) -> list[str]:
        """See Lease.qemu_args."""

        def make(lease: Lease) -> list[str]:
            return lease.qemu_args(
                machine, memory=memory, shared_memory=shared_memory, kvm=kvm, program=program
            )

        words = await self._call(make)
        self.devices = self._lease.devices
        return words

    async def give_to(self, pid: int) -> None:
        """See Lease.give_to."""
        await self._call(lambda lease: lease.give_to(pid))

    async def wait(self, timeout_s: float | None = None) -> bool:
        """See Lease.wait; no thread waits, and a wait that is cancelled leaves nothing behind."""
        self._threads.check()
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        while True:
            async with _end_of(self._lease.process) as end:
                # Asked after it was opened: so it is not of a later process with that number.
                if await self._call(lambda lease: lease.wait(0)):
                    return True
                if deadline is not None and loop.time() >= deadline:
                    return False
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await end.wait()
                        await asyncio.sleep(STEP_S)  # another process may use the devices still

    async def settle(self) -> str | None:
        """See Lease.settle."""
        return await self._call(lambda lease: lease.settle())

    async def release(self) -> None:
        """See Lease.release."""
        await self._call(lambda lease: lease.release())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._threads.check()
        settling = self._threads.finish(
            partial(_give_back, self._lease), after=self._threads.left_for(self.id)
        )
        await self._threads.result_of(settling)

    async def _call(self, work: Callable[[Lease], R]) -> R:
        return await self._threads.call(partial(work, self._lease), concerns=self.id)


async def lease(
    requests: Sequence[Request],
    *,
    owner: str | None = None,
    managed: bool = False,
    terms: LeaseTerms = DEFAULT_TERMS,
    host: HostRoot | None = None,
    setup: Setup = DEFAULT_SETUP,
) -> AsyncLease:
    """See vmplug.lease; cancelled, it gives the devices back."""
    work = partial(
        _lease, requests, owner=owner, managed=managed, terms=terms, host=host, setup=setup
    )
    threads = Threads.of_loop()
    return AsyncLease(await threads.call(work, dispose=_give_back), threads)


def _give_back(lease: Lease) -> None:
    lease.settle()


@asynccontextmanager
async def _end_of(pid: int | None) -> AsyncIterator[asyncio.Event]:
    """An event that is set when the process has ended. Source: pidfd_open(2)."""
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    descriptor = None
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid) if pid else None
    if descriptor is None:
        end.set()
        yield end
        return
    loop.add_reader(descriptor, end.set)
    try:
        yield end
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
