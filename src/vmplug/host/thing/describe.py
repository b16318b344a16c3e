"""Make a Thing of a device: its tree, the uses that `check` finds, and what is unknown."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import assert_never

from msgspec.structs import replace

from vmplug.errors import AttributeReadError, HostError
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.qcow2 import read_image
from vmplug.host.block.usage import HostUsage
from vmplug.host.check.claimed import find_claimed
from vmplug.host.check.device import check_device
from vmplug.host.check.open_char import may_have_users
from vmplug.host.check.relate import relate_device
from vmplug.host.check.shared import check_shared
from vmplug.host.check.thing import identify
from vmplug.host.check.unknown import find_unread
from vmplug.host.device import (
    CharDevice,
    EntropySource,
    HostDevice,
    OpenConnection,
    SharedDirectory,
)
from vmplug.host.finding import Access, Code, Finding, Severity
from vmplug.host.kind import IdentityKind
from vmplug.host.pci.group import VfioGroup
from vmplug.host.root import HostRoot
from vmplug.host.thing.disk import DiskReader
from vmplug.host.thing.function import FunctionReader
from vmplug.host.thing.name import no_such
from vmplug.host.thing.thing import Thing, ThingKind
from vmplug.host.thing.uses import names_in, place_uses
from vmplug.host.use.claim import Claim
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.host.vhost_user.probe import find_client
from vmplug.host.vhost_user.sockets import UnixSockets


def relate(device: HostDevice, usage: HostUsage, root: HostRoot) -> HostDevice:
    """The device with everything that shows the same bytes; VMs may have claims on that.

    An image also has the files that its header names, where vmplug can follow them.
    """
    if isinstance(device, DiskFile):
        device = _with_image(device, root)
    return relate_device(device, usage, root)


def _with_image(file: DiskFile, root: HostRoot) -> DiskFile:
    if file.qcow2 and (file.qcow2.backing_file or file.qcow2.external_data):
        with suppress(HostError, ValueError):
            return file._replace(image=read_image(file.host_path, root))
    return file


def describe_thing(
    device: HostDevice, *, usage: HostUsage, claims: Sequence[Claim] | None, root: HostRoot
) -> Thing:
    """What a device is, what it is made of, and who uses it.

    `device` comes from `relate`, `usage` from `read_usage`. `claims` are those of all VMs,
    None where nobody asked. Nodes are opened as `check` opens them; no connection is made. Raises
    AttributeReadError when the device itself cannot be read.
    """
    thing = _read(device, usage, root)
    found, unknown = list[Finding](), list(thing.unknown)
    try:
        unknown += _unknown(device, usage, root)
        found = _find_uses(device, thing, usage, claims or (), root)
    except HostError as error:
        unknown.append(f"the uses: {error.message}")
    if claims is None:
        unknown.append("the VMs of vmplug: no journal of this host was read")
    # The device could not be asked: that says nothing about its users.
    unknown += [finding.message for finding in found if finding.code is Code.UNREADABLE]
    return replace(place_uses(thing, found), unknown=tuple(dict.fromkeys(unknown)))


def describe_other(name: str, usage: HostUsage, root: HostRoot) -> Thing:
    """A thing that is not a device: a type of mediated device, or a parent of such devices.

    Raises NoSuchDevice.
    """
    thing = FunctionReader(usage, root).parent_or_type(name)
    if thing is None:
        raise no_such(name)
    return thing


def _find_uses(
    device: HostDevice, thing: Thing, usage: HostUsage, claims: Sequence[Claim], root: HostRoot
) -> list[Finding]:
    """What `check` finds of the device, and the claims on everything else in its tree."""
    access, names = Access(read_only=False), names_in(thing)
    related = {device.identity, *device.related_identities}
    own = [claim for claim in claims if claim.identity in related]
    found = check_device(device, access, usage=usage, claims=own, root=root)
    others = [c for c in claims if c.identity not in related and str(c.identity) in names]
    found += find_claimed(others, access)
    match device:
        case SharedDirectory():  # any number of VMs may have it, under any tags
            shares = [claim for claim in claims if _is_of(claim, device)]
            uses = [*find_claimed(shares, access), *check_shared(device, usage, root)]
            return [replace(use, severity=Severity.WARNING) for use in uses]
        case VhostUserSocket() if client := find_client(device, root, usage.questions):
            return [*found, client]
        case _:
            return found


def _is_of(claim: Claim, directory: SharedDirectory) -> bool:
    is_share = claim.identity.kind is IdentityKind.SHARE
    return is_share and claim.identity.path == directory.host_path


def _read(device: HostDevice, usage: HostUsage, root: HostRoot) -> Thing:
    disks = DiskReader(usage, root)
    match device:
        case BlockDevice():
            return disks.disk(device)
        case DiskFile():
            return disks.file(device)
        case VfioGroup():
            return FunctionReader(usage, root).group(device)
        case VhostUserSocket():
            return _socket(device, usage, root)
        case _:
            return _simple(device, root)


def _simple(
    device: SharedDirectory | OpenConnection | CharDevice | EntropySource, root: HostRoot
) -> Thing:
    """A thing without parts that vmplug knows."""
    match device:
        case SharedDirectory():
            kind, identity = ThingKind.DIRECTORY, identify(device, root) if root.is_live else None
        case OpenConnection():
            kind, identity = ThingKind.CONNECTION, None
        case CharDevice(devnum=number):
            kind, identity = ThingKind.CHARACTER_DEVICE, f"char {number}" if number else None
        case EntropySource():
            kind, identity = ThingKind.CHARACTER_DEVICE, None
        case _:
            assert_never(device)
    return Thing(kind=kind, name=device.host_path, identity=identity)


def _socket(device: VhostUserSocket, usage: HostUsage, root: HostRoot) -> Thing:
    """A socket with the process that serves it."""
    try:
        server = usage.once(UnixSockets).find_server(device.socket_path)
    except HostError:
        server = None
    return Thing(
        kind=ThingKind.SOCKET,
        name=device.socket_path,
        identity=identify(device, root) if root.is_live else None,
        title=f"served by {server}" if server else None,
        unknown=() if server else ("the process that serves it: none can be seen",),
    )


def _unknown(device: HostDevice, usage: HostUsage, root: HostRoot) -> Iterator[str]:
    """What could not be looked for, of the uses that this kind of thing may have.

    Tables that a copy of a host does not hold are a finding (`unknown-use`).
    """
    match device:
        case BlockDevice() | VfioGroup() if root.is_live:
            if not _sees_mounts(root):
                yield "mounts in other mount namespaces: those of process 1 may not be read"
        case DiskFile() | VhostUserSocket() if root.is_live:
            pass
        case BlockDevice() | DiskFile():
            yield "who has it open (O_EXCL, the locks of QEMU): this is a copy of a host"
        case VfioGroup():
            if device.disks:
                yield "who has its disks open (O_EXCL): this is a copy of a host"
        case CharDevice() if not may_have_users(device):
            yield "who has it open: every process may have it"
        case CharDevice() | SharedDirectory():
            if isinstance(device, SharedDirectory):
                yield "other machines: vmplug looks for exports of the kernel's NFS server only"
            opened = usage.open_files
            yield from find_unread(opened, sorted({*opened.unlisted, *opened.guarded}))
        case _:
            yield "who has it open: vmplug looks only for VMs of its own"


def _sees_mounts(root: HostRoot) -> bool:
    """Whether the mount namespaces of other processes can be told apart."""
    try:
        return root.read_link("/proc/1/ns/mnt") is not None
    except AttributeReadError as error:
        return error.errno not in {errno.EACCES, errno.EPERM}
