"""From a driver of the host into a running guest, and back: an NVMe with data on it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import topology
from tests.lab.nested import NestedGuest
from tests.support.lab import namespace_of
from vmplug import DeviceManager, HostRoot, Qemu, VfioInfo

UNPLUG_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    subprocess.run(["modprobe", "--all", "vfio-pci", "nvme", "e1000e"], check=True)


@pytest.fixture(scope="module")
def devices(
    guest: NestedGuest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DeviceManager]:
    with DeviceManager.open(
        vm="sb1",
        host=HostRoot(),
        hypervisor=Qemu.connect(str(guest.vm.qmp_path)),
        state_dir=tmp_path_factory.mktemp("state"),
    ) as devices:
        yield devices


def driver_of(bdf: str) -> str | None:
    link = Path(f"/sys/bus/pci/devices/{bdf}/driver")
    return link.resolve().name if link.exists() else None


def read_on_host(bdf: str, length: int) -> bytes:
    with namespace_of(bdf).open("rb") as disk:
        return disk.read(length)


def test_the_guest_reads_the_hosts_nvme_and_loses_it_again(
    guest: NestedGuest, devices: DeviceManager
) -> None:
    marker = topology.NVME_MARKER.encode()
    assert read_on_host(topology.NVME, len(marker)) == marker
    held = devices.attach(VfioInfo(label="nvme", device=topology.NVME), managed=True)
    assert guest.read_nvme(len(marker)) == marker
    assert driver_of(topology.NVME) == "vfio-pci"
    assert held.guest_address
    assert held.guest_address.pci_path
    (slot, _) = held.guest_address.pci_path.slots
    found = [bdf for bdf, ids in guest.pci_ids().items() if ids == "1b36:0010"]
    paths = [guest.console.run(f"realpath /sys/bus/pci/devices/{bdf}") for bdf in found]
    assert [f"/0000:00:{slot}.0/" in path for path in paths] == [True]

    devices.detach(held.id, timeout_s=UNPLUG_S)
    guest.console.wait_until("! [ -e /dev/nvme0n1 ]", timeout_s=UNPLUG_S)
    assert driver_of(topology.NVME) == "nvme"
    assert read_on_host(topology.NVME, len(marker)) == marker


def test_a_group_of_three_comes_and_goes_as_one(
    guest: NestedGuest, devices: DeviceManager
) -> None:
    held = devices.attach(VfioInfo(label="multi", device=topology.MULTI_EDU), managed=True)
    marker = topology.MULTI_MARKER.encode()
    assert guest.read_nvme(len(marker)) == marker
    assert {"1b36:0010", "1234:11e8", "8086:10d3"} <= set(guest.pci_ids().values())
    devices.detach(held.id, timeout_s=UNPLUG_S)
    assert not {"1b36:0010", "1234:11e8", "8086:10d3"} & set(guest.pci_ids().values())
    assert driver_of(topology.MULTI_NVME) == "nvme"
    assert devices.attachments() == []
