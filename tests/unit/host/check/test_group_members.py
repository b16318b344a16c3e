"""Members of a group that stay with the host: which of them keep it from going, and the remedy."""

from pathlib import Path

import pytest

from tests.support.fake_kernel import FakeKernel
from tests.support.pci_tree import PciTree
from tests.support.vfio import findings
from vmplug.errors import InUse
from vmplug.host.finding import Code
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder
from vmplug.manager.examine import examine
from vmplug.oci.requests import VfioInfo

HOST_BRIDGE, PORT, GPU = "0000:00:00.0", "0000:00:01.0", "0000:01:00.0"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    """A graphics card that shares its group with the bridges above it."""
    tree = PciTree(tmp_path / "host")
    tree.file("/proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555555\n")
    tree.pci_function(HOST_BRIDGE, class_code=0x060000, group=1)
    tree.pci_function(PORT, class_code=0x060400, driver="pcieport", group=1)
    tree.pci_function(GPU, class_code=0x030000, driver="vfio-pci", group=1, below=PORT)
    return tree.pci_driver("vfio-pci")


@pytest.mark.parametrize("driver", ["pcieport", "pci-stub", "vfio-pci"])
def test_a_bridge_whose_driver_leaves_dma_alone_lets_the_group_go(
    tree: PciTree, driver: str
) -> None:
    assert findings(tree, GPU) == {}
    assert findings(tree.take(PORT, driver), GPU) == {}


@pytest.mark.parametrize(
    ("bridge", "driver"), [(HOST_BRIDGE, "ie31200_edac"), (PORT, "shpchp"), (PORT, "vmd")]
)
def test_a_bridge_with_a_driver_of_its_own_keeps_the_group_and_the_remedy_frees_it(
    tree: PciTree, tmp_path: Path, bridge: str, driver: str
) -> None:
    kernel = FakeKernel(tree.take(bridge, driver))
    (code,) = found = findings(tree, GPU)
    assert code is Code.MEMBER_IN_USE
    assert f"bridge {bridge} is bound to {driver}" in found[code].message
    with Journal.open(tmp_path / "state") as journal, pytest.raises(InUse, match=driver):
        Binder(journal, kernel).bind(find_vfio_device(GPU, kernel))
    text, _, path = found[code].hint.rpartition("echo ")[2].partition(" > ")
    assert kernel.write_attribute(path, text) is None
    assert findings(tree, GPU) == {}


def test_managed_does_not_hide_what_it_cannot_mend(tree: PciTree) -> None:
    tree.take(HOST_BRIDGE, "ie31200_edac")
    (request,) = examine([VfioInfo(label="gpu", device=GPU)], tree.root, managed=True)
    assert [finding.code for finding in request.findings] == [Code.MEMBER_IN_USE]
    assert request.is_refused


def test_bind_refuses_before_it_takes_the_card_from_its_driver(
    tree: PciTree, tmp_path: Path
) -> None:
    kernel = FakeKernel(tree.take(GPU, "nouveau").take(HOST_BRIDGE, "ie31200_edac"))
    with Journal.open(tmp_path / "state") as journal, pytest.raises(InUse) as refusal:
        Binder(journal, kernel).bind(find_vfio_device(GPU, kernel))
    assert refusal.value.codes == (Code.MEMBER_IN_USE,)
    assert kernel.writes == []
