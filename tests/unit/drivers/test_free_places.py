"""Places for devices that are no plain disks: the lowest that is free, or why there is none."""

from functools import partial
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.support.scsi import first_addresses
from tests.support.work import count_lines
from vmplug.address import CcwDevNo, PciPath, PciSlot
from vmplug.drivers.free_places import (
    Taken,
    ccw_places,
    check_shared_memory,
    cold_plug_only,
    memory_slot,
    mmio_places,
    pci_places,
    scsi_places,
    virtio_place,
)
from vmplug.drivers.place import (
    CcwPlace,
    MemorySlot,
    MmioPlace,
    Offer,
    PciPlace,
    PciPort,
    PlugMode,
    ScsiController,
    Windows,
)
from vmplug.errors import CannotPlug, NoFreePort

WHAT = "a random number device"


def port(bus: str, path: str, *free: int) -> PciPort:
    return PciPort(bus=bus, path=PciPath.parse(path), free=tuple(map(PciSlot, free)))


def transports(*indices: int) -> tuple[MmioPlace, ...]:
    return tuple(MmioPlace(bus=f"virtio-mmio-bus.{index}", index=index) for index in indices)


Q35 = Offer(
    machine="q35",
    ports=(port("rp1", "02", 0), port("br0", "03", 1, 31)),
    controllers=(),
    shared_memory=True,
    nvdimm=True,
    memory_slots=4,
)
S390X = Offer(
    machine="s390-ccw-virtio",
    ports=(),
    controllers=(),
    shared_memory=True,
    ccw_used=frozenset({CcwDevNo(0, 1), CcwDevNo(1, 2)}),
)
MICROVM = Offer(
    machine="microvm",
    ports=(),
    controllers=(),
    shared_memory=True,
    mode=PlugMode.COLD,
    mmio=transports(3, 4, 5),
)
NOTHING = replace(Q35, ports=())


# Everything there is


def test_pci_places_are_all_free_slots_of_all_ports() -> None:
    assert list(pci_places(Q35)) == [
        PciPlace(bus="rp1", slot=PciSlot(0), path=PciPath.parse("02/00")),
        PciPlace(bus="br0", slot=PciSlot(1), path=PciPath.parse("03/01")),
        PciPlace(bus="br0", slot=PciSlot(31), path=PciPath.parse("03/1f")),
    ]


def test_ports_with_large_windows_are_the_last() -> None:
    large = replace(port("rp0", "01", 0), windows=Windows(1 << 30, 2 << 20))
    places = pci_places(replace(Q35, ports=(large, *Q35.ports)))
    assert [str(place) for place in places] == ["rp1/00", "br0/01", "br0/1f", "rp0/00"]


def test_ccw_places_are_all_of_the_first_set_but_zero_and_those_in_use() -> None:
    places = [str(place) for place in ccw_places(S390X)]
    assert places[:2] == ["ccw/0.0.0002", "ccw/0.0.0003"]
    assert places[-1] == "ccw/0.0.ffff"
    assert len(places) == len(set(places)) == 0xFFFF - 1


def test_mmio_places_are_those_of_the_machine() -> None:
    assert tuple(mmio_places(MICROVM)) == MICROVM.mmio


def test_scsi_places_are_all_free_addresses_of_all_controllers() -> None:
    used = first_addresses(0xFFFF)
    controllers = (
        ScsiController(bus="a.0", path=None, used=used),
        ScsiController(bus="b.0", path=PciPath.parse("05"), used=frozenset()),
    )
    places = scsi_places(replace(Q35, controllers=controllers))
    first, second = next(places), next(places)
    assert (str(first), first.path) == ("a.0/255:255", None)
    assert (str(second), second.path) == ("b.0/0:0", PciPath.parse("05"))


def test_scsi_places_leave_out_what_is_taken() -> None:
    offer = replace(Q35, controllers=(ScsiController(bus="a.0", path=None, used=frozenset()),))
    taken = {str(place) for place in islice(scsi_places(offer), 300)} - {"a.0/1:3"}
    free = [str(place) for place in islice(scsi_places(offer, taken), 2)]
    assert free == ["a.0/1:3", "a.0/1:44"]


def in_turn(taken: Taken, count: int) -> list[str]:
    """The places that one plan gives to so many disks."""
    controllers = (ScsiController(bus=f"{name}.0", path=None, used=frozenset()) for name in "ab")
    offer = replace(Q35, controllers=tuple(controllers))
    chosen = list[str]()
    for _ in range(count):
        chosen.append(str(next(scsi_places(offer, taken))))
        taken.add(chosen[-1])
    return chosen


def test_a_plan_gives_each_free_scsi_address_once_lowest_first() -> None:
    known = ["a.0/0:0", "a.0/0:2", "a.0/0:3"]
    assert in_turn(Taken(known), 4) == ["a.0/0:1", "a.0/0:4", "a.0/0:5", "a.0/0:6"]
    full = [f"a.0/{index >> 8}:{index & 0xFF}" for index in range(1 << 16)]
    assert in_turn(Taken(full), 2) == ["b.0/0:0", "b.0/0:1"]


def test_the_next_scsi_address_costs_as_much_after_many() -> None:
    few, many = (count_lines(partial(in_turn, Taken(), n)) / n for n in (10, 1000))
    assert many <= few


@pytest.mark.parametrize("offer", [NOTHING, MICROVM])
def test_a_machine_has_no_places_of_a_kind_that_it_lacks(offer: Offer) -> None:
    assert [*pci_places(offer), *scsi_places(offer), *ccw_places(offer)] == []
    assert list(mmio_places(NOTHING)) == []


# One of them


@pytest.mark.parametrize(
    ("offer", "taken", "place"),
    [
        (Q35, (), "rp1/00"),
        (Q35, ("rp1/00",), "br0/01"),
        (Q35, ("rp1/00", "br0/01"), "br0/1f"),
        (Q35, ("br0/01",), "rp1/00"),
        (S390X, (), "ccw/0.0.0002"),
        (S390X, ("ccw/0.0.0002", "ccw/0.0.0004"), "ccw/0.0.0003"),
        (replace(S390X, ports=Q35.ports), (), "rp1/00"),
    ],
)
def test_a_virtio_device_gets_the_first_free_place(
    offer: Offer, taken: tuple[str, ...], place: str
) -> None:
    assert str(virtio_place(offer, taken, WHAT)) == place
    assert str(virtio_place(offer, taken, WHAT, is_disk=True)) == place


@pytest.mark.parametrize(
    ("taken", "is_disk", "place"),
    [
        ((), True, 3),
        ((), False, 5),
        (("virtio-mmio-bus.3",), True, 4),
        (("virtio-mmio-bus.5",), False, 4),
        (("virtio-mmio-bus.3", "virtio-mmio-bus.4"), False, 5),
    ],
)
def test_on_a_microvm_disks_come_from_below_and_others_from_above(
    taken: tuple[str, ...], *, is_disk: bool, place: int
) -> None:
    """So that the guest's names of disks do not depend on what else there is."""
    found = virtio_place(MICROVM, taken, WHAT, is_disk=is_disk)
    assert found == MmioPlace(bus=f"virtio-mmio-bus.{place}", index=place)


@given(st.sets(st.sampled_from(["rp1/00", "br0/01", "br0/1f"])))
def test_a_taken_place_is_never_given_again(taken: set[str]) -> None:
    found = None
    try:
        found = virtio_place(Q35, taken, WHAT)
    except NoFreePort:
        assert len(taken) == 3
    assert str(found) not in taken


@pytest.mark.parametrize(
    ("offer", "taken"),
    [
        (NOTHING, ()),
        (Q35, ("rp1/00", "br0/01", "br0/1f")),
        (replace(Q35, ports=(port("rp1", "02"),)), ()),
        (replace(MICROVM, mmio=transports(0)), ("virtio-mmio-bus.0",)),
        (replace(MICROVM, mmio=()), ()),
    ],
)
@pytest.mark.parametrize("is_disk", [False, True])
def test_no_place_left_is_said_with_the_device_and_a_remedy(
    offer: Offer, taken: tuple[str, ...], *, is_disk: bool
) -> None:
    with pytest.raises(NoFreePort, match=f"the VM \\({offer.machine}\\) has no free") as caught:
        virtio_place(offer, taken, WHAT, is_disk=is_disk)
    assert caught.value.message.endswith(WHAT)
    assert ("--ports" in (caught.value.hint or "")) is (offer.machine == "q35")


@pytest.mark.parametrize("is_disk", [False, True])
def test_a_microvm_that_runs_takes_nothing(*, is_disk: bool) -> None:
    running = replace(MICROVM, mode=PlugMode.HOT, ports=Q35.ports)
    with pytest.raises(CannotPlug) as caught:
        virtio_place(running, (), WHAT, is_disk=is_disk)
    assert caught.value.reason == "cold-plug-only"
    assert caught.value.message == f"{WHAT} can only be plugged before the VM starts"
    assert caught.value.hint


def test_a_device_for_cold_plug_only_is_refused_with_a_remedy() -> None:
    error = cold_plug_only("a virtio-9p share")
    assert (error.reason, error.message) == (
        "cold-plug-only",
        "a virtio-9p share can only be plugged before the VM starts",
    )
    assert "vmplug vm start" in (error.hint or "")


# Memory slots


@pytest.mark.parametrize(
    ("used", "taken", "slot"),
    [
        ((), (), 0),
        ((0,), (), 1),
        ((1,), (), 0),
        ((), ("memory/0",), 1),
        ((0, 2), ("memory/1",), 3),
        ((0,), ("memory/0",), 1),
        ((), ("rp1/00", "memory/10"), 0),
    ],
)
def test_an_nvdimm_gets_the_lowest_slot(
    used: tuple[int, ...], taken: tuple[str, ...], slot: int
) -> None:
    offer = replace(Q35, memory_slots_used=frozenset(used))
    assert memory_slot(offer, taken).slot == slot


@given(st.lists(st.booleans(), max_size=4), st.integers(0, 3))
def test_nvdimms_that_come_one_after_another_are_numbered_in_that_order(
    plugged: list[bool], others: int
) -> None:
    """Whether the VM holds those before by now, or only the journal does."""
    offer = replace(Q35, memory_slots=8, memory_slots_used=frozenset(range(others)))
    taken: set[str] = set()
    for number, is_plugged in enumerate(plugged):
        found = memory_slot(offer, taken)
        assert found == MemorySlot(slot=others + number, index=number)
        taken.add(str(found))
        if is_plugged:
            used = offer.memory_slots_used | {found.slot}
            offer = replace(offer, memory_slots_used=used, nvdimms=offer.nvdimms + 1)


@pytest.mark.parametrize(
    ("used", "taken"),
    [
        ((0, 1, 2, 3), ()),
        ((), ("memory/0", "memory/1", "memory/2", "memory/3")),
        ((0, 2), ("memory/1", "memory/3")),
    ],
)
def test_full_slots_are_said_and_that_none_is_ever_freed(
    used: tuple[int, ...], taken: tuple[str, ...]
) -> None:
    with pytest.raises(NoFreePort, match="all 4 memory slots of the VM are in use") as caught:
        memory_slot(replace(Q35, memory_slots_used=frozenset(used)), taken)
    assert "cannot unplug an NVDIMM" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("offer", "remedy"),
    [
        (replace(Q35, nvdimm=False), "nvdimm=on"),
        (replace(Q35, memory_slots=0), "slots=N"),
        (S390X, "as a disk"),
        (MICROVM, "as a disk"),
    ],
    ids=["no NVDIMMs", "no slots", "s390x", "microvm"],
)
def test_a_machine_without_nvdimms_says_what_to_do_now(offer: Offer, remedy: str) -> None:
    with pytest.raises(CannotPlug) as caught:
        memory_slot(offer, ())
    assert caught.value.reason == "no-nvdimm"
    assert caught.value.message == f"the VM ({offer.machine}) does not support NVDIMMs"
    assert remedy in (caught.value.hint or "")


# Shared memory


def test_shared_memory_is_all_that_a_backend_needs() -> None:
    check_shared_memory(Q35, "a virtio-fs share")


def test_memory_that_is_not_shared_is_refused_with_the_way_to_share_it() -> None:
    with pytest.raises(CannotPlug) as caught:
        check_shared_memory(replace(Q35, shared_memory=False), "a virtio-fs share")
    assert caught.value.reason == "memory-not-shared"
    assert (
        caught.value.message
        == "the VM's memory is not shared with other processes, and a virtio-fs share needs that"
    )
    assert "share=on" in (caught.value.hint or "")


def test_the_first_number_of_the_channel_subsystem_is_the_machines() -> None:
    bare = replace(S390X, ccw_used=frozenset())
    assert virtio_place(bare, (), WHAT) == CcwPlace(devno=CcwDevNo(0, 1))
