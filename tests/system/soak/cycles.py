"""Attach and detach, over and over: a device each time, and the same VM."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.daemons import vhost_user_backend
from tests.support.disks import disk_image
from tests.support.vm import GuestVm, root_ports, scsi_controller, shared_memory, start_vm
from tests.system.soak.figures import Figures, measure
from vmplug import DeviceInfo, DeviceManager, DevType, HostRoot, Qemu
from vmplug.oci.requests import NetInfo, Request, RngInfo, ShareInfo

_WARM_UP = 10
"""The first of so many parts is not measured: caches fill."""
_REOPEN_EVERY = 10

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How many cycles it were, how long they took, and what there was before and after."""

    cycles: int
    seconds: float
    warm: Figures
    end: Figures


def run_cycles(
    vm: GuestVm, state_dir: Path, requests: Sequence[Request], cycles: int, say: Say
) -> Run:
    """Attach and detach one after the other; every tenth time with a manager of its own."""
    warm, begin = None, time.monotonic()
    with _opened(vm, state_dir) as kept:
        for cycle in range(cycles):
            if cycle == cycles // _WARM_UP:
                warm = measure(vm, state_dir)
            request = requests[cycle % len(requests)]
            if cycle % _REOPEN_EVERY:
                _once(kept, request)
            else:
                with _opened(vm, state_dir) as another:
                    _once(another, request)
            if cycle % _REOPEN_EVERY == 0:
                vm.oracle.execute("query-status")
                vm.oracle.events.clear()  # the tests' own monitor keeps every event
            if cycle % max(1, cycles // 20) == 0:
                say(f"{cycle} of {cycles} cycles, {time.monotonic() - begin:.0f} s")
        seconds = time.monotonic() - begin
        end = measure(vm, state_dir)
    return Run(cycles=cycles, seconds=seconds, warm=warm or end, end=end)


def soak_disks(directory: Path, cycles: int, say: Say) -> Run:
    """SCSI disks of a paused VM, which lets them go without a guest; one of them with limits."""
    plain = {"block-driver": "virtio-scsi"}
    requests = [
        disk_request(directory / "plain.img", plain),
        disk_request(directory / "limited.img", {**plain, "iops-total": "1000"}),
        disk_request(directory / "read-only.img", plain, ro=True),
    ]
    with start_vm(directory, devices=scsi_controller(), guest=False, paused=True) as vm:
        return run_cycles(vm, directory / "state", requests, cycles, say)


def soak_guest(directory: Path, cycles: int, say: Say) -> Run:
    """PCI devices that a guest lets go: a disk, random numbers, a network, a shared directory."""
    shared = directory / "shared"
    shared.mkdir()
    with (
        start_vm(directory, devices=root_ports(4), extra=shared_memory(), smp=2) as vm,
        vhost_user_backend("net") as backend,
    ):
        requests: list[Request] = [
            disk_request(directory / "disk.img", {"iothread": "on", "bps-total": "1000000"}),
            RngInfo(),
            NetInfo(label="eth0", socket_path=str(backend.socket_path)),
            ShareInfo(tag="work", source=str(shared)),
        ]
        vm.console.load_modules("virtio_net", "virtiofs", "virtio-rng")
        return run_cycles(vm, directory / "state", requests, cycles, say)


def disk_request(image: Path, options: Mapping[str, str], *, ro: bool = False) -> DeviceInfo:
    """A request for an image, which is made."""
    return DeviceInfo(
        container_path=f"/dev/{image.stem}",
        dev_type=DevType.BLOCK,
        host_path=str(disk_image(image, 1, image.stem)),
        read_only=ro,
        driver_options=options,
    )


def _once(manager: DeviceManager, request: Request) -> None:
    manager.detach(manager.attach(request).id)


def _opened(vm: GuestVm, state_dir: Path) -> DeviceManager:
    qemu = Qemu.connect(str(vm.qmp_path))
    return DeviceManager.open(vm="soak", host=HostRoot("/"), hypervisor=qemu, state_dir=state_dir)
