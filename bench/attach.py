"""Attaching disks to a paused QEMU, against the same commands sent raw."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.vm import GuestVm, root_ports, start_vm

from bench.timing import Ratio, of_pairs, timed
from vmplug import DeviceInfo, DeviceManager, DevNum, DevType, HostRoot, Qemu, Step

_ROUNDS = 9
_NULL = DeviceInfo(container_path="/dev/null", dev_type=DevType.CHAR, devnum=DevNum(1, 3))
"""Only counted: QEMU hears nothing of it."""
_PORTS = 32


def rows() -> Iterator[Ratio]:
    """N = 1 and N = 32."""
    for count in (1, 32):
        with TemporaryDirectory(prefix="vmplug-bench-") as directory:
            infos = _disks(Path(directory), count)
            pairs = [_round(Path(directory), infos) for _ in range(_ROUNDS + 1)][1:]
        name = f"attaching {count} disk{'s' * (count > 1)} / the same QMP commands sent raw"
        yield of_pairs(name, pairs, target=1.3)


def _disks(directory: Path, count: int) -> list[DeviceInfo]:
    infos = []
    for index in range(count):
        image = directory / f"disk{index}.img"
        image.touch()
        with image.open("r+b") as file:
            file.truncate(1 << 20)
        info = DeviceInfo(
            container_path=f"/dev/d{index}", dev_type=DevType.BLOCK, host_path=str(image)
        )
        infos.append(info)
    return infos


def _round(directory: Path, infos: list[DeviceInfo]) -> tuple[float, float]:
    """One QEMU for either, as a paused VM lets nothing go again.

    The manager is up, as in a service: connected, the topology read, the journal written to
    before. Its time holds finding the disks, the safety checks, two journal transactions and the
    QMP commands.
    """
    with (
        _paused_vm(directory) as vm,
        TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as state_dir,
        DeviceManager.open(
            vm="bench",
            host=HostRoot("/"),
            hypervisor=Qemu.connect(str(vm.qmp_path)),
            state_dir=state_dir,
        ) as devices,
    ):
        devices.detach(devices.attach(_NULL).id)
        steps = devices.plan(infos)
        ours = timed(lambda: devices.attach_all(infos))
    with _paused_vm(directory) as vm:
        return ours, timed(lambda: _send(vm, steps))


def _paused_vm(directory: Path) -> AbstractContextManager[GuestVm]:
    return start_vm(directory, devices=root_ports(_PORTS), guest=False, paused=True)


def _send(vm: GuestVm, steps: list[Step]) -> None:
    for step in steps:
        vm.oracle.execute(step.do.execute, step.do.arguments)
