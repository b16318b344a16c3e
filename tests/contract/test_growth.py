"""What one attach asks of a VM does not grow with the ports and disks that the VM has."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.vm import Device, root_ports, scsi_controller, start_vm
from vmplug.drivers.ports import Command, Endpoint
from vmplug.errors import CommandError
from vmplug.host.process import read_start_time
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.hypervisor.fake.monitor import FakeMonitor
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.hypervisor.qmp.defaults import sent_arguments
from vmplug.hypervisor.qmp.monitor import EventReceiver, Monitor
from vmplug.manager.manager import DeviceManager
from vmplug.oci.info import DeviceInfo, DevType

SCSI = {"block-driver": "virtio-scsi"}
COMMANDS_MAX, BYTES_MAX = 16, 2000


class Counted(Monitor):
    """A monitor that writes down every command as the socket gets it."""

    def __init__(self, inner: Monitor) -> None:
        self._inner = inner
        self.sent: list[str] = []

    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        """See Monitor."""
        self.sent += [
            json.dumps({"execute": c.execute, "arguments": sent_arguments(c)}) for c in commands
        ]
        return self._inner.attempt(commands)

    def listen(self, receive: EventReceiver) -> None:
        """See Monitor."""
        self._inner.listen(receive)

    def close(self) -> None:
        """See Monitor."""
        self._inner.close()


@contextmanager
def vm_in_memory(directory: Path, ports: int) -> Iterator[tuple[Monitor, Endpoint | None]]:
    monitor = FakeMonitor(root_ports=1)
    first = monitor.devices["rp0"]
    for index in range(1, ports):
        address: Mapping[str, Any] = {**first.properties, "addr": (0x10 << 3) + index}
        monitor.devices[f"rp{index}"] = replace(first, properties=address)
    yield monitor, None


@contextmanager
def real_vm(directory: Path, ports: int) -> Iterator[tuple[Monitor, Endpoint | None]]:
    devices: list[Device] = [*root_ports(ports), *scsi_controller()]
    with start_vm(directory, devices=devices, guest=False, paused=True) as vm:
        started_at = read_start_time(vm.pid, THIS_HOST)
        endpoint = Endpoint(str(vm.qmp_path), vm.pid, started_at)
        yield QmpMonitor.connect(str(vm.qmp_path)), endpoint


@pytest.fixture(params=["memory", pytest.param("qemu", marks=[pytest.mark.qemu])])
def vms(request: pytest.FixtureRequest) -> Any:
    return vm_in_memory if request.param == "memory" else real_vm


def disks(directory: Path, count: int, options: Mapping[str, str]) -> list[DeviceInfo]:
    directory.mkdir()
    infos = []
    for index in range(count):
        image = directory / f"disk{index:03}.img"
        image.touch()
        with image.open("r+b") as file:
            file.truncate(1 << 20)
        info = DeviceInfo(
            container_path=f"/dev/d{index}",
            dev_type=DevType.BLOCK,
            host_path=str(image),
            driver_options=options,
        )
        infos.append(info)
    return infos


def opened(monitor: Monitor, endpoint: Endpoint | None, directory: Path) -> DeviceManager:
    return DeviceManager.open(
        vm="vm1",
        host=HostRoot("/"),
        hypervisor=Qemu(monitor, endpoint),
        state_dir=directory / "state",
    )


def sent_for_the_last(vms: Any, directory: Path, ports: int, infos: list[DeviceInfo]) -> list[str]:
    """What a new process sends for the last of the disks, when the VM has the others."""
    directory.mkdir()
    with vms(directory, ports) as (monitor, endpoint):
        counted = Counted(monitor)
        with opened(counted, endpoint, directory) as first:
            first.attach_all(infos[:-1])
            counted.sent.clear()
            with opened(counted, endpoint, directory) as second:
                second.attach(infos[-1])
                return list(counted.sent)


def assert_alike(few: list[str], many: list[str]) -> None:
    """As many commands; names have a digit more or two."""
    assert len(many) == len(few) <= COMMANDS_MAX
    assert sum(map(len, many)) <= sum(map(len, few)) * 1.05
    assert sum(map(len, many)) <= BYTES_MAX


def test_it_does_not_grow_with_the_ports(vms: Any, tmp_path: Path) -> None:
    infos = disks(tmp_path / "disks", 1, {})
    few, many = (sent_for_the_last(vms, tmp_path / str(n), n, infos) for n in (8, 120))
    assert_alike(few, many)


def test_it_does_not_grow_with_the_ports_that_are_taken(vms: Any, tmp_path: Path) -> None:
    infos = disks(tmp_path / "disks", 120, {})
    few = sent_for_the_last(vms, tmp_path / "few", 8, infos[:8])
    many = sent_for_the_last(vms, tmp_path / "many", 120, infos)
    assert_alike(few, many)


def test_it_does_not_grow_with_the_disks_of_a_controller(vms: Any, tmp_path: Path) -> None:
    infos = disks(tmp_path / "disks", 200, SCSI)
    few, many = (sent_for_the_last(vms, tmp_path / str(n), 1, infos[-n:]) for n in (10, 200))
    assert_alike(few, many)


def sent_to_detach(vms: Any, directory: Path, count: int) -> list[str]:
    """What is sent to detach so many disks of one controller."""
    directory.mkdir()
    infos = disks(directory / "disks", count, SCSI)
    with vms(directory, 1) as (monitor, endpoint):
        counted = Counted(monitor)
        with opened(counted, endpoint, directory) as manager:
            held = manager.attach_all(infos)
            counted.sent.clear()
            manager.detach_all([hold.id for hold in held])
            assert manager.attachments() == []
            return list(counted.sent)


def test_a_detach_asks_once_for_all_what_the_vm_has(vms: Any, tmp_path: Path) -> None:
    """A list is as long as what the VM has: one for each device would be a square."""
    few, many = (sent_to_detach(vms, tmp_path / str(n), n) for n in (5, 50))
    lists = [sum("qom-list" in text for text in sent) for sent in (few, many)]
    assert lists[1] <= lists[0] + 5  # a wait may look again
    assert len(many) / 50 <= len(few) / 5
