"""Every block device of the host, with its uses.

Source: Documentation/ABI/stable/sysfs-block; proc(5); drivers/nvdimm.
"""

import re
from collections.abc import Iterator, Mapping

import msgspec
from msgspec import structs

from vmplug.address import Bdf, find_bdf
from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError
from vmplug.host.block.device import BlockDevice
from vmplug.host.block.loop_files import Loop, same_file
from vmplug.host.block.sysfs import read_block_device
from vmplug.host.kind import FoundBy, Identity
from vmplug.host.root import HostRoot
from vmplug.host.use.mounts import MountedDevice

_ND_DEVICES = "/sys/bus/nd/devices"
_DAX_DEVICES = "/sys/bus/dax/devices"
_NAMESPACE = "namespace"
_WORDS = re.compile(r"([^0-9]*)([0-9]*)", re.ASCII)


class DiskUses(msgspec.Struct, frozen=True, kw_only=True):
    """What uses disks, as far as it could be read; see `vmplug.host.block.usage`.

    `unknown` are kinds of uses that could not be looked for: `mount`, `swap`.
    """

    mounts: tuple[MountedDevice, ...]
    swaps: tuple[str, ...]
    loops: tuple[Loop, ...]
    unknown: tuple[str, ...] = ()


class Use(msgspec.Struct, frozen=True):
    """One use of a device by the host or a VM.

    `kind` is a stable word. `detail` is the directory of a `mount`, the kernel name of a `holder`
    that was built on the device (`dm-0`), the node of a `loop` device on it, the name of a `vm`,
    the reason why a `network` interface is in use; None for `swap` and for the host's `console`.
    """

    kind: str
    device: str
    detail: str | None = None

    def __str__(self) -> str:
        return f"{self.device} {_USES[self.kind]}" + (f" {self.detail}" if self.detail else "")


_USES = {
    "mount": "is mounted at",
    "swap": "is swap space",
    "holder": "is part of",
    "loop": "is behind",
    "network": "has",
    "console": "is the host's console",
    "vm": "is in VM",
}


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk or partition; where its `facts` are None, `unreadable` is the reason.

    `unknown` are kinds of uses that could not be looked for: `mount`, `swap`.
    `disk` is the name of the whole disk that a partition is part of, `function` the PCI function
    that it comes from.
    """

    name: str
    device_node: str
    devnum: DevNum | None
    disk: str | None = None
    function: Bdf | None = None
    facts: BlockDevice | None = None
    uses: tuple[Use, ...] = ()
    unknown: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


def read_disks(
    paths: Mapping[str, str], usage: DiskUses, vms: Mapping[Identity, str], root: HostRoot
) -> list[Disk]:
    """The block devices of those names and directories, partitions after their disks.

    Hidden paths of a multipath disk are left out. `vms` are VMs by the identities of what they
    hold.
    """
    mounts: dict[DevNum, set[str]] = {}
    for mount in usage.mounts:
        mounts.setdefault(mount.devnum, set()).add(mount.mount_point)
    found = []
    for name, path in paths.items():
        disk = _read_disk(name, path, root)
        if disk is None:
            continue
        above = path.split("/")[-2]
        disk = structs.replace(disk, disk=above if above in paths else None)
        uses = [*_uses(disk, mounts, usage, root)]
        if disk.devnum and (vm := vms.get(Identity.of_block(disk.devnum))):
            uses.append(Use("vm", disk.device_node, vm))
        found.append(structs.replace(disk, uses=tuple(uses), unknown=usage.unknown))
    return sorted(found, key=_in_order)


def _in_order(disk: Disk) -> tuple[list[tuple[str, int]], str]:
    """By the numbers in the names: loop9 before loop10, a disk before its partitions."""
    words = _WORDS.findall(disk.disk or disk.name)
    return [(word, int(digits or 0)) for word, digits in words], f"{len(disk.name):3}{disk.name}"


def _read_disk(name: str, path: str, root: HostRoot) -> Disk | None:
    node = f"/dev/{name.replace('!', '/')}"
    functions = [bdf for part in path.split("/") if (bdf := find_bdf(part))]
    bare = Disk(
        name=name, device_node=node, devnum=None, function=functions[-1] if functions else None
    )
    try:
        devnum = root.read_devnum(f"{path}/dev")
        if devnum is None:
            return None
        facts = read_block_device(devnum, node, FoundBy.SYSFS, root)
    except AttributeReadError as error:
        return structs.replace(bare, unreadable=(error.message,))
    return structs.replace(bare, devnum=devnum, facts=facts)


def _uses(
    disk: Disk, mounts: Mapping[DevNum, set[str]], usage: DiskUses, root: HostRoot
) -> Iterator[Use]:
    node = disk.device_node
    for point in sorted(mounts.get(disk.devnum, ()) if disk.devnum else ()):
        yield Use("mount", node, point)
    for holder in (disk.facts.holders or ()) if disk.facts else ():
        yield Use("holder", node, holder)
    for loop in usage.loops:
        if loop.shows(node, root):
            yield Use("loop", node, loop.device_node)
    if any(same_file(area, node, root) for area in usage.swaps):
        yield Use("swap", node)


class Pmem(msgspec.Struct, frozen=True, kw_only=True):
    """Persistent memory: a namespace, or a block device of it that belongs to none.

    `mode` is the kernel's word: `raw`, `sector`, `fsdax`, `devdax`, or `memory` for one without a
    mode yet. `device_node` is /dev/pmemN or /dev/daxN.M, None while there is none.
    """

    name: str | None
    device_node: str | None
    mode: str | None = None
    size_bytes: int | None = None
    numa_node: int | None = None
    uses: tuple[Use, ...] = ()
    unreadable: tuple[str, ...] = ()


def read_pmem(paths: Mapping[str, str], disks: Mapping[str, Disk], root: HostRoot) -> list[Pmem]:
    """The namespaces, and the devices /dev/pmemN and /dev/daxN.M without one."""
    names = (name for name in root.list_dir(_ND_DEVICES) if name.startswith(_NAMESPACE))
    found = [_read_namespace(name, paths, disks, root) for name in names]
    taken = {pmem.device_node for pmem in found}
    for name, disk in disks.items():
        if name.startswith("pmem") and not disk.disk and disk.device_node not in taken:
            size = disk.facts.size_bytes if disk.facts else None
            found.append(
                Pmem(
                    name=None,
                    device_node=disk.device_node,
                    size_bytes=size,
                    uses=_uses_of(disk, disks),
                )
            )
    taken = {pmem.device_node for pmem in found}
    dax = (name for name in root.list_dir(_DAX_DEVICES) if f"/dev/{name}" not in taken)
    return found + [_read_dax(name, root) for name in dax if "." in name]


def _read_dax(name: str, root: HostRoot) -> Pmem:
    """Memory without a namespace: of a CXL device, or set aside by the firmware.

    Source: Documentation/ABI/testing/sysfs-bus-dax.
    """
    unreadable = list[str]()

    def number(file: str) -> int | None:
        try:
            return root.read_int(f"{_DAX_DEVICES}/{name}/{file}")
        except AttributeReadError as error:
            unreadable.append(error.message)
            return None

    node = number("numa_node")
    return Pmem(
        name=None,
        device_node=f"/dev/{name}",
        mode="devdax",
        size_bytes=number("size"),
        numa_node=None if node is None or node < 0 else node,
        unreadable=tuple(unreadable),
    )


def _read_namespace(
    name: str, paths: Mapping[str, str], disks: Mapping[str, Disk], root: HostRoot
) -> Pmem:
    base, unreadable = f"{_ND_DEVICES}/{name}", list[str]()

    def word(file: str) -> str | None:
        try:
            data = root.read_attribute(f"{base}/{file}")
        except AttributeReadError as error:
            unreadable.append(error.message)
            return None
        return data.decode(errors="replace").strip() or None if data else None

    def number(file: str) -> int | None:
        text = word(file)
        try:
            return int(text, 0) if text else None
        except ValueError:
            unreadable.append(f"cannot read {base}/{file}: {text!r} is not a number")
            return None

    holder = word("holder") or name
    inside = {f"/{name}/", f"/{holder}/"}
    disk = next(
        (d for n, d in disks.items() if any(i in paths[n] for i in inside) and not d.disk), None
    )
    dax = None
    if disk is None:
        dax = _find_dax(root.real_path(base).rpartition("/")[0] + f"/{holder}", root)
    node = number("numa_node")
    return Pmem(
        name=name,
        device_node=disk.device_node if disk else dax,
        mode=word("mode"),
        size_bytes=number("size"),
        numa_node=None if node is None or node < 0 else node,
        uses=_uses_of(disk, disks) if disk else (),
        unreadable=tuple(unreadable),
    )


def _find_dax(directory: str, root: HostRoot) -> str | None:
    """The character device node of a namespace in mode devdax."""
    try:
        names = [name for name in root.list_dir(directory) if name.startswith("dax")]
    except AttributeReadError:
        return None
    return next((f"/dev/{name}" for name in names if "." in name), None)


def _uses_of(disk: Disk, disks: Mapping[str, Disk]) -> tuple[Use, ...]:
    """The uses of a disk and its partitions."""
    parts = [part for part in disks.values() if part.disk == disk.name]
    return tuple(use for each in (disk, *parts) for use in each.uses)
