"""What sysfs shows of a function that cannot go as it is, each beside the one that can."""

from pathlib import Path

import pytest

from tests.support.fake_kernel import FakeKernel
from tests.support.pci_tree import (
    CONFIG_PCIE,
    FLAGS_IO,
    FLAGS_MEM32,
    FLAGS_MEM64,
    PciTree,
    config_space,
)
from tests.support.tree import GIB
from tests.support.vfio import findings
from vmplug.errors import InUse
from vmplug.host.finding import NEVER_ALLOWED, Code, Severity
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder

GPU, PHYSFN, VIRTFN = "0000:01:00.0", "0000:3b:00.0", "0000:3b:10.0"
MIB = 1 << 20
UNSET = 0x20000000
LOST = b"\xff" * CONFIG_PCIE
QAT = 0x37C8


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    tree = PciTree(tmp_path / "host")
    return tree.file("/proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555555\n")


def gpu(tree: PciTree, **more: object) -> PciTree:
    wanted = {"class_code": 0x030200, "driver": "vfio-pci", "group": 2, **more}
    return tree.pci_function(GPU, **wanted)  # type: ignore[arg-type]


def write(tree: PciTree, bdf: str, name: str, content: str | bytes) -> None:
    """Another content of one of its files."""
    tree.file(f"{tree.real(bdf)}/{name}", content)


# does it answer?


def test_a_card_that_has_fallen_off_the_bus_is_named_and_nothing_else(tree: PciTree) -> None:
    bars = {0: (0xA3000000, 16 * MIB, FLAGS_MEM32)}
    gpu(tree, bars=bars)
    assert findings(tree, GPU) == {}
    write(tree, GPU, "config", LOST)
    (code,) = found = findings(tree, GPU)
    assert code is Code.NO_RESPONSE
    assert code in NEVER_ALLOWED
    assert "fallen off the bus" in found[code].message
    write(tree, GPU, "config", config_space(0x8086, 0x0953, CONFIG_PCIE))
    assert findings(tree, GPU) == {}


def test_a_virtual_function_without_ids_answers_all_the_same(tree: PciTree) -> None:
    tree.pci_function(PHYSFN, class_code=0x020000, driver="igb", group=3)
    tree.sriov(PHYSFN, VIRTFN, driver="vfio-pci", group=4)
    assert findings(tree, VIRTFN) == {}
    write(tree, VIRTFN, "config", LOST)
    assert set(findings(tree, VIRTFN)) == {Code.NO_RESPONSE}


@pytest.mark.parametrize(
    ("power", "runtime", "is_lost"),
    [
        ("D0", "active", False),
        ("D3hot", "suspended", False),
        ("D3cold", "suspended", False),
        ("D3cold", None, False),
        ("unknown", "unsupported", False),
        ("D3cold", "active", True),
        ("D0", "error", True),
        ("error", "active", True),
    ],
)
def test_a_sleeping_card_can_be_woken_and_one_without_power_cannot(
    tree: PciTree, power: str, runtime: str | None, *, is_lost: bool
) -> None:
    gpu(tree, power_state=f"{power}\n")
    if runtime:
        write(tree, GPU, "power/runtime_status", f"{runtime}\n")
    found = findings(tree, GPU)
    assert set(found) == ({Code.NO_RESPONSE} if is_lost else set())


def test_bind_leaves_a_card_that_does_not_answer_to_its_driver(
    tree: PciTree, tmp_path: Path
) -> None:
    kernel = FakeKernel(gpu(tree, driver="nouveau", config=LOST))
    with Journal.open(tmp_path / "state") as journal, pytest.raises(InUse, match="fallen off"):
        Binder(journal, kernel).bind(find_vfio_device(GPU, kernel))
    assert kernel.writes == []


# BARs


@pytest.mark.parametrize(
    "bar",
    [
        (0, 8 * GIB, UNSET | FLAGS_MEM64),
        (0, 8 * GIB, FLAGS_MEM64),
        (0xF0000000, 8 * GIB, UNSET | FLAGS_MEM64),
    ],
)
def test_a_bar_without_an_address_is_found_and_can_be_allowed(
    tree: PciTree, bar: tuple[int, int, int]
) -> None:
    gpu(tree, bars={0: (0xF0000000, 16 * MIB, FLAGS_MEM64), 2: bar})
    (code,) = found = findings(tree, GPU)
    assert (code, found[code].severity) == (Code.BAR_UNASSIGNED, Severity.ERROR)
    assert f"BAR 2 (8 GiB) of {GPU}" in found[code].message
    assert code not in NEVER_ALLOWED


def test_a_bar_of_which_only_flags_are_left_is_found(tree: PciTree) -> None:
    gpu(tree, bars={1: (0, 1, UNSET | FLAGS_MEM64)})
    assert f"BAR 1 of {GPU}" in findings(tree, GPU)[Code.BAR_UNASSIGNED].message


def test_bars_with_addresses_and_absent_ones_may_go(tree: PciTree) -> None:
    gpu(tree, bars={0: (0xF0000000, 16 * MIB, FLAGS_MEM64), 3: (0xE000, 32, FLAGS_IO)})
    assert findings(tree, GPU) == {}


def test_ports_without_an_address_are_a_warning(tree: PciTree) -> None:
    gpu(tree, bars={4: (0, 32, UNSET | FLAGS_IO)})
    assert findings(tree, GPU)[Code.BAR_UNASSIGNED].severity is Severity.WARNING


# what VFIO does not take


def test_a_bridge_by_its_header_is_refused_before_it_leaves_its_driver(tree: PciTree) -> None:
    header = bytearray(config_space(0x8086, 0x0953, CONFIG_PCIE))
    gpu(tree, class_code=0x068000, vendor=0x10B5, driver="ntb", config=bytes(header))
    assert set(findings(tree, GPU)) == {Code.NOT_BOUND}
    header[0x0E] = 0x80  # more than one function
    write(tree, GPU, "config", bytes(header))
    assert set(findings(tree, GPU)) == {Code.NOT_BOUND}
    header[0x0E] = 0x81
    write(tree, GPU, "config", bytes(header))
    assert set(findings(tree, GPU)) == {Code.NOT_BOUND, Code.VFIO_REFUSES}


def test_a_cardbus_bridge_stays_with_the_host(tree: PciTree) -> None:
    gpu(tree).pci_function("0000:01:00.1", class_code=0x060700, group=2)
    assert findings(tree, GPU) == {}


@pytest.mark.parametrize(
    ("device", "severity"), [(QAT, Severity.ERROR), (0x0B25, Severity.WARNING)]
)
def test_an_accelerator_on_the_denylist_is_found_and_the_remedy_frees_it(
    tree: PciTree, device: int, severity: Severity
) -> None:
    gpu(tree, class_code=0x0B4000, device=device, driver="c6xx")
    assert findings(tree, GPU)[Code.VFIO_REFUSES].severity is severity
    parameter = "/sys/module/vfio_pci/parameters/disable_denylist"
    tree.file(parameter, "N\n")
    assert "disable_denylist=1" in findings(tree, GPU)[Code.VFIO_REFUSES].hint
    tree.file(parameter, "Y\n")
    assert set(findings(tree, GPU)) == {Code.NOT_BOUND}


def test_a_kernel_without_a_denylist_takes_it_and_so_does_one_that_has_taken_it(
    tree: PciTree, tmp_path: Path
) -> None:
    gpu(tree, class_code=0x0B4000, device=QAT, driver="c6xx")
    tree.file("/sys/module/vfio_pci/parameters/disable_idle_d3", "N\n")
    assert set(findings(tree, GPU)) == {Code.NOT_BOUND}
    taken = gpu(PciTree(tmp_path / "other"), class_code=0x0B4000, device=QAT)
    assert findings(taken, GPU) == {}


# memory of the firmware


@pytest.mark.parametrize(
    ("kind", "is_refused"), [("direct", True), ("direct-relaxable", False), ("msi", False)]
)
def test_memory_that_the_firmware_keeps_holds_the_group(
    tree: PciTree, kind: str, *, is_refused: bool
) -> None:
    gpu(tree)
    region = f"0x00000000fee00000 0x00000000feefffff msi\n0xad000000 0xae7fffff {kind}\n"
    tree.file("/sys/kernel/iommu_groups/2/reserved_regions", region)
    found = findings(tree, GPU)
    assert set(found) == ({Code.RESERVED_MEMORY} if is_refused else set())
    if is_refused:
        assert "0xad000000-0xae7fffff" in found[Code.RESERVED_MEMORY].message


# does it have a type?


def test_a_virtual_gpu_has_a_type_before_it_goes(tree: PciTree, tmp_path: Path) -> None:
    tree.pci_function(PHYSFN, class_code=0x030200, vendor=0x10DE, driver="nvidia", group=50)
    tree.sriov(PHYSFN, VIRTFN, driver="nvidia", group=51, cdev=0, class_code=0x030200)
    assert findings(tree, VIRTFN) == {}
    write(tree, VIRTFN, "nvidia/current_vgpu_type", "0\n")
    (code,) = found = findings(tree, VIRTFN)
    assert (code, found[code].severity) == (Code.VFIO_REFUSES, Severity.ERROR)
    command = found[code].hint.partition("; ")[2]
    file = f"/sys/bus/pci/devices/{VIRTFN}/nvidia/current_vgpu_type"
    assert command == f"echo TYPE > {file}"
    tree.file(file, "558\n")
    assert findings(tree, VIRTFN) == {}


def test_a_virtual_gpu_without_a_type_is_not_taken_from_nvidias_driver(
    tree: PciTree, tmp_path: Path
) -> None:
    tree.pci_function(PHYSFN, class_code=0x030200, vendor=0x10DE, driver="nvidia", group=50)
    tree.sriov(PHYSFN, VIRTFN, driver="nvidia", group=51, class_code=0x030200)
    write(tree, VIRTFN, "nvidia/current_vgpu_type", "0\n")
    kernel = FakeKernel(tree.pci_driver("vfio-pci"))
    with Journal.open(tmp_path / "state") as journal:
        with pytest.raises(InUse, match="no type of virtual GPU yet"):
            Binder(journal, kernel).bind(find_vfio_device(VIRTFN, kernel))
        assert kernel.writes == []
        assert journal.bindings.all() == []
