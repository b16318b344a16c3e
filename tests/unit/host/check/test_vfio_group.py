"""Every reason not to hand an IOMMU group over, each beside the host that gives no such reason."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.checking import WRITING, Counting, claim
from tests.support.pci_tree import PciTree
from vmplug.errors import AttributeReadError
from vmplug.host.block.usage import HostUsage, read_usage
from vmplug.host.check.device import check_device
from vmplug.host.check.isolation import check_isolation
from vmplug.host.check.unknown import gather_unknown
from vmplug.host.check.vfio_group import (
    GuestMemory,
    check_memlock,
    check_networks,
    check_openers,
    check_vm,
)
from vmplug.host.finding import Code, Finding, Severity
from vmplug.host.kind import Identity
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.root import HostRoot
from vmplug.host.use.claim import Claim
from vmplug.host.use.interfaces import MovedInterface

GPU, AUDIO, OTHER = "0000:3b:00.0", "0000:3b:00.1", "0000:3c:00.0"
VGA, SOUND, ETHERNET, BRIDGE, NVSWITCH = 0x030000, 0x040300, 0x020000, 0x060400, 0x068000
VIRTUAL = "0000:3c:10.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"

REMAPPING = "  0:  122  IR-IO-APIC   2-edge      timer\n"
NO_REMAPPING = "  0:  122  IO-APIC   2-edge      timer\n"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    """A host with an IOMMU that remaps interrupts."""
    tree = PciTree(tmp_path)
    tree.file("/proc/interrupts", REMAPPING)
    return tree


def bound(tree: PciTree, bdf: str = GPU, **more: object) -> PciTree:
    """A function that VFIO has."""
    wanted = {"driver": "vfio-pci", "group": 26, **more}
    return tree.pci_function(bdf, **wanted)  # type: ignore[arg-type]


def findings(
    tree: PciTree, name: str = GPU, claims: tuple[Claim, ...] = ()
) -> dict[Code, Finding]:
    group = find_vfio_device(name, tree.root)
    usage = read_usage(tree.root)
    found = check_device(group, WRITING, usage=usage, claims=claims, root=tree.root)
    assert all(finding.hint and finding.message for finding in found)
    return {finding.code: finding for finding in found}


def test_a_function_that_vfio_has_may_go(tree: PciTree) -> None:
    bound(tree)
    assert findings(tree) == {}


# isolation


def test_a_function_in_no_group_has_no_iommu(tree: PciTree) -> None:
    bound(tree, group=None)
    message = findings(tree)[Code.NO_IOMMU].message
    assert message == f"{GPU} is in no IOMMU group: the host has no IOMMU, or does not use it"
    bound(tree, OTHER, group=5)
    finding = findings(tree)[Code.NO_IOMMU]
    assert finding.message == f"{GPU} is in no IOMMU group, although the host uses its IOMMU"
    assert "enable" not in finding.hint


def test_a_function_in_no_group_is_not_sent_to_bind_which_refuses_it(tree: PciTree) -> None:
    bound(tree, group=None, driver="nvidia")
    assert not findings(tree).keys() & {Code.NOT_BOUND, Code.GROUP_NOT_VIABLE}


def test_interrupts_that_are_not_remapped_are_a_danger(tree: PciTree) -> None:
    bound(tree).file("/proc/interrupts", NO_REMAPPING)
    finding = findings(tree)[Code.NO_INTERRUPT_REMAPPING]
    assert finding.severity is Severity.ERROR
    assert "allow_unsafe_interrupts" in finding.hint


def test_the_operator_may_have_told_vfio_to_do_without(tree: PciTree) -> None:
    switch = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
    bound(tree).file("/proc/interrupts", NO_REMAPPING).file(switch, "Y\n")
    assert findings(tree)[Code.NO_INTERRUPT_REMAPPING].severity is Severity.WARNING
    tree.file(switch, "N\n")
    assert findings(tree)[Code.NO_INTERRUPT_REMAPPING].severity is Severity.ERROR


def test_a_devices_own_node_is_that_of_another_module_which_must_be_told(tree: PciTree) -> None:
    base = "/sys/module/{}/parameters/allow_unsafe_interrupts"
    bound(tree, cdev=0).file("/proc/interrupts", NO_REMAPPING).file("/dev/iommu")
    tree.file(base.format("vfio_iommu_type1"), "Y\n")
    group = find_vfio_device(GPU, tree.root)
    named = group._replace(cdev_nodes=((GPU, "/dev/vfio/devices/vfio0"),))

    def severity(group: VfioGroup) -> Severity:
        (finding,) = check_isolation(group, read_usage(tree.root), tree.root)
        return finding.severity

    assert [severity(group), severity(named)] == [Severity.WARNING, Severity.ERROR]
    tree.file(base.format("iommufd"), "Y\n")
    assert severity(named) is Severity.WARNING


def test_a_host_that_does_not_say_how_it_remaps_is_not_suspected(tree: PciTree) -> None:
    bound(tree).file("/proc/interrupts", " 11:  5  GICv3  27 Level  arch_timer\n")
    assert findings(tree) == {}


# bindings


def test_a_function_of_a_host_driver_is_not_bound(tree: PciTree) -> None:
    tree.pci_function(GPU, driver="nouveau", group=26)
    finding = findings(tree)[Code.NOT_BOUND]
    assert finding.message == f"/dev/vfio/26 is not bound to VFIO: {GPU} is bound to nouveau"
    assert f"vmplug bind {GPU}" in finding.hint
    assert "--managed" in finding.hint


def test_a_function_without_a_driver_is_not_bound_either(tree: PciTree) -> None:
    tree.pci_function(GPU, group=26)
    assert f"{GPU} has no driver" in findings(tree)[Code.NOT_BOUND].message


def test_the_audio_of_a_gpu_keeps_its_group_from_going_and_is_named(tree: PciTree) -> None:
    bound(tree, class_code=VGA).pci_function(
        AUDIO, class_code=SOUND, driver="snd_hda_intel", group=26
    )
    found = findings(tree)
    assert set(found) == {Code.GROUP_NOT_VIABLE}
    assert f"{AUDIO} is bound to snd_hda_intel" in found[Code.GROUP_NOT_VIABLE].message
    assert GPU not in found[Code.GROUP_NOT_VIABLE].message


def test_a_bridge_stays_with_the_host_and_an_nvswitch_does_not(tree: PciTree) -> None:
    bound(tree).pci_function(OTHER, class_code=BRIDGE, driver="pcieport", group=26)
    assert findings(tree) == {}
    tree.pci_function(AUDIO, class_code=NVSWITCH, driver="nvidia-nvswitch", group=26)
    assert AUDIO in findings(tree)[Code.GROUP_NOT_VIABLE].message


def test_a_variant_driver_is_vfio_too_by_its_name_or_by_what_the_kernel_shows(
    tree: PciTree,
) -> None:
    bound(tree, driver="mlx5_vfio_pci")
    bound(tree, OTHER, driver="strange", group=5, cdev=3)
    assert findings(tree) == findings(tree, OTHER) == {}


def test_a_member_that_nobody_knows_keeps_the_group(tree: PciTree) -> None:
    bound(tree).link("/sys/kernel/iommu_groups/26/devices/fsl-mc.1", "../../../../devices/x")
    assert "fsl-mc.1" in findings(tree)[Code.MEMBER_IN_USE].message


# use on the host


def test_a_mounted_disk_on_it_keeps_an_nvme(tree: PciTree) -> None:
    tree.pci_function(GPU, driver="nvme", group=26)
    tree.pci_disk(GPU, "259:0", "nvme0n1", partitions={"259:1": "nvme0n1p1"})
    assert set(findings(tree)) == {Code.NOT_BOUND}
    tree.mount("/dev/nvme0n1p1", "/srv/data", "259:1")
    finding = findings(tree)[Code.MOUNTED_ON_HOST]
    assert finding.message == (
        "/dev/vfio/26 has a disk: /dev/nvme0n1p1 is mounted on the host at /srv/data"
    )
    assert finding.hint == "umount /srv/data"


def test_what_was_built_on_its_disk_keeps_an_nvme(tree: PciTree) -> None:
    tree.pci_function(GPU, driver="nvme", group=26).pci_disk(GPU, "259:0", "nvme0n1")
    tree.hold("nvme0n1", "dm-0")
    assert "dm-0" in findings(tree)[Code.HAS_HOLDERS].message


def test_a_disk_that_a_vm_has_keeps_an_nvme(tree: PciTree) -> None:
    tree.pci_function(GPU, driver="nvme", group=26).pci_disk(GPU, "259:0", "nvme0n1")
    assert Identity.parse("block:259:0") in find_vfio_device(GPU, tree.root).related_identities
    assert Code.IN_USE_BY_VM in findings(tree, claims=(claim(),))


def test_the_default_route_keeps_a_nic(tree: PciTree) -> None:
    tree.pci_function(GPU, class_code=ETHERNET, driver="igb", group=26).network(GPU, "eth0")
    assert set(findings(tree)) == {Code.NOT_BOUND}
    tree.route("eth0")
    finding = findings(tree)[Code.NETWORK_IN_USE]
    assert "eth0, which has the default route and an address" in finding.message
    assert "ip addr flush dev eth0" in finding.hint


def test_an_address_of_ipv6_keeps_a_nic_and_the_one_of_the_link_does_not(tree: PciTree) -> None:
    tree.pci_function(GPU, class_code=ETHERNET, driver="igb", group=26).network(GPU, "eth0")
    tree.address6("eth0", "fe80" + "0" * 28, scope=0x20)
    assert Code.NETWORK_IN_USE not in findings(tree)
    tree.address6("eth0", "2001" + "0" * 28, scope=0)
    assert "an address" in findings(tree)[Code.NETWORK_IN_USE].message


def test_a_bond_keeps_a_nic(tree: PciTree) -> None:
    tree.pci_function(GPU, class_code=ETHERNET, driver="igb", group=26)
    tree.network(GPU, "eth0", master="bond0")
    assert "a place in bond0" in findings(tree)[Code.NETWORK_IN_USE].message


def test_the_boot_console_keeps_a_gpu_as_long_as_the_host_has_it(tree: PciTree) -> None:
    tree.pci_function(GPU, class_code=VGA, driver="nouveau", group=26, boot_vga="1\n")
    assert Code.BOOT_CONSOLE in findings(tree)
    tree.pci_function(OTHER, class_code=VGA, driver="nouveau", group=5, boot_vga="0\n")
    assert Code.BOOT_CONSOLE not in findings(tree, OTHER)


def test_virtual_functions_keep_the_physical_one(tree: PciTree) -> None:
    bound(tree, class_code=ETHERNET).sriov(
        GPU, "0000:3b:10.0", "0000:3b:10.2", group=30, driver="vfio-pci"
    )
    finding = findings(tree)[Code.HAS_VIRTUAL_FUNCTIONS]
    assert "2 virtual functions" in finding.message
    assert f"vmplug sriov {GPU} --count 0" in finding.hint


def test_a_virtual_function_goes_alone_unless_a_vm_has_the_physical_one(tree: PciTree) -> None:
    tree.pci_function(GPU, class_code=ETHERNET, driver="igb", group=26)
    tree.sriov(GPU, "0000:3b:10.0", group=30, driver="vfio-pci")
    assert findings(tree, "0000:3b:10.0") == {}
    group = find_vfio_device("0000:3b:10.0", tree.root)
    assert group.related_identities == (Identity.of_vfio(GPU),)


def test_a_process_that_has_the_node_open_is_named(tree: PciTree) -> None:
    bound(tree).link("/proc/77/fd/9", "/dev/vfio/26").file("/proc/77/comm", "dpdk-testpmd\n")
    assert "process 77 (dpdk-testpmd)" in findings(tree)[Code.OPEN_BY_PROCESS].message
    assert set(findings(tree, claims=(claim(),))) == {Code.IN_USE_BY_VM}


def test_a_process_that_uses_the_card_through_its_driver_is_named(tree: PciTree) -> None:
    tree.pci_function(GPU, class_code=VGA, driver="amdgpu", group=26)
    tree.class_device(f"{GPU}/drm/card1", "char", "226:1", "dri/card1")
    tree.process(900, "gnome-shell", "/dev/null", "/dev/dri/card1")
    found = findings(tree)
    assert found[Code.OPEN_BY_PROCESS].message == (
        f"/dev/dri/card1, a node of {GPU}, is open in process 900 (gnome-shell)"
    )
    (tree.path / "proc/900/fd/4").unlink()  # the remedy: it has let go
    assert findings(tree).keys() == found.keys() - {Code.OPEN_BY_PROCESS}


def test_another_function_of_the_group_is_looked_at_too(tree: PciTree) -> None:
    tree.pci_function(GPU, class_code=VGA, driver="amdgpu", group=26)
    tree.pci_function(AUDIO, class_code=SOUND, driver="snd_hda_intel", group=26)
    tree.class_device(f"{AUDIO}/sound/card1/pcmC1D3p", "char", "116:9", "snd/pcmC1D3p")
    tree.process(950, "pipewire", "/dev/snd/pcmC1D3p")
    assert f"a node of {AUDIO}" in findings(tree)[Code.OPEN_BY_PROCESS].message


def test_the_nodes_and_the_networks_of_the_host_are_read_once_for_a_group(tree: PciTree) -> None:
    for function in (GPU, AUDIO):
        tree.pci_function(function, class_code=ETHERNET, driver="igb", group=26)
        tree.class_device(
            f"{function}/sound/pcm{function[-1]}", "char", f"116:{function[-1]}", "x"
        )
        tree.network(function, f"eth{function[-1]}").route("eth9")
    root = Counting(tree.root)
    group = find_vfio_device(GPU, root)
    root.reads.clear()
    check_device(group, WRITING, usage=read_usage(root), root=root)
    assert {root.reads[path] for path in ("/sys/dev/char", "/proc/net/route")} == {1}


def test_a_request_reads_a_table_once_for_all_groups_and_each_function_once(tree: PciTree) -> None:
    bound(tree).pci_function(OTHER, class_code=ETHERNET, driver="ixgbe", group=27)
    tree.sriov(OTHER, VIRTUAL, group=28).file("/proc/interrupts", REMAPPING)
    root = Counting(tree.root)
    usage = read_usage(root)
    for name in (GPU, VIRTUAL):
        check_device(find_vfio_device(name, root), WRITING, usage=usage, root=root)
    uevents = (f"/sys/bus/pci/devices/{name}/uevent" for name in (GPU, VIRTUAL, OTHER))
    assert [root.reads.get(path) for path in uevents] == [1, 1, None]
    assert root.reads["/proc/interrupts"] == 1


@pytest.mark.parametrize(
    ("target", "is_used"),
    [("20010db8" + "0" * 24, True), ("fe80" + "0" * 28, False), ("ff02" + "0" * 28, False)],
)
def test_a_route_of_ipv6_alone_keeps_a_nic_unless_the_kernel_made_it(
    tree: PciTree, target: str, *, is_used: bool
) -> None:
    tree.pci_function(GPU, class_code=ETHERNET, driver="igb", group=26).network(GPU, "eth0")
    tree.route6("eth0", target=target, length=64)
    found = findings(tree).get(Code.NETWORK_IN_USE)
    assert (found is not None) is is_used
    assert found is None or found.message.endswith("eth0, which has a route")


PACKET_SOCKETS = """\
sk               RefCnt Type Proto  Iface R Rmem   User   Inode
00000000666588e1 3      3    0003   {0}     1 0      0      663
000000007065588e 3      2    0800   {0}     1 0      0      664
00000000c340558d 3      3    0003   0     1 0      0      665
"""


def test_a_process_that_takes_the_packets_of_an_interface_is_mentioned_once(
    tree: PciTree,
) -> None:
    tree.pci_function(GPU, class_code=ETHERNET, driver="ice", group=26).network(GPU, "eth0")
    tree.file("/sys/class/net/eth0/ifindex", "7\n").process(301, "x", "socket:[665]")
    tree.process(300, "dhclient", "socket:[664]", "socket:[663]")
    tree.file("/proc/net/packet", PACKET_SOCKETS.format(8))
    assert Code.OPEN_BY_PROCESS not in findings(tree)
    tree.file("/proc/net/packet", PACKET_SOCKETS.format(7))
    group = find_vfio_device(GPU, tree.root)
    found = check_device(group, WRITING, usage=read_usage(tree.root), claims=(), root=tree.root)
    (finding,) = (one for one in found if one.code is Code.OPEN_BY_PROCESS)
    assert finding.severity is Severity.WARNING
    assert "eth0, of which process 300 (dhclient) gets packets" in finding.message
    shutil.rmtree(tree.path / "proc/300")
    finding = findings(tree)[Code.OPEN_BY_PROCESS]
    assert "of which a process that vmplug does not see gets packets" in finding.message


@pytest.mark.parametrize(
    "bus_device", ["", "virtio4", "mlx5_core.sf.2", "usb1/1-1/1-1.4/1-1.4:1.0"]
)
def test_an_interface_in_another_network_namespace_is_in_use(
    tree: PciTree, bus_device: str
) -> None:
    tree.pci_function(GPU, class_code=ETHERNET, driver="iavf", group=26)
    free = findings(tree)
    tree.moved_network(GPU, bus_device=bus_device)
    finding = findings(tree)[Code.NETWORK_IN_USE]
    assert finding.message == f"the network interface of {GPU} is in another network namespace"
    tree.network(GPU, "eth1", bus_device=bus_device)  # the remedy: it has been taken back
    assert findings(tree).keys() == free.keys()


@pytest.mark.parametrize(
    ("kind", "what", "name"),
    [("infiniband", "RDMA device", "mlx5_0"), ("ieee80211", "radio", "phy0")],
)
def test_whatever_has_a_network_namespace_may_be_in_another_one(
    tree: PciTree, kind: str, what: str, name: str
) -> None:
    tree.pci_function(GPU, class_code=ETHERNET, driver="x", group=26).network(GPU, "eth0")
    free, directory = findings(tree), tree.path / f"{tree.real(GPU)}/{kind}".lstrip("/")
    directory.mkdir()
    finding = findings(tree)[Code.NETWORK_IN_USE]
    assert finding.message == f"the {what} of {GPU} is in another network namespace"
    (directory / name).mkdir()  # the remedy: it has been taken back
    assert findings(tree) == free


class OneMoved(HostUsage):
    """What a running host knows of an interface in another namespace."""

    @property
    def moved_interfaces(self) -> dict[str, MovedInterface]:
        return {GPU: MovedInterface(name="eth1", namespace="/run/netns/pod")}


def test_one_of_two_interfaces_in_another_network_namespace_is_in_use(tree: PciTree) -> None:
    tree.pci_function(GPU, class_code=ETHERNET, driver="mlx4_core", group=26).network(GPU, "eth0")
    (function,) = find_vfio_device(GPU, tree.root).functions
    assert list(check_networks(function, HostUsage(tree.root), tree.root)) == []
    (finding,) = check_networks(function, OneMoved(tree.root), tree.root)
    where = "in the network namespace /run/netns/pod"
    assert finding.message == f"{GPU} is the network interface eth1 {where}"


def test_no_way_to_reset_is_a_warning(tree: PciTree) -> None:
    bound(tree, reset_methods=())
    assert findings(tree)[Code.NO_RESET].severity is Severity.WARNING


def test_before_linux_5_15_no_method_is_named_and_none_is_missed(tree: PciTree) -> None:
    bound(tree, reset_methods=None, reset="")
    assert findings(tree) == {}


# mediated devices


def test_a_mediated_device_needs_no_binding_and_no_remapping(tree: PciTree) -> None:
    tree.file("/proc/interrupts", NO_REMAPPING)
    tree.pci_function(GPU, driver="i915", group=1).mdev_type(GPU, "i915-GVTg_V5_4")
    tree.mdev(UUID, GPU, "i915-GVTg_V5_4", group=27)
    assert findings(tree, UUID) == {}


def test_a_group_that_has_gone_has_nothing_to_hand_over(tree: PciTree) -> None:
    bound(tree)
    group = find_vfio_device(GPU, tree.root)._replace(functions=())
    found = check_device(group, WRITING, usage=read_usage(tree.root), root=tree.root)
    assert [finding.code for finding in found] == [Code.NO_SUCH_DEVICE]


class Running(HostRoot):
    """A tree that is taken for the running host; the files of process 42 cannot be read."""

    is_live = True

    def list_dir(self, path: str) -> list[str]:
        if path == "/proc/42/fd":
            raise AttributeReadError(path, errno.EACCES)
        return super().list_dir(path)


@pytest.mark.root
def test_a_process_whose_files_cannot_be_read_may_have_the_group(tree: PciTree) -> None:
    group = find_vfio_device(GPU, bound(tree).node("/dev/vfio/26", "c", "243:26").root)
    running = Running(tree.path)
    assert not list(check_openers(group, read_usage(running), running))
    tree.process(42, "qemu")
    found = check_openers(group, read_usage(running), running)
    (finding,) = gather_unknown(found, GPU, running)
    assert (finding.code, finding.severity) == (Code.UNKNOWN_USE, Severity.ERROR)
    assert finding.message == (
        f"{GPU} may be in use: vmplug could not look for open files of process 42 (permission "
        "denied)"
    )
    assert not list(check_openers(group, read_usage(tree.root), tree.root))


@pytest.mark.root
def test_a_process_that_even_root_may_not_look_into_counts_for_a_function(tree: PciTree) -> None:
    group = find_vfio_device(GPU, bound(tree).node("/dev/vfio/26", "c", "243:26").root)
    running = Running(tree.path)
    usage = read_usage(running)
    vars(usage)["open_files"] = replace(usage.open_files, guarded=(7,))
    (finding,) = gather_unknown(check_openers(group, usage, running), GPU, running)
    assert finding.severity is Severity.ERROR
    assert "open files of process 7 (permission denied)" in finding.message


@pytest.mark.root
@pytest.mark.parametrize(
    ("namespace", "hidepid", "capabilities", "hidden"),
    [
        ("4026531836", "", "0", None),
        (None, "", "0", None),
        ("4026532999", "", "1ffffffffff", "outside of this PID namespace"),
        ("4026531836", ",hidepid=ptraceable", "0", "that /proc hides (hidepid)"),
        ("4026531836", ",hidepid=2", "0", "that /proc hides (hidepid)"),
        ("4026531836", ",hidepid=2", "1ffffffffff", None),
        ("4026531836", ",hidepid=noaccess", "0", None),  # these are listed
    ],
)
def test_processes_that_proc_does_not_list_are_unknown(
    tree: PciTree, namespace: str | None, hidepid: str, capabilities: str, hidden: str | None
) -> None:
    tree.file("/proc/self/status", f"CapEff:\t{capabilities:0>16}\n")
    tree.mount("proc", "/proc", "0:21", fs_type="proc", fs_options=f"rw{hidepid}", pid=1)
    (tree.path / "proc/1/mountinfo").rename(tree.path / "proc/self/mountinfo")
    if namespace:
        tree.link("/proc/self/ns/pid", f"pid:[{namespace}]")
    group = find_vfio_device(GPU, bound(tree).node("/dev/vfio/26", "c", "243:26").root)
    running = Running(tree.path)
    opened = check_openers(group, read_usage(running), running)
    found = gather_unknown(opened, GPU, running)
    assert [hidden in finding.message for finding in found if hidden] == [True] * bool(hidden)
    assert bool(found) is bool(hidden)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("proc/1/fd", "open files of processes (no /proc/PID/fd)"),
        ("proc/1/mountinfo", "mounts (no /proc/PID/mountinfo)"),
        ("proc/swaps", "swap space (no /proc/swaps)"),
        ("proc/net/route", "routes and addresses of eth0 (no /proc/net)"),
    ],
)
def test_what_a_copy_does_not_hold_is_one_warning(tree: PciTree, path: str, said: str) -> None:
    tree.pci_function(GPU, class_code=ETHERNET, driver="igb", group=26).network(GPU, "eth0")
    tree.pci_disk(GPU, "259:0", "nvme0n1")
    assert Code.UNKNOWN_USE not in findings(tree)
    (tree.path / "proc/net/if_inet6").unlink()
    gone = tree.path / path
    gone.rmdir() if gone.is_dir() else gone.unlink()
    finding = findings(tree)[Code.UNKNOWN_USE]
    assert finding.severity is Severity.WARNING
    assert said in finding.message
    shutil.rmtree(tree.path / "proc")
    message = findings(tree)[Code.UNKNOWN_USE].message
    assert message.count("(no /proc") == 4


def test_a_process_of_which_only_the_mounts_can_be_read_is_not_left_out(tree: PciTree) -> None:
    class NoLinks(HostRoot):
        """Linux lets a process read the mounts of another, and not the link to its namespace."""

        def read_link(self, path: str) -> str | None:
            if path.endswith("/ns/mnt"):
                raise AttributeReadError(path, errno.EACCES)
            return super().read_link(path)

    tree.mount("/dev/sda", "/data", "8:0", pid=7)
    assert [mount.mount_point for mount in read_usage(NoLinks(tree.path)).mounts] == ["/data"]


# memory

LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max locked memory         {limit:20} {limit:20} bytes
"""
NO_CAPABILITIES, ALL_CAPABILITIES = "CapEff:\t0000000000000000\n", "CapEff:\t000001ffffffffff\n"


@pytest.mark.parametrize(
    ("limit", "capabilities", "is_enough"),
    [
        ("8388608", NO_CAPABILITIES, False),
        ("8388608", ALL_CAPABILITIES, True),
        ("unlimited", NO_CAPABILITIES, True),
        (str(1 << 30), NO_CAPABILITIES, True),
        (str((1 << 30) - 1), NO_CAPABILITIES, False),
    ],
)
def test_qemu_must_be_allowed_to_lock_the_guests_memory(
    tree: PciTree, limit: str, capabilities: str, *, is_enough: bool
) -> None:
    bound(tree).file("/proc/88/limits", LIMITS.format(limit=limit))
    tree.file("/proc/88/status", f"Name:\tqemu\n{capabilities}")
    found = list(check_memlock(find_vfio_device(GPU, tree.root), 88, 1 << 30, tree.root))
    assert [finding.code for finding in found] == ([] if is_enough else [Code.MEMLOCK_LIMIT])


# what the VM has against it


def test_a_qemu_without_iommufd_is_told_of_where_a_device_was_named_by_its_node(
    tree: PciTree,
) -> None:
    bound(tree)
    group = find_vfio_device(GPU, tree.root)
    named = group._replace(cdev_nodes=((GPU, "/dev/vfio/devices/vfio0"),))
    vm = GuestMemory(size_bytes=1 << 30, pid=None)
    (finding,) = check_vm(named, vm, tree.root, has_iommufd=False)
    assert (finding.code, finding.severity) == (Code.NO_IOMMUFD, Severity.WARNING)
    assert "/dev/vfio/26 instead" in finding.message
    assert list(check_vm(named, vm, tree.root, has_iommufd=True)) == []
    assert list(check_vm(group, vm, tree.root, has_iommufd=False)) == []


def test_the_limit_of_a_vm_that_is_to_be_started_is_this_processs(tree: PciTree) -> None:
    bound(tree)
    pid = os.getpid()
    tree.file(f"/proc/{pid}/status", "CapEff:\t0000000000000000\n")
    limits = "Max locked memory         8388608              8388608              bytes\n"
    tree.file(f"/proc/{pid}/limits", limits)
    group = find_vfio_device(GPU, tree.root)
    vm = GuestMemory(size_bytes=1 << 30, pid=pid)
    (finding,) = check_vm(group, vm, tree.root, has_iommufd=False)
    assert finding.code is Code.MEMLOCK_LIMIT
    assert finding.message.startswith("QEMU, with the limit of this process, may lock 8192 KiB")
    assert finding.hint.startswith("ulimit -l")


def test_an_address_that_no_route_places_is_one_warning(tree: PciTree) -> None:
    tree.pci_function(GPU, driver="ice", group=26).network(GPU, "eth0").route("eth1")
    tree.file("/proc/net/fib_trie", "|-- 10.0.0.1\n   /32 host LOCAL\n")
    finding = findings(tree)[Code.UNKNOWN_USE]
    assert finding.severity is Severity.WARNING
    assert "addresses of eth0 (of some, no route says of which interface)" in finding.message
