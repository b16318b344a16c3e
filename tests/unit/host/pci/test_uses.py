"""What a function is used for: its block devices and network interfaces, below any root."""

import json
import shutil
from pathlib import Path

import pytest
from msgspec import structs

from tests.support.pci_tree import PciTree
from vmplug.address import Bdf
from vmplug.errors import AttributeReadError
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.uses import (
    RECORDED_NETWORK,
    BlockDevices,
    NetInterface,
    read_network_interfaces,
)
from vmplug.host.resolve import resolve_all
from vmplug.host.root import HostRoot
from vmplug.oci.requests import VfioInfo

PORT, CARD, OTHER = "0000:00:1c.0", "0000:3b:00.0", "0000:00:03.0"
LINK_LOCAL, GLOBAL = "fe80" + "0" * 28, "2001" + "0" * 28
UNUSED = NetInterface(name="eth0", has_default_route=False, has_address=False, master=None)


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    tree = PciTree(tmp_path / "host")
    tree.pci_function(PORT, class_code=0x060400)
    return tree.pci_function(CARD, below=PORT).pci_function(OTHER)


@pytest.fixture
def wired(tree: PciTree) -> PciTree:
    """With an interface whose host has tables that say nothing of it."""
    tree.network(CARD, "eth0").route("lo", target="0000007F")
    return tree.route6("lo").address6("lo", "0" * 31 + "1", scope=0x10)


def blocks(tree: PciTree, bdf: str) -> list[str]:
    return [str(number) for number in BlockDevices(tree.root).of(Bdf.parse(bdf))]


def networks(tree: PciTree, bdf: str = CARD) -> list[NetInterface]:
    found = read_network_interfaces(bdf, tree.root)
    assert found == read_network_interfaces(Bdf.parse(bdf), tree.root)
    return found


def test_disks_and_partitions_of_a_function(tree: PciTree) -> None:
    tree.pci_disk(CARD, "259:0", "nvme0n1", partitions={"259:1": "nvme0n1p1"})
    tree.pci_disk(OTHER, "254:0", "vda", way="virtio0/block")
    tree.block_device("7:0", "loop0")
    assert blocks(tree, CARD) == ["259:0", "259:1"]
    assert blocks(tree, OTHER) == ["254:0"]
    # What is behind a bridge would go with it.
    assert blocks(tree, PORT) == ["259:0", "259:1"]


def test_a_function_without_disks_has_none(tree: PciTree) -> None:
    assert blocks(tree, CARD) == []
    tree.pci_disk(CARD, "259:0", "nvme0n1")
    assert blocks(tree, OTHER) == []


def test_functions_read_the_class_once(tree: PciTree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.pci_disk(CARD, "259:0", "nvme0n1")
    requests = [VfioInfo(label=bdf, device=bdf) for bdf in (CARD, OTHER)]
    listed, list_dir = list[str](), HostRoot.list_dir

    def count(root: HostRoot, path: str) -> list[str]:
        listed.append(path)
        return list_dir(root, path)

    monkeypatch.setattr(HostRoot, "list_dir", count)
    resolve_all(requests[:1], tree.root)
    once = listed.count("/sys/class/block")
    found = resolve_all(requests * 8, tree.root)
    assert [len(group.disks) for group in found if isinstance(group, VfioGroup)] == [1, 0] * 8
    assert listed.count("/sys/class/block") == 2 * once


def test_a_disk_of_several_controllers_is_found_by_its_hidden_ways(tree: PciTree) -> None:
    """The disk lies below no function; Linux 4.15 and later, for drives of several ports."""
    hidden = f"{tree.real(CARD)}/nvme/nvme0/nvme0c0n1"
    tree.file(f"{hidden}/size", "8\n").file(f"{hidden}/hidden", "1\n")
    tree.link("/sys/class/block/nvme0c0n1", f"../..{hidden[4:]}")
    tree.block_device("259:2", "nvme0n1", partitions={"259:3": "nvme0n1p1"})
    tree.block_device("259:4", "nvme0n12").block_device("259:5", "nvme1n1")
    assert blocks(tree, CARD) == ["259:2", "259:3"]


def test_a_disk_that_is_going_away_is_passed_over(tree: PciTree) -> None:
    tree.pci_disk(CARD, "259:0", "nvme0n1")
    tree.link("/sys/class/block/nvme1n1", f"../..{tree.real(CARD)[4:]}/nvme/nvme1/nvme1n1")
    assert blocks(tree, CARD) == ["259:0"]


def test_a_number_that_makes_no_sense_is_an_error(tree: PciTree) -> None:
    tree.pci_disk(CARD, "259:0", "nvme0n1")
    (tree.path / tree.real(CARD)[1:] / "nvme/nvme0/nvme0n1/dev").write_text("many\n")
    with pytest.raises(AttributeReadError, match="not MAJOR:MINOR"):
        blocks(tree, CARD)


def test_a_class_directory_without_links_is_searched_too(tree: PciTree) -> None:
    """As in a copy of a host whose links were followed."""
    tree.file("/sys/class/block/nvme0n1/dev", "259:0\n")
    assert blocks(tree, CARD) == []


# interfaces


@pytest.mark.parametrize("bus_device", ["", "virtio0", "mlx5_core.sf.2"])
def test_an_interface_is_found_wherever_it_lies_below_its_function(
    tree: PciTree, bus_device: str
) -> None:
    tree.route("lo", target="0000007F").network(CARD, "eth0", bus_device=bus_device)
    assert networks(tree) == [UNUSED]
    assert networks(tree, OTHER) == []


def test_a_pppoe_connection_needs_no_address(wired: PciTree) -> None:
    head = "Id       Address              Device\n"
    wired.file("/proc/net/pppoe", f"{head}00000001 02:00:00:00:00:01     eth1\n")
    assert networks(wired) == [UNUSED]
    wired.file("/proc/net/pppoe", f"{head}00000001 02:00:00:00:00:01     eth0\n")
    (interface,) = networks(wired)
    assert interface.uses == ("a PPPoE connection",)


def test_a_program_that_takes_its_packets(wired: PciTree) -> None:
    said: dict[str, object] = {"addressed": [], "routed": [], "built": {}}
    for programmed in ([], ["eth1"]):
        wired.file(RECORDED_NETWORK, json.dumps({**said, "programmed": programmed}))
        assert networks(wired) == [UNUSED]
    wired.file(RECORDED_NETWORK, json.dumps({**said, "programmed": ["eth0"]}))
    assert networks(wired)[0].uses == ("an XDP program",)
    wired.file(RECORDED_NETWORK, json.dumps(said))  # that of an earlier record
    assert networks(wired) == [UNUSED]


def test_an_interface_that_the_host_does_not_use(wired: PciTree) -> None:
    assert networks(wired) == [UNUSED]
    assert not UNUSED.is_used


def test_a_host_without_tables_does_not_say(tree: PciTree) -> None:
    tree.network(CARD, "eth0", master="br0")
    shutil.rmtree(tree.path / "proc/net")
    (found,) = networks(tree)
    assert found == NetInterface(
        name="eth0", has_default_route=None, has_address=None, master="br0"
    )


def test_the_default_route(wired: PciTree) -> None:
    wired.route("eth0")
    assert networks(wired) == [structs.replace(UNUSED, has_default_route=True, has_address=True)]
    assert networks(wired)[0].is_used


def test_a_route_to_a_network_comes_with_an_address(wired: PciTree) -> None:
    wired.route("eth0", target="0002A8C0", mask="00FFFFFF")
    assert networks(wired) == [structs.replace(UNUSED, has_address=True)]


@pytest.mark.parametrize(("flags", "is_used"), [("0x1003", True), ("0x1002", False)])
def test_a_route_that_is_left_to_an_interface_that_is_down_does_not_count(
    wired: PciTree, flags: str, *, is_used: bool
) -> None:
    """One of several ways of a route stays there, and only the kernel itself passes it over."""
    wired.route("eth0", target="0002A8C0").file("/sys/class/net/eth0/flags", f"{flags}\n")
    assert networks(wired) == [structs.replace(UNUSED, has_address=is_used)]


FIB_TRIE = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 127.0.0.1
        /32 host LOCAL
     |-- {address}
        /32 host LOCAL
     |-- 192.168.2.255
        /32 link BROADCAST
"""


@pytest.mark.parametrize(
    ("address", "has_address"),
    [("192.168.2.7", False), ("127.0.0.9", False), ("192.168.3.7", None), ("10.0.0.1", None)],
)
def test_an_address_without_a_route_may_be_that_of_any_interface(
    wired: PciTree, address: str, *, has_address: bool | None
) -> None:
    wired.route("eth1", target="0002A8C0").route("eth1")
    wired.file("/proc/net/fib_trie", FIB_TRIE.format(address=address))
    assert networks(wired) == [structs.replace(UNUSED, has_address=has_address)]


def test_a_record_says_which_interface_has_an_address(wired: PciTree) -> None:
    wired.file("/proc/net/fib_trie", FIB_TRIE.format(address="10.0.0.1"))
    own = {"addressed": ["eth0"], "routed": [], "built": {"eth0": ["tun0"]}}
    wired.file(RECORDED_NETWORK, json.dumps(own))
    (found,) = networks(wired)
    assert found.uses == ("an address", "a place in tun0")
    own["addressed"] = []
    wired.file(RECORDED_NETWORK, json.dumps(own))
    assert networks(wired)[0].uses == ("a place in tun0",)
    wired.file(RECORDED_NETWORK, "[" * 5000)
    with pytest.raises(AttributeReadError, match=RECORDED_NETWORK):
        networks(wired)


def test_the_default_route_of_ipv6(wired: PciTree) -> None:
    wired.route6("eth0", target=LINK_LOCAL, length=64)
    assert networks(wired) == [UNUSED]
    wired.route6("eth0")
    assert networks(wired) == [structs.replace(UNUSED, has_default_route=True)]


def test_a_link_local_address_does_not_count(wired: PciTree) -> None:
    wired.address6("eth0", LINK_LOCAL, scope=0x20)
    assert networks(wired) == [UNUSED]
    wired.address6("eth0", GLOBAL, scope=0x00)
    assert networks(wired) == [structs.replace(UNUSED, has_address=True)]


def test_another_interfaces_routes_are_its_own(wired: PciTree) -> None:
    wired.network(OTHER, "eth00").route("eth00").address6("eth00", GLOBAL, scope=0)
    assert networks(wired) == [UNUSED]


def test_a_route_that_is_down_or_rejects_does_not_count(wired: PciTree) -> None:
    with (wired.path / "proc/net/route").open("a") as file:
        file.write("eth0\t00000000\t00000000\t0000\t0\t0\t0\t00000000\t0\t0\t0\n")
        file.write("eth0\t00000000\t00000000\t0201\t0\t0\t0\t00000000\t0\t0\t0\n")
    assert networks(wired) == [UNUSED]


def test_a_part_of_a_bridge_and_a_base_of_a_vlan(wired: PciTree) -> None:
    wired.network(CARD, "eth1", master="br0", uppers=("br0",)).network(
        CARD, "eth2", uppers=("eth2.100",)
    )
    masters = {network.name: network.master for network in networks(wired)}
    assert masters == {"eth0": None, "eth1": "br0", "eth2": "eth2.100"}


@pytest.mark.parametrize("name", ["route", "ipv6_route", "if_inet6"])
@pytest.mark.parametrize("line", ["eth0", "q r s t u v w x y z k", "\udcff " * 11])
def test_a_table_that_makes_no_sense_is_an_error(wired: PciTree, name: str, line: str) -> None:
    with (wired.path / f"proc/net/{name}").open("a", errors="surrogateescape") as file:
        file.write(f"{line}\n")
    with pytest.raises(AttributeReadError, match=f"/proc/net/{name}: no route or address"):
        networks(wired)


def test_files_of_the_class_are_no_interfaces(wired: PciTree) -> None:
    wired.file("/sys/class/net/bonding_masters", "bond0\n")
    assert networks(wired) == [UNUSED]


def test_this_host_can_be_asked() -> None:
    root = HostRoot()
    for name in root.list_dir(root.pci_devices):
        real = root.real_path(f"{root.pci_devices}/{name}")
        for number in BlockDevices(root).of(Bdf.parse(name)):
            assert root.real_path(f"{root.sys_dev}/block/{number}").startswith(real)
        read_network_interfaces(name, root)
