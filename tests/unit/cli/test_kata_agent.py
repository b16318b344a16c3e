"""What Kata's agent is told of a device, in its words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.unit.drivers.test_place import guest_addresses
from vmplug.address import CcwDevNo, PciPath, ScsiAddress
from vmplug.cli.render.kata_agent import agent_json
from vmplug.drivers.place import GuestAddress, GuestFunction
from vmplug.host.kind import DeviceType
from vmplug.journal.records import Attachment
from vmplug.journal.state import State

PCI, SCSI, CCW = PciPath.parse("02/00"), ScsiAddress(0, 3), CcwDevNo(0, 5)
BLOCK, FS, P9 = DeviceType.BLOCK, DeviceType.VHOST_USER_FS, DeviceType.VIRTIO_9P


def attachment(
    guest: GuestAddress | None,
    kind: DeviceType = BLOCK,
    *,
    read_only: bool = False,
    fs_type: str | None = None,
) -> Attachment:
    return Attachment(
        id="h",
        vm="sb1",
        owner="c1",
        name="/dev/vda",
        host_path="/srv/a.img",
        kind=kind,
        read_only=read_only,
        count=1,
        state=State.ATTACHED,
        guest_address=guest,
        device_id="0123456789abcdef",
        options={"fstype": fs_type} if fs_type else {},
    )


@pytest.mark.parametrize(
    ("guest", "kind", "type_", "device_id", "vm_path"),
    [
        (GuestAddress(pci_path=PCI), BLOCK, "blk", "02/00", ""),
        (GuestAddress(pci_path=PCI), DeviceType.VHOST_USER_BLK, "blk", "02/00", ""),
        (GuestAddress(pci_path=PCI, scsi_address=SCSI), BLOCK, "scsi", "0:3", ""),
        (GuestAddress(scsi_address=SCSI), BLOCK, "scsi", "0:3", ""),
        (GuestAddress(ccw_devno=CCW), BLOCK, "blk-ccw", "0.0.0005", ""),
        (GuestAddress(ccw_devno=CCW), DeviceType.VHOST_USER_BLK, "blk-ccw", "0.0.0005", ""),
        (GuestAddress(virt_path="/dev/vdb"), BLOCK, "mmioblk", "/dev/vdb", "/dev/vdb"),
        (GuestAddress(nvdimm_id=0, nvdimm_handle=1), BLOCK, "nvdimm", "", "/dev/pmem0"),
        (GuestAddress(nvdimm_id=2, nvdimm_handle=5), BLOCK, "nvdimm", "", "/dev/pmem2"),
    ],
)
def test_a_disk_is_named_by_its_type_and_what_the_agent_waits_for(
    guest: GuestAddress, kind: DeviceType, type_: str, device_id: str, vm_path: str
) -> None:
    assert agent_json(attachment(guest, kind)) == {
        "type": type_,
        "id": device_id,
        "vm_path": vm_path,
        "options": [],
    }


@pytest.mark.parametrize(
    ("guest", "read_only", "fs_type", "options"),
    [
        (GuestAddress(pci_path=PCI), True, None, ["ro"]),
        (GuestAddress(pci_path=PCI), False, "ext4", []),
        (GuestAddress(pci_path=PCI), True, "ext4", ["ro"]),
        (GuestAddress(nvdimm_id=0, nvdimm_handle=1), False, None, []),
        (GuestAddress(nvdimm_id=0, nvdimm_handle=1), False, "ext4", ["dax"]),
        (GuestAddress(nvdimm_id=0, nvdimm_handle=1), True, "ext4", ["dax", "ro"]),
        (GuestAddress(nvdimm_id=0, nvdimm_handle=1), True, None, ["ro"]),
    ],
)
def test_a_file_system_is_mounted_with_its_options(
    guest: GuestAddress, *, read_only: bool, fs_type: str | None, options: list[str]
) -> None:
    told = agent_json(attachment(guest, read_only=read_only, fs_type=fs_type))
    assert told
    assert (told.get("fstype"), told["options"]) == (fs_type, options)


@pytest.mark.parametrize(
    "guest",
    [
        GuestAddress(pci_path=PCI, mount_tag="work"),
        GuestAddress(ccw_devno=CCW, mount_tag="work"),
        GuestAddress(mount_tag="work"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_share_is_mounted_by_its_tag_wherever_it_sits(
    guest: GuestAddress, *, read_only: bool
) -> None:
    ro = ["ro"] if read_only else []
    assert agent_json(attachment(guest, FS, read_only=read_only)) == {
        "type": "virtio-fs",
        "id": "work",
        "vm_path": "",
        "fstype": "virtiofs",
        "options": ro,
    }
    assert agent_json(attachment(guest, P9, read_only=read_only)) == {
        "type": "9p",
        "id": "work",
        "vm_path": "",
        "fstype": "9p",
        "options": ["trans=virtio,version=9p2000.L", *ro],
    }


@pytest.mark.parametrize(
    ("guest", "kind"),
    [
        (None, DeviceType.GENERIC),
        (GuestAddress(pci_path=PCI), DeviceType.VHOST_USER_SCSI),
        (GuestAddress(pci_path=PCI, mac_address="52:54:00:1:2:3"), DeviceType.VHOST_USER_NET),
        (GuestAddress(pci_path=PCI), DeviceType.VIRTIO_RNG),
        (GuestAddress(), DeviceType.VIRTIO_RNG),
        (GuestAddress(nvdimm_handle=1), BLOCK),
    ],
)
def test_the_agent_gets_no_device_that_it_cannot_describe(
    guest: GuestAddress | None, kind: DeviceType
) -> None:
    assert agent_json(attachment(guest, kind)) is None


@pytest.mark.parametrize(
    ("guest", "name", "options", "expected"),
    [
        (
            GuestAddress(
                pci_path=PCI,
                functions=(
                    GuestFunction("0001:41:00.0", PciPath.parse("03/00")),
                    GuestFunction("0001:41:00.1", PciPath.parse("03/00.1")),
                ),
            ),
            "/dev/vfio/12",
            {},
            ("vfio-pci", "12", ["0001:41:00.0=03/00", "0001:41:00.1=03/00.1"]),
        ),
        (
            GuestAddress(
                pci_path=PCI, functions=(GuestFunction("0000:41:00.0", PciPath.parse("03/00")),)
            ),
            "/dev/vfio/devices/vfio3",
            {"mode": "guest-kernel"},
            ("vfio-pci-gk", "vfio3", ["0000:41:00.0=03/00"]),
        ),
        (
            GuestAddress(ap_queues=("05.001f", "05.0020")),
            "/dev/vfio/9",
            {},
            ("vfio-ap", "9", ["05.001f", "05.0020"]),
        ),
    ],
)
def test_the_agent_is_told_of_every_function_or_queue(
    guest: GuestAddress,
    name: str,
    options: dict[str, str],
    expected: tuple[str, str, list[str]],
) -> None:
    held = replace(attachment(guest, DeviceType.VFIO), name=name, options=options)
    told = agent_json(held)
    assert told is not None
    assert (told["type"], told["id"], told["options"]) == expected


@given(guest=guest_addresses, kind=st.sampled_from(DeviceType), read_only=st.booleans())
def test_every_answer_says_what_the_agent_reads(
    guest: GuestAddress, kind: DeviceType, *, read_only: bool
) -> None:
    told = agent_json(attachment(guest, kind, read_only=read_only))
    if told is not None:
        assert {"type", "id", "vm_path", "options"} <= told.keys()
        assert told["id"] or told["vm_path"]
        # A VFIO device cannot be read-only, and is never attached so.
        assert ("ro" in told["options"]) is (read_only and kind is not DeviceType.VFIO)
