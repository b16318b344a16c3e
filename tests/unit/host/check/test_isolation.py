"""What keeps a VM out of the host: each gap beside the host that has none."""

from pathlib import Path

import pytest

from tests.support.fake_kernel import FakeKernel
from tests.support.pci_tree import PciTree
from tests.support.vfio import findings
from vmplug.errors import InUse
from vmplug.host.finding import Code, Severity
from vmplug.host.inventory import read_inventory
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder

NIC, OTHER, UUID = "0000:00:04.0", "0000:00:05.0", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
VMD, ROOT_PORT, DRIVE = "0000:64:00.5", "10000:00:02.0", "10000:01:00.0"
NO_REMAPPING = "  0:  122  IO-APIC   2-edge      timer\n"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    """A host whose kernel has VFIO, and a function that VFIO has."""
    tree = PciTree(tmp_path / "host")
    tree.file("/proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555555\n")
    return tree.pci_function(NIC, class_code=0x020000, driver="vfio-pci", group=0)


def without_iommu(tree: PciTree) -> PciTree:
    """The group of the function is the one that VFIO makes in no-IOMMU mode."""
    tree.file("/sys/kernel/iommu_groups/0/name", "vfio-noiommu\n")
    tree.file("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n")
    tree.link("/sys/class/vfio/noiommu-0", "../../devices/virtual/vfio/noiommu-0")
    return tree.file("/sys/devices/virtual/vfio/noiommu-0/dev", "243:0\n")


@pytest.mark.parametrize("interrupts", [None, NO_REMAPPING])
def test_no_iommu_mode_is_refused_in_its_own_words(tree: PciTree, interrupts: str | None) -> None:
    assert findings(tree, NIC) == {}
    without_iommu(tree)
    if interrupts:
        tree.file("/proc/interrupts", interrupts)
    found = findings(tree, NIC)
    assert set(found) == {Code.NO_IOMMU}
    assert "no-IOMMU mode (/dev/vfio/noiommu-0)" in found[Code.NO_IOMMU].message
    assert found[Code.NO_IOMMU].severity is Severity.ERROR


def test_the_node_of_no_iommu_mode_is_the_kernels(tree: PciTree) -> None:
    without_iommu(tree)
    assert find_vfio_device(NIC, tree.root).host_path == "/dev/vfio/noiommu-0"
    assert read_inventory(tree.root).pci[0].group_node == "/dev/vfio/noiommu-0"
    tree.link("/proc/77/fd/9", "/dev/vfio/noiommu-0").file("/proc/77/comm", "dpdk-testpmd\n")
    assert "process 77 (dpdk-testpmd)" in findings(tree, NIC)[Code.OPEN_BY_PROCESS].message


def test_groups_that_only_an_option_made_are_a_warning(tree: PciTree) -> None:
    tree.file("/proc/cmdline", "BOOT_IMAGE=/vmlinuz intel_iommu=on pci=noacs_override\n")
    assert findings(tree, NIC) == {}
    tree.file("/proc/cmdline", "BOOT_IMAGE=/vmlinuz pcie_acs_override=downstream,multifunction\n")
    (code,) = found = findings(tree, NIC)
    assert (code, found[code].severity) == (Code.ACS_OVERRIDE, Severity.WARNING)
    assert "group 0 may be a part of a larger one" in found[code].message
    tree.mdev_type(NIC, "mtty-1").mdev(UUID, NIC, "mtty-1", group=27)
    assert findings(tree, UUID) == {}


@pytest.mark.parametrize("name", [UUID, "/dev/vfio/27"])
def test_a_mediated_device_is_in_a_group_of_that_name_and_may_go(tree: PciTree, name: str) -> None:
    tree.mdev_type(NIC, "mtty-1").mdev(UUID, NIC, "mtty-1", group=27)
    assert findings(tree, name) == {}
    assert find_vfio_device(UUID, tree.root).host_path == "/dev/vfio/27"


def test_bind_refuses_no_iommu_mode_even_if_vfio_has_the_function_already(
    tree: PciTree, tmp_path: Path
) -> None:
    kernel = FakeKernel(tree)
    with Journal.open(tmp_path / "state") as journal:
        assert Binder(journal, kernel).bind(find_vfio_device(NIC, kernel)) == []
        without_iommu(tree)
        with pytest.raises(InUse, match="no-IOMMU mode"):
            Binder(journal, kernel).bind(find_vfio_device(NIC, kernel), allow=[Code.NO_IOMMU])
    assert kernel.writes == []


def test_groups_of_no_iommu_mode_do_not_make_it_a_host_with_an_iommu(tree: PciTree) -> None:
    tree.pci_function(OTHER, driver="e1000e")
    assert "the host has no IOMMU" not in findings(tree, OTHER)[Code.NO_IOMMU].message
    without_iommu(tree)
    assert "the host has no IOMMU" in findings(tree, OTHER)[Code.NO_IOMMU].message


def drive_behind(tree: PciTree, driver: str) -> PciTree:
    """A drive in a domain that the driver of a function made."""
    tree.pci_function(VMD, class_code=0x010400, device=0x201D, driver=driver, group=9)
    tree.pci_function(ROOT_PORT, class_code=0x060400, driver="pcieport")
    base = f"{tree.real(VMD)}/pci10000:00"
    (tree.path / base[1:]).mkdir()
    for bdf, above in ((ROOT_PORT, base), (DRIVE, f"{base}/{ROOT_PORT}")):
        old = tree.real(bdf) if bdf == ROOT_PORT else None
        link = tree.path / f"sys/bus/pci/devices/{bdf}"
        if old:
            (tree.path / old[1:]).rename(tree.path / f"{above}/{bdf}"[1:])
            link.unlink()
            link.symlink_to(f"../../..{above[4:]}/{bdf}")
    return tree.pci_function(DRIVE, driver="nvme", below=ROOT_PORT)


def test_a_drive_behind_vmd_is_not_told_to_enable_vt_d(tree: PciTree) -> None:
    drive_behind(tree, "vmd")
    finding = findings(tree, DRIVE)[Code.NO_IOMMU]
    assert f"behind Intel's volume management device {VMD} (VMD)" in finding.message
    assert "VT-d" not in finding.hint
    assert "turn VMD off" in finding.hint


def test_the_remedy_for_a_drive_behind_vmd_works(tree: PciTree) -> None:
    """The controller goes with every drive behind it, once VFIO has it."""
    drive_behind(tree, "vmd").pci_disk(DRIVE, "259:0", "nvme0n1")
    named = findings(tree, DRIVE)[Code.NO_IOMMU].hint.rpartition("vfio:")[2]
    group = find_vfio_device(named, tree.root)
    assert [disk.device_node for disk in group.disks] == ["/dev/nvme0n1"]
    assert set(findings(tree, named)) == {Code.NOT_BOUND}


def test_a_domain_of_another_host_bridge_is_not_vmds(tree: PciTree) -> None:
    drive_behind(tree, "pci-hyperv")
    assert "VMD" not in findings(tree, DRIVE)[Code.NO_IOMMU].message
