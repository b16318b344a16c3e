"""Ports, switches, bridges and expanders of a real QEMU, and what the guest makes of them.

The devices are QEMU's pci-testdev, whose BAR can have any size.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.vm import Device, GuestVm, start_vm
from vmplug.address import Bdf, PciPath
from vmplug.drivers.place import FIRMWARE_WINDOWS, Offer, PortKind, Windows
from vmplug.drivers.vfio import window_for
from vmplug.host.pci.function import Bar, PciFunction
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.start.machine import TCG_ADDRESS_BITS

pytestmark = pytest.mark.qemu

MIB, GIB = 1 << 20, 1 << 30
ANSWER_S = 60.0


def large(size_bytes: int) -> PciFunction:
    """A function with one BAR of that size."""
    bar = Bar(
        number=0,
        start=0,
        size_bytes=size_bytes,
        is_memory=True,
        is_64bit=True,
        is_prefetchable=True,
    )
    return PciFunction(bdf=Bdf(0, 0x3B, 0, 0), pcie=True, bars=(bar,))


LARGE_WINDOW = window_for([large(8 * GIB)])

DEVICES: list[Device] = [
    {"driver": "pcie-root-port", "id": "rp0", "bus": "pcie.0", "addr": "0x10", "chassis": 1},
    {"driver": "pcie-root-port", "id": "rp1", "bus": "pcie.0", "addr": "0x11", "chassis": 2},
    {
        "driver": "pcie-root-port",
        "id": "rp2",
        "bus": "pcie.0",
        "addr": "0x12",
        "chassis": 3,
        "pref64-reserve": LARGE_WINDOW,
    },
    {"driver": "pcie-root-port", "id": "swrp", "bus": "pcie.0", "addr": "0x13", "chassis": 4},
    {"driver": "x3130-upstream", "id": "swup", "bus": "swrp", "addr": "0x0"},
    {
        "driver": "xio3130-downstream",
        "id": "swdp0",
        "bus": "swup",
        "addr": "0x1",
        "chassis": 5,
        "slot": 1,
    },
    {"driver": "pcie-pci-bridge", "id": "br0", "bus": "pcie.0", "addr": "0x14"},
    {"driver": "pci-bridge", "id": "br1", "bus": "pcie.0", "addr": "0x15", "chassis_nr": 9},
    {
        "driver": "pxb-pcie",
        "id": "pxb1",
        "bus": "pcie.0",
        "addr": "0x16",
        "bus_nr": 0x20,
        "numa_node": 1,
    },
    {"driver": "pcie-root-port", "id": "rpx", "bus": "pxb1", "addr": "0x0", "chassis": 50},
]
NODES = (
    "-object",
    "memory-backend-ram,id=ram0,size=128M",
    "-object",
    "memory-backend-ram,id=ram1,size=128M",
    "-numa",
    "node,nodeid=0,memdev=ram0",
    "-numa",
    "node,nodeid=1,memdev=ram1",
)


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    directory = tmp_path_factory.mktemp("ports")
    with start_vm(directory, devices=DEVICES, extra=NODES) as vm:
        vm.console.run("true")
        yield vm


def read_offer(vm: GuestVm) -> Offer:
    with closing(Qemu.connect(str(vm.qmp_path))) as qemu:
        return qemu.offer()


def test_every_kind_of_port_is_offered_with_its_window_and_its_node(vm: GuestVm) -> None:
    found = {port.bus: port for port in read_offer(vm).ports}
    assert {bus: (port.kind, str(port.path)) for bus, port in found.items()} == {
        "rp0": (PortKind.ROOT_PORT, "10"),
        "rp1": (PortKind.ROOT_PORT, "11"),
        "rp2": (PortKind.ROOT_PORT, "12"),
        "swrp": (PortKind.ROOT_PORT, "13"),
        "swdp0": (PortKind.SWITCH_PORT, "13/00/01"),
        "br0": (PortKind.BRIDGE_PORT, "14"),
        "br1": (PortKind.BRIDGE_PORT, "15"),
        "rpx": (PortKind.ROOT_PORT, "20:00"),
    }
    assert found["swrp"].free == ()
    assert found["rp2"].windows == Windows(LARGE_WINDOW, 2 * MIB)
    assert found["rp0"].windows == found["br1"].windows == FIRMWARE_WINDOWS
    assert (found["rpx"].numa_node, found["rp0"].numa_node) == (1, None)


def test_an_offer_says_what_else_the_machine_has(vm: GuestVm) -> None:
    offer = read_offer(vm)
    assert (offer.viommu, offer.ap, offer.memory_bytes) == (False, False, 256 * MIB)
    assert offer.address_bits == TCG_ADDRESS_BITS


def test_an_iommu_of_the_guests_is_seen(tmp_path: Path) -> None:
    iommu: list[Device] = [{"driver": "intel-iommu"}]
    with start_vm(tmp_path, devices=iommu, guest=False, paused=True) as vm:
        offer = read_offer(vm)
        assert (offer.viommu, offer.address_bits) == (True, None)


def sysfs_of(path: PciPath) -> str:
    """A device's directory in the guest, whatever number each bus behind has."""
    parts = "/".join(f"0000:*:{slot.slot:02x}.{slot.function}" for slot in path.slots)
    return f"/sys/devices/pci0000:{path.root_bus:02x}/{parts}"


@pytest.mark.parametrize(
    ("bus", "address", "path", "size_bytes", "has_address"),
    [
        ("rp0", "0x0", "10/00", 2 * MIB, True),
        ("rp1", "0x0", "11/00", 4 * MIB, False),
        ("rp2", "0x0", "12/00", 8 * GIB, True),
        ("swdp0", "0x0", "13/00/01/00", MIB, True),
        ("br0", "0x3", "14/03", MIB, True),
        ("br1", "0x1f", "15/1f", MIB, True),
        ("rpx", "0x0", "20:00/00", MIB, True),
    ],
)
def test_the_guest_finds_a_device_where_we_say_and_gives_its_bar_an_address_if_it_fits(
    vm: GuestVm, bus: str, address: str, path: str, size_bytes: int, *, has_address: bool
) -> None:
    name = f"test-{bus}"
    add = {"driver": "pci-testdev", "id": name, "bus": bus, "addr": address, "membar": size_bytes}
    vm.oracle.execute("device_add", **add)
    directory = sysfs_of(PciPath.parse(path))
    vm.console.wait_until(f"[ -e {directory}/enable ]", ANSWER_S)
    # The BAR is the third line; the guest has tried all that it can once the first has one.
    vm.console.wait_until(f"! head -n 1 {directory}/resource | grep -q '^0x0* '", ANSWER_S)
    start = int(vm.console.run(f"sed -n 3p {directory}/resource").split()[0], 16)
    assert (start != 0) is has_address


def test_a_slot_without_function_0_is_empty_and_with_it_everything_is_there(vm: GuestVm) -> None:
    """What `steps.vfio` orders its steps by, and takes half of a group out by."""
    slot = "/sys/devices/pci0000:00/0000:00:14.0/0000:*:09"
    for function in (2, 1):
        add_function(vm, "br0", 9, function)
    assert vm.console.run(f"ls -d {slot}.* 2>/dev/null; true").split() == []
    vm.oracle.execute("device_del", id="test-br0-9-2")
    vm.oracle.wait_event("DEVICE_DELETED", device="test-br0-9-2")
    vm.oracle.wait_event("DEVICE_DELETED", device="test-br0-9-1")
    for function in (1, 0):
        add_function(vm, "br0", 9, function)
    vm.console.wait_until(f"[ -e {slot}.0 ] && [ -e {slot}.1 ]", ANSWER_S)
    vm.oracle.execute("device_del", id="test-br0-9-0")
    vm.oracle.wait_event("DEVICE_DELETED", device="test-br0-9-1")
    vm.console.wait_until(f"! [ -e {slot}.0 ] && ! [ -e {slot}.1 ]", ANSWER_S)


def add_function(vm: GuestVm, bus: str, slot: int, function: int) -> None:
    vm.oracle.execute(
        "device_add",
        driver="pci-testdev",
        id=f"test-{bus}-{slot}-{function}",
        bus=bus,
        addr=f"{slot:#x}.{function}",
        multifunction=True,
    )
