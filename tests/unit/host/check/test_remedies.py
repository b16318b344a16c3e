"""Remedies that can be run on a tree: after the commands of the hint nothing is found any more."""

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.checking import WRITING
from tests.support.pci_tree import PciTree
from tests.support.vfio import findings
from vmplug.devnum import DevNum
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import Access, Code, Finding
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.resolve import resolve
from vmplug.oci.info import DeviceInfo, DevType

DISK = DeviceInfo(container_path="/dev/sda", dev_type=DevType.BLOCK, devnum=DevNum.parse("8:0"))
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


def test_soft_rdma_without_a_file_for_its_interface_is_known_by_its_guid(tree: PciTree) -> None:
    """siw before Linux 6.5. The GUID of its interface 52:54:00:12:34:56."""
    tree.pci_function(NIC, class_code=0x020000, driver="ice", group=40).network(NIC, "eth0")
    for name, guid in (("siw0", "5054:00ff:fe12:3456"), ("siw1", "5054:00ff:fe12:3457")):
        tree.file(f"/sys/devices/virtual/infiniband/{name}/node_guid", f"{guid}\n")
        tree.link(f"/sys/class/infiniband/{name}", f"../../devices/virtual/infiniband/{name}")
    finding = findings(tree, NIC)[Code.NETWORK_IN_USE]
    assert finding.message.endswith("which has a place in siw0")
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


def run_on(tree: PciTree, finding: Finding) -> None:
    """The command between the brackets of a hint, on the tree's files: an `echo` into one."""
    command = finding.hint.partition("(")[2].partition(")")[0].replace("> /", f"> {tree.path}/")
    assert command.startswith("echo ")
    subprocess.run(["sh", "-euc", command], check=True)


def test_a_screen_is_free_without_the_text_console(tree: PciTree) -> None:
    tree.pci_function(NIC, class_code=0x038000, driver="nouveau", group=40)
    tree.file(f"{tree.real(NIC)}/graphics/fb0/name", "nouveaudrmfb\n")
    tree.link(
        "/sys/class/graphics/fb0", f"../..{tree.real(NIC).removeprefix('/sys')}/graphics/fb0"
    )
    for number, name in enumerate(("(S) dummy device", "(M) frame buffer device")):
        tree.file(f"/sys/class/vtconsole/vtcon{number}/name", f"{name}\n")
        tree.file(f"/sys/class/vtconsole/vtcon{number}/bind", f"{number}\n")
    run_on(tree, findings(tree, NIC)[Code.BOOT_CONSOLE])
    assert (tree.path / "sys/class/vtconsole/vtcon1/bind").read_text() == "0\n"
    assert set(findings(tree, NIC)) == {Code.NOT_BOUND}


@pytest.mark.parametrize("has_switch", [True, False], ids=["a serial port", "another"])
def test_a_serial_port_is_taken_from_the_kernel_while_it_runs(
    tree: PciTree, *, has_switch: bool
) -> None:
    """tests/lab/test_consoles.py shows that the kernel does what the file is told."""
    tree.pci_function(NIC, class_code=0x070002, driver="serial", group=40)
    place = f"{tree.real(NIC)}/tty/ttyS4"
    tree.file(f"{place}/dev", "4:68\n")
    tree.link("/sys/class/tty/ttyS4", f"../..{place.removeprefix('/sys')}")
    tree.file("/sys/class/tty/console/active", "tty0 ttyS4\n")
    if has_switch:
        tree.file(f"{place}/console", "Y\n")
    finding = findings(tree, NIC)[Code.BOOT_CONSOLE]
    assert "choose another console= on the kernel's command line" in finding.hint
    assert ("echo N" in finding.hint) is has_switch
    if has_switch:
        run_on(tree, finding)
        assert (tree.path / place[1:] / "console").read_text() == "N\n"


def test_a_usb_stick_gives_its_file_back(tree: PciTree) -> None:
    """No kernel of the lab can be a USB device; the file has the text that it was told."""
    base = "/sys/kernel/config/usb_gadget/g1/functions/mass_storage.0"
    tree.file(f"{base}/lun.0/file", "/dev/sda\n").block_device("8:0", "sda")

    def found() -> dict[Code, Finding]:
        disk = resolve(DISK, tree.root)
        checked = check_device(disk, WRITING, usage=read_usage(tree.root), root=tree.root)
        return {finding.code: finding for finding in checked}

    finding = found()[Code.IS_EXPORTED]
    assert finding.message == "/dev/sda is exported as the USB target g1"
    run_on(tree, finding)
    assert Code.IS_EXPORTED not in found()
