"""Two managers of one VM, as in two services, that use its QMP socket in turn."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.vm import scsi_controller, start_vm

from bench.timing import Ratio, of_pairs, rounds, timed
from vmplug import DeviceInfo, DeviceManager, DevType, HostRoot, Qemu

_COUNT = 25
_MOST_S = 0.012


def rows() -> Iterator[Ratio]:
    """An attach just after one of the other manager / an attach of a manager that is alone.

    And what that may take at most, with the checks that an attach makes anyway.
    """
    with (
        TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as name,
        start_vm(Path(name), devices=scsi_controller(), guest=False, paused=True) as vm,
        ExitStack() as opened,
    ):
        one, other = (
            opened.enter_context(
                DeviceManager.open(
                    vm="bench",
                    host=HostRoot("/"),
                    hypervisor=Qemu.connect(str(vm.qmp_path)),
                    state_dir=Path(name, "state"),
                )
            )
            for _ in range(2)
        )
        first, second = (_disk(Path(name, f"{number}.img")) for number in range(2))
        pairs = []
        for _ in rounds(_COUNT):
            _attach(one, first)
            alone_s = _attach(one, second)
            one.detach_all([hold.id for hold in one.attachments()])
            _attach(one, first)
            in_turn_s = _attach(other, second)
            one.detach_all([hold.id for hold in one.attachments()])
            pairs.append((in_turn_s, alone_s))
        yield of_pairs("attach of two managers in turn / of one", pairs, target=3.0)
        limited = [(in_turn_s, _MOST_S) for in_turn_s, _ in pairs]
        yield of_pairs("attach of two managers in turn / 12 ms", limited, target=1.0)


def _disk(image: Path) -> DeviceInfo:
    image.touch()
    os.truncate(image, 1 << 20)
    return DeviceInfo(
        container_path=f"/dev/{image.stem}",
        dev_type=DevType.BLOCK,
        host_path=str(image),
        driver_options={"block-driver": "virtio-scsi"},
    )


def _attach(manager: DeviceManager, info: DeviceInfo) -> float:
    seconds, hold = timed(lambda: manager.attach(info))
    assert hold.guest_address, hold
    return seconds
