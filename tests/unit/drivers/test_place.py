"""Places and guest addresses: each written in one way, and the same again when read back."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import structs
from msgspec.structs import replace

from tests.support.journal import in_progress
from vmplug.address import CcwDevNo, PciPath, PciSlot, ScsiAddress, virtio_disk_path
from vmplug.drivers.place import (
    UNPLUGGED_NEVER,
    CcwPlace,
    GuestAddress,
    GuestFunction,
    MemorySlot,
    MmioPlace,
    PciPlace,
    Place,
    ScsiPlace,
)
from vmplug.drivers.plug import (
    BlockDrive,
    DiskFrontend,
    Plug,
    RNGDevice,
    SharedFS,
    VhostUserDevice,
    guest_address,
)
from vmplug.errors import StoreError
from vmplug.host.kind import DeviceType, Identity
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, DeviceRecord, guest_text
from vmplug.journal.state import State

slots = st.builds(PciSlot, st.integers(0, 0x1F), st.integers(0, 7))
paths = st.builds(PciPath, st.lists(slots, min_size=1, max_size=4).map(tuple))
scsi_addresses = st.builds(ScsiAddress, st.integers(0, 255), st.integers(0, 255))
devnos = st.builds(CcwDevNo, st.integers(0, 3), st.integers(0, 0xFFFF))
texts = st.text(min_size=1, max_size=36)
guest_addresses = st.builds(
    GuestAddress,
    pci_path=st.none() | paths,
    scsi_address=st.none() | scsi_addresses,
    ccw_devno=st.none() | devnos,
    virt_path=st.none() | st.integers(0, 10**6).map(virtio_disk_path),
    nvdimm_id=st.none() | st.integers(0, 1 << 32),
    nvdimm_handle=st.none() | st.integers(1, 1 << 32),
    mount_tag=st.none() | texts,
    mac_address=st.none() | texts,
    functions=st.lists(
        st.builds(GuestFunction, host=texts, pci_path=st.none() | paths), max_size=3
    ).map(tuple),
    ap_queues=st.lists(texts, max_size=3).map(tuple),
)


# Device numbers of the channel subsystem


@given(devnos)
def test_a_device_number_survives_being_written_and_read(devno: CcwDevNo) -> None:
    assert CcwDevNo.parse(str(devno)) == devno
    assert CcwDevNo.parse(devno.qemu) == devno


@given(devnos, devnos)
def test_no_two_device_numbers_are_written_alike(one: CcwDevNo, other: CcwDevNo) -> None:
    assert (str(one) == str(other)) is (one == other)
    assert (one.qemu == other.qemu) is (one == other)


@pytest.mark.parametrize(
    ("text", "written", "qemu"),
    [
        ("0.2.0005", "0.2.0005", "fe.2.0005"),
        ("fe.2.0005", "0.2.0005", "fe.2.0005"),
        ("0.0.5", "0.0.0005", "fe.0.0005"),
        ("0.3.FFFF", "0.3.ffff", "fe.3.ffff"),
    ],
)
def test_a_device_number_is_written_in_one_way(text: str, written: str, qemu: str) -> None:
    devno = CcwDevNo.parse(text)
    assert (str(devno), devno.qemu) == (written, qemu)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0.0",
        "0.0.",
        "0..5",
        ".0.5",
        "0.0.0.5",
        "1.0.5",
        "ff.0.5",
        "FE.0.5",
        "00.0.5",
        "0.a.5",
        "0.-1.5",
        "0.0.-1",
        "0.0.g",
        "0.0.0x5",
        "0.0.5 ",
        "0.0.5\n",
        " 0.0.5",
        "0.٣.5",
        "0.0.٣",
    ],
)
def test_anything_else_is_no_device_number(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a device number 0\.SSID\.DEVNO") as caught:
        CcwDevNo.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("ssid", "devno", "message"),
    [
        (-1, 0, r"subchannel set -1 is not in 0\.\.3"),
        (4, 0, r"subchannel set 4 is not in 0\.\.3"),
        (0, -1, r"device number -0x1 is not in 0\.\.0xffff"),
        (0, 0x10000, r"device number 0x10000 is not in 0\.\.0xffff"),
    ],
)
def test_a_device_number_out_of_range_is_refused(ssid: int, devno: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CcwDevNo(ssid, devno)
    if devno >= 0 and ssid >= 0:
        with pytest.raises(ValueError, match=message):
            CcwDevNo.parse(f"0.{ssid}.{devno:x}")


@given(st.text(max_size=12) | st.from_regex(r"(0|fe)\.[0-9]{1,2}\.[0-9a-f]{1,5}", fullmatch=True))
@example("0." + "9" * 5000 + ".0")
def test_any_text_is_a_device_number_or_a_value_error(text: str) -> None:
    devno = None
    try:
        devno = CcwDevNo.parse(text)
    except ValueError:
        return
    assert CcwDevNo.parse(str(devno)) == devno


# Names of virtio disks


@pytest.mark.parametrize(
    ("index", "path"),
    [
        (0, "/dev/vda"),
        (25, "/dev/vdz"),
        (26, "/dev/vdaa"),
        (51, "/dev/vdaz"),
        (52, "/dev/vdba"),
        (701, "/dev/vdzz"),
        (702, "/dev/vdaaa"),
    ],
)
def test_disks_are_named_as_linux_names_them(index: int, path: str) -> None:
    assert virtio_disk_path(index) == path


@given(st.integers(0, 10**9))
def test_the_name_of_a_disk_counts_in_letters(index: int) -> None:
    letters = virtio_disk_path(index).removeprefix("/dev/vd")
    value = 0
    for letter in letters:
        assert "a" <= letter <= "z"
        value = value * 26 + ord(letter) - ord("a") + 1
    assert value == index + 1


@given(st.integers(max_value=-1))
def test_there_is_no_disk_before_the_first(index: int) -> None:
    with pytest.raises(ValueError, match=f"disk index {index} is negative"):
        virtio_disk_path(index)


# Places

buses = st.sampled_from(["rp0", "rp1", "scsi0.0", "pci.1"])
places: st.SearchStrategy[Place] = st.one_of(
    st.builds(PciPlace, bus=buses, slot=slots, path=paths),
    st.builds(ScsiPlace, bus=buses, address=scsi_addresses, path=st.none() | paths),
    st.builds(CcwPlace, devno=devnos),
    st.integers(0, 31).map(lambda i: MmioPlace(bus=f"virtio-mmio-bus.{i}", index=i)),
    st.builds(MemorySlot, slot=st.integers(0, 255), index=st.integers(0, 255)),
)


def essence(place: Place) -> object:
    """What makes it one place: not how the guest counts or reaches it."""
    match place:
        case PciPlace():
            return (PciPlace, place.bus, place.slot)
        case ScsiPlace():
            return (ScsiPlace, place.bus, place.address)
        case MemorySlot():
            return (MemorySlot, place.slot)
        case _:
            return place


@given(places, places)
def test_the_text_of_a_place_is_the_place(one: Place, other: Place) -> None:
    """The journal keeps only the text, and lets no place be taken twice by it."""
    assert (str(one) == str(other)) is (essence(one) == essence(other))


@given(places)
def test_only_memory_and_mmio_are_never_left(place: Place) -> None:
    never = isinstance(place, MemorySlot | MmioPlace)
    assert str(place).startswith(UNPLUGGED_NEVER) is never
    assert record(GuestAddress(), place=str(place)).can_be_unplugged is not never


# Guest addresses as people read them

PCI, SCSI, CCW = PciPath.parse("02/00"), ScsiAddress(0, 3), CcwDevNo(0, 5)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (GuestAddress(), ""),
        (GuestAddress(pci_path=PCI), "PCI 02/00"),
        (GuestAddress(pci_path=PCI, scsi_address=SCSI), "SCSI 0:3"),
        (GuestAddress(scsi_address=SCSI), "SCSI 0:3"),
        (GuestAddress(ccw_devno=CCW), "CCW 0.0.0005"),
        (GuestAddress(virt_path="/dev/vda"), "/dev/vda"),
        (GuestAddress(nvdimm_id=0), "/dev/pmem0"),
        (GuestAddress(nvdimm_id=2, nvdimm_handle=7), "/dev/pmem2"),
        (GuestAddress(nvdimm_handle=7), "NVDIMM with handle 7"),
        (GuestAddress(mount_tag="work"), "tag work"),
        (GuestAddress(pci_path=PCI, mount_tag="work"), "PCI 02/00 tag work"),
        (GuestAddress(ccw_devno=CCW, mount_tag="work"), "CCW 0.0.0005 tag work"),
        (
            GuestAddress(pci_path=PCI, mac_address="52:54:00:12:34:56"),
            "PCI 02/00 52:54:00:12:34:56",
        ),
        (GuestAddress(mac_address="52:54:00:12:34:56"), "52:54:00:12:34:56"),
    ],
)
def test_an_address_is_read_as_what_the_guest_looks_for(address: GuestAddress, text: str) -> None:
    assert str(address) == text


@given(guest_addresses)
def test_only_what_has_no_address_at_all_is_empty(address: GuestAddress) -> None:
    one = replace(address, functions=address.functions[:1])  # which is at pci_path
    assert (str(one) == "") is (replace(one, functions=()) == GuestAddress())


def drive(driver: DiskFrontend = DiskFrontend.VIRTIO_BLOCK) -> BlockDrive:
    return BlockDrive(id="a", file="/srv/a.img", is_device=False, driver=driver)


def vhost_user(kind: DeviceType) -> VhostUserDevice:
    is_fs, is_net = kind is DeviceType.VHOST_USER_FS, kind is DeviceType.VHOST_USER_NET
    return VhostUserDevice(
        id="a", type=kind, tag="work" if is_fs else None, mac_address="mac" if is_net else None
    )


MMIO = MmioPlace(bus="virtio-mmio-bus.3", index=3)
PORT = PciPlace(bus="rp0", slot=PciSlot(0), path=PCI)


@pytest.mark.parametrize(
    ("plug", "virt_path", "tag", "mac"),
    [
        (drive(), "/dev/vdd", None, None),
        (vhost_user(DeviceType.VHOST_USER_BLK), "/dev/vdd", None, None),
        (vhost_user(DeviceType.VHOST_USER_SCSI), None, None, None),
        (vhost_user(DeviceType.VHOST_USER_NET), None, None, "mac"),
        (vhost_user(DeviceType.VHOST_USER_FS), None, "work", None),
        (SharedFS(id="a", directory="/d", tag="work", read_only=True), None, "work", None),
        (RNGDevice(id="a", filename="/dev/urandom"), None, None, None),
    ],
)
def test_only_disks_are_named_by_their_transport(
    plug: Plug, virt_path: str | None, tag: str | None, mac: str | None
) -> None:
    known = GuestAddress(mount_tag=tag, mac_address=mac)
    assert guest_address(plug, MMIO) == replace(known, virt_path=virt_path)
    assert guest_address(plug, PORT) == replace(known, pci_path=PCI)
    assert guest_address(plug, CcwPlace(devno=CCW)) == replace(known, ccw_devno=CCW)


@given(st.integers(0, 255), st.integers(0, 255))
def test_the_handle_of_an_nvdimm_is_its_slot_counted_from_one(slot: int, index: int) -> None:
    address = guest_address(drive(DiskFrontend.NVDIMM), MemorySlot(slot=slot, index=index))
    assert address == GuestAddress(nvdimm_id=index, nvdimm_handle=slot + 1)


# Guest addresses as they are saved


def record(address: GuestAddress | None, *, place: str | None = "rp0/00") -> DeviceRecord:
    return DeviceRecord(
        id="0123456789abcdef",
        vm="sb1",
        identity=Identity.parse("file:/srv/a.img"),
        kind=DeviceType.BLOCK,
        host_path="/srv/a.img",
        state=State.PLUGGING,
        read_only=False,
        share_rw=False,
        options={},
        place=place,
        guest_address=address,
    )


def hold(device: DeviceRecord) -> Attachment:
    return Attachment(
        id="h",
        vm=device.vm,
        owner="c1",
        name="/dev/vda",
        host_path=device.host_path,
        kind=device.kind,
        read_only=device.read_only,
        count=1,
        state=device.state,
        guest_address=device.guest_address,
        device_id=device.id,
        options=device.options,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journal]:
    with Journal.open(tmp_path_factory.mktemp("state")) as opened:
        yield opened


@settings(max_examples=settings().max_examples // 2)  # each example waits for the disk
@given(address=st.none() | guest_addresses)
@example(address=GuestAddress())
def test_an_address_comes_out_of_the_journal_as_it_went_in(
    store: Journal, address: GuestAddress | None
) -> None:
    device = record(address)
    store.add_devices([device], [hold(device)])
    try:
        assert store.devices("sb1") == [in_progress(device, store)]
        (attachment,) = store.attachments("sb1")
        assert attachment.guest_address == address
    finally:
        store.forget_devices([device.id])


@given(guest_addresses)
def test_the_saved_text_is_json_of_what_is_known(address: GuestAddress) -> None:
    saved = json.loads(guest_text(address) or "")
    known = structs.asdict(address)
    assert saved.keys() == {name for name, value in known.items() if value not in {None, ()}}
    for name, value in saved.items():
        if name == "functions":
            written = [[f.host, f.pci_path and str(f.pci_path)] for f in known[name]]
        else:
            written = list(known[name]) if name == "ap_queues" else known[name]
        assert str(value) == str(written)


def test_a_counted_device_has_no_text() -> None:
    assert guest_text(None) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "[]", "7"),
        '{"pci_path": "zz"}',
        '{"pci_path": 7}',
        '{"ccw_devno": "0.9.0"}',
        '{"nvdimm_id": "one"}',
        '{"novelty": "one"}',
    ],
)
def test_a_damaged_address_makes_a_journal_unreadable_and_nothing_else(
    store: Journal, text: str
) -> None:
    device = record(GuestAddress(pci_path=PCI))
    store.add_devices([device], [])
    try:
        with closing(sqlite3.connect(store.path)) as db:
            db.execute("UPDATE device SET guest = ?", (text,))
            db.commit()
            with pytest.raises(StoreError, match="is damaged") as caught:
                store.devices("sb1")
            assert caught.value.hint
            assert db.execute("SELECT guest FROM device").fetchall() == [(text,)]
    finally:
        store.forget_devices([device.id])
