"""What a node, an address or a UUID of VFIO names on the host."""

from pathlib import Path

import pytest

from tests.support.pci_tree import PciTree
from vmplug.address import Bdf
from vmplug.devnum import DevNum
from vmplug.errors import NoSuchDevice, SpecError
from vmplug.host.kind import FoundBy, Identity
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.mdev import VFIODeviceType, read_mdev_types
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.resolve import resolve
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import VfioInfo

FIRST, SECOND, BRIDGE = "0000:3b:00.0", "0000:3b:00.1", "0000:3a:00.0"
FAR = "10000:e1:00.0"
"""A domain of five digits, as behind Intel's VMD."""
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    tree = PciTree(tmp_path)
    tree.pci_function(BRIDGE, class_code=0x060400, driver="pcieport", group=26)
    for bdf in (FIRST, SECOND):
        tree.pci_function(bdf, driver="vfio-pci", group=26, below=BRIDGE)
    return tree.vfio_group(26).pci_function(FAR, driver="vfio-pci", group=7)


def named(device: str, tree: PciTree) -> VfioGroup:
    found = resolve(VfioInfo(label="a", device=device), tree.root)
    assert isinstance(found, VfioGroup)
    return found


def asked(number: str, tree: PciTree) -> VfioGroup:
    info = DeviceInfo(
        container_path="/dev/anything", dev_type=DevType.CHAR, devnum=DevNum.parse(number)
    )
    found = resolve(info, tree.root)
    assert isinstance(found, VfioGroup)
    return found


def test_every_name_of_a_group_gives_the_whole_of_it(tree: PciTree) -> None:
    by_number, by_node = asked("243:26", tree), named("/dev/vfio/26", tree)
    by_address = named(SECOND, tree)
    for group in (by_number, by_node, by_address):
        assert (group.number, group.members) == (26, (FIRST, SECOND))
        assert [str(bridge.bdf) for bridge in group.bridges] == [BRIDGE]
        assert (group.host_path, group.identity) == ("/dev/vfio/26", Identity.of_vfio(FIRST))
    assert (by_number.found_by, by_node.found_by) == (FoundBy.SYSFS, FoundBy.FILE)
    assert by_address.named == SECOND


def test_a_domain_of_five_digits_is_not_another_ones(tree: PciTree) -> None:
    tree.pci_function("0000:e1:00.0", driver="nvme", group=8)
    assert named(FAR, tree).members == (FAR,)
    assert named("0000:e1:00.0", tree).members == ("0000:e1:00.0",)
    assert str(Bdf.parse(FAR)) == FAR


def test_a_devices_own_node_gives_its_group_and_the_nodes_of_all(tree: PciTree) -> None:
    tree.vfio_cdev(FIRST, 0).vfio_cdev(SECOND, 1)
    for number in (0, 1):
        tree.file(f"/dev/vfio/devices/vfio{number}")
    group = asked("511:1", tree)
    assert (group.number, group.members) == (26, (FIRST, SECOND))
    assert group.host_path == "/dev/vfio/devices/vfio1"
    assert group.cdev_nodes == (
        (FIRST, "/dev/vfio/devices/vfio0"),
        (SECOND, "/dev/vfio/devices/vfio1"),
    )


def test_nodes_are_used_only_when_every_member_has_one(tree: PciTree) -> None:
    tree.vfio_cdev(FIRST, 0).file("/dev/vfio/devices/vfio0")
    assert asked("511:0", tree).cdev_nodes == ()


def test_a_mediated_devices_node_never_gives_its_parent(tree: PciTree) -> None:
    tree.pci_function("0000:00:02.0", driver="i915", group=1)
    tree.mdev_type("0000:00:02.0", "i915-GVTg_V5_4").mdev(
        UUID, "0000:00:02.0", "i915-GVTg_V5_4", group=27
    )
    tree.vfio_cdev(UUID, 5)
    for group in (asked("511:5", tree), named(UUID, tree)):
        assert (group.members, group.functions) == ((UUID,), ())
        assert group.mediated
        assert (group.mediated.type, group.mediated.parent) == (
            VFIODeviceType.MEDIATED,
            "0000:00:02.0",
        )
        assert group.mediated.sysfs_path == f"/sys/devices/pci0000:00/0000:00:02.0/{UUID}"


@pytest.mark.parametrize(
    ("api", "parent", "kind"),
    [
        ("vfio-pci", "/sys/devices/virtual/mtty/mtty", VFIODeviceType.MEDIATED),
        ("vfio-ap", "/sys/devices/vfio_ap/matrix", VFIODeviceType.AP),
        ("vfio-ccw", "/sys/devices/css0/0.0.0313", VFIODeviceType.CCW),
    ],
)
def test_the_kind_of_a_mediated_device_is_what_its_driver_says(
    tree: PciTree, api: str, parent: str, kind: VFIODeviceType
) -> None:
    queues = ("05.001f", "06.0020") if kind is VFIODeviceType.AP else None
    tree.mdev_type(parent, "type-1", title="A type", available=3, api=api)
    tree.mdev(UUID, parent, "type-1", group=27, matrix=queues)
    mediated = named(UUID, tree).mediated
    assert mediated
    assert (mediated.type, mediated.ap_queues) == (kind, queues or ())
    (offered,) = read_mdev_types(tree.root)
    assert (offered.name, offered.title, offered.available, offered.device_api) == (
        "type-1",
        "A type",
        3,
        api,
    )


@pytest.mark.parametrize("content", [None, "", "\n", "05.001f", "05.001f\n"])
def test_a_matrix_is_read_with_and_without_queues_and_a_last_newline(
    tree: PciTree, content: str | None
) -> None:
    tree.mdev_type("/sys/devices/vfio_ap/matrix", "t", api="vfio-ap")
    tree.mdev(UUID, "/sys/devices/vfio_ap/matrix", "t", group=27)
    if content is not None:
        tree.file(f"/sys/devices/vfio_ap/matrix/{UUID}/matrix", content)
    mediated = named(UUID, tree).mediated
    assert mediated
    assert mediated.ap_queues == tuple((content or "").split())


def test_what_is_not_there_is_told(tree: PciTree) -> None:
    with pytest.raises(NoSuchDevice, match=r"no PCI function 0000:99:00\.0"):
        named("0000:99:00.0", tree)
    with pytest.raises(NoSuchDevice, match="no mediated device"):
        named(UUID, tree)
    assert named("/dev/vfio/99", tree).members == ()
    assert named("/dev/vfio/devices/vfio99", tree).members == ()


@pytest.mark.parametrize(
    "device",
    [
        "/dev/vfio/vfio",
        "/dev/vfio/noiommu-0",
        "/dev/vfio/../sda",
        "/dev/vfio/devices",
        "/dev/vfio/devicesX",
        "/dev/vfio/26/",
        "/dev/vfio/٢",
        "vfio",
        "/a/b/c",
        "3b:00.0",
        "0000:3b:00.8",
        "0000:3b:20.0",
        UUID.upper(),
        "",
    ],
)
def test_what_names_no_device_is_refused_before_the_host_is_asked(device: str) -> None:
    with pytest.raises(SpecError):
        VfioInfo(label="a", device=device)


def test_in_no_group_a_function_is_still_found(tree: PciTree) -> None:
    tree.pci_function("0000:05:00.0", driver="nvme")
    group = named("0000:05:00.0", tree)
    assert (group.number, group.members, group.host_path) == (
        None,
        ("0000:05:00.0",),
        "0000:05:00.0",
    )


def test_a_copy_with_a_directory_for_a_group_is_searched(tree: PciTree) -> None:
    tree.pci_function("0000:05:00.0", driver="vfio-pci")
    base = tree.real("0000:05:00.0")
    tree.file(f"{base}/iommu_group/name").link(
        "/sys/kernel/iommu_groups/9/devices/0000:05:00.0",
        f"../../../..{base.removeprefix('/sys')}",
    )
    assert find_vfio_device("0000:05:00.0", tree.root).number == 9
