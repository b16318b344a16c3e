"""Where the functions of an IOMMU group go in a VM: arithmetic, with neither host nor VM."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from vmplug.address import Bdf, CcwDevNo, PciPath, PciSlot
from vmplug.drivers.place import (
    FIRMWARE_WINDOWS,
    ApPlace,
    CcwPlace,
    GroupPlace,
    GuestFunction,
    Offer,
    PciPort,
    Place,
    PlugMode,
    PortKind,
    Windows,
)
from vmplug.drivers.plug import VFIODevice, VFIODevices, guest_address
from vmplug.drivers.ports import NewPlug
from vmplug.drivers.vfio import VfioDriver, check_address_space, needed_windows, window_for
from vmplug.errors import CannotPlug, NoFreePort, SpecError
from vmplug.host.finding import Code
from vmplug.host.pci.function import Bar, PciFunction
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.mdev import MediatedDevice, VFIODeviceType

MIB, GIB = 1 << 20, 1 << 30
UUID = "f94290f8-78ac-45fb-bb22-e55e519fa64f"


def bar(size_bytes: int, *, prefetchable: bool = True, is_64bit: bool = True) -> Bar:
    return Bar(
        number=0,
        start=1 << 40,
        size_bytes=size_bytes,
        is_memory=True,
        is_64bit=is_64bit,
        is_prefetchable=prefetchable,
    )


def function(
    bdf: str = "0000:3b:00.0",
    *bars: Bar,
    pcie: bool | None = True,
    numa_node: int | None = None,
) -> PciFunction:
    return PciFunction(bdf=Bdf.parse(bdf), pcie=pcie, bars=bars, numa_node=numa_node)


def group(*functions: PciFunction, number: int = 26) -> VfioGroup:
    return VfioGroup(
        number=number, device_node=f"/dev/vfio/{number}", functions=functions or (function(),)
    )


def port(index: int, kind: PortKind = PortKind.ROOT_PORT, **more: object) -> PciPort:
    slots = range(1, 32) if kind is PortKind.BRIDGE_PORT else (0,)
    return PciPort(
        bus=f"{'br' if kind is PortKind.BRIDGE_PORT else 'rp'}{index}",
        path=PciPath((PciSlot(4 + index),)),
        free=tuple(PciSlot(slot) for slot in slots),
        kind=kind,
        **more,  # type: ignore[arg-type]
    )


def bridge(index: int = 9) -> PciPort:
    return port(index, PortKind.BRIDGE_PORT)


def offer(*ports: PciPort, **more: object) -> Offer:
    return Offer(
        machine="q35",
        ports=ports,
        controllers=(),
        shared_memory=False,
        **more,  # type: ignore[arg-type]
    )


def choose(
    device: VfioGroup, vm: Offer, *taken: str, options: VfioDriver | None = None
) -> list[str]:
    place = (options or VfioDriver()).choose_place(device, vm, set(taken))
    return str(place).split()


# ports


def test_a_pcie_function_goes_to_a_root_port() -> None:
    assert choose(group(), offer(bridge(), port(0), port(1))) == ["rp0/00"]


def test_a_conventional_function_goes_behind_a_bridge() -> None:
    conventional = group(function(pcie=False))
    assert choose(conventional, offer(port(0), bridge())) == ["br9/01"]
    with pytest.raises(NoFreePort, match="conventional PCI device") as refusal:
        choose(conventional, offer(port(0)))
    assert "--bridges" in (refusal.value.hint or "")


@pytest.mark.parametrize("more", [{"ccw_used": frozenset()}, {"machine": "microvm"}])
def test_a_machine_that_never_has_ports_is_not_offered_more(more: dict[str, object]) -> None:
    """zPCI functions sit on no port, and vm start makes none for such machines."""
    without = replace(offer(), **more)
    with pytest.raises(NoFreePort, match="no PCIe ports") as refusal:
        choose(group(), without)
    assert "--ports" not in (refusal.value.hint or "")
    assert choose(group(), replace(without, ports=(port(0),))) == ["rp0/00"]
    with pytest.raises(NoFreePort) as refusal:
        choose(group(), offer())
    assert "--ports" in (refusal.value.hint or "")


def test_where_the_host_does_not_say_a_port_comes_first_and_a_bridge_serves_too() -> None:
    unknown = group(function(pcie=None))
    assert choose(unknown, offer(bridge(), port(0))) == ["rp0/00"]
    assert choose(unknown, offer(bridge())) == ["br9/01"]


def test_a_switch_port_is_as_good_as_a_root_port() -> None:
    switch = port(3, PortKind.SWITCH_PORT)
    assert choose(group(), offer(switch)) == ["rp3/00"]
    wanted = VfioDriver(port=PortKind.SWITCH_PORT)
    assert choose(group(), offer(port(0), switch), options=wanted) == ["rp3/00"]
    with pytest.raises(NoFreePort, match="no free switch-port"):
        choose(group(), offer(port(0)), options=wanted)


def test_a_taken_port_is_not_given_again_whatever_function_is_in_it() -> None:
    two = offer(port(0), port(1))
    assert choose(group(), two, "rp0/00") == ["rp1/00"]
    assert choose(group(), two, "rp0/00.1") == ["rp1/00"]
    with pytest.raises(NoFreePort, match=r"0000:3b:00\.0"):
        choose(group(), two, "rp0/00", "rp1/00")


def test_a_port_may_have_a_dot_in_its_name() -> None:
    dotted = PciPort(bus="rp.0", path=PciPath((PciSlot(4),)), free=(PciSlot(0),))
    assert choose(group(), offer(dotted)) == ["rp.0/00"]
    with pytest.raises(NoFreePort):
        choose(group(), offer(dotted), "rp.0/00")


def test_the_lowest_port_is_free_again_after_the_first_of_two_has_gone() -> None:
    three = offer(port(0), port(1), port(2))
    assert choose(group(), three, "rp1/00") == ["rp0/00"]


def test_ports_ten_and_two_are_in_the_order_of_the_offer_and_not_of_their_names() -> None:
    many = offer(*(port(index) for index in range(12)))
    taken = [f"rp{index}/00" for index in range(2)]
    assert choose(group(), many, *taken) == ["rp2/00"]


# several functions


def test_functions_of_one_slot_stay_functions_of_one_slot() -> None:
    device = group(*(function(f"0000:3b:00.{number}") for number in (0, 1, 3)))
    assert choose(device, offer(port(0), port(1))) == ["rp0/00", "rp0/00.1", "rp0/00.3"]


def test_a_slot_without_a_function_0_gets_one_or_the_guest_would_not_look() -> None:
    device = group(function("0000:3b:00.2"), function("0000:3b:00.5"))
    assert choose(device, offer(port(0))) == ["rp0/00", "rp0/00.1"]


def test_a_device_of_both_kinds_is_a_pcie_device() -> None:
    device = group(function("0000:3b:00.0"), function("0000:3b:00.1", pcie=False))
    assert choose(device, offer(bridge(), port(0))) == ["rp0/00", "rp0/00.1"]


def test_functions_of_other_slots_go_to_other_ports() -> None:
    device = group(function("0000:3b:00.0"), function("0000:3b:00.1"), function("0000:3c:00.0"))
    assert choose(device, offer(port(0), port(1))) == ["rp0/00", "rp0/00.1", "rp1/00"]
    with pytest.raises(NoFreePort):
        choose(device, offer(port(0)))


def test_conventional_neighbours_share_a_bridge_in_slots_of_their_own() -> None:
    device = group(function("0000:09:01.0", pcie=False), function("0000:09:02.0", pcie=False))
    assert choose(device, offer(bridge()), "br9/01") == ["br9/02", "br9/03"]


def test_a_guest_iommu_wants_a_group_behind_one_bridge() -> None:
    device = group(function("0000:3b:00.0"), function("0000:3b:00.1"))
    assert choose(device, offer(port(0), bridge(), viommu=True)) == ["br9/01", "br9/01.1"]
    with pytest.raises(CannotPlug, match="several address spaces") as refusal:
        choose(device, offer(port(0), port(1), viommu=True))
    assert refusal.value.reason == Code.SPLIT_GROUP


def test_a_guest_iommu_takes_a_single_function_anywhere() -> None:
    assert choose(group(), offer(port(0), viommu=True)) == ["rp0/00"]


# windows


def test_a_bar_that_the_window_does_not_hold_is_refused() -> None:
    device = group(function("0000:3b:00.0", bar(8 * GIB)))
    with pytest.raises(NoFreePort, match="12288 MiB") as refusal:
        choose(device, offer(port(0)))
    assert "--room-for" in (refusal.value.hint or "")
    roomy = port(1, windows=Windows(16 * GIB, 2 * MIB))
    assert choose(device, offer(port(0), roomy)) == ["rp1/00"]


def test_the_firmware_gives_two_mib_and_not_a_byte_more() -> None:
    assert choose(group(function("0000:3b:00.0", bar(2 * MIB))), offer(port(0))) == ["rp0/00"]
    with pytest.raises(NoFreePort):
        choose(group(function("0000:3b:00.0", bar(2 * MIB), bar(4096))), offer(port(0)))


def test_before_the_vm_starts_the_firmware_makes_room_for_what_is_there() -> None:
    device = group(function("0000:3b:00.0", bar(8 * GIB)))
    assert choose(device, offer(port(0), mode=PlugMode.COLD)) == ["rp0/00"]


def test_the_smallest_window_that_fits_is_taken() -> None:
    roomy, plain = port(0, windows=Windows(16 * GIB, 2 * MIB)), port(1)
    assert choose(group(), offer(roomy, plain)) == ["rp1/00"]


def test_memory_that_is_not_prefetchable_or_has_32_bits_needs_the_other_window() -> None:
    bars = (bar(64), bar(16, prefetchable=False), bar(32, is_64bit=False))
    assert needed_windows([function("0000:3b:00.0", *bars)]) == Windows(64, 48)


@given(st.lists(st.integers(12, 38), min_size=1, max_size=6))
def test_the_window_for_some_bars_is_a_power_of_two_that_holds_them(bits: list[int]) -> None:
    device = function("0000:3b:00.0", *(bar(1 << size) for size in bits))
    window = window_for([device])
    total = sum(1 << size for size in bits) + max(0, (1 << max(bits)) - 4 * GIB)
    assert window & (window - 1) == 0
    assert total <= window < 2 * total


@pytest.mark.parametrize(("bar_gib", "window_gib"), [(1, 1), (4, 4), (8, 16), (16, 32)])
def test_a_large_bar_needs_twice_its_size_as_windows_are_aligned_to_4_gib(
    bar_gib: int, window_gib: int
) -> None:
    assert window_for([function("0000:3b:00.0", bar(bar_gib * GIB))]) == window_gib * GIB


def test_a_function_without_bars_needs_no_window() -> None:
    assert window_for([function()]) == 0


# NUMA


def test_a_port_near_the_function_is_taken_and_a_far_one_last() -> None:
    near, far, neutral = port(2, numa_node=1), port(0, numa_node=0), port(1)
    device = group(function(numa_node=1))
    assert choose(device, offer(far, neutral, near)) == ["rp2/00"]
    assert choose(device, offer(far, neutral)) == ["rp1/00"]
    assert choose(device, offer(far)) == ["rp0/00"]


# what is no PCI device


def mediated(kind: VFIODeviceType, **more: object) -> VfioGroup:
    device = MediatedDevice(
        uuid=UUID,
        type=kind,
        parent="matrix",
        sysfs_path=f"/sys/devices/x/{UUID}",
        **more,  # type: ignore[arg-type]
    )
    return VfioGroup(number=42, device_node="/dev/vfio/42", functions=(), mediated=device)


def test_a_mediated_pci_device_goes_to_any_port() -> None:
    assert choose(mediated(VFIODeviceType.MEDIATED), offer(port(0))) == ["rp0/00"]


def test_an_adapter_matrix_has_a_bus_of_its_own_that_takes_one() -> None:
    matrix = mediated(VFIODeviceType.AP, ap_queues=("05.001f", "06.0001"))
    assert choose(matrix, offer(ap=True)) == ["ap"]
    with pytest.raises(NoFreePort, match="supports only one"):
        choose(matrix, offer(ap=True), "ap")
    with pytest.raises(CannotPlug, match="vfio-ap"):
        choose(matrix, offer(port(0)))


def test_a_channel_device_gets_a_device_number() -> None:
    dasd = mediated(VFIODeviceType.CCW)
    vm = offer(ccw_used=frozenset({CcwDevNo(0, 1)}))
    assert choose(dasd, vm) == ["ccw/0.0.0002"]
    with pytest.raises(CannotPlug, match="vfio-ccw"):
        choose(dasd, offer(port(0)))


# plugs


def plan(device: VfioGroup, vm: Offer, options: VfioDriver) -> tuple[VFIODevices, Place]:
    place = options.choose_place(device, vm, set())
    return options.plan(NewPlug(id="0" * 16, device=device, read_only=False), place, vm), place


def test_every_function_of_the_group_is_in_the_plug_and_in_the_guests_address() -> None:
    device = group(function("0001:3b:00.0"), function("0001:3b:00.1"))
    plug, place = plan(device, offer(port(0)), VfioDriver())
    assert plug.devices == tuple(
        VFIODevice(
            name=f"0001:3b:00.{number}",
            type=VFIODeviceType.NORMAL,
            bdf=Bdf(1, 0x3B, 0, number),
            sysfs_path=f"/sys/bus/pci/devices/0001:3b:00.{number}",
        )
        for number in (0, 1)
    )
    guest = guest_address(plug, place)
    assert guest.functions == (
        GuestFunction("0001:3b:00.0", PciPath.parse("04/00")),
        GuestFunction("0001:3b:00.1", PciPath.parse("04/00.1")),
    )
    assert (guest.pci_path, str(guest)) == (PciPath.parse("04/00"), "PCI 04/00, 04/00.1")


def test_behind_an_expander_the_guests_address_has_the_root_bus() -> None:
    far = PciPort(
        bus="rpx", path=PciPath((PciSlot(0),), root_bus=0x20), free=(PciSlot(0),), numa_node=1
    )
    plug, place = plan(group(function(numa_node=1)), offer(far), VfioDriver())
    assert str(guest_address(plug, place).pci_path) == "20:00/00"


def test_queues_and_device_numbers_are_the_address_of_what_is_no_pci_device() -> None:
    matrix = mediated(VFIODeviceType.AP, ap_queues=("05.001f",))
    plug, place = plan(matrix, offer(ap=True), VfioDriver())
    assert isinstance(place, ApPlace)
    assert guest_address(plug, place).ap_queues == ("05.001f",)
    plug, place = plan(mediated(VFIODeviceType.CCW), offer(ccw_used=frozenset()), VfioDriver())
    assert isinstance(place, CcwPlace)
    assert guest_address(plug, place).ccw_devno == CcwDevNo(0, 1)


def test_the_devices_own_nodes_are_used_only_where_qemu_knows_them() -> None:
    device = group()._replace(cdev_nodes=(("0000:3b:00.0", "/dev/vfio/devices/vfio0"),))
    plug, _ = plan(device, offer(port(0), iommufd=True), VfioDriver())
    assert plug.devices[0].cdev_node == "/dev/vfio/devices/vfio0"
    plug, place = plan(device, offer(port(0)), VfioDriver())
    assert (plug.devices[0].cdev_node, isinstance(place, GroupPlace)) == (None, True)


# addresses of the guest

GPU_BAR = 128 * GIB


def large(count: int, window: int = 256 * GIB, **more: object) -> Offer:
    """A VM with ports that ask for large windows."""
    windows = replace(FIRMWARE_WINDOWS, prefetchable=window)
    return offer(*(port(index, windows=windows) for index in range(count)), port(20), **more)


@pytest.mark.parametrize(
    ("count", "bits", "is_enough"),
    [(5, 40, False), (4, 40, False), (3, 40, True), (5, 46, True), (5, None, True)],
)
def test_windows_that_exceed_the_guests_addresses_are_found(
    count: int, bits: int | None, *, is_enough: bool
) -> None:
    vm = large(count, address_bits=bits, memory_bytes=GIB)
    gpu = group(function("0000:17:00.0", bar(GPU_BAR)))
    found = list(check_address_space(gpu, vm))
    assert [finding.code for finding in found] == ([] if is_enough else [Code.NO_ADDRESS_SPACE])
    if found:
        assert f"need {count * 256} GiB" in found[0].message
        assert "has 1019 GiB for them (40 bits)" in found[0].message
    assert list(check_address_space(group(), vm)) == []


def test_the_guests_memory_takes_addresses_too() -> None:
    gpu = group(function("0000:17:00.0", bar(GPU_BAR)))
    enough = large(3, address_bits=40, memory_bytes=251 * GIB)
    assert list(check_address_space(gpu, enough)) == []
    assert list(check_address_space(gpu, replace(enough, memory_bytes=253 * GIB)))


# options


def test_options_are_read() -> None:
    parsed = VfioDriver.parse(
        {
            "port": "bridge-port",
            "rom": "on",
            "x-pci-vendor-id": "0x10de",
            "x-pci-device-id": "1b80",
        }
    )
    wanted = VfioDriver(port=PortKind.BRIDGE_PORT, rom=True, vendor_id=0x10DE, device_id=0x1B80)
    assert parsed == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", "rp0"),
        ("port", "no-port"),
        ("mode", "VFIO"),
        ("rom", "yes"),
        ("x-pci-vendor-id", "0x10dea"),
        ("x-pci-device-id", "nvidia"),
        ("x-pci-device-id", ""),
        ("romfile", "x"),
    ],
)
def test_a_wrong_option_is_named(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=key):
        VfioDriver.parse({key: value})


def test_a_mediated_device_has_no_ids_to_change() -> None:
    with pytest.raises(SpecError, match="mediated") as refusal:
        plan(mediated(VFIODeviceType.MEDIATED), offer(port(0)), VfioDriver(vendor_id=1))
    assert refusal.value.where == "option x-pci-vendor-id"


def test_a_group_cannot_be_read_only() -> None:
    (finding,) = VfioDriver().check(group(), read_only=True)
    assert finding.code is Code.CANNOT_BE_READ_ONLY
    assert list(VfioDriver().check(group(), read_only=False)) == []
