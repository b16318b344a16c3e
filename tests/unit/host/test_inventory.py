"""The inventory of whole hosts, complete ones and copies with holes."""

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.pci_tree import PciTree
from tests.support.tree import GIB, MIB
from vmplug.address import Bdf
from vmplug.devnum import DevNum
from vmplug.errors import NoSuchDevice
from vmplug.host.block.inventory import Disk, Pmem, Use
from vmplug.host.inventory import (
    HostFunction,
    HostMediated,
    Inventory,
    Kind,
    read_inventory,
    with_reset_methods,
)
from vmplug.host.kind import Identity
from vmplug.host.pci.mdev import MdevType, MediatedDevice, VFIODeviceType, read_mdev_types
from vmplug.host.pci.pci_ids import PCI_IDS, PciNames
from vmplug.host.pci.uses import NetInterface
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.store import VhostUserStore

PORT, NVME, NIC, GPU = "0000:00:1c.0", "0000:3b:00.0", "0000:3c:00.0", "0000:00:02.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path / "host")


@pytest.fixture
def host(tree: PciTree) -> PciTree:
    """A server: a bridge, a drive, a network card with virtual functions, a graphics card."""
    tree.pci_function(PORT, class_code=0x060400, driver="pcieport", group=1)
    tree.pci_function(NVME, below=PORT, driver="nvme", group=26)
    tree.pci_disk(NVME, "259:0", "nvme0n1", partitions={"259:1": "nvme0n1p1"})
    tree.pci_function(NIC, class_code=0x020000, driver="ixgbe", group=27)
    tree.sriov(NIC, "0000:3c:10.0", "0000:3c:10.2").network(NIC, "eth0").route("eth0")
    return tree.pci_function(GPU, class_code=0x030000, driver="i915", group=0, boot_vga="1\n")


def entry(inventory: Inventory, bdf: str) -> HostFunction:
    (found,) = (e for e in inventory.pci if str(e.function.bdf) == bdf)
    return found


def disk(inventory: Inventory, name: str) -> Disk:
    (found,) = (disk for disk in inventory.block if disk.name == name)
    return found


def test_a_host_without_anything_has_an_empty_inventory(tree: PciTree) -> None:
    assert read_inventory(tree.root) == Inventory()
    assert read_inventory(HostRoot(tree.path / "nowhere")) == Inventory()


def test_virtual_functions_are_found_from_their_own_side(host: PciTree) -> None:
    inventory = read_inventory(host.root)
    virtfns = [str(bdf) for bdf in entry(inventory, NIC).virtfns]
    assert virtfns == ["0000:3c:10.0", "0000:3c:10.2"]
    assert entry(inventory, "0000:3c:10.0").virtfns == ()
    assert entry(inventory, "0000:3c:10.0").function.physfn == Bdf.parse(NIC)


def test_what_holds_each_function(host: PciTree) -> None:
    host.mount("/dev/nvme0n1p1", "/srv", "259:1")
    inventory = read_inventory(host.root)
    assert entry(inventory, NVME).disks == ("/dev/nvme0n1", "/dev/nvme0n1p1")
    assert entry(inventory, NVME).uses == (Use("mount", "/dev/nvme0n1p1", "/srv"),)
    (network,) = entry(inventory, NIC).networks
    assert network == NetInterface(
        name="eth0", has_default_route=True, has_address=True, master=None
    )
    assert list(map(str, entry(inventory, NIC).uses)) == ["eth0 has the default route, an address"]
    assert entry(inventory, GPU).uses == (Use("console", GPU),)
    # A bridge stays, whatever is behind it.
    assert entry(inventory, PORT) == HostFunction(function=entry(inventory, PORT).function)


def test_a_function_that_nothing_holds_has_no_uses(host: PciTree) -> None:
    inventory = read_inventory(host.root)
    assert entry(inventory, NVME).uses == ()
    host.pci_function("0000:00:03.0", class_code=0x030000, boot_vga="0\n")
    assert entry(read_inventory(host.root), "0000:00:03.0").uses == ()


def test_nodes_of_vfio(host: PciTree) -> None:
    assert entry(read_inventory(host.root), NVME).group_node is None
    host.vfio_group(26).vfio_cdev(NVME, 3)
    found = entry(read_inventory(host.root), NVME)
    assert (found.group_node, found.cdev_node) == ("/dev/vfio/26", None)
    host.file("/dev/vfio/devices/vfio3").file("/dev/vfio/27")
    inventory = read_inventory(host.root)
    assert entry(inventory, NVME).cdev_node == "/dev/vfio/devices/vfio3"
    assert entry(inventory, NIC).group_node == "/dev/vfio/27"


def test_resets_are_read_when_asked_for(host: PciTree) -> None:
    found = entry(read_inventory(host.root), NVME)
    assert found.reset_methods is None
    assert with_reset_methods(found, host.root).reset_methods == ("flr", "bus")
    path = host.path / host.real(NVME)[1:] / "reset_method"
    path.unlink()
    path.symlink_to("reset_method")
    told = with_reset_methods(found, host.root)
    assert told.reset_methods is None
    assert "reset_method: Too many levels" in told.function.unreadable[0]


def test_vms_hold_functions_disks_and_mediated_devices(host: PciTree) -> None:
    host.mdev_type(GPU, "i915-1").mdev(UUID, GPU, "i915-1", group=40)
    held = {f"vfio:{NVME}": "sb1", "block:259:1": "sb2", f"vfio:{UUID}": "sb3"}
    vms = {Identity.parse(text): vm for text, vm in held.items()}
    inventory = read_inventory(host.root, vms=vms)
    assert set(map(str, entry(inventory, NVME).uses)) == {
        f"{NVME} is in VM sb1",
        "/dev/nvme0n1p1 is in VM sb2",
    }
    assert [mediated.uses for mediated in inventory.mdev] == [(Use("vm", UUID, "sb3"),)]


def test_only_the_kinds_asked_for_are_read(host: PciTree) -> None:
    host.mdev_type(GPU, "i915-1").mdev(UUID, GPU, "i915-1").pmem("namespace0.0")
    whole = read_inventory(host.root)
    assert read_inventory(host.root, kinds=[Kind.PCI]) == Inventory(pci=whole.pci)
    assert read_inventory(host.root, kinds=[Kind.BLOCK]) == Inventory(block=whole.block)
    assert read_inventory(host.root, kinds=[Kind.PMEM]) == Inventory(pmem=whole.pmem)
    mediated = Inventory(mdev_types=whole.mdev_types, mdev=whole.mdev)
    assert read_inventory(host.root, kinds=[Kind.MDEV]) == mediated
    assert all(part for part in (whole.pci, whole.block, whole.pmem, whole.mdev))


# block devices


def test_disks_with_what_is_done_with_them(tree: PciTree) -> None:
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1", "8:2": "sda2"}).hold("sda2", "dm-0")
    tree.block_device("8:16", "sdb").swap("/dev/sdb")
    loop = {"backing_file": "/dev/sda1\n", "offset": "0\n", "sizelimit": "0\n"}
    tree.block_device("7:0", "loop0", size_bytes=16 * MIB, loop=loop)
    tree.mount("/dev/sda1", "/", "8:1").mount(
        "/dev/sda1", "/mnt", "8:1", pid=2, namespace="mnt:[2]"
    )
    inventory = read_inventory(tree.root)
    assert [(d.name, d.disk) for d in inventory.block] == [
        ("loop0", None),
        ("sda", None),
        ("sda1", "sda"),
        ("sda2", "sda"),
        ("sdb", None),
    ]
    assert [str(use) for use in disk(inventory, "sda1").uses] == [
        "/dev/sda1 is mounted at /",
        "/dev/sda1 is mounted at /mnt",
        "/dev/sda1 is behind /dev/loop0",
    ]
    assert disk(inventory, "sda2").uses == (Use("holder", "/dev/sda2", "dm-0"),)
    assert disk(inventory, "sdb").uses == (Use("swap", "/dev/sdb"),)
    facts = disk(inventory, "loop0").facts
    assert facts
    assert facts.backing
    assert (facts.size_bytes, facts.backing.backing_file) == (16 * MIB, "/dev/sda1")


def test_disks_are_in_the_order_of_their_numbers(tree: PciTree) -> None:
    for number in (10, 9, 1):
        tree.block_device(f"7:{number}", f"loop{number}")
    tree.block_device(
        "259:0", "nvme0n1", partitions={"259:10": "nvme0n1p10", "259:2": "nvme0n1p2"}
    )
    names = [disk.name for disk in read_inventory(tree.root).block]
    assert names == ["loop1", "loop9", "loop10", "nvme0n1", "nvme0n1p2", "nvme0n1p10"]


def test_a_disk_that_cannot_be_read_is_told_beside_a_good_one(tree: PciTree) -> None:
    tree.block_device("8:0", "sda").block_device("8:16", "sdb")
    (tree.path / "sys/devices/virtual/block/sda/size").write_text("large\n")
    inventory = read_inventory(tree.root)
    bad, good = inventory.block
    assert (bad.facts, bad.unreadable) == (
        None,
        ("cannot read /sys/dev/block/8:0/size: b'large\\n' is not a number",),
    )
    assert good.facts
    assert good.unreadable == inventory.unreadable == ()


def test_a_malformed_table_of_mounts_is_told_and_the_disks_are_listed(tree: PciTree) -> None:
    tree.block_device("8:0", "sda").file("/proc/1/mountinfo", "nonsense\n")
    inventory = read_inventory(tree.root)
    assert [disk.name for disk in inventory.block] == ["sda"]
    assert inventory.unreadable[0].startswith("cannot read /proc/1/mountinfo")


def test_a_malformed_table_of_routes_leaves_the_uses_unknown(host: PciTree) -> None:
    host.file("/proc/net/if_inet6", "nonsense\n")
    inventory = read_inventory(host.root)
    unknown = NetInterface(name="eth0", has_default_route=None, has_address=None, master=None)
    assert entry(inventory, NIC).networks == (unknown,)
    assert len(inventory.unreadable) == 1
    assert inventory.unreadable[0].startswith("cannot read /proc/net/if_inet6")


def test_a_name_with_a_slash_and_one_that_is_not_utf8(tree: PciTree) -> None:
    tree.block_device("104:0", "cciss!c0d0").block_device("8:0", "s\udce9a")
    nodes = [disk.device_node for disk in read_inventory(tree.root).block]
    assert nodes == ["/dev/cciss/c0d0", "/dev/s\udce9a"]


# persistent memory


def test_namespaces_with_their_block_devices(tree: PciTree) -> None:
    tree.pmem("namespace0.0", size_bytes=GIB).mount("/dev/pmem0", "/pmem", "259:64")
    mounted = (Use("mount", "/dev/pmem0", "/pmem"),)
    expected = Pmem(
        name="namespace0.0",
        device_node="/dev/pmem0",
        mode="fsdax",
        size_bytes=GIB,
        numa_node=0,
        uses=mounted,
    )
    assert read_inventory(tree.root).pmem == (expected,)


def test_a_namespace_whose_block_device_is_its_holders(tree: PciTree) -> None:
    """As the kernel has it for fsdax: the block device lies below pfn0.1."""
    region = "/sys/devices/platform/e820_pmem/ndbus0/region0"
    tree.file(f"{region}/namespace0.0/mode", "fsdax\n").file(f"{region}/namespace0.0/size", "16\n")
    tree.file(f"{region}/namespace0.0/holder", "pfn0.1\n")
    tree.link("/sys/bus/nd/devices/namespace0.0", f"../../..{region[4:]}/namespace0.0")
    tree._block_directory(f"{region}/pfn0.1/block/pmem0", "259:64", GIB, (), ro=False)
    (pmem,) = read_inventory(tree.root).pmem
    assert (pmem.name, pmem.device_node, pmem.size_bytes) == ("namespace0.0", "/dev/pmem0", 16)


def test_memory_of_the_dax_bus_is_listed_once(tree: PciTree) -> None:
    """dax1.0 is of a namespace; dax2.0 is of a CXL device, and has none."""
    region = "/sys/devices/platform/e820_pmem/ndbus0/region1"
    tree.file(f"{region}/namespace1.0/mode", "devdax\n").file(f"{region}/dax1.0/dax1.0/dev")
    tree.file(f"{region}/namespace1.0/holder", "dax1.0\n")
    tree.link("/sys/bus/nd/devices/namespace1.0", f"../../..{region[4:]}/namespace1.0")
    for name in ("dax1.0", "dax2.0"):
        tree.file(f"/sys/bus/dax/devices/{name}/size", f"{GIB}\n")
        tree.file(f"/sys/bus/dax/devices/{name}/numa_node", "1\n")
    assert read_inventory(tree.root).pmem == (
        Pmem(name="namespace1.0", device_node="/dev/dax1.0", mode="devdax"),
        Pmem(name=None, device_node="/dev/dax2.0", mode="devdax", size_bytes=GIB, numa_node=1),
    )
    tree.file("/sys/bus/dax/devices/dax2.0/size", "x\n")
    (_, odd) = read_inventory(tree.root).pmem
    assert odd.size_bytes is None
    assert odd.unreadable


def test_block_devices_of_a_copy_with_one_list_of_the_kernels_are_listed(tree: PciTree) -> None:
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"})
    full = read_inventory(tree.root).block
    shutil.rmtree(tree.path / "sys/class/block")
    shutil.rmtree(tree.path / "sys/dev/block")
    assert [disk.name for disk in full] == ["sda", "sda1"]
    assert read_inventory(tree.root).block == full


def test_a_namespace_in_mode_devdax_has_a_character_device(tree: PciTree) -> None:
    region = "/sys/devices/platform/e820_pmem/ndbus0/region0"
    tree.file(f"{region}/namespace0.0/mode", "devdax\n")
    tree.file(f"{region}/namespace0.0/holder", "dax0.1\n")
    tree.file(f"{region}/dax0.1/dax0.0/dev", "252:0\n")
    tree.link("/sys/bus/nd/devices/namespace0.0", f"../../..{region[4:]}/namespace0.0")
    assert read_inventory(tree.root).pmem == (
        Pmem(
            name="namespace0.0",
            device_node="/dev/dax0.0",
            mode="devdax",
            size_bytes=None,
            numa_node=None,
        ),
    )


def test_a_malformed_namespace_is_told(tree: PciTree) -> None:
    region = "/sys/devices/platform/e820_pmem/ndbus0/region0"
    tree.file(f"{region}/namespace0.0/size", "much\n")
    tree.link("/sys/bus/nd/devices/namespace0.0", f"../../..{region[4:]}/namespace0.0")
    (pmem,) = read_inventory(tree.root).pmem
    assert (pmem.size_bytes, pmem.device_node) == (None, None)
    assert pmem.unreadable == (
        "cannot read /sys/bus/nd/devices/namespace0.0/size: 'much' is not a number",
    )


def test_a_pmem_disk_without_a_namespace_is_listed(tree: PciTree) -> None:
    tree.block_device("259:64", "pmem0", size_bytes=GIB)
    assert read_inventory(tree.root).pmem == (
        Pmem(name=None, device_node="/dev/pmem0", size_bytes=GIB),
    )


# mediated devices


def test_types_and_instances(tree: PciTree) -> None:
    tree.pci_function(GPU, class_code=0x030000, group=0)
    tree.mdev_type(GPU, "i915-GVTg_V5_4", title="GVTg", available=1)
    tree.mdev(UUID, GPU, "i915-GVTg_V5_4", group=40).vfio_group(40)
    inventory = read_inventory(tree.root)
    assert inventory.mdev_types == (
        MdevType(
            parent=GPU, name="i915-GVTg_V5_4", title="GVTg", available=1, device_api="vfio-pci"
        ),
    )
    path = f"/sys/devices/pci0000:00/{GPU}/{UUID}"
    device = MediatedDevice(uuid=UUID, type=VFIODeviceType.MEDIATED, parent=GPU, sysfs_path=path)
    assert inventory.mdev == (
        HostMediated(
            uuid=UUID,
            device=device,
            mdev_type="i915-GVTg_V5_4",
            iommu_group=40,
            group_node="/dev/vfio/40",
        ),
    )
    assert [str(e.function.bdf) for e in inventory.pci] == [GPU]


def test_an_adapter_of_s390x_shows_its_queues(tree: PciTree) -> None:
    parent = "/sys/devices/vfio_ap/matrix"
    tree.mdev_type(parent, "vfio_ap-passthrough", available=65536, api="vfio-ap")
    tree.mdev(UUID, parent, "vfio_ap-passthrough", matrix=["05.0004", "05.00ab"])
    (mediated,) = read_inventory(tree.root).mdev
    assert mediated.device
    assert mediated.device.type is VFIODeviceType.AP
    assert mediated.device.ap_queues == ("05.0004", "05.00ab")
    assert (mediated.device.parent, mediated.iommu_group) == ("matrix", None)


def test_a_malformed_type_is_told_beside_a_good_one(tree: PciTree) -> None:
    tree.pci_function(GPU).mdev_type(GPU, "a", available="many").mdev_type(GPU, "b", available=2)
    bad, good = read_mdev_types(tree.root)
    assert (bad.name, bad.available, len(bad.unreadable)) == ("a", None, 1)
    assert "available_instances: 'many' is not a number" in bad.unreadable[0]
    assert (good.available, good.unreadable) == (2, ())


def test_words_of_a_mediated_device_that_are_not_utf8(tree: PciTree) -> None:
    tree.pci_function(GPU).mdev_type(GPU, "a", title="caf\udce9", api="vfio-\udce9")
    tree.mdev(UUID, GPU, "a")
    inventory = read_inventory(tree.root)
    assert inventory.mdev_types[0].title == "caf\ufffd"
    assert [mediated.unreadable for mediated in inventory.mdev] == [()]


def test_a_mediated_device_that_cannot_be_read_is_told(tree: PciTree) -> None:
    tree.link(f"/sys/bus/mdev/devices/{UUID}", UUID)
    (mediated,) = read_inventory(tree.root).mdev
    assert (mediated.device, len(mediated.unreadable)) == (None, 1)


# the vhost-user store


@pytest.fixture
def store(tmp_path: Path) -> VhostUserStore:
    for name in ("devices", "sockets"):
        (tmp_path / "store/block" / name).mkdir(parents=True)
    return VhostUserStore(str(tmp_path / "store"))


def test_an_empty_store_and_one_that_is_not_there(tree: PciTree, store: VhostUserStore) -> None:
    live = HostRoot()
    kinds = [Kind.VHOST_USER]
    assert read_inventory(live, vhost_user_store=store, kinds=kinds).vhost_user == ()
    assert read_inventory(live, kinds=kinds) == Inventory()
    with pytest.raises(NoSuchDevice, match="does not exist"):
        read_inventory(
            tree.root, vhost_user_store=VhostUserStore("/nowhere", root=tree.root), kinds=kinds
        )


@pytest.mark.root
def test_the_numbers_of_a_store_with_and_without_a_socket(
    tmp_path: Path, store: VhostUserStore
) -> None:
    tree = PciTree(tmp_path)
    for name, number in (("a", "241:0"), ("b", "242:1"), ("other", "8:0")):
        tree.node(f"/store/block/devices/{name}", "b", number)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{store.path}/block/sockets/a")
    vms = {Identity.parse("block:241:0"): "sb1"}
    found = read_inventory(HostRoot(), vhost_user_store=store, kinds=[Kind.VHOST_USER], vms=vms)
    served, unserved = found.vhost_user
    assert (served.devnum, served.kind, served.problem) == (
        DevNum(241, 0),
        "vhost-user-blk-pci",
        None,
    )
    assert served.socket_path == f"{store.path}/block/sockets/a"
    assert [str(use) for use in served.uses] == [f"{store.path}/block/devices/a is in VM sb1"]
    assert (unserved.devnum, unserved.socket_path) == (DevNum(242, 1), None)
    assert unserved.problem
    assert "has no socket" in unserved.problem


# names

LIST = """#
# A list.
0001  One
8086  Intel Corporation
\t0953  PCIe Data Center SSD
\t\t8086 370a  DC P3600 SSD [2.5" SFF]
\t09531  Not a device
10de  NVIDIA Corporation
\t0a00  Of another vendor

C 01  Mass storage controller
\t08  Non-Volatile memory controller
\t\t02  NVM Express
C 02  Network controller
"""


def test_names_come_out_of_the_roots_own_list(tree: PciTree) -> None:
    tree.file(PCI_IDS[1], LIST.replace("Intel", "Int\udce9l"))
    names = PciNames(tree.root)
    assert names.find_vendor(0x8086) == "Int\ufffdl Corporation"
    assert names.find_device(0x8086, 0x0953) == "PCIe Data Center SSD"
    assert names.find_class(0x010802) == "Non-Volatile memory controller"
    # Of a class whose subclass is not listed there is the base's name.
    assert names.find_class(0x028000) == "Network controller"
    assert names.find_class(0x020000) == "Ethernet controller"


def test_a_name_that_is_not_listed_is_none(tree: PciTree) -> None:
    tree.file(PCI_IDS[0], LIST)
    names = PciNames(tree.root)
    assert names.find_device(0x8086, 0x0A00) is None
    assert (names.find_vendor(0x8087), names.find_vendor(None)) == (None, None)
    assert (names.find_device(0x10DE, None), names.find_device(0x8087, 1)) == (None, None)
    assert (names.find_class(None), names.find_class(0xFE0000)) == (None, None)


def test_an_unreadable_list_is_passed_over(tree: PciTree) -> None:
    tree.link(PCI_IDS[0], "pci.ids").file(PCI_IDS[1], LIST)
    assert PciNames(tree.root).find_vendor(0x8086) == "Intel Corporation"


# this host


def test_this_hosts_disks_are_those_that_lsblk_shows() -> None:
    columns = "KNAME,MAJ:MIN,SIZE,RO,TYPE,PKNAME,LOG-SEC,RM"
    command = ["lsblk", "--json", "--bytes", "--all", "--list", "--output", columns]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    expected = {row["kname"]: row for row in listed["blockdevices"]}
    found = {disk.name: disk for disk in read_inventory(HostRoot(), kinds=[Kind.BLOCK]).block}
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        disk = found[name]
        assert disk.facts
        assert str(disk.devnum) == row["maj:min"]
        assert disk.facts.size_bytes == int(row["size"] or 0)
        assert disk.facts.read_only == row["ro"]
        assert disk.facts.sector_bytes == row["log-sec"]
        if row["type"] == "part":
            assert disk.disk == row["pkname"]
