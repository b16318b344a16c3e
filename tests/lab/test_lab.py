"""The lab is what it says: the kernel, its IOMMU and groups, the devices, and the VMs in it."""

import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.topology import FREE_PORT, Device, device_behind

from lab import topology
from tests.lab.nested import LARGE_PORT, PLAIN_PORTS, NestedGuest, paused_vm
from tests.support.lab import OuterQemu, namespace_of
from tests.support.raw_qmp import QmpError

UNPLUG_TIMEOUT_S = 60.0
PCI = Path("/sys/bus/pci")
GROUPS = Path("/sys/kernel/iommu_groups")

ALONE = (
    topology.NVME,
    topology.NIC,
    topology.EDU,
    topology.VIRTIO_DISK,
    topology.LARGE,
    topology.SRIOV,
    topology.NETWORK,
    topology.VGA,
    topology.FAR,
)
TOGETHER = (
    {topology.MULTI_NVME, topology.MULTI_EDU, topology.MULTI_NIC},
    {topology.BRIDGE, *topology.CONVENTIONAL},
)
DRIVERS = {
    topology.NVME: "nvme",
    topology.NIC: "e1000e",
    topology.EDU: None,
    topology.VIRTIO_DISK: "virtio-pci",
    topology.SRIOV: "nvme",
    topology.NETWORK: "virtio-pci",
}
NUMBERS = {
    "nvme": "1b36:0010",
    "e1000e": "8086:10d3",
    "edu": "1234:11e8",
    "virtio-blk-pci": "1af4:1042",
    "virtio-net-pci": "1af4:1041",
    "pci-testdev": "1b36:0005",
    "pcie-pci-bridge": "1b36:000e",
    "VGA": "1234:1111",
}
PARENTS = {port.qdev_id: f"0000:00:{port.addr}" for port in topology.PORTS} | {
    "port65": "0000:40:00.0",
    "bridge": topology.BRIDGE,
}


def attribute(bdf: str, name: str) -> str:
    return (PCI / "devices" / bdf / name).read_text().strip()


def driver_of(bdf: str) -> str | None:
    link = PCI / "devices" / bdf / "driver"
    return link.resolve().name if link.exists() else None


def group_of(bdf: str) -> set[str]:
    return {path.name for path in (PCI / "devices" / bdf / "iommu_group/devices").iterdir()}


def take_over(bdf: str) -> str | None:
    """Gives a function to vfio-pci, through sysfs alone; the driver that had it."""
    former = driver_of(bdf)
    (PCI / "devices" / bdf / "driver_override").write_text("vfio-pci")
    offer(bdf)
    assert driver_of(bdf) == "vfio-pci"
    return former


def give_back(bdf: str, former: str | None) -> None:
    (PCI / "devices" / bdf / "driver_override").write_text("\n")
    offer(bdf)
    assert driver_of(bdf) == former


def offer(bdf: str) -> None:
    if driver_of(bdf):
        (PCI / "devices" / bdf / "driver/unbind").write_text(bdf)
    (PCI / "drivers_probe").write_text(bdf)


@pytest.fixture
def taken(request: pytest.FixtureRequest) -> Iterator[str]:
    """The function that the test names, bound to vfio-pci."""
    bdf: str = request.param
    subprocess.run(["modprobe", "vfio-pci"], check=True, timeout=20)
    former = take_over(bdf)
    yield bdf
    give_back(bdf, former)


@pytest.fixture
def outer() -> Iterator[OuterQemu]:
    with OuterQemu.connect() as outer:
        yield outer


@pytest.fixture
def late(outer: OuterQemu) -> Iterator[Device]:
    """A device that is not there yet; if the test leaves it, it is removed."""
    device = device_behind(FREE_PORT, "edu", qdev_id="late")
    yield device
    if device.qdev_id in outer.devices():
        outer.remove(device)


def test_the_kernel_is_the_labs_and_its_modules_are_too() -> None:
    release = platform.release()
    assert release.startswith(("6.1.", "6.12."))
    found = subprocess.run(["modinfo", "-n", "mtty"], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == f"/lib/modules/{release}/extra/mtty.ko"


def test_the_clock_is_one_that_a_busy_host_does_not_make_fast() -> None:
    source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    assert source.read_text().strip() == "hpet"


def test_the_iommu_remaps_interrupts() -> None:
    log = subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
    assert "DMAR-IR: Enabled IRQ remapping" in log
    assert list(GROUPS.iterdir())


@pytest.mark.parametrize("bdf", ALONE)
def test_a_function_is_alone_in_its_group(bdf: str) -> None:
    assert group_of(bdf) == {bdf}


@pytest.mark.parametrize("members", TOGETHER, ids=["slot", "bridge"])
def test_functions_that_cannot_be_told_apart_are_in_one_group(members: set[str]) -> None:
    for bdf in members:
        assert group_of(bdf) == members


@pytest.mark.parametrize("device", topology.DEVICES, ids=lambda device: device.qdev_id)
def test_every_device_is_where_the_topology_says(device: Device) -> None:
    vendor, number = (attribute(device.bdf, name)[2:] for name in ("vendor", "device"))
    assert f"{vendor}:{number}" == NUMBERS[device.driver]
    assert (PCI / "devices" / device.bdf).resolve().parent.name == PARENTS[device.bus]


@pytest.mark.parametrize(("bdf", "driver"), DRIVERS.items())
def test_devices_have_the_driver_that_a_host_gives_them(bdf: str, driver: str | None) -> None:
    assert driver_of(bdf) == driver


@pytest.mark.parametrize(
    ("bdf", "marker"),
    [(topology.NVME, topology.NVME_MARKER), (topology.SRIOV, topology.SRIOV_MARKER)],
)
def test_disks_begin_with_their_marker(bdf: str, marker: str) -> None:
    with namespace_of(bdf).open("rb") as disk:
        assert disk.read(len(marker)) == marker.encode()


def test_the_large_bar_has_an_address() -> None:
    first, last, _ = (int(word, 16) for word in attribute(topology.LARGE, "resource").split()[6:9])
    assert last + 1 - first == topology.LARGE_BAR_BYTES


def test_the_graphics_card_is_the_one_of_the_boot() -> None:
    assert attribute(topology.VGA, "boot_vga") == "1"


def test_the_far_function_is_on_another_numa_node() -> None:
    assert attribute(topology.FAR, "numa_node") == "1"
    assert attribute(topology.NVME, "numa_node") == "-1"


def test_virtual_functions_come_and_go() -> None:
    count = PCI / "devices" / topology.SRIOV / "sriov_numvfs"
    count.write_text("2")
    try:
        for bdf in ("0000:09:00.1", "0000:09:00.2"):
            assert group_of(bdf) == {bdf}
            assert (PCI / "devices" / bdf / "physfn").resolve().name == topology.SRIOV
    finally:
        count.write_text("0")
    assert not (PCI / "devices/0000:09:00.1").exists()


def test_a_card_has_the_labs_address() -> None:
    (interface,) = (PCI / "devices" / topology.NETWORK).glob("virtio*/net/*")
    words = ["ip", "-o", "-4", "addr", "show", "dev", interface.name]
    shown = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert topology.LAB_ADDRESS in shown.split()


def test_devices_come_and_go(outer: OuterQemu, late: Device) -> None:
    outer.add(late)
    assert attribute(late.bdf, "device") == "0x11e8"
    assert group_of(late.bdf) == {late.bdf}
    outer.remove(late)
    assert late.qdev_id not in outer.devices()


def test_the_labs_qemu_says_what_it_refuses(outer: OuterQemu) -> None:
    with pytest.raises(QmpError, match="not found"):
        outer.execute("device_del", id="never-there")


def test_the_monitor_can_be_left_and_taken_again() -> None:
    for _ in range(2):
        with OuterQemu.connect() as outer:
            assert "nvme" in outer.devices()
            with pytest.raises(OSError, match="busy"):
                OuterQemu.connect()


@pytest.mark.parametrize("taken", [topology.NVME, topology.LARGE], indirect=True)
def test_a_paused_vm_takes_a_function(taken: str, tmp_path: Path) -> None:
    with paused_vm(tmp_path) as vm:
        given = {"driver": "vfio-pci", "id": "given", "host": taken}
        vm.oracle.execute("device_add", **given, bus=LARGE_PORT)
        host = vm.oracle.execute("qom-get", path="/machine/peripheral/given", property="host")
        assert host == taken


@pytest.mark.parametrize("taken", [topology.NVME], indirect=True)
def test_a_running_guest_reads_a_disk_and_gives_it_back(taken: str, guest: NestedGuest) -> None:
    before = guest.pci_ids()
    given = {"driver": "vfio-pci", "id": "given", "host": taken}
    guest.vm.oracle.execute("device_add", **given, bus=PLAIN_PORTS[0])
    marker = topology.NVME_MARKER.encode()
    assert guest.read_nvme(len(marker)) == marker
    assert guest.pci_ids().items() - before.items() == {("0000:01:00.0", NUMBERS["nvme"])}
    guest.vm.oracle.execute("device_del", id="given")
    guest.vm.oracle.wait_event("DEVICE_DELETED", UNPLUG_TIMEOUT_S, device="given")
    assert guest.pci_ids() == before


@pytest.mark.parametrize("taken", [topology.EDU], indirect=True)
def test_a_running_guest_sees_a_function_without_a_driver(taken: str, guest: NestedGuest) -> None:
    given = {"driver": "vfio-pci", "id": "given", "host": taken}
    guest.vm.oracle.execute("device_add", **given, bus=PLAIN_PORTS[1])
    guest.wait_for_pci("0000:02:00.0")
    assert guest.pci_ids()["0000:02:00.0"] == NUMBERS["edu"]
    guest.vm.oracle.execute("device_del", id="given")
    guest.vm.oracle.wait_event("DEVICE_DELETED", UNPLUG_TIMEOUT_S, device="given")
