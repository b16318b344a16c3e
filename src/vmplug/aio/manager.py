"""AsyncDeviceManager: the devices of one VM, for an event loop."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from vmplug.aio.threads import Threads
from vmplug.arguments import checked
from vmplug.drivers.ports import Hypervisor
from vmplug.errors import CLOSED, StateError
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.journal import DEFAULT_STATE_DIR, StateDir
from vmplug.manager.manager import DeviceManager
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.policy.rules import Policy
from vmplug.vms import connect

P = ParamSpec("P")
R = TypeVar("R")

_GRACE_S = 5.0
"""How long closing waits for cancelled calls. They wait for no guest, but QEMU may hang."""

checked(DeviceManager)
_connect: Callable[..., DeviceManager] = checked(connect.connect_vm)


def _in_thread(
    method: Callable[Concatenate[DeviceManager, P], R],
) -> Callable[Concatenate["AsyncDeviceManager", P], Coroutine[Any, Any, R]]:
    """The method as a coroutine."""

    @wraps(method)
    async def call(self: "AsyncDeviceManager", /, *args: P.args, **named: P.kwargs) -> R:
        return await self._call(lambda devices: method(devices, *args, **named))

    return call


class AsyncDeviceManager:
    """The devices of one VM: `DeviceManager` with coroutines.

        async with await aio.connect_vm("sb1") as devices:
            async with asyncio.timeout(5):
                await devices.attach(disk, owner="ctr1")

    A call that is cancelled goes on to its end in its thread, but waits for no guest. The next
    call for this VM begins after that, so it finds whatever was done. Made by `connect_vm` and
    `open`, for the event loop that runs then.
    """

    def __init__(self, devices: DeviceManager, vm: str, threads: Threads) -> None:
        self._devices = devices
        self._vm = vm
        self._threads = threads
        self._closing: Future[None] | None = None
        threads.hold()

    @classmethod
    async def open(
        cls,
        *,
        vm: str,
        host: HostRoot,
        hypervisor: Hypervisor,
        state_dir: StateDir = DEFAULT_STATE_DIR,
        vhost_user_store: VhostUserStore | None = None,
        policy: Policy | None = None,
    ) -> Self:
        """See DeviceManager.open; cancelled, it closes the hypervisor's connection too."""
        work = partial(
            DeviceManager.open,
            vm=vm,
            host=host,
            hypervisor=hypervisor,
            state_dir=state_dir,
            vhost_user_store=vhost_user_store,
            policy=policy,
        )
        threads = Threads.of_loop()
        try:
            return cls(await _opened(work, vm, threads), vm, threads)
        except asyncio.CancelledError:
            threads.finish(hypervisor.close, after=threads.left_for(vm))
            raise

    async def close(self) -> None:
        """Close the connection to the VM and the journal; devices stay attached.

        It lets cancelled calls end, for 5 seconds at most. Other calls that wait end with
        StateError. Cancelled, it closes all the same.
        """
        if not self._threads.is_ours:
            return  # it is the parent's
        self._threads.check()
        if self._closing is None:
            left = self._threads.left_for(self._vm)
            self._closing = self._threads.finish(self._devices.close, after=left, grace_s=_GRACE_S)
            self._threads.release()
        await self._threads.result_of(self._closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _call(self, work: Callable[[DeviceManager], R]) -> R:
        return await self._threads.call(lambda: self._do(work), concerns=self._vm)

    def _do(self, work: Callable[[DeviceManager], R]) -> R:
        if self._closing:
            raise StateError(
                f"the manager of VM {self._vm} is closed", state=CLOSED, required="open"
            )
        return work(self._devices)

    attach = _in_thread(DeviceManager.attach)
    attach_all = _in_thread(DeviceManager.attach_all)
    attachments = _in_thread(DeviceManager.attachments)
    check = _in_thread(DeviceManager.check)
    check_places = _in_thread(DeviceManager.check_places)
    detach = _in_thread(DeviceManager.detach)
    detach_all = _in_thread(DeviceManager.detach_all)
    detach_owner = _in_thread(DeviceManager.detach_owner)
    plan = _in_thread(DeviceManager.plan)
    reconcile = _in_thread(DeviceManager.reconcile)
    resize = _in_thread(DeviceManager.resize)


async def connect_vm(name: str, *, setup: Setup = DEFAULT_SETUP) -> AsyncDeviceManager:
    """See vmplug.connect_vm."""
    work = partial(_connect, name, setup=setup)
    threads = Threads.of_loop()
    return AsyncDeviceManager(await _opened(work, name, threads), name, threads)


async def _opened(work: Callable[[], DeviceManager], vm: str, threads: Threads) -> DeviceManager:
    """The manager; it is closed when nobody waits for it any more."""
    return await threads.call(work, concerns=vm, dispose=DeviceManager.close)
