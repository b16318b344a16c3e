"""Remedies that can be run on a tree: after the commands of the hint nothing is found any more."""

import shlex
from pathlib import Path

import pytest

from tests.support.pci_tree import PciTree
from tests.support.vfio import findings
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import Access, Code
from vmplug.host.pci.vfio import find_vfio_device

NIC, DRIVES = "0000:3b:00.0", ("0000:04:00.0", "0000:04:00.1")


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path)


def run_network(tree: PciTree, commands: str) -> None:
    """ip(8), rdma(8) and ovs-vsctl(8) on a tree; an unknown command is an error."""
    nic = tree.path / "sys/class/net/eth0"
    for command in commands.split("; "):
        match shlex.split(command):
            case ["rdma", "link", "delete", device]:
                (tree.path / "sys/class/infiniband" / device).unlink()
            case ["ip", "link", "delete", upper]:
                (nic / f"upper_{upper}").unlink()
            case ["ip", "link", "set", "eth0", "nomaster"] | [
                "ovs-vsctl",
                "--with-iface",
                "del-port",
                "eth0",
            ]:
                master = (nic / "master").readlink().name
                assert master.startswith("ovs-") is command.startswith("ovs-")
                (nic / "master").unlink()
                (nic / f"upper_{master}").unlink(missing_ok=True)
            case ["ip", "addr", "flush", "dev", name]:
                for table in tree.path.glob("proc/net/*route"):
                    lines = table.read_text().splitlines(keepends=True)
                    table.write_text("".join(line for line in lines if name not in line.split()))
            case ["ip", "link", "set", _, "down"]:
                pass
            case words:
                raise AssertionError(words)


@pytest.mark.parametrize(
    ("master", "uppers", "names"),
    [
        ("bond0", ("bond0",), "bond0"),
        ("br0", (), "br0"),
        (None, ("eth0.7",), "eth0.7"),
        (None, ("eth0.7", "macvtap0"), "eth0.7, macvtap0"),
        ("br0", ("br0", "eth0.7"), "br0, eth0.7"),
        ("ovs-system", ("ovs-system",), "ovs-system"),
    ],
)
def test_an_interface_leaves_what_is_built_on_it_by_the_commands_for_that(
    tree: PciTree, master: str | None, uppers: tuple[str, ...], names: str
) -> None:
    tree.pci_function(NIC, class_code=0x020000, driver="ice", group=40)
    tree.network(NIC, "eth0", master=master, uppers=uppers).route("eth0").route("eth1")
    finding = findings(tree, NIC)[Code.NETWORK_IN_USE]
    assert finding.message.endswith(f"a place in {names}")
    run_network(tree, finding.hint.removeprefix("remove it from the host's network first: "))
    assert set(findings(tree, NIC)) == {Code.NOT_BOUND}


def test_the_fast_path_of_another_card_is_not_released_by_a_command(tree: PciTree) -> None:
    """A VM on Hyper-V, or with a failover pair: ip(8) says that this is not supported."""
    tree.pci_function(NIC, class_code=0x020000, driver="mlx5_core", group=40)
    tree.network(NIC, "eth1", master="eth0").route("lo")
    tree.file("/sys/devices/virtual/net/eth0/address")
    tree.link("/sys/class/net/eth0", "../../devices/virtual/net/eth0")
    assert "ip link set eth1 nomaster" in findings(tree, NIC)[Code.NETWORK_IN_USE].hint
    tree.link("/sys/devices/virtual/net/eth0/device", "../../../vmbus/0")
    tree.file("/sys/devices/vmbus/0/uevent")
    finding = findings(tree, NIC)[Code.NETWORK_IN_USE]
    assert finding.message.endswith("which has a place in eth0")
    assert "nomaster" not in finding.hint
    assert "eth0 keeps it as its fast path" in finding.hint


@pytest.mark.parametrize("file", ["parent", "ports/1/gid_attrs/ndevs/0"])
def test_soft_rdma_over_an_interface_is_its_use(tree: PciTree, file: str) -> None:
    tree.pci_function(NIC, class_code=0x020000, driver="ice", group=40)
    tree.network(NIC, "eth0").route("eth1")
    for name, interface in (("rxe$0", "eth0"), ("rxe1", "eth1")):
        tree.file(f"/sys/devices/virtual/infiniband/{name}/{file}", f"{interface}\n")
        link = f"/sys/class/infiniband/{name}"
        tree.link(link, f"../../devices/virtual/infiniband/{name}")
    # That of the card itself goes where the card goes.
    card = f"{tree.real(NIC)}/infiniband/mlx5_0"
    tree.file(f"{card}/ports/1/gid_attrs/ndevs/0", "eth0\n")
    tree.link("/sys/class/infiniband/mlx5_0", f"../../{card.removeprefix('/sys/')}")
    finding = findings(tree, NIC)[Code.NETWORK_IN_USE]
    assert finding.message.endswith("which has a place in rxe$0")
    run_network(tree, finding.hint.removeprefix("remove it from the host's network first: "))
    assert set(findings(tree, NIC)) == {Code.NOT_BOUND}


def test_the_name_of_an_interface_is_no_part_of_a_command(tree: PciTree) -> None:
    """A container may choose it."""
    tree.pci_function(NIC, class_code=0x020000, driver="ice", group=40)
    tree.network(NIC, "eth0", uppers=("a;reboot",)).route("eth1")
    hint = findings(tree, NIC)[Code.NETWORK_IN_USE].hint
    assert "ip link delete 'a;reboot'; ip addr flush dev eth0" in hint


def test_a_disk_with_two_controllers_in_the_group_is_named_once(tree: PciTree) -> None:
    for number, bdf in enumerate(DRIVES):
        tree.pci_function(bdf, driver="nvme", group=14)
        hidden = f"{tree.real(bdf)}/nvme/nvme{number}/nvme0c{number}n1"
        tree.file(f"{hidden}/size", "8\n")
        tree.link(f"/sys/class/block/nvme0c{number}n1", f"../..{hidden[4:]}")
    tree.block_device("259:2", "nvme0n1").mount("/dev/nvme0n1", "/srv", "259:2")
    group = find_vfio_device(DRIVES[0], tree.root)
    assert [disk.device_node for disk in group.disks] == ["/dev/nvme0n1"]
    usage = read_usage(tree.root)
    found = check_device(group, Access(read_only=False), usage=usage, root=tree.root)
    assert [finding.code for finding in found] == [Code.NOT_BOUND, Code.MOUNTED_ON_HOST]
