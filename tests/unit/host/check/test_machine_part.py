"""Groups with parts of the machine itself, and a physical function with its virtual ones."""

from pathlib import Path

import pytest

from tests.support.fake_kernel import FakeKernel
from tests.support.pci_tree import PciTree
from tests.support.vfio import findings
from vmplug.address import Bdf
from vmplug.errors import InUse
from vmplug.host.finding import Code, Severity
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder
from vmplug.manager.binding.subdevices import divide
from vmplug.manager.examine import examine
from vmplug.oci.requests import VfioInfo

NIC, PORT, GPU, UCSI = "0000:00:1f.6", "0000:00:01.0", "0000:01:00.0", "0000:01:00.3"
PHYSFN, VIRTFNS = "0000:af:00.0", ("0000:af:01.0", "0000:af:01.1")
INTEL, AMD, NVIDIA, HP, RED_HAT = 0x8086, 0x1022, 0x10DE, 0x103C, 0x1AF4


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    tree = PciTree(tmp_path / "host").pci_driver("vfio-pci")
    return tree.file("/proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555555\n")


def slot(tree: PciTree, *parts: tuple[str, int, int], driver: str | None = "vfio-pci") -> PciTree:
    """A network card of the chipset, in one group with functions of those classes and makers."""
    tree.pci_function(NIC, class_code=0x020000, driver=driver, group=10)
    for bdf, class_code, vendor in parts:
        tree.pci_function(bdf, class_code=class_code, vendor=vendor, driver=driver, group=10)
    return tree


@pytest.mark.parametrize(
    ("class_code", "vendor"),
    [
        (0x060100, INTEL),
        (0x0C0500, INTEL),
        (0x0C0500, AMD),
        (0x0C8000, INTEL),
        (0x078000, INTEL),
        (0x118000, INTEL),
        (0x050000, INTEL),
        (0x058000, INTEL),
        (0x068000, INTEL),
        (0x080600, AMD),
        (0x108000, AMD),
        (0x0C0701, HP),
        (0x088000, HP),
    ],
)
def test_a_part_of_the_machine_keeps_its_group(
    tree: PciTree, class_code: int, vendor: int
) -> None:
    slot(tree, ("0000:00:1f.5", class_code, vendor))
    (code,) = found = findings(tree, NIC)
    assert (code, found[code].severity) == (Code.MACHINE_PART, Severity.ERROR)
    assert "0000:00:1f.5 (" in found[code].message


@pytest.mark.parametrize(
    ("class_code", "vendor"),
    [(0x010601, INTEL), (0x0C0330, INTEL), (0x040300, INTEL), (0x078000, RED_HAT)],
)
def test_ordinary_devices_of_a_chipset_may_go(tree: PciTree, class_code: int, vendor: int) -> None:
    slot(tree, ("0000:00:1f.5", class_code, vendor))
    assert findings(tree, NIC) == {}


@pytest.mark.parametrize("class_code", [0x0C8000, 0x078000, 0x088000, 0x050000])
def test_a_card_has_such_classes_too(tree: PciTree, class_code: int) -> None:
    tree.pci_function(PORT, class_code=0x060400, driver="pcieport", group=2)
    tree.pci_function(GPU, class_code=0x030000, driver="vfio-pci", group=2, below=PORT)
    more = {"vendor": INTEL, "driver": "vfio-pci", "group": 2, "below": PORT}
    tree.pci_function(UCSI, class_code=class_code, **more)  # type: ignore[arg-type]
    assert findings(tree, GPU) == {}


def test_a_copy_engine_is_of_use_to_a_guest(tree: PciTree) -> None:
    tree.pci_function("0000:00:04.0", class_code=0x088000, driver="ioatdma", group=3)
    assert set(findings(tree, "0000:00:04.0")) == {Code.NOT_BOUND}


def test_the_chipsets_slot_is_named_whole_and_stays_unless_it_is_allowed(
    tree: PciTree, tmp_path: Path
) -> None:
    lpc, smbus, flash = "0000:00:1f.0", "0000:00:1f.3", "0000:00:1f.5"
    parts = [(lpc, 0x060100, INTEL), (smbus, 0x0C0500, INTEL), (flash, 0x0C8000, INTEL)]
    kernel = FakeKernel(slot(tree, *parts, driver=None))
    message = findings(tree, NIC)[Code.MACHINE_PART].message
    assert all(bdf in message for bdf in (lpc, smbus, flash))
    assert NIC not in message
    request = [VfioInfo(label="nic", device=NIC)]
    assert examine(request, kernel, managed=True)[0].is_refused
    assert not examine(request, kernel, managed=True, allowed=[Code.MACHINE_PART])[0].is_refused
    with Journal.open(tmp_path / "state") as journal:
        with pytest.raises(InUse, match="parts of this machine"):
            Binder(journal, kernel).bind(find_vfio_device(NIC, kernel))
        assert kernel.writes == []
        group = find_vfio_device(NIC, kernel)
        assert len(Binder(journal, kernel).bind(group, allow=[Code.MACHINE_PART])) == 4


CXL, OTHER_CXL = "0000:36:00.0", "0000:37:00.0"


def with_memory(tree: PciTree, bdf: str, number: int, region: str) -> PciTree:
    """A CXL card with its endpoint; what the host makes of its memory is elsewhere."""
    tree.pci_function(bdf, class_code=0x050210, driver="cxl_pci", group=number)
    card, endpoint = tree.real(bdf), f"/sys/devices/platform/ACPI0017:00/root0/endpoint{number}"
    memory = f"{card}/mem{number}"
    tree.class_device(f"{bdf}/mem{number}", "char", f"250:{number}", f"cxl/mem{number}")
    tree.link(f"/sys/bus/cxl/devices/mem{number}", f"../../..{memory[4:]}")
    tree.link(f"/sys/bus/cxl/devices/endpoint{number}", f"../../..{endpoint[4:]}")
    tree.link(f"{endpoint}/uport", f"../../../..{memory[4:]}")
    return tree.file(f"{endpoint}/decoder{number}.0/region", f"{region}\n")


def test_memory_of_the_host_on_a_card_stays_with_it(tree: PciTree, tmp_path: Path) -> None:
    with_memory(with_memory(tree, CXL, 3, ""), OTHER_CXL, 4, "region0")
    assert set(findings(tree, CXL)) == {Code.NOT_BOUND}
    found = findings(tree, OTHER_CXL)
    assert set(found) == {Code.NOT_BOUND, Code.MACHINE_PART}
    assert f"{OTHER_CXL} (memory of the host, CXL region0)" in found[Code.MACHINE_PART].message
    kernel = FakeKernel(tree)
    with Journal.open(tmp_path / "state") as journal:
        with pytest.raises(InUse, match="memory of the host"):
            Binder(journal, kernel).bind(find_vfio_device(OTHER_CXL, kernel))
        assert kernel.writes == []
        Binder(journal, kernel).bind(find_vfio_device(CXL, kernel))


# a physical function and its virtual ones


def divided(tree: PciTree, *, groups: tuple[int, int]) -> PciTree:
    tree.pci_function(PHYSFN, class_code=0x020000, driver="ice", group=8)
    tree.sriov(PHYSFN, *VIRTFNS, driver="iavf", group=None)
    for bdf, group in zip(VIRTFNS, groups, strict=True):
        tree.iommu_group(group, bdf)
    return tree


@pytest.mark.parametrize("name", [PHYSFN, VIRTFNS[0]])
def test_virtual_functions_in_the_group_of_their_physical_one_do_not_send_one_in_a_circle(
    tree: PciTree, name: str
) -> None:
    divided(tree, groups=(8, 8))
    finding = findings(tree, name)[Code.HAS_VIRTUAL_FUNCTIONS]
    assert f"{PHYSFN} and 2 of its virtual functions are in one IOMMU group" in finding.message
    assert "one of them" not in finding.hint
    assert f"hand over {PHYSFN} whole" in finding.hint


def test_in_groups_of_their_own_one_of_them_may_go(tree: PciTree) -> None:
    divided(tree, groups=(90, 91))
    assert "hand over one of them" in findings(tree, PHYSFN)[Code.HAS_VIRTUAL_FUNCTIONS].hint
    assert set(findings(tree, VIRTFNS[0])) == {Code.NOT_BOUND}


def test_the_remedy_leaves_the_physical_function_ready_to_be_bound(
    tree: PciTree, tmp_path: Path
) -> None:
    kernel = FakeKernel(divided(tree, groups=(8, 8)))
    with Journal.open(tmp_path / "state") as journal:
        with pytest.raises(InUse, match="in one IOMMU group"):
            Binder(journal, kernel).bind(find_vfio_device(VIRTFNS[0], kernel))
        divide(Bdf.parse(PHYSFN), 0, journal=journal, host=kernel)
        assert set(findings(tree, PHYSFN)) == {Code.NOT_BOUND}
        Binder(journal, kernel).bind(find_vfio_device(PHYSFN, kernel))
    assert findings(tree, PHYSFN) == {}
