"""Devices of one request that are parts of each other: a disk and its partition, both asked for.

Each device is looked up in what was asked for before it, so that the cost grows with the request
and not with its square.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import msgspec

from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.device import HostDevice
from vmplug.host.file_id import file_id
from vmplug.host.finding import Access, Code, Finding, UsedBy
from vmplug.host.kind import Identity, IdentityKind
from vmplug.host.pci.group import VfioGroup
from vmplug.host.root import HostRoot
from vmplug.oci.requests import Request


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One device of the request, and how it is wanted."""

    info: Request
    device: HostDevice
    access: Access


class Overlaps:
    """What a request has asked for so far."""

    def __init__(self, root: HostRoot) -> None:
        self._root = root
        self._keys: dict[Identity, Identity] = {}
        self._by_identity = defaultdict[Identity, list[Asked]](list)
        self._by_relative = defaultdict[Identity, list[Asked]](list)
        self._disks_of_groups = defaultdict[Identity, list[Asked]](list)
        self._disks = defaultdict[Identity, list[Asked]](list)

    def find(self, asked: Asked) -> list[Finding]:
        """One finding for each earlier device that is a part of this one, or it of that."""
        device = asked.device
        own, related = self._identify(device)
        found = [
            *self._by_identity.get(own, ()),
            *self._by_relative.get(own, ()),
            *_at(self._by_identity, related),
            *_at(*self._between_groups_and_disks(device, own, related)),
        ]
        others = {id(other): other for other in found if other.device.identity != device.identity}
        return [_finding(asked, one) for one in others.values() if not self._share(asked, one)]

    def add(self, asked: Asked) -> None:
        """From now on the device counts for those that follow."""
        device = asked.device
        own, related = self._identify(device)
        self._by_identity[own].append(asked)
        for identity in related:
            self._by_relative[identity].append(asked)
        if isinstance(device, VfioGroup):
            for identity in _disks_of(device):
                self._disks_of_groups[identity].append(asked)
        elif isinstance(device, BlockDevice):
            for identity in {own, *related}:
                self._disks[identity].append(asked)

    def _identify(self, device: HostDevice) -> tuple[Identity, list[Identity]]:
        """What the device is, and what it is related to, whatever the names of files are."""
        return self._key(device.identity), [self._key(one) for one in device.related_identities]

    def _key(self, identity: Identity) -> Identity:
        """A file by its inode, which all of its hard links share."""
        if identity not in self._keys:
            is_file = identity.kind is IdentityKind.FILE
            status = self._root.stat_or_none(identity.key) if is_file else None
            known = Identity(identity.kind, file_id(status)) if status else identity
            self._keys[identity] = known
        return self._keys[identity]

    def _share(self, one: Asked, other: Asked) -> bool:
        """Readers may share, and so may writers if all have share-rw; never a function."""
        if isinstance(one.device, VfioGroup) or isinstance(other.device, VfioGroup):
            return False
        readers = self._only_reads(one, other) and self._only_reads(other, one)
        return readers or (one.access.share_rw and other.access.share_rw)

    def _only_reads(self, one: Asked, other: Asked) -> bool:
        """Whether the one only reads what it has of the other: backing files it never writes."""
        device = one.device
        only_read = map(self._key, device.only_read) if isinstance(device, DiskFile) else ()
        return one.access.read_only or self._key(other.device.identity) in only_read

    def _between_groups_and_disks(
        self, device: HostDevice, own: Identity, related: Iterable[Identity]
    ) -> tuple[dict[Identity, list[Asked]], Iterable[Identity]]:
        """A function takes along whatever is on its disks: partitions, volumes, mirrors."""
        match device:
            case VfioGroup():
                return self._disks, _disks_of(device)
            case BlockDevice():
                return self._disks_of_groups, (own, *related)
            case _:
                return {}, ()


def _at(index: dict[Identity, list[Asked]], keys: Iterable[Identity]) -> Iterator[Asked]:
    for key in keys:
        yield from index.get(key, ())


def _disks_of(group: VfioGroup) -> list[Identity]:
    return [Identity.of_block(disk.devnum) for disk in group.disks]


def _finding(asked: Asked, other: Asked) -> Finding:
    name = f" as {other.info.name}" if other.info.name != other.device.host_path else ""
    return Finding(
        Code.IN_USE_BY_VM,
        f"{asked.device.host_path} {_relation(asked.device, other.device)}, which this request "
        f"asks for too{name}",
        _remedy(asked.device, other.device),
        used_by=UsedBy(
            on=asked.device.host_path,
            who="another device of this request",
            where=other.info.name,
            how="the request itself",
        ),
    )


def _remedy(device: HostDevice, other: HostDevice) -> str:
    match device, other:
        case VfioGroup(), VfioGroup() if _is_above(other, device):
            return _one_after_the_other(other, device)
        case VfioGroup(), VfioGroup() if _is_above(device, other):
            return _one_after_the_other(device, other)
        case (VfioGroup(), _) | (_, VfioGroup()):
            return "request only one of them"
        case _:
            return "request only one of them, or both read-only"


def _one_after_the_other(physfn: VfioGroup, virtfn: VfioGroup) -> str:
    owner, name = physfn.members[0], virtfn.members[0]
    if virtfn.mediated:
        return f"request only one of them: {name} disappears when VFIO gets {owner}"
    return (
        f"request only {name}: it disappears when VFIO gets {owner}. If VFIO has {owner} already, "
        f"attach {owner} first and {name} after it: the VM that has {owner} makes the token that "
        "opens the other"
    )


_PARTITION = "is a partition of", "has the partition"
_LOOP = "is a loop device over", "is behind"
_BUILT = "is built on", "is part of"
_MEMBER = "belongs to", "has"
_MEDIATED = "is a mediated device of", "is the parent of"
_VIRTUAL = "has a virtual function of", "makes the functions of"


def _relation(device: HostDevice, other: HostDevice) -> str:
    """What the one is of the other: `is a partition of /dev/sda`."""
    if words := _words(device, other):
        return f"{words[0]} {other.host_path}"
    if words := _words(other, device):
        return f"{words[1]} {other.host_path}"
    match device, other:
        case DiskFile(file_id=one), DiskFile(file_id=same) if one == same:
            return f"is another name of {other.host_path}"
        case _:
            return f"has the same data as {other.host_path}"


def _words(upper: HostDevice, lower: HostDevice) -> tuple[str, str] | None:
    """How `upper` is a part of `lower` or built on it, said of both; None when it is not."""
    match upper, lower:
        case BlockDevice(), VfioGroup():
            return _MEMBER
        case BlockDevice(), DiskFile():
            return _LOOP if upper.backing else _BUILT
        case BlockDevice(), BlockDevice() if _is_partition_of(upper, lower):
            return _PARTITION
        case BlockDevice(), BlockDevice() if lower.devnum in upper.below:
            return _BUILT
        case VfioGroup(), VfioGroup() if _is_above(lower, upper):
            return _MEDIATED if upper.mediated else _VIRTUAL
        case _:
            return None


def _is_above(group: VfioGroup, other: VfioGroup) -> bool:
    """Whether the other is a part of it: virtual functions, a mediated device."""
    parent = {other.mediated.parent} if other.mediated else set()
    above = parent | {str(function.physfn) for function in other.functions}
    return not above.isdisjoint(group.members)


def _is_partition_of(part: BlockDevice, disk: BlockDevice) -> bool:
    """Of a disk the directory is the parent of its partitions'."""
    return bool(
        part.sysfs_path and disk.sysfs_path and part.sysfs_path.startswith(f"{disk.sysfs_path}/")
    )
