"""An inventory for people: a section for each kind, an indented tree in each."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from vmplug.cli.render.output import access, size
from vmplug.cli.render.terminal import Style
from vmplug.cli.render.tree import Line
from vmplug.host.block.inventory import Disk, Use
from vmplug.host.inventory import HostFunction, HostMediated, Inventory, StoredSocket
from vmplug.host.pci.function import Bar, PciFunction
from vmplug.host.pci.pci_ids import PciNames

_PCIE = {True: "PCIe", False: "PCI", None: "?"}


def inventory_lines(inventory: Inventory, names: PciNames) -> list[list[Line]]:
    """The sections that are not empty."""
    sections = (
        ("PCI functions by IOMMU group", _functions(inventory.pci, names)),
        ("block devices", _disks(inventory.block)),
        ("persistent memory", _pmem(inventory)),
        ("vhost-user sockets", _sockets(inventory.vhost_user)),
        ("mediated devices", _mediated(inventory.mdev)),
        ("what devices can be divided into", _mdev_types(inventory)),
        ("what could not be read", (Line(1, (text,)) for text in inventory.unreadable)),
    )
    listed = ((title, list(lines)) for title, lines in sections)
    return [[Line(0, (title,), Style.HEADING), *lines] for title, lines in listed if lines]


def _functions(entries: Sequence[HostFunction], names: PciNames) -> Iterator[Line]:
    def in_group(entry: HostFunction) -> tuple[bool, int]:
        group = entry.function.iommu_group
        return group is None, group or 0

    for (is_alone, group), members in groupby(sorted(entries, key=in_group), key=in_group):
        listed = list(members)
        node = next((entry.group_node for entry in listed if entry.group_node), None)
        title = "in no group" if is_alone else f"group {group}" + (f", {node}" if node else "")
        yield Line(1, (title,), Style.HEADING)
        for entry in listed:
            yield Line(2, _function_cells(entry.function, names))
            yield from _function_details(entry)


def _function_cells(function: PciFunction, names: PciNames) -> tuple[str, ...]:
    vendor = names.find_vendor(function.vendor_id)
    device = names.find_device(function.vendor_id, function.device_id)
    ids = f"{_hex(function.vendor_id, 4)}:{_hex(function.device_id, 4)}"
    return (
        str(function.bdf),
        _PCIE[function.pcie],
        "-" if function.numa_node is None else f"node {function.numa_node}",
        function.driver or "no driver",
        f"{names.find_class(function.class_code) or '?'} [{_hex(function.class_code, 6)}]",
        " ".join(filter(None, (vendor, device, f"[{ids}]"))),
    )


def _hex(number: int | None, digits: int) -> str:
    return "?" if number is None else f"{number:0{digits}x}"


def _function_details(entry: HostFunction) -> Iterator[Line]:
    function = entry.function
    if function.is_bridge:
        yield Line(3, ("a bridge: stays with the host",), Style.DETAIL)
    elif entry.reset_methods is not None:
        how = ", ".join(entry.reset_methods) or "none known to the kernel"
        yield Line(3, (f"reset: {how}",), Style.DETAIL)
    if function.bars:
        yield Line(3, ("BARs: " + ", ".join(map(_bar, function.bars)),), Style.DETAIL)
    if function.physfn:
        yield Line(3, (f"virtual function of {function.physfn}",), Style.DETAIL)
    if entry.virtfns:
        listed = " ".join(map(str, entry.virtfns))
        yield Line(3, (f"virtual functions: {listed}",), Style.DETAIL)
    if entry.cdev_node:
        yield Line(3, (f"node: {entry.cdev_node}",), Style.DETAIL)
    if entry.disks:
        yield Line(3, ("disks: " + " ".join(entry.disks),), Style.DETAIL)
    unused = [network.name for network in entry.networks if not network.is_used]
    if unused:
        yield Line(3, ("interfaces not in use: " + " ".join(unused),), Style.DETAIL)
    yield from _held(3, entry.uses)
    yield from _unreadable(3, function.unreadable)


def _bar(bar: Bar) -> str:
    words = (
        size(bar.size_bytes),
        None if bar.is_memory else "of ports",
        "large" if bar.is_large else None,
        None if bar.is_assigned else "without an address",
    )
    return f"{bar.number} " + " ".join(filter(None, words))


def _held(depth: int, uses: Iterable[Use]) -> Iterator[Line]:
    for use in uses:
        yield Line(depth, (f"held: {use}",), Style.WARNING)


def _unreadable(depth: int, sentences: Iterable[str]) -> Iterator[Line]:
    for sentence in sentences:
        yield Line(depth, (sentence,), Style.WARNING)


def _disks(disks: Sequence[Disk]) -> Iterator[Line]:
    shown = {disk.name for disk in disks}
    for disk in disks:
        facts = disk.facts
        if facts and facts.size_bytes == 0 and not disk.uses:
            continue  # as an unused loop device, which lsblk(8) leaves out too
        backing = facts.backing if facts else None
        origin = f"PCI {disk.function}" if disk.function else ""
        if backing:
            origin = backing.backing_file + (" (deleted)" if backing.deleted else "")
        depth = 2 if disk.disk in shown else 1
        size_bytes = facts.size_bytes if facts else None
        yield Line(
            depth,
            (
                disk.device_node,
                str(disk.devnum or "?"),
                "?" if size_bytes is None else size(size_bytes),
                access(read_only=facts.read_only) if facts else "?",
                origin,
            ),
        )
        yield from _held(depth + 1, disk.uses)
        yield from _unreadable(depth + 1, disk.unreadable)


def _pmem(inventory: Inventory) -> Iterator[Line]:
    for pmem in inventory.pmem:
        yield Line(
            1,
            (
                pmem.device_node or "-",
                pmem.name or "-",
                pmem.mode or "?",
                "?" if pmem.size_bytes is None else size(pmem.size_bytes),
                "-" if pmem.numa_node is None else f"node {pmem.numa_node}",
            ),
        )
        yield from _held(2, pmem.uses)
        yield from _unreadable(2, pmem.unreadable)


def _sockets(sockets: Sequence[StoredSocket]) -> Iterator[Line]:
    for socket in sockets:
        found = socket.socket_path or "nobody serves it"
        yield Line(1, (socket.device_node, str(socket.devnum), socket.kind, found))
        yield from _held(2, socket.uses)


def _mediated(entries: Sequence[HostMediated]) -> Iterator[Line]:
    for entry in entries:
        device = entry.device
        yield Line(
            1,
            (
                entry.uuid,
                str(device.type) if device else "?",
                entry.mdev_type or "?",
                f"part of {device.parent}" if device else "?",
                "in no group" if entry.iommu_group is None else f"group {entry.iommu_group}",
                entry.cdev_node or entry.group_node or "",
            ),
        )
        if device and device.ap_queues:
            yield Line(2, ("queues: " + " ".join(device.ap_queues),), Style.DETAIL)
        yield from _held(2, entry.uses)
        yield from _unreadable(2, entry.unreadable)


def _mdev_types(inventory: Inventory) -> Iterator[Line]:
    for parent, kinds in groupby(inventory.mdev_types, key=lambda kind: kind.parent):
        yield Line(1, (parent,), Style.HEADING)
        for kind in kinds:
            more = "?" if kind.available is None else f"{kind.available} more"
            yield Line(2, (kind.name, more, kind.device_api or "?", kind.title or ""))
            yield from _unreadable(3, kind.unreadable)
