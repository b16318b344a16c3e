"""PCI functions below any root: the kernel's shapes, and everything that copies of hosts lack."""

import random
import subprocess
from pathlib import Path

import pytest

from tests.support.pci_tree import (
    CONFIG_CUT,
    CONFIG_PCI,
    CONFIG_PCIE,
    FLAGS_IO,
    FLAGS_MEM32,
    FLAGS_MEM64,
    PciTree,
    config_space,
    resource_text,
)
from vmplug.address import Bdf
from vmplug.host.pci.function import (
    Bar,
    PciFunction,
    find_function,
    read_function,
    read_functions,
    read_reset_methods,
    read_virtfns,
)
from vmplug.host.pci.iommu import find_group, has_iommu, read_group, read_groups, read_membership
from vmplug.host.root import HostRoot

NVME = "0000:3b:00.0"
BDF = Bdf.parse(NVME)
GIB = 1 << 30


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path / "host")


def function(tree: PciTree, bdf: str = NVME) -> PciFunction:
    found = find_function(Bdf.parse(bdf), tree.root)
    assert found
    assert [f for f in read_functions(tree.root) if f.bdf == found.bdf] == [found]
    return found


def rewrite(tree: PciTree, name: str, content: str | bytes) -> None:
    (tree.path / tree.real(NVME)[1:] / name).unlink(missing_ok=True)
    tree.file(f"{tree.real(NVME)}/{name}", content)


def remove(tree: PciTree, *names: str) -> None:
    for name in names:
        (tree.path / tree.real(NVME)[1:] / name).unlink()


def test_a_function_is_read_whole(tree: PciTree) -> None:
    tree.pci_function(
        NVME,
        driver="nvme",
        group=26,
        numa_node=1,
        bars={0: (0x4000000000, 0x4000, FLAGS_MEM64), 4: (0xE000, 0x20, FLAGS_IO)},
    )
    assert function(tree) == PciFunction(
        bdf=BDF,
        class_code=0x010802,
        vendor_id=0x8086,
        device_id=0x0953,
        modalias="pci:v00008086d00000953sv00008086sd0000370Dbc01sc08i02",
        driver="nvme",
        iommu_group=26,
        numa_node=1,
        pcie=True,
        bars=(
            Bar(
                number=0,
                start=0x4000000000,
                size_bytes=0x4000,
                is_memory=True,
                is_64bit=True,
                is_prefetchable=True,
            ),
            Bar(
                number=4,
                start=0xE000,
                size_bytes=0x20,
                is_memory=False,
                is_64bit=False,
                is_prefetchable=False,
            ),
        ),
    )


def test_what_the_host_does_not_say_is_none(tree: PciTree) -> None:
    (tree.path / f"sys/bus/pci/devices/{NVME}").mkdir(parents=True)
    assert function(tree) == PciFunction(bdf=BDF)


def test_a_function_that_is_not_there_is_not_found(tree: PciTree) -> None:
    tree.pci_function(NVME)
    assert find_function(Bdf.parse("0000:3b:00.1"), tree.root) is None
    assert read_functions(HostRoot(tree.path / "nowhere")) == []


def test_a_dangling_link_is_a_function_of_which_nothing_is_known(tree: PciTree) -> None:
    tree.link(f"/sys/bus/pci/devices/{NVME}", f"../../../devices/pci0000:00/{NVME}")
    assert read_functions(tree.root) == [PciFunction(bdf=BDF)]
    assert find_function(BDF, tree.root) is None


def test_functions_are_in_the_order_of_the_bus_and_other_names_are_none(tree: PciTree) -> None:
    names = ["0000:ff:1f.7", "0000:00:00.0", "10000:01:00.0", "0001:00:00.0", NVME]
    random.Random(1).shuffle(names)
    for name in names:
        tree.pci_function(name)
    for stranger in ("0000:3b:00.8", "0000:3b:20.0", "3b:00.0", "0000:3B:00.0", "caf\udce9"):
        (tree.path / "sys/bus/pci/devices" / stranger).mkdir()
    expected = ["0000:00:00.0", NVME, "0000:ff:1f.7", "0001:00:00.0", "10000:01:00.0"]
    assert [str(f.bdf) for f in read_functions(tree.root)] == expected


@pytest.mark.parametrize("written", ["10802", "010802", "0x010802", "0X010802"])
def test_a_class_is_read_however_it_is_written(tree: PciTree, written: str) -> None:
    tree.pci_function(NVME)
    rewrite(tree, "uevent", f"PCI_CLASS={written}\nPCI_ID=8086:0953\nPCI_SLOT_NAME={NVME}\n")
    assert (function(tree).class_code, function(tree).unreadable) == (0x010802, ())


@pytest.mark.parametrize("written", ["", "0x", "zebra", "-1", "1000000", "\xff"])
def test_a_malformed_class_is_told_and_the_rest_is_read(tree: PciTree, written: str) -> None:
    tree.pci_function(NVME, driver="nvme")
    rewrite(tree, "uevent", f"DRIVER=nvme\nPCI_CLASS={written}\nPCI_ID=8086:0953\n")
    found = function(tree)
    assert (found.class_code, found.vendor_id, found.driver) == (None, 0x8086, "nvme")
    (sentence,) = found.unreadable
    assert sentence.startswith(f"cannot read /sys/bus/pci/devices/{NVME}/class: ")
    assert not found.is_bridge


def test_without_a_uevent_the_files_and_the_link_tell(tree: PciTree) -> None:
    tree.pci_function(NVME, driver="nvme")
    remove(tree, "uevent")
    found = function(tree)
    assert (found.class_code, found.vendor_id, found.device_id) == (0x010802, 0x8086, 0x0953)
    assert (found.driver, found.modalias, found.unreadable) == ("nvme", None, ())


def test_a_function_without_a_driver_has_none(tree: PciTree) -> None:
    tree.pci_function(NVME)
    assert function(tree).driver is None


def test_two_functions_that_differ_only_in_a_file_are_not_mixed_up(tree: PciTree) -> None:
    for bdf, vendor in (("0000:00:01.0", 0x8086), ("0000:00:02.0", 0x1AF4)):
        tree.pci_function(bdf, vendor=vendor)
        (tree.path / tree.real(bdf)[1:] / "uevent").write_text(f"PCI_SLOT_NAME={bdf}\nDRIVER=x\n")
    assert [f.vendor_id for f in read_functions(tree.root)] == [0x8086, 0x1AF4]


def test_undecodable_bytes_are_kept(tree: PciTree) -> None:
    tree.pci_function(NVME)
    rewrite(tree, "uevent", b"DRIVER=nvm\xe9\nPCI_CLASS=10802\nPCI_ID=8086:0953\n")
    assert function(tree).driver == "nvm\udce9"


@pytest.mark.parametrize(("written", "node"), [("0", 0), ("3", 3), ("-1", None)])
def test_a_numa_node_is_none_where_the_kernel_knows_none(
    tree: PciTree, written: str, node: int | None
) -> None:
    tree.pci_function(NVME, numa_node=int(written))
    assert (function(tree).numa_node, function(tree).unreadable) == (node, ())


@pytest.mark.parametrize("written", ["", "near", "\udcff"])
def test_a_malformed_numa_node_is_told(tree: PciTree, written: str) -> None:
    tree.pci_function(NVME, driver="nvme")
    rewrite(tree, "numa_node", written)
    assert function(tree).numa_node is None
    assert ["numa_node" in sentence for sentence in function(tree).unreadable] == [True]


# groups


def test_the_groups_of_functions(tree: PciTree) -> None:
    tree.pci_function(NVME, group=26).pci_function("0000:3b:00.1", group=26)
    tree.pci_function("0000:00:1f.0")
    assert [f.iommu_group for f in read_functions(tree.root)] == [None, 26, 26]
    assert (read_groups(tree.root), read_group(26, tree.root)) == ([26], [NVME, "0000:3b:00.1"])
    assert find_group(tree.real(NVME), tree.root) == 26
    assert read_membership(tree.root) == {NVME: 26, "0000:3b:00.1": 26}
    assert has_iommu(tree.root)


def test_a_copied_host_has_a_directory_where_the_kernel_has_a_link(tree: PciTree) -> None:
    tree.pci_function(NVME, group=26).pci_function("0000:3b:00.1")
    remove(tree, "iommu_group")
    for bdf in (NVME, "0000:3b:00.1"):
        (tree.path / tree.real(bdf)[1:] / "iommu_group").mkdir()
    assert [f.iommu_group for f in read_functions(tree.root)] == [26, None]
    assert [f.unreadable for f in read_functions(tree.root)] == [(), ()]
    assert find_group(tree.real(NVME), tree.root) == 26
    assert find_group(tree.real("0000:3b:00.1"), tree.root) is None


def test_a_group_that_is_no_number_is_told(tree: PciTree) -> None:
    tree.pci_function(NVME).link(f"{tree.real(NVME)}/iommu_group", "../groups/many")
    assert function(tree).iommu_group is None
    assert "iommu_group: 'many' is not a number" in function(tree).unreadable[0]


def test_a_host_without_an_iommu_has_no_groups(tree: PciTree) -> None:
    tree.pci_function(NVME)
    assert (function(tree).iommu_group, has_iommu(tree.root)) == (None, False)


# PCIe or not


@pytest.mark.parametrize(
    ("config", "pcie"),
    [
        (config_space(0x8086, 0x0953, CONFIG_PCIE), True),
        (config_space(0x8086, 0x0953, CONFIG_PCI), True),
        (config_space(0x8086, 0x0953, CONFIG_PCI, is_pcie=False), False),
        (config_space(0x8086, 0x0953, CONFIG_CUT), None),
        (config_space(0x8086, 0x0953, 0x41), None),
        (b"", None),
        (b"\xff" * CONFIG_PCI, None),
    ],
)
def test_pcie_is_told_or_unknown(tree: PciTree, *, config: bytes, pcie: bool | None) -> None:
    tree.pci_function(NVME, config=config)
    assert (function(tree).pcie, function(tree).unreadable) == (pcie, ())


def test_a_list_of_capabilities_that_bites_its_tail_ends(tree: PciTree) -> None:
    space = bytearray(config_space(0x8086, 0x0953, CONFIG_PCI, is_pcie=False))
    space[0x40:0x42] = b"\x01\x40"
    tree.pci_function(NVME, config=bytes(space))
    assert function(tree).pcie is False


def test_without_capabilities_it_is_conventional(tree: PciTree) -> None:
    space = bytearray(config_space(0x8086, 0x0953, CONFIG_PCI))
    space[0x06] = 0
    tree.pci_function(NVME, config=bytes(space))
    assert function(tree).pcie is False


# BARs


@pytest.mark.parametrize(
    ("size_bytes", "is_large"),
    [(4 * GIB, False), (4 * GIB + 1, True), (64 * GIB, True), (1 << 64, True)],
)
def test_a_bar_of_more_than_4_gib_is_large(
    tree: PciTree, *, size_bytes: int, is_large: bool
) -> None:
    tree.pci_function(NVME, bars={2: (1 << 40, size_bytes, FLAGS_MEM64)})
    (bar,) = function(tree).bars or ()
    assert (bar.number, bar.size_bytes, bar.is_large) == (2, size_bytes, is_large)


@pytest.mark.parametrize(("start", "count"), [(0x3F6, 1), (0, 0)])
def test_a_bar_may_have_one_byte(tree: PciTree, start: int, count: int) -> None:
    """As that of an IDE controller's status."""
    line = f"0x{start:016x} 0x{start:016x} 0x{FLAGS_IO:016x}"
    tree.pci_function(NVME)
    rewrite(tree, "resource", "\n".join([line, *[" ".join(["0x" + "0" * 16] * 3)] * 12]) + "\n")
    bars = function(tree).bars or ()
    assert [(bar.start, bar.size_bytes) for bar in bars] == [(start, 1)] * count


@pytest.mark.parametrize("config", [b"", config_space(0x8086, 0x0953, CONFIG_CUT)])
@pytest.mark.parametrize(("speed", "pcie"), [("16.0 GT/s PCIe\n", True), ("", None), (None, None)])
def test_a_link_speed_tells_pcie_where_the_configuration_space_is_cut(
    tree: PciTree, *, config: bytes, speed: str | None, pcie: bool | None
) -> None:
    tree.pci_function(NVME, config=config)
    if speed is not None:
        rewrite(tree, "max_link_speed", speed)
    assert function(tree).pcie is pcie
    remove(tree, "config")
    assert function(tree).pcie is pcie


@pytest.mark.parametrize(("class_code", "pcie"), [(0x060000, False), (0x010802, True)])
def test_a_host_bridge_is_not_pcie_for_its_large_configuration_space(
    tree: PciTree, *, class_code: int, pcie: bool
) -> None:
    space = config_space(0x8086, 0x0953, CONFIG_PCIE, is_pcie=False)
    tree.pci_function(NVME, class_code=class_code, config=space)
    assert function(tree).pcie is pcie


def test_only_the_six_bars_count(tree: PciTree) -> None:
    rom = {6: (0xF0000000, 0x10000, FLAGS_MEM32), 7: (1 << 40, GIB, FLAGS_MEM64)}
    tree.pci_function(NVME, bars={5: (0xFE000000, 0x1000, FLAGS_MEM32), **rom})
    assert [bar.number for bar in function(tree).bars or ()] == [5]


@pytest.mark.parametrize("line", ["0x1 zebra 0x0", "0x0 0x3ffffffff", "0x0 0x1 0x0 0x0"])
def test_a_malformed_line_is_told_and_the_others_are_read(tree: PciTree, line: str) -> None:
    tree.pci_function(NVME, bars={2: (0xFE000000, 0x1000, FLAGS_MEM32)})
    lines = resource_text({2: (0xFE000000, 0x1000, FLAGS_MEM32)}).splitlines()
    rewrite(tree, "resource", "\n".join([line, *lines[1:]]))
    assert [bar.number for bar in function(tree).bars or ()] == [2]
    (sentence,) = function(tree).unreadable
    assert sentence.endswith(f"resource: line 1 is b'{line}'")


def test_a_range_that_ends_before_it_begins_is_not_a_bar(tree: PciTree) -> None:
    tree.pci_function(NVME)
    rewrite(tree, "resource", "0x2000 0x1000 0x140204\n")
    assert (function(tree).bars, function(tree).unreadable) == ((), ())


def test_an_empty_or_cut_resource_has_what_it_has(tree: PciTree) -> None:
    whole = resource_text({0: (0xFE000000, 0x1000, FLAGS_MEM32)})
    tree.pci_function(NVME)
    rewrite(tree, "resource", whole[:57])
    assert (len(function(tree).bars or ()), function(tree).unreadable) == (1, ())
    rewrite(tree, "resource", "")
    assert (function(tree).bars, len(function(tree).unreadable)) == ((), 1)


# virtual functions


def test_virtual_functions_and_their_physical_one(tree: PciTree) -> None:
    virtfns = [f"0000:3b:{slot:02x}.0" for slot in range(2, 14)]
    tree.pci_function(NVME).sriov(NVME, *virtfns)
    found = function(tree, virtfns[-1])
    # Its own configuration space begins with FFFF; what it is stands elsewhere.
    assert (found.physfn, found.vendor_id, found.pcie) == (BDF, 0x8086, True)
    assert [str(bdf) for bdf in read_virtfns(BDF, tree.root)] == virtfns
    assert read_virtfns(found.bdf, tree.root) == ()


def test_a_virtual_function_without_its_physical_one_still_names_it(tree: PciTree) -> None:
    tree.pci_function(NVME, config=b"\xff" * 256).link(f"{tree.real(NVME)}/physfn", "../gone")
    assert (function(tree).physfn, function(tree).pcie) == (None, None)
    assert "physfn: '../gone' does not lead to a PCI function" in function(tree).unreadable[0]
    remove(tree, "physfn")
    tree.link(f"{tree.real(NVME)}/physfn", "../0000:3b:00.7")
    assert function(tree).physfn == Bdf.parse("0000:3b:00.7")


# resets


def test_how_a_function_can_be_reset(tree: PciTree) -> None:
    tree.pci_function(NVME, reset_methods=("flr", "bus"))
    assert read_reset_methods(BDF, tree.root) == ("flr", "bus")
    rewrite(tree, "reset_method", "\n")
    assert read_reset_methods(BDF, tree.root) == ()
    remove(tree, "reset_method")
    assert read_reset_methods(BDF, tree.root) == ()
    tree.file(f"{tree.real(NVME)}/reset", "")
    assert read_reset_methods(BDF, tree.root) == ("unknown",)
    remove(tree, "reset", "uevent")
    assert read_reset_methods(BDF, tree.root) is None


# what cannot be read


@pytest.fixture
def forbidden(tree: PciTree) -> PciTree:
    """Files that lead nowhere: a link to itself gives ELOOP, whoever reads it."""
    tree.pci_function(NVME, driver="nvme", group=26, bars={0: (1 << 40, GIB, FLAGS_MEM64)})
    return tree


@pytest.mark.parametrize("name", ["uevent", "resource", "numa_node", "config"])
def test_a_file_that_cannot_be_read_is_told_and_the_rest_is_read(
    forbidden: PciTree, name: str
) -> None:
    remove(forbidden, name)
    forbidden.link(f"{forbidden.real(NVME)}/{name}", name)
    found = function(forbidden)
    assert found.unreadable == (
        f"cannot read /sys/bus/pci/devices/{NVME}/{name}: Too many levels of symbolic links",
    )
    assert (found.class_code, found.iommu_group, found.driver) == (0x010802, 26, "nvme")
    assert (found.pcie is None, found.bars is None) == (name == "config", name == "resource")


def test_a_directory_that_cannot_be_entered_is_told(tree: PciTree) -> None:
    tree.link(f"/sys/bus/pci/devices/{NVME}", NVME)
    (found,) = read_functions(tree.root)
    assert found == read_function(BDF, tree.root)
    assert found.unreadable
    assert {"Too many levels" in sentence for sentence in found.unreadable} == {True}


# this host


def test_this_hosts_functions_are_those_that_lspci_shows() -> None:
    try:
        command = ["lspci", "-A", "linux-sysfs", "-vmmnkD"]
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        pytest.skip("needs lspci, of pciutils")
    expected = []
    for block in filter(None, shown.split("\n\n")):
        lines = dict(line.split(":\t", 1) for line in block.splitlines())
        if not lines:
            continue
        expected.append(
            (
                lines["Slot"],
                int(lines["Class"] + lines.get("ProgIf", "00"), 16),
                int(lines["Vendor"], 16),
                int(lines["Device"], 16),
                lines.get("Driver"),
                int(lines["NUMANode"]) if "NUMANode" in lines else None,
                int(lines["IOMMUGroup"]) if "IOMMUGroup" in lines else None,
            )
        )
    if not expected:
        pytest.skip("needs a host with PCI")
    found = [
        (
            str(f.bdf),
            f.class_code,
            f.vendor_id,
            f.device_id,
            f.driver,
            f.numa_node,
            f.iommu_group,
        )
        for f in read_functions(HostRoot())
    ]
    assert sorted(found) == sorted(expected)
