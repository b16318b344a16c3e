"""File systems on a disk, or of a virtio device: their mounts, and those that no table shows."""

from collections.abc import Iterator, Mapping, Sequence
from shlex import quote

from vmplug.devnum import DevNum
from vmplug.host.block.device import BlockDevice, DiskPart
from vmplug.host.block.usage import HostUsage
from vmplug.host.finding import Access, Code, Finding, UsedBy
from vmplug.host.pci.function import PciFunction
from vmplug.host.root import HostRoot
from vmplug.host.use.mounts import MountedDevice, read_kept
from vmplug.host.use.served import find_mounts_of, read_served


def find_mounts(device: BlockDevice, access: Access, usage: HostUsage) -> Iterator[Finding]:
    """Mounts of all that shows its bytes; a read-only file system may be shared."""
    names = {part.devnum: name_part(part, device) for part in device.same_bytes}
    names[device.devnum] = device.device_node
    nodes = {part.devnum: part.device_node for part in device.same_bytes}
    for devnum, name in names.items():
        mounts = [
            mount
            for mount in usage.mounts_of.get(devnum, ())
            if not (mount.read_only and access.read_only)
        ]
        if mounts:
            points = sorted({mount.mount_point for mount in mounts})
            yield Finding(
                Code.MOUNTED_ON_HOST,
                f"{name} is mounted on the host at {few(points)}",
                _unmount(mounts),
                used_by=UsedBy(
                    on=nodes.get(devnum, device.device_node),
                    who="a mounted file system",
                    where=", ".join(points),
                    how="the mount tables of all mount namespaces",
                ),
            )
    yield from _kept(device, names, usage)


def find_served(function: PciFunction, usage: HostUsage, root: HostRoot) -> Iterator[Finding]:
    """Mounts of what another machine gives this one through the function: 9p and virtiofs."""
    for served in read_served(function.sysfs_path, root):
        mounts = find_mounts_of(served, usage.namespaces.tables, root)
        if mounts:
            points = sorted({mount.mount_point for mount in mounts})
            what = "a file system" if served.tag is None else f"the file system {served.tag!r}"
            may_be = ", perhaps one that" if served.tag is None else ", which"
            yield Finding(
                Code.MOUNTED_ON_HOST,
                f"{function.bdf} has {what} of {served.fs_type}{may_be} is mounted on the host at "
                + few(points),
                _unmount(mounts),
                used_by=UsedBy(
                    on=str(function.bdf),
                    who="a mounted file system",
                    where=", ".join(points),
                    how="the mount tables of all mount namespaces",
                ),
            )


def _unmount(mounts: Sequence[MountedDevice]) -> str:
    """What unmounts it here, or else in the first namespace that has it."""
    here = sorted(mount.mount_point for mount in mounts if mount.namespace is None)
    if "/" in here:
        return "the host's root file system is on it: hand over another device"
    if here:
        every = "--all-targets " if len(here) > 1 else ""
        return f"umount {every}{quote(here[0])}"
    other = mounts[0]
    return (
        "it is mounted in another mount namespace: end the container or the service there "
        f"(lsns --type mnt), or run umount --namespace {quote(other.namespace or '')} "
        + quote(other.mount_point)
    )


def _kept(device: BlockDevice, names: Mapping[DevNum, str], usage: HostUsage) -> Iterator[Finding]:
    """File systems in no mount table: unmounted lazily, or mounted where vmplug cannot look."""
    nodes = {part.devnum: part.device_node for part in device.same_bytes}
    nodes[device.devnum] = f"/dev/{(device.sysfs_path or '').rpartition('/')[2]}"
    kept = usage.once(read_kept)
    for devnum, node in nodes.items():
        name = node.removeprefix("/dev/").replace("/", "!")
        if name in kept and devnum not in usage.mounts_of:
            yield Finding(
                Code.MOUNTED_ON_HOST,
                f"{names[devnum]} has a file system in use, and no mount table shows where",
                "it was unmounted lazily (umount --lazy), or a container of another PID namespace "
                f"has it: end the processes that fuser --verbose --mount {quote(node)} shows",
                used_by=UsedBy(
                    on=node, who="a mounted file system", how="the file systems in /sys/fs"
                ),
            )


def name_part(part: DiskPart, device: BlockDevice) -> str:
    """`/dev/sdb`; for another name of the disk, with the name that was asked for."""
    if part in (device.twins or ()):
        return f"{part.device_node}, on the same disk as {device.device_node},"
    if part in (device.behind or ()):
        return f"{part.device_node}, which is below {device.device_node},"
    return part.device_node


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
