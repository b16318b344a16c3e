"""Addresses: `parse` reads what `str()` writes, and nothing out of range gets in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmplug.address import (
    NODE_NAME_MAX,
    Bdf,
    PciPath,
    PciSlot,
    ScsiAddress,
    device_id_of,
    new_id,
    qemu_id,
)
from vmplug.devnum import MAJOR_MAX, MINOR_MAX, DevNum

devnums = st.builds(DevNum, st.integers(0, MAJOR_MAX), st.integers(0, MINOR_MAX))
slots = st.builds(PciSlot, st.integers(0, 0x1F), st.integers(0, 7))
paths = st.builds(PciPath, st.lists(slots, min_size=1, max_size=6).map(tuple))
scsi_addresses = st.builds(ScsiAddress, st.integers(0, 255), st.integers(0, 255))


@given(devnums)
def test_a_device_number_survives_being_written_and_read(devnum: DevNum) -> None:
    assert DevNum.parse(str(devnum)) == devnum


@given(slots)
def test_a_pci_slot_survives_being_written_and_read(slot: PciSlot) -> None:
    assert PciSlot.parse(str(slot)) == slot
    assert PciSlot.from_devfn(slot.slot << 3 | slot.function) == slot


@pytest.mark.parametrize("text", ["3b:00.0", "3B:00.0", "0000:3b:00.0", "0000:3B:00.0"])
def test_an_address_is_one_however_a_person_writes_it(text: str) -> None:
    assert Bdf.parse_written(text) == Bdf(0, 0x3B, 0, 0)


@pytest.mark.parametrize("text", ["", "3b:00", "3b:20.0", "3b:00.8", "x3b:00.0", "Share:/A", "3B"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not DOMAIN:BUS:SLOT\.FUNCTION"):
        Bdf.parse_written(text)


@given(paths)
def test_a_pci_path_survives_being_written_and_read(path: PciPath) -> None:
    assert PciPath.parse(str(path)) == path


@given(paths, slots)
def test_a_child_is_one_slot_further_down(path: PciPath, slot: PciSlot) -> None:
    assert str(path.child(slot)) == f"{path}/{slot}"


@given(scsi_addresses)
def test_a_scsi_address_survives_being_written_and_read(address: ScsiAddress) -> None:
    assert ScsiAddress.parse(str(address)) == address


@given(st.integers(0, 0xFFFF))
def test_scsi_indices_count_luns_first(index: int) -> None:
    address = ScsiAddress.from_index(index)
    assert (address.scsi_id, address.lun) == divmod(index, 256)
    assert address.index == index


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("2", "02"),
        ("1F", "1f"),
        ("02.0", "02"),
        ("1f.7", "1f.7"),
    ],
)
def test_a_pci_slot_is_written_in_one_way(text: str, written: str) -> None:
    assert str(PciSlot.parse(text)) == written


def test_the_last_numbers_of_the_kernel_are_accepted() -> None:
    assert str(DevNum(4095, 1048575)) == "4095:1048575"


@pytest.mark.parametrize(
    ("major", "minor", "message"),
    [
        (-1, 0, "major -1 is not in 0..4095"),
        (4096, 0, "major 4096 is not in 0..4095"),
        (0, -1, "minor -1 is not in 0..1048575"),
        (0, 1048576, "minor 1048576 is not in 0..1048575"),
    ],
)
def test_a_number_the_kernel_cannot_hold_is_refused(major: int, minor: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DevNum(major, minor)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "8",
        "8:",
        ":0",
        "-1:0",
        "8:-1",
        "+8:0",
        "8: 0",
        "8:0:0",
        "8:0\n",
        "a:0",
        "²:0",
        "8:٣",
    ],
)
def test_anything_but_two_decimal_numbers_is_no_device_number(text: str) -> None:
    with pytest.raises(ValueError, match="is not MAJOR:MINOR"):
        DevNum.parse(text)


@pytest.mark.parametrize(("slot", "function"), [(-1, 0), (32, 0), (0, -1), (0, 8)])
def test_a_slot_or_function_that_no_bus_has_is_refused(slot: int, function: int) -> None:
    with pytest.raises(ValueError, match=r"is not in 0\.\."):
        PciSlot(slot, function)


@pytest.mark.parametrize(
    "text", ["", ".", "1.", ".1", "001", "1f.a", "-1", "0x1", "g", "1.0.0", " 1", "1\n", "00:02"]
)
def test_anything_else_is_no_pci_slot(text: str) -> None:
    with pytest.raises(ValueError, match="is not a PCI slot"):
        PciSlot.parse(text)


@pytest.mark.parametrize("text", ["20", "1f.8"])
def test_a_slot_out_of_range_is_refused_when_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not in 0\.\."):
        PciSlot.parse(text)


@pytest.mark.parametrize("text", ["", "/", "02/", "/02", "02//00"])
def test_a_pci_path_has_no_empty_component(text: str) -> None:
    with pytest.raises(ValueError, match="is not a PCI slot"):
        PciPath.parse(text)


def test_a_pci_path_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        PciPath(())


@pytest.mark.parametrize(("scsi_id", "lun"), [(-1, 0), (256, 0), (0, -1), (0, 256)])
def test_a_scsi_address_beyond_a_byte_is_refused(scsi_id: int, lun: int) -> None:
    with pytest.raises(ValueError, match=r"is not in 0\.\.255"):
        ScsiAddress(scsi_id, lun)


@pytest.mark.parametrize("index", [-1, 0x10000])
def test_a_scsi_index_beyond_the_last_address_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=r"is not in 0\.\.65535"):
        ScsiAddress.from_index(index)


@pytest.mark.parametrize("text", ["", "0", "0:", ":0", "0:-1", "0:0:0", "a:b", "0:1 "])
def test_anything_else_is_no_scsi_address(text: str) -> None:
    with pytest.raises(ValueError, match="is not ID:LUN"):
        ScsiAddress.parse(text)


def test_fresh_ids_are_sixteen_hexadecimal_digits_and_differ() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(name) == 16 and set(name) <= set("0123456789abcdef") for name in ids)


@given(st.sampled_from(["", "file", "limit", "x-y"]))
def test_every_part_of_a_device_leads_back_to_its_id(part: str) -> None:
    device_id = new_id()
    name = qemu_id(device_id, part)
    assert device_id_of(name) == device_id
    assert len(name) <= NODE_NAME_MAX


def test_the_longest_name_that_qemu_takes_is_made_and_the_next_refused() -> None:
    device_id = "0123456789abcdef"
    assert qemu_id(device_id, "seven77") == "vmplug-0123456789abcdef-seven77"
    with pytest.raises(ValueError, match="cannot name a part of a device"):
        qemu_id(device_id, "eight888")


def test_a_device_without_an_id_has_no_name() -> None:
    with pytest.raises(ValueError, match="cannot name a part of a device"):
        qemu_id("", "file")


@pytest.mark.parametrize("name", ["", "drive0", "#block123", "vmplug", "Vmplug-0", "x-vmplug-0"])
def test_somebody_elses_name_has_no_device_id(name: str) -> None:
    assert device_id_of(name) is None
