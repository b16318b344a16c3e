"""What grows with a request: the cost of one device among many, and among few."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import vmplug
from bench.timing import Ratio, compare, scaled
from vmplug import DeviceInfo, DeviceManager, DevType, HostRoot
from vmplug.hypervisor.fake.monitor import FakeHypervisor
from vmplug.oci.spec import parse_config

_MANY, _FEW = scaled(1000), scaled(100)


def rows() -> Iterator[Ratio]:
    """Reading a request, checking it, and attaching it to a VM in memory."""
    yield from map(_reading, (10, 100, 1000))
    with TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as directory:
        infos = _disks(Path(directory))
        setup = vmplug.Setup(state_dir=directory)
        for many, few in ((_MANY, _FEW), (_FEW, scaled(10))):
            yield _growth(
                f"check of {many} disk images, each / of {few}",
                infos[:many],
                few,
                lambda some: len(vmplug.check_requests(some, setup=setup)),
            )
            yield _growth(
                f"attaching {many} SCSI disks to a VM in memory, each / {few}",
                infos[:many],
                few,
                lambda some: _attach(Path(directory), some),
            )


def _reading(count: int) -> Ratio:
    devices = [
        {"path": f"/dev/d{index}", "type": "b", "major": 7, "minor": index, "fileMode": 0o660}
        for index in range(count)
    ]
    data = json.dumps({"ociVersion": "1.0.2", "linux": {"devices": devices}}).encode()

    def ours() -> tuple[DeviceInfo, ...]:
        return parse_config(data, name=None).devices

    def other() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(data)
        return found

    return compare(
        f"reading a request of {count} devices / json.loads",
        ours,
        other,
        lambda infos, found: (
            [(info.name, info.minor) for info in infos]
            == [(one["path"], one["minor"]) for one in found["linux"]["devices"]]
        ),
        target=2.5,
        size=(31, max(1, 1000 // count)),
    )


def _disks(directory: Path) -> list[DeviceInfo]:
    infos = []
    for index in range(_MANY):
        image = directory / f"{index}.img"
        image.touch()
        os.truncate(image, 1 << 20)
        info = DeviceInfo(
            container_path=f"/dev/d{index}",
            dev_type=DevType.BLOCK,
            host_path=str(image),
            driver_options={"block-driver": "virtio-scsi"},
        )
        infos.append(info)
    return infos


def _growth(
    name: str, infos: list[DeviceInfo], few: int, use: Callable[[list[DeviceInfo]], int]
) -> Ratio:
    """Both sides use as many devices: all of them in one request, or in requests of a few."""
    requests = [infos[start : start + few] for start in range(0, len(infos), few)]
    return compare(
        name,
        lambda: use(infos),
        lambda: sum(map(use, requests)),
        lambda at_once, in_parts: at_once == in_parts == len(infos),
        target=1.2,
        size=(5, 1),
    )


def _attach(directory: Path, infos: list[DeviceInfo]) -> int:
    """To a new VM with a new journal: how many it has."""
    hypervisor = FakeHypervisor()
    with (
        TemporaryDirectory(dir=directory) as state_dir,
        DeviceManager.open(
            vm="bench", host=HostRoot("/"), hypervisor=hypervisor, state_dir=state_dir
        ) as devices,
    ):
        devices.attach_all(infos)
        return len(hypervisor.find_drivers())
