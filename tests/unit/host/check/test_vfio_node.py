"""The nodes in /dev that QEMU will open: stale, missing, of another group, or right."""

from pathlib import Path

import pytest

from tests.support.pci_tree import PciTree
from tests.support.vfio import findings
from vmplug.host.check.vfio_group import GuestMemory, check_vm
from vmplug.host.finding import NEVER_ALLOWED, Code, Finding
from vmplug.host.pci.vfio import find_named_group

BDF, GROUP, CDEV = "0000:91:03.2", "/dev/vfio/141", "/dev/vfio/devices/vfio2"
PARENT, UUID = "0000:02:00.0", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    """A function that VFIO has; /dev has only the node of VFIO itself."""
    tree = PciTree(tmp_path)
    tree.pci_function(BDF, class_code=0x020000, driver="vfio-pci", group=141, cdev=2)
    return tree.vfio_group(141).file("/dev/vfio/vfio")


def run(tree: PciTree, finding: Finding) -> None:
    """The commands of the remedy, with `rm` and `mknod` as they are."""
    for command in finding.hint.partition("; in a container")[0].split("; "):
        match command.split():
            case ["rm", path]:
                (tree.path / path[1:]).unlink()
            case ["mknod", path, kind, major, minor]:
                tree.node(path, kind, f"{major}:{minor}")
            case _:
                pass


@pytest.mark.root
@pytest.mark.parametrize("node", [GROUP, BDF])
def test_the_kernels_node_is_right(tree: PciTree, node: str) -> None:
    tree.node(GROUP, "c", "243:141")
    assert findings(tree, node) == {}


@pytest.mark.root
@pytest.mark.parametrize("number", ["243:2", "10:200"])
@pytest.mark.parametrize("name", [GROUP, BDF])
def test_a_node_of_another_number_is_found_and_the_remedy_makes_the_right_one(
    tree: PciTree, name: str, number: str
) -> None:
    tree.node(GROUP, "c", number)
    (code,) = found = findings(tree, name)
    assert code is Code.WRONG_NODE
    assert found[code].message == (
        f"{GROUP} must be char device 243:141 for group 141, but it is char device {number}"
    )
    run(tree, found[code])
    assert findings(tree, name) == {}


@pytest.mark.root
@pytest.mark.parametrize(
    ("mounts", "is_found"),
    [
        ({"/dev": "rw,nosuid"}, False),
        ({"/dev": "rw,nodev"}, True),
        ({"/dev": "rw", "/dev/vfio": "rw,nodev"}, True),
        ({"/dev": "rw,nodev", "/dev/vfio": "rw"}, False),
        ({"/dev": "rw", "/dev/vf": "rw,nodev"}, False),
    ],
)
@pytest.mark.parametrize("name", [GROUP, BDF])
def test_a_node_that_is_mounted_so_that_nothing_opens_it_is_found(
    tree: PciTree, name: str, mounts: dict[str, str], *, is_found: bool
) -> None:
    tree.node(GROUP, "c", "243:141")
    lines = [
        f"{number} 1 0:5 / {path} {options} - devtmpfs udev rw\n"
        for number, (path, options) in enumerate(mounts.items(), start=20)
    ]
    tree.file("/proc/1/mountinfo", "".join(lines))
    found = findings(tree, name)
    assert list(found) == [Code.WRONG_NODE] * is_found
    if is_found:
        path = list(mounts)[-1]
        assert found[Code.WRONG_NODE].hint == f"mount -o remount,bind,dev {path}"


def test_a_file_in_its_place_is_not_the_node(tree: PciTree) -> None:
    tree.file(GROUP)
    assert "a regular file" in findings(tree, GROUP)[Code.WRONG_NODE].message


@pytest.mark.root
def test_a_node_that_is_missing_or_renamed_is_found_and_the_remedy_makes_it(
    tree: PciTree,
) -> None:
    tree.node("/dev/vfio/gpu0", "c", "243:141")
    (code,) = found = findings(tree, BDF)
    assert code is Code.NO_NODE
    assert GROUP in found[code].message
    run(tree, found[code])
    assert findings(tree, BDF) == {}
    assert {Code.NO_NODE, Code.WRONG_NODE} <= NEVER_ALLOWED


def test_a_copy_without_nodes_of_vfio_is_not_suspected(tree: PciTree) -> None:
    (tree.path / "dev/vfio/vfio").unlink()
    assert findings(tree, BDF) == {}


def test_a_kernel_without_nodes_of_groups_is_found_and_its_other_nodes_serve(
    tmp_path: Path,
) -> None:
    tree = PciTree(tmp_path).file("/dev/vfio/vfio").file("/dev/iommu").file(CDEV)
    tree.pci_function(BDF, class_code=0x020000, driver="vfio-pci", group=141)
    tree.vfio_group(7)
    assert "use a kernel" in findings(tree, BDF)[Code.NO_NODE].hint
    tree.file(f"{tree.real(BDF)}/vfio-dev/vfio2/uevent")
    tree.link("/sys/class/vfio-dev/vfio2", f"../..{tree.real(BDF)[4:]}/vfio-dev/vfio2")
    finding = findings(tree, BDF)[Code.NO_NODE]
    assert "CONFIG_VFIO_GROUP=n" in finding.message
    assert findings(tree, finding.hint.rpartition(" ")[2]) == {}


@pytest.mark.root
def test_a_node_of_a_group_that_vfio_gave_back_was_left_behind(tree: PciTree) -> None:
    tree.pci_function(PARENT, driver="e1000e", group=5)
    assert set(findings(tree, PARENT)) == {Code.NOT_BOUND}
    tree.node("/dev/vfio/5", "c", "243:5")
    found = findings(tree, PARENT)
    assert set(found) == {Code.NOT_BOUND, Code.WRONG_NODE}
    assert "left behind" in found[Code.WRONG_NODE].message
    run(tree, found[Code.WRONG_NODE])
    assert set(findings(tree, PARENT)) == {Code.NOT_BOUND}


def test_a_node_of_a_group_that_is_gone_names_no_device(tree: PciTree) -> None:
    assert set(findings(tree, "/dev/vfio/99")) == {Code.NO_SUCH_DEVICE}


@pytest.mark.root
def test_a_devices_own_node_must_be_the_kernels_too(tree: PciTree) -> None:
    tree.node(GROUP, "c", "243:141").node(CDEV, "c", "511:9").file("/dev/iommu")
    assert findings(tree, BDF) == {}
    finding = findings(tree, CDEV)[Code.WRONG_NODE]
    assert f"{CDEV} must be char device 511:2 for {BDF}" in finding.message
    run(tree, finding)
    assert findings(tree, CDEV) == {}


@pytest.mark.root
def test_a_qemu_without_iommufd_gets_the_groups_node_which_must_be_right(tree: PciTree) -> None:
    tree.node(GROUP, "c", "243:2").node(CDEV, "c", "511:2").file("/dev/iommu")
    group = find_named_group(CDEV, tree.root)
    memory = GuestMemory(size_bytes=1 << 30, pid=None)
    found = check_vm(group, memory, tree.root, has_iommufd=False)
    assert {finding.code for finding in found} == {Code.NO_IOMMUFD, Code.WRONG_NODE}
    assert list(check_vm(group, memory, tree.root, has_iommufd=True)) == []


@pytest.mark.root
def test_the_node_of_a_mediated_device_is_checked_too(tree: PciTree) -> None:
    tree.pci_function(PARENT, driver="i915", group=1).mdev_type(PARENT, "i915-GVTg_V5_4")
    tree.mdev(UUID, PARENT, "i915-GVTg_V5_4", group=27).vfio_group(27)
    assert set(findings(tree, UUID)) == {Code.NO_NODE}
    tree.node("/dev/vfio/27", "c", "243:27")
    assert findings(tree, UUID) == {}
