"""May an IOMMU group be handed over? Every reason against it, each with its remedy.

A group is viable when all its functions are bound to VFIO: through one that is not, its user could
reach the VM's memory, and the VM could reach the user's. `vmplug.host.check.device` finds the
users of a function's disks, with those of other disks.
Source: Documentation/driver-api/vfio.rst; drivers/vfio/group.c.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from shlex import quote

import msgspec

from vmplug.errors import counted
from vmplug.host.block.usage import HostUsage
from vmplug.host.check.function_state import check_function
from vmplug.host.check.isolation import check_isolation
from vmplug.host.check.machine_part import check_machine_parts
from vmplug.host.check.mounted import find_served
from vmplug.host.check.open_disk import used_by_kernel
from vmplug.host.check.unknown import find_unread, not_looked_for, why_not_all_processes
from vmplug.host.check.vfio_node import check_group_node, check_nodes
from vmplug.host.finding import Access, Code, Finding, Severity, UsedBy
from vmplug.host.pci.bind import PCI_DRIVERS
from vmplug.host.pci.consoles import Consoles
from vmplug.host.pci.function import PciFunction, read_reset_methods, read_virtfns
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.iommu import IOMMU_NODE
from vmplug.host.pci.nodes import read_node_paths, read_nodes
from vmplug.host.pci.uses import (
    NetInterface,
    read_net_parents,
    read_network_interfaces,
    read_network_uses,
)
from vmplug.host.pci.vfio import CDEV_NODE, has_node, is_vfio_driver, list_vfio_nodes
from vmplug.host.process import read_memlock_limit
from vmplug.host.root import HostRoot
from vmplug.host.use.kernel_users import find_unknown_exports
from vmplug.host.use.openers import DeviceNode, wanted_node, wanted_sockets

_OVS_MASTER = "ovs-system"
"""The master of every port of Open vSwitch, which takes a port back that only the kernel released.
Source: Linux net/openvswitch/vport-netdev.c."""

_MOVED = {
    "net": ("network interface", "ip link set NAME netns 1"),
    "infiniband": ("RDMA device", "rdma dev set NAME netns 1"),
    "ieee80211": ("radio", "iw phy NAME set netns 1"),
}
"""What is moved to another network namespace, by its class, and the command that takes it back."""

_LEAVES_DMA_ALONE = frozenset({"pcieport", "pci-stub"})
"""Drivers that the kernel accepts in a group of VFIO: those that set driver_managed_dma. Linux
before 5.19 accepted any driver of a PCI-to-PCI bridge. A member without a driver is accepted too.
Source: drivers/pci/pcie/portdrv.c, drivers/pci/pci-stub.c; vfio_dev_viable before."""


def check_group(group: VfioGroup, usage: HostUsage, root: HostRoot) -> Iterator[Finding]:
    """Every reason not to hand the group over, except the users of its disks."""
    if not group.members:
        others = [*(str(bridge.bdf) for bridge in group.bridges), *group.unknown_members]
        yield Finding(
            Code.NO_SUCH_DEVICE,
            f"{group.host_path} "
            + (
                f"has no device that can be handed over: {', '.join(others)}"
                if others
                else "is a VFIO node, but the kernel has no device behind it"
            ),
            "vmplug host lists the devices; bridges stay with the host",
        )
        return
    yield from check_isolation(group, usage, root)
    yield from _bindings(group, root)
    yield from _others(group, root)
    yield from check_machine_parts(group, root)
    yield from check_nodes(group, usage, root)
    if CDEV_NODE.match(group.host_path) and not has_node(IOMMU_NODE, root):
        why = f"the host has no {IOMMU_NODE}, which {group.host_path} needs"
        yield _by_group_alone(group, why, "modprobe iommufd", root)
    for function in group.functions:
        has_vfio = is_vfio_driver(function, root)
        yield from check_function(function, root, has_vfio=has_vfio)
        if not has_vfio:
            yield from _console(function, usage)
            yield from check_networks(function, usage, root)
            yield from find_served(function, usage, root)
        yield from _virtual_functions(function, group, root)
        yield from _reset(function, root)


def check_openers(group: VfioGroup, usage: HostUsage, root: HostRoot) -> Iterator[Finding]:
    """Processes that have the group open, which cannot be opened twice, or a node of its drivers.

    To unbind a driver waits for those that use its nodes, or takes the device away from them.
    """
    own = [node for _, node in group.cdev_nodes]
    if group.number is not None:
        own.append(group.group_node)
    nodes = {node: DeviceNode.of_char(node, root) for node in own}
    owners: dict[str, str] = {}
    for function in group.functions:
        for node in read_nodes(function.bdf, usage.once(read_node_paths), root):
            nodes.setdefault(node.path, node)
            owners.setdefault(node.path, str(function.bdf))
    for child in group.children:
        for path in list_vfio_nodes(child.sysfs_path, root):
            nodes.setdefault(path, DeviceNode.of_char(path, root))
            owners.setdefault(path, f"{child.uuid}, a mediated device of {child.parent}")
    wanted = {k: p for node in nodes.values() for k, p in wanted_node(node, root).items()}
    for opener in usage.open_files.find_lasting(wanted) if wanted else ():
        process, path = f"process {opener.pid} ({opener.name})", opener.path
        used_by = UsedBy(on=path, who=process, how="the open files of all processes")
        if path in own:
            yield Finding(
                Code.OPEN_BY_PROCESS,
                f"{group.host_path} is open in {process}",
                "end that process first; if it is a QEMU, register the VM with vmplug vm adopt",
                used_by=used_by,
            )
        else:
            yield Finding(
                Code.OPEN_BY_PROCESS,
                f"{path}, a node of {owners[path]}, is open in {process}",
                "end that process, or the service that it belongs to: "
                f"fuser --verbose {quote(path)}",
                used_by=used_by,
            )
    # The users of disks are found with those of other disks.
    others = {key: p for key, p in wanted.items() if nodes[p].kind == stat.S_IFCHR}
    yield from used_by_kernel(others, Access(read_only=False), usage)
    if wanted and group.members:
        yield from map(not_looked_for, _unseen(usage, root))
        yield from map(not_looked_for, find_unknown_exports(root))


def _unseen(usage: HostUsage, root: HostRoot) -> Iterator[str]:
    """The processes whose open files are unknown."""
    opened = usage.open_files
    yield from find_unread(opened, sorted({*opened.unlisted, *opened.guarded}))
    if root.is_live and (why := why_not_all_processes(root)):
        yield f"open files of processes {why}"


class GuestMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The size of a guest's memory, and the process that locks it; None where it is unknown.

    The process is QEMU, or this one when it will start QEMU, which inherits its limits.
    """

    size_bytes: int
    pid: int | None


def check_vm(
    group: VfioGroup, memory: GuestMemory, root: HostRoot, *, has_iommufd: bool
) -> Iterator[Finding]:
    """Every reason not to give the group to a VM, whose QEMU has iommufd or not."""
    if group.cdev_nodes and not has_iommufd:
        why = f"the VM's QEMU has no iommufd, which {group.host_path} needs"
        yield _by_group_alone(group, why, "start the VM with a newer QEMU (Debian 13's)", root)
        yield from check_group_node(group, root)
    if group.functions and memory.pid:
        yield from check_memlock(group, memory.pid, memory.size_bytes, root)


def _by_group_alone(group: VfioGroup, why: str, remedy: str, root: HostRoot) -> Finding:
    """A warning where the group's own node serves too; Linux 6.6 and later may have none."""
    if has_node(group.group_node, root):
        return Finding(
            Code.NO_IOMMUFD,
            f"{why}: vmplug hands over its group by {group.group_node} instead",
            f"{remedy}, to use its own node",
            Severity.WARNING,
        )
    return Finding(Code.NO_IOMMUFD, f"{why}; {group.group_node} does not exist either", remedy)


def check_memlock(
    group: VfioGroup, pid: int, memory_bytes: int, root: HostRoot
) -> Iterator[Finding]:
    """Whether process `pid` may lock all of its guest's memory, as VFIO requires."""
    limit = read_memlock_limit(pid, root)
    if limit is not None and limit < memory_bytes:
        is_to_start = pid == os.getpid()
        who = "QEMU, with the limit of this process," if is_to_start else f"QEMU (process {pid})"
        yield Finding(
            Code.MEMLOCK_LIMIT,
            f"{who} may lock {limit >> 10} KiB of memory, and {group.host_path} "
            f"needs all of the guest's {memory_bytes >> 20} MiB locked",
            ("ulimit -l unlimited" if is_to_start else f"prlimit --pid {pid} --memlock=unlimited")
            + ", or LimitMEMLOCK=infinity in its unit",
        )


def _bindings(group: VfioGroup, root: HostRoot) -> Iterator[Finding]:
    """Functions that are not bound to VFIO; none where binding helps nothing, without a group."""
    outside = [f for f in group.functions if not is_vfio_driver(f, root)]
    if not outside or group.number is None:
        return
    words = ", ".join(
        f"{f.bdf} is bound to {f.driver}" if f.driver else f"{f.bdf} has no driver"
        for f in outside
    )
    hint = f"vmplug bind {outside[0].bdf} binds the whole group to VFIO; or attach with --managed"
    if len(outside) == len(group.functions):
        yield Finding(Code.NOT_BOUND, f"{group.host_path} is not bound to VFIO: {words}", hint)
    else:
        blocking = f"group {group.number} cannot be handed over: {words}"
        yield Finding(Code.GROUP_NOT_VIABLE, blocking, hint)


def _others(group: VfioGroup, root: HostRoot) -> Iterator[Finding]:
    """Members that vmplug never binds, and that keep the kernel from giving the group away."""
    for name in group.unknown_members:
        yield Finding(
            Code.MEMBER_IN_USE,
            f"group {group.number} has a member {name} of a kind that vmplug does not support",
            "hand over another device",
            used_by=UsedBy(on=name, who="the host", how="the members of the group"),
        )
    for bridge in group.bridges:
        if bridge.driver in {None, *_LEAVES_DMA_ALONE} or is_vfio_driver(bridge, root):
            continue
        yield Finding(
            Code.MEMBER_IN_USE,
            f"group {group.number} cannot be handed over: its bridge {bridge.bdf} is bound to "
            f"{bridge.driver}, which Linux 5.19 and later do not accept beside VFIO",
            "bridges stay with the host, so vmplug does not bind them; take the bridge from its "
            f"driver: echo {bridge.bdf} > {PCI_DRIVERS}/{bridge.driver}/unbind",
            used_by=UsedBy(
                on=str(bridge.bdf), who=f"driver {bridge.driver}", how="the driver of the bridge"
            ),
        )


def _console(function: PciFunction, usage: HostUsage) -> Iterator[Finding]:
    """The screen that the firmware chose, or a serial port, shows the host's console."""
    for use in usage.once(Consoles).of(function):
        yield Finding(
            Code.BOOT_CONSOLE,
            f"{function.bdf} {use.what}",
            f"{use.remedy}; or allow this finding if the host needs no console",
            used_by=UsedBy(on=str(function.bdf), who="the host's console", how=use.how),
        )


def check_networks(function: PciFunction, usage: HostUsage, root: HostRoot) -> Iterator[Finding]:
    """The uses of a function's network interfaces, by the host and in other namespaces."""
    interfaces = read_network_interfaces(function.bdf, root, lambda: usage.once(read_network_uses))
    yield from _networks(function, interfaces)
    yield from _listeners(function, interfaces, usage, root)
    if root.is_live:
        yield from _built_elsewhere(function, interfaces, usage, root)
    yield from _moved_network(function, usage, root)


def _built_elsewhere(
    function: PciFunction, interfaces: Sequence[NetInterface], usage: HostUsage, root: HostRoot
) -> Iterator[Finding]:
    """What was built on an interface and moved into a container: sysfs does not show it here."""
    for interface in interfaces:
        index = root.read_int(f"/sys/class/net/{interface.name}/ifindex")
        for built in usage.other_networks.built.get(index, ()) if index else ():
            yield Finding(
                Code.NETWORK_IN_USE,
                f"{function.bdf} is the network interface {interface.name}, on which {built.name} "
                f"in the network namespace {built.namespace} is built",
                "end what uses it there, then remove it: "
                f"nsenter --net={quote(built.namespace)} ip link delete {quote(built.name)}",
                used_by=UsedBy(
                    on=interface.name,
                    who=f"{built.name} in another network namespace",
                    where=built.namespace,
                    how="the links of all network namespaces",
                ),
            )


def _networks(function: PciFunction, interfaces: Sequence[NetInterface]) -> Iterator[Finding]:
    for interface in interfaces:
        if interface.has_default_route is None:
            yield not_looked_for(f"routes and addresses of {interface.name} (no /proc/net)")
        elif interface.has_address is None:
            why = "of some, no route says of which interface"
            yield not_looked_for(f"addresses of {interface.name} ({why})")
        if uses := " and ".join(interface.uses):
            yield Finding(
                Code.NETWORK_IN_USE,
                f"{function.bdf} is the network interface {interface.name}, which has " + uses,
                _how_to_free(interface),
                used_by=UsedBy(
                    on=interface.name,
                    who="the host's network",
                    where=uses,
                    how="routes, addresses and links of the interface",
                ),
            )


def _listeners(
    function: PciFunction, interfaces: Sequence[NetInterface], usage: HostUsage, root: HostRoot
) -> Iterator[Finding]:
    """A DHCP client, a sniffer or the like: it loses the interface, which may be intended."""
    for interface in interfaces:
        if not interface.listeners:
            continue
        wanted = wanted_sockets(interface.listeners, interface.name, root)
        users = [f"process {o.pid} ({o.name})" for o in usage.open_files.find(wanted)]
        who = " and ".join(users) or "a process that vmplug does not see"
        yield Finding(
            Code.OPEN_BY_PROCESS,
            f"{function.bdf} is the network interface {interface.name}, of which {who} gets "
            "packets by a socket of its own (AF_PACKET)",
            "leave it if it may lose the interface; else end that process: "
            "ss --packet --processes lists them",
            Severity.WARNING,
            used_by=UsedBy(on=interface.name, who=who, how="/proc/net/packet"),
        )


def _moved_network(function: PciFunction, usage: HostUsage, root: HostRoot) -> Iterator[Finding]:
    """An interface in another network namespace, where a container has it."""
    parents = read_net_parents(function.bdf, root)
    if not parents:
        return
    found = (usage.moved_interfaces.get(parent) for parent in sorted(parents))
    moved = next(filter(None, found), None)
    if moved:
        yield Finding(
            Code.NETWORK_IN_USE,
            f"{function.bdf} is the network interface {moved.name} in the network namespace "
            f"{moved.namespace}",
            "end what uses it there, then take it back: "
            f"nsenter --net={quote(moved.namespace)} ip link set {quote(moved.name)} netns 1",
            used_by=_elsewhere(function, moved.namespace),
        )
    kinds = [kind for kinds in parents.values() for kind in kinds if not (moved and kind == "net")]
    for kind in dict.fromkeys(kinds):
        what, how = _MOVED[kind]
        yield Finding(
            Code.NETWORK_IN_USE,
            f"the {what} of {function.bdf} is in another network namespace",
            f"lsns --type net lists them; {how}, run there, takes it back",
            used_by=_elsewhere(function, None),
        )


def _elsewhere(function: PciFunction, namespace: str | None) -> UsedBy:
    return UsedBy(
        on=str(function.bdf),
        who="another network namespace",
        where=namespace,
        how="its directories in sysfs, and the links of all network namespaces",
    )


def _how_to_free(interface: NetInterface) -> str:
    if interface.is_kept:
        return (
            f"{interface.master} keeps it as its fast path and does not let it go: turn that off "
            "where this machine is configured (accelerated networking, a failover pair), or hand "
            "over another device"
        )
    ends = [f"end {name}; " for name in _keepers(interface)]
    return "".join([*ends, "remove it from the host's network first: "]) + "; ".join(
        _retire(interface)
    )


def _keepers(interface: NetInterface) -> Iterator[str]:
    """The processes that no command for the interface ends."""
    if interface.has_pppoe:
        yield "its pppd"
    if interface.has_program:
        yield "the process that keeps the program, if one does (bpftool link)"


def _retire(interface: NetInterface) -> Iterator[str]:
    """The commands after which the host does not use an interface."""
    name, master = quote(interface.name), interface.master
    yield from (f"rdma link delete {quote(device)}" for device in interface.rdma)
    yield from (f"ip link delete {quote(upper)}" for upper in interface.uppers)
    if master == _OVS_MASTER:
        yield f"ovs-vsctl --with-iface del-port {name}"  # also one of a bond's
    elif master and master not in interface.uppers:
        yield f"ip link set {name} nomaster"
    if interface.has_program:
        yield f"ip link set {name} xdp off"
    yield from (f"echo 0 > {quote(f'{target}/enabled')}" for target in interface.netconsoles)
    yield f"ip addr flush dev {name}"
    yield f"ip link set {name} down"


def _virtual_functions(
    function: PciFunction, group: VfioGroup, root: HostRoot
) -> Iterator[Finding]:
    virtfns = read_virtfns(function.bdf, root)
    used_by = UsedBy(
        on=str(function.bdf),
        who="its virtual functions",
        where=" ".join(map(str, virtfns)),
        how="virtfn links in sysfs",
    )
    inside = [str(bdf) for bdf in virtfns if str(bdf) in group.members]
    if inside:
        yield Finding(
            Code.HAS_VIRTUAL_FUNCTIONS,
            f"{function.bdf} and {len(inside)} of its virtual functions are in one IOMMU group, "
            "because no bridge above them keeps them apart (ACS): no virtual function can go "
            "alone, and all of them disappear when VFIO gets the physical one",
            f"hand over {function.bdf} whole, without them: vmplug sriov {function.bdf} "
            "--count 0; or put the card into a slot behind a bridge with ACS",
            used_by=used_by,
        )
    elif virtfns and is_vfio_driver(function, root):
        yield Finding(
            Code.HAS_VIRTUAL_FUNCTIONS,
            f"{function.bdf} has {counted(len(virtfns), 'virtual function')}, and a VM that has "
            "it can stop them and disturb their users",
            f"hand over one of them, or remove them: vmplug sriov {function.bdf} --count 0",
        )
    elif virtfns:
        yield Finding(
            Code.HAS_VIRTUAL_FUNCTIONS,
            f"{function.bdf} has {counted(len(virtfns), 'virtual function')}, which would "
            "disappear or follow it",
            f"hand over one of them, or remove them: vmplug sriov {function.bdf} --count 0",
            used_by=used_by,
        )


def _reset(function: PciFunction, root: HostRoot) -> Iterator[Finding]:
    if read_reset_methods(function.bdf, root) == ():
        yield Finding(
            Code.NO_RESET,
            f"the kernel has no way to reset {function.bdf}: the next VM finds the state that "
            "the last one left in it",
            "give it to only one VM until the host reboots",
            Severity.WARNING,
        )
