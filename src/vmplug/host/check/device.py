"""May it be handed over? Every reason against it, each with its remedy; nothing is changed.

A finding of severity `error` stops `attach`. An operator may allow single findings by code.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from shlex import quote
from typing import assert_never

from msgspec.structs import replace

from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.loop_files import Loop, same_file
from vmplug.host.block.relations import relate_block, relate_file
from vmplug.host.block.sysfs import read_block_device
from vmplug.host.block.usage import HostUsage
from vmplug.host.check.claimed import find_claimed, without_shared
from vmplug.host.check.exclusive import exclusive_errno, find_claims_elsewhere, held_exclusively
from vmplug.host.check.mounted import few, find_mounts, name_part
from vmplug.host.check.open_disk import (
    check_open_disk,
    check_qemu_locks,
    find_kernel_users,
    find_openers_elsewhere,
    find_qemu_locks,
)
from vmplug.host.check.relate import list_image_files, relate_device
from vmplug.host.check.unknown import gather_unknown, not_looked_for
from vmplug.host.device import (
    CharDevice,
    EntropySource,
    HostDevice,
    OpenConnection,
    SharedDirectory,
)
from vmplug.host.finding import Access, Code, Finding, Severity, UsedBy
from vmplug.host.kind import FoundBy
from vmplug.host.pci.group import VfioGroup
from vmplug.host.root import HostRoot, describe, node_number
from vmplug.host.use.claim import Claim, is_pod
from vmplug.host.vhost_user.device import VhostUserSocket

_NOT_ASKED = frozenset({errno.EACCES, errno.EPERM, errno.ENOENT})
"""The device itself did not answer: this process may not open it, or has no node for it."""


def check_device(
    device: HostDevice,
    access: Access,
    *,
    usage: HostUsage,
    claims: Sequence[Claim] = (),
    is_held: bool = False,
    root: HostRoot,
) -> list[Finding]:
    """Every reason not to hand `device` over; empty when there is none.

    `claims` are those of VMs on this device and its relatives. The QEMU of one of these, or of the
    VM that asks and has it already (`is_held`), has it open: that is not another reason. Nodes are
    opened (for reading, O_EXCL) only on the running host.
    """
    if isinstance(device, VfioGroup):
        claims = without_shared(claims, device, root)
    own = [claim for claim in claims if not is_pod(claim.vm)]  # which may not have opened it yet
    if isinstance(device, DiskFile):
        of_others = {*device.written, *device.only_read}
        own = [claim for claim in own if claim.identity not in of_others]
    in_vm = is_held or bool(own)
    found = _check(device, access, usage, claims, root, in_vm=in_vm)
    return gather_unknown(found, device.host_path, root)


def _check(
    device: HostDevice,
    access: Access,
    usage: HostUsage,
    claims: Sequence[Claim],
    root: HostRoot,
    *,
    in_vm: bool,
) -> list[Finding]:
    match device:
        case BlockDevice():
            disk = relate_block(device, usage, root)
            return list(_check_block(disk, access, usage, claims, root, in_vm=in_vm))
        case DiskFile():
            file = relate_file(device, usage, root)
            found = list(_check_file(file, access, usage, claims, root, in_vm=in_vm))
            for other, how in list_image_files(None if in_vm else device.image, access, root):
                related = relate_device(other, usage, root)
                names = {related.identity, *related.related_identities}
                is_claimed = any(claim.identity in names for claim in claims)
                found += _check(related, how, usage, (), root, in_vm=is_claimed)
            return found
        case VhostUserSocket() | OpenConnection() | SharedDirectory():
            found = list(find_claimed(claims, access))
            if isinstance(device, SharedDirectory) and not in_vm:
                from vmplug.host.check.shared import check_shared  # noqa: PLC0415  1 ms

                found += check_shared(device, usage, root)
            return found
        case VfioGroup():
            # Functions of one group may share what is in use, such as a disk with two controllers.
            members = _check_vfio(device, access, usage, claims, root, in_vm=in_vm)
            return list(dict.fromkeys(members))
        case CharDevice():
            from vmplug.host.check.open_char import check_open_char  # noqa: PLC0415  1 ms

            return list(check_open_char(device, usage, root))
        case EntropySource():
            return []
        case _:
            assert_never(device)


def _check_vfio(
    group: VfioGroup,
    access: Access,
    usage: HostUsage,
    claims: Sequence[Claim],
    root: HostRoot,
    *,
    in_vm: bool,
) -> Iterator[Finding]:
    from vmplug.host.check.vfio_group import check_group, check_openers  # noqa: PLC0415  6 ms

    yield from find_claimed(claims, access)
    yield from check_group(group, usage, root)
    if not in_vm:
        yield from check_openers(group, usage, root)
    if group.disks:
        yield from _unknown(usage, root)
    for part in group.disks:
        found = read_block_device(part.devnum, part.device_node, FoundBy.SYSFS, root)
        disk = relate_block(found, usage, root)
        used = list(_all_users(disk, usage, root, in_vm=in_vm))
        if not (in_vm or _is_refused(used)):
            used += find_openers_elsewhere(disk, usage, root)
        for finding in used:
            yield replace(finding, message=f"{group.host_path} has a disk: {finding.message}")


def _all_users(
    disk: BlockDevice, usage: HostUsage, root: HostRoot, *, in_vm: bool
) -> Iterator[Finding]:
    """Every user of a disk that the host will lose with the function that it is on."""
    used = _users(disk, Access(read_only=False), usage, root)
    yield from used
    if root.is_live and not _is_refused(used):
        number = exclusive_errno(disk.device_node, usage, root)
        held = (
            [held_exclusively(disk.device_node, disk.relatives)] if number == errno.EBUSY else []
        )
        held += find_claims_elsewhere(disk, usage, root, explained=False)
        yield from held
        if number in _NOT_ASKED:
            yield not_looked_for(f"users of {disk.device_node} ({os.strerror(number).lower()})")
        if not (held or in_vm):
            for node in disk.nodes:
                yield from find_qemu_locks(node, Access(read_only=False), root)


def find_disk_users(disk: BlockDevice, usage: HostUsage, root: HostRoot) -> list[Finding]:
    """Every user of what was built on another device, such as a volume."""
    loops = (loop for node in disk.nodes for loop in usage.loop_index.find_on(node))
    known = disk._replace(twins=(), behind=(), loops=tuple(loop.devnum for loop in loops))
    found = _all_users(known, usage, root, in_vm=False)
    return gather_unknown(found, disk.host_path, root)


def _check_block(
    device: BlockDevice,
    access: Access,
    usage: HostUsage,
    claims: Sequence[Claim],
    root: HostRoot,
    *,
    in_vm: bool,
) -> Iterator[Finding]:
    if device.size_bytes is None:
        yield Finding(
            Code.NOT_IN_SYSFS,
            f"{device.device_node} has no entry in sysfs, so vmplug cannot check all of its users",
            "use a device that the kernel lists below /sys/dev/block",
        )
    yield from _wrong_node(device, root)
    yield from _unknown(usage, root)
    used = _users(device, access, usage, root)
    found = [*used, *find_claimed(claims, access)]
    if root.is_live:
        # A user that could share it with a reader still holds the device exclusively.
        explained = used + _users(device, replace(access, read_only=False), usage, root)
        closed = list(_opened(device, usage, root, explained=_is_refused(explained)))
        closed += find_claims_elsewhere(device, usage, root, explained=_is_refused(explained))
        found += closed
        if not (_is_refused(used) or in_vm or closed):
            for path in (*device.nodes, *device.below_files):
                found += check_qemu_locks(path, device, access, usage, root)
    yield from found
    if not _is_refused(found):
        yield from check_open_disk(device, access, usage, root)
    yield from _read_only(
        device, access, f"make it writable (blockdev --setrw {quote(device.device_node)})"
    )
    yield from _suspended(device, root)
    if device.size_bytes == 0:
        yield _empty(device)


def _wrong_node(device: BlockDevice, root: HostRoot) -> Iterator[Finding]:
    """QEMU opens the node by its name: it must be the device that was asked for."""
    status = root.stat_or_none(device.device_node)
    if status and not (stat.S_ISBLK(status.st_mode) and node_number(status) == device.devnum):
        yield Finding(
            Code.WRONG_NODE,
            f"the kernel calls block device {device.devnum} {device.device_node}, but that is "
            + describe(status),
            "create the nodes again (udevadm trigger), or remove the wrong one",
        )


def _check_file(
    device: DiskFile,
    access: Access,
    usage: HostUsage,
    claims: Sequence[Claim],
    root: HostRoot,
    *,
    in_vm: bool,
) -> Iterator[Finding]:
    # It can be mounted only through a loop device.
    yield from _unknown(usage, root, mounts=bool(device.loops))
    used = [
        *_looped(device, access, usage, root),
        *_swap(device.host_path, device.nodes, usage, root),
        *find_kernel_users(device, access, usage, root),
    ]
    found = [*used, *find_claimed(claims, access, device.only_read)]
    if not (_is_refused(used) or in_vm):
        for path in device.nodes:
            found += check_qemu_locks(path, device, access, usage, root)
    yield from found
    if not _is_refused(found):
        yield from check_open_disk(device, access, usage, root)
    yield from _read_only(device, access, "remount its file system for writing")
    if device.size_bytes == 0:
        yield Finding(
            Code.SIZE_ZERO,
            f"{device.host_path} is empty",
            "give it a size, for example with truncate --size=1G",
        )


def _unknown(usage: HostUsage, root: HostRoot, *, mounts: bool = True) -> Iterator[Finding]:
    """On the running host an exclusive open finds what no mount table shows."""
    if not root.is_live:
        of_disks = (usage.unknown_mounts, usage.unknown_members) if mounts else ()
        unknown = (*of_disks, usage.unknown_swap)
        yield from map(not_looked_for, filter(None, unknown))


def _is_refused(findings: Iterable[Finding]) -> bool:
    return any(finding.severity is Severity.ERROR for finding in findings)


def _users(device: BlockDevice, access: Access, usage: HostUsage, root: HostRoot) -> list[Finding]:
    """Every known user on the host that cannot share the device in this way."""
    return [
        *find_mounts(device, access, usage),
        *_held(device, access, root),
        *_looped(device, access, usage, root),
        *_swap(device.device_node, (*device.nodes, *device.below_files), usage, root),
        *find_kernel_users(device, access, usage, root),
    ]


def _held(device: BlockDevice, access: Access, root: HostRoot) -> Iterator[Finding]:
    """Devices that the kernel built on it: device-mapper, md, bcache."""
    held = [(device.device_node, device.device_node, device.holders or ())]
    held += [(p.device_node, name_part(p, device), p.holders) for p in device.same_bytes]
    for node, named, holders in held:
        writers = [
            name
            for name in holders
            if not (access.read_only and root.read_int(f"/sys/class/block/{name}/ro"))
        ]
        if writers:
            yield Finding(
                Code.HAS_HOLDERS,
                f"{named} is part of {few(writers)}",
                f"hand over {few([f'/dev/{name}' for name in writers])} itself, or dismantle it "
                f"first ({_take_apart(writers, root)})",
                used_by=UsedBy(
                    on=node,
                    who=", ".join(_with_title(name, root) for name in writers),
                    how="holders in sysfs",
                ),
            )


def _with_title(name: str, root: HostRoot) -> str:
    title = _mapped_name(f"/sys/block/{name}", root)
    return f"{name} ({title})" if title else name


def _take_apart(holders: Sequence[str], root: HostRoot) -> str:
    """The commands for it; the tools of LVM and others know more, but have the same effect."""
    names = [name for holder in holders if (name := _mapped_name(f"/sys/block/{holder}", root))]
    commands = [f"dmsetup remove {' '.join(map(quote, names[:3]))}"] if names else []
    commands += [f"mdadm --stop /dev/{name}" for name in holders if name.startswith("md")]
    commands += [
        f"echo 1 > /sys/block/{name}/bcache/stop" for name in holders if name.startswith("bcache")
    ]
    commands += [
        f"drbdadm down, with the resource of /dev/{name}"
        for name in holders
        if name.startswith("drbd")
    ]
    return "; ".join(commands) or "dmsetup, lvm, mdadm"


def _mapped_name(sysfs_path: str, root: HostRoot) -> str | None:
    """The name of a device-mapper device; None for every other device."""
    name = root.read_attribute(f"{sysfs_path}/dm/name")
    return os.fsdecode(name).removesuffix("\n") if name else None


def _looped(
    disk: BlockDevice | DiskFile, access: Access, usage: HostUsage, root: HostRoot
) -> Iterator[Finding]:
    """Loop devices on the disk. One that nothing uses, such as kubelet's, may stay."""
    for loop in filter(None, map(usage.loop_index.by_number.get, disk.loops or ())):
        if access.read_only and root.read_int(f"/sys/dev/block/{loop.devnum}/ro"):
            continue
        shown = next((n for n in disk.nodes if loop.shows(n, root)), loop.backing.backing_file)
        message = f"{shown} is behind the loop device {loop.device_node}"
        used_by = UsedBy(
            on=shown,
            who=f"the loop device {loop.device_node}",
            how="the file that the kernel has open for it",
        )
        if _is_idle(loop, usage, root):
            yield Finding(
                Code.HAS_HOLDERS,
                f"{message}, which nothing uses now",
                "leave it unused (kubelet keeps one on each raw block volume), or run "
                f"losetup --detach {loop.device_node}",
                Severity.WARNING,
                used_by=used_by,
            )
        else:
            yield Finding(
                Code.HAS_HOLDERS,
                message,
                f"hand over {loop.device_node} itself, or end its use and run losetup --detach "
                f"{loop.device_node}",
                used_by=used_by,
            )


def _is_idle(loop: Loop, usage: HostUsage, root: HostRoot) -> bool:
    """Whether nothing that can be seen uses a loop device."""
    device = read_block_device(loop.devnum, loop.device_node, FoundBy.SYSFS, root)
    access = Access(read_only=False)
    used = [
        *find_mounts(device, access, usage),
        *_held(device, access, root),
        *_swap(device.device_node, device.nodes, usage, root),
        *find_kernel_users(device, access, usage, root),
    ]
    if used or any(usage.loop_index.find_on(node) for node in device.nodes):
        return False
    if not root.is_live:
        return True
    is_locked = any(list(find_qemu_locks(node, access, root)) for node in device.nodes)
    refusal = exclusive_errno(device.device_node, usage, root)
    return refusal is None and not is_locked


def _swap(
    name: str, paths: tuple[str, ...], usage: HostUsage, root: HostRoot
) -> Iterator[Finding]:
    for area in usage.swaps:
        on = next((path for path in paths if same_file(area, path, root)), None)
        if on:
            yield Finding(
                Code.IS_SWAP,
                f"{name} contains swap space that the host uses"
                + ("" if area == name else f" ({area})"),
                f"swapoff {quote(area)}",
                used_by=UsedBy(on=on, who="the host's swap", where=area, how="/proc/swaps"),
            )


def _opened(
    device: BlockDevice, usage: HostUsage, root: HostRoot, *, explained: bool
) -> Iterator[Finding]:
    """An exclusive open finds users that sysfs does not list: btrfs, zfs, a database, a daemon."""
    match exclusive_errno(device.device_node, usage, root, explained=explained):
        case None:
            # The drive was opened without its disc.
            if device.removable and root.lacks_disc(device.device_node):
                yield _empty(device)
        case errno.EBUSY:
            if not explained:
                yield held_exclusively(device.device_node, device.relatives)
        case errno.ENOMEDIUM:
            if device.size_bytes != 0:
                yield _empty(device)
        case number:
            yield Finding(
                Code.UNREADABLE,
                f"{device.device_node} cannot be opened: {os.strerror(number)}",
                "vmplug needs root, and a node in /dev for each device that it hands over"
                if number in _NOT_ASKED
                else "the kernel log may have the reason: dmesg",
            )


def _read_only(device: BlockDevice | DiskFile, access: Access, remedy: str) -> Iterator[Finding]:
    if device.read_only and not access.read_only:
        yield Finding(
            Code.READ_ONLY_DEVICE,
            f"{device.host_path} is read-only, and the request is for writing",
            f"request it read-only, or {remedy}",
        )


def _suspended(device: BlockDevice, root: HostRoot) -> Iterator[Finding]:
    """A reader waits for its table; QEMU would wait too, with its whole VM."""
    path = device.sysfs_path
    if path and root.read_int(f"{path}/dm/suspended"):
        name = _mapped_name(path, root) or device.device_node
        yield Finding(
            Code.UNREADABLE,
            f"{device.device_node} is suspended: it cannot be read until it is resumed",
            f"dmsetup resume {quote(name)}",
        )


def _empty(device: BlockDevice) -> Finding:
    if device.removable:
        return Finding(
            Code.NO_MEDIUM, f"{device.device_node} has no medium in it", "insert a medium"
        )
    return Finding(
        Code.SIZE_ZERO,
        f"{device.device_node} has size zero",
        "set it up first (a loop device needs a file: losetup)",
    )
