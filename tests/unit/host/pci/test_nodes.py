"""The device nodes of a function, below any root."""

import stat
from pathlib import Path

import pytest

from tests.support.pci_tree import PciTree
from vmplug.devnum import DevNum
from vmplug.host.pci.nodes import read_node_paths, read_nodes

PORT, CARD, OTHER = "0000:00:1c.0", "0000:3b:00.0", "0000:00:03.0"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    tree = PciTree(tmp_path / "host")
    tree.pci_function(PORT, class_code=0x060400)
    return tree.pci_function(CARD, below=PORT).pci_function(OTHER)


def nodes(tree: PciTree, bdf: str = CARD) -> dict[str, str]:
    return {
        node.path: str(node.number)
        for node in read_nodes(bdf, read_node_paths(tree.root), tree.root)
    }


def test_a_function_without_a_driver_has_no_nodes(tree: PciTree) -> None:
    tree.char_device("1:3", "null")
    assert nodes(tree) == {}


def test_only_what_is_below_the_directory_of_a_function_is_its_own(tree: PciTree) -> None:
    below = ("!x", "-a/b", ".1/x", "/a", "/b/c", "0", "0/a")
    paths = sorted(
        (f"{directory}{name}", stat.S_IFCHR, DevNum(10, number))
        for directory in (tree.real(CARD), tree.real(OTHER))
        for number, name in enumerate(below)
    )
    assert [node.path for node in read_nodes(CARD, paths, tree.root)] == ["/dev/a", "/dev/c"]


def test_nodes_of_every_class_are_found(tree: PciTree) -> None:
    tree.class_device(f"{CARD}/drm/card1", "char", "226:1", "dri/card1")
    tree.class_device(f"{CARD}/sound/card1/pcmC1D3p", "char", "116:9", "snd/pcmC1D3p")
    tree.class_device(f"{OTHER}/drm/card0", "char", "226:0", "dri/card0")
    assert nodes(tree) == {"/dev/dri/card1": "226:1", "/dev/snd/pcmC1D3p": "116:9"}
    assert nodes(tree, OTHER) == {"/dev/dri/card0": "226:0"}


def test_block_and_char_devices_of_one_number_are_two(tree: PciTree) -> None:
    tree.class_device(f"{CARD}/block/sda", "block", "8:0", "sda")
    tree.class_device(f"{CARD}/other/x", "char", "8:0", "x")
    assert nodes(tree) == {"/dev/sda": "8:0", "/dev/x": "8:0"}


def test_a_node_without_a_uevent_has_the_name_of_its_directory(tree: PciTree) -> None:
    tree.class_device(f"{CARD}/block/cciss!c0d0", "block", "104:0", "-")
    tree.file(f"{tree.real(CARD)}/block/cciss!c0d0/uevent", "")
    assert nodes(tree) == {"/dev/cciss/c0d0": "104:0"}


def test_disks_of_an_nvme_subsystem_are_those_of_its_controllers(tree: PciTree) -> None:
    for number, bdf in ((2, CARD), (3, OTHER)):
        name = f"nvme{number}"
        subsystem = f"/sys/devices/virtual/nvme-subsystem/nvme-subsys{number}"
        tree.class_device(f"{bdf}/nvme/{name}", "char", f"238:{number}", name)
        tree.class_device(f"{subsystem}/{name}n1", "block", f"259:{number}", f"{name}n1")
        tree.class_device(f"{subsystem}/ng{number}n1", "char", f"237:{number}", f"ng{number}n1")
        tree.link(f"{subsystem}/{name}", f"../../../../{tree.real(bdf)[1:]}/nvme/{name}")
        tree.link(f"/sys/class/nvme-subsystem/nvme-subsys{number}", f"../..{subsystem[4:]}")
    assert nodes(tree) == {"/dev/nvme2": "238:2", "/dev/nvme2n1": "259:2", "/dev/ng2n1": "237:2"}


def test_nvidias_own_driver_tells_its_node_in_proc_alone(tree: PciTree) -> None:
    gpus = "/proc/driver/nvidia/gpus"
    tree.file(f"{gpus}/{CARD}/information", "Model: \t H100\nDevice Minor: \t 3\n")
    assert nodes(tree) == {"/dev/nvidia3": "195:3"}
    assert nodes(tree, OTHER) == {}


def test_other_names_among_the_nodes_of_a_copy_are_passed_over(tree: PciTree) -> None:
    tree.class_device(f"{CARD}/nvme/nvme0", "char", "245:0", "nvme0")
    tree.file("/sys/dev/char/notes").file("/sys/dev/block/8:")
    assert nodes(tree) == {"/dev/nvme0": "245:0"}
