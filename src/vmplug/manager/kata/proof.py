"""Prove what a VM has under a name: QEMU has open what the name leads to now.

Kata saves only names. A name may lead to another file than the one that QEMU opened, so nothing
is believed that QEMU does not have open. Where a file was replaced under its name, and QEMU has
the new one open for another device of the import, none of the two is proven.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from msgspec.structs import replace

from vmplug.devnum import DevNum
from vmplug.errors import HostError
from vmplug.host.block.sysfs import find_block_directory
from vmplug.host.check.thing import identify, identify_block
from vmplug.host.file_id import file_id, has_open
from vmplug.host.kind import SERVED, IdentityKind
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.root import HostRoot
from vmplug.host.use.file_handle import identify_file
from vmplug.host.vhost_user.peer import find_connections, find_file_at
from vmplug.journal.records import DeviceRecord


def with_things(
    records: Sequence[DeviceRecord], pid: int | None, host: HostRoot
) -> list[DeviceRecord]:
    """The records with what QEMU's process was proven to have; the others as they are."""
    if not host.is_live:  # the processes are those of the running host
        return list(records)
    things = [_prove(record, pid, host) for record in records]
    often = Counter(things)
    return [
        replace(record, thing=thing if often[thing] == 1 else None)
        for record, thing in zip(records, things, strict=True)
    ]


def _prove(record: DeviceRecord, pid: int | None, host: HostRoot) -> str | None:
    identity, path = record.identity, record.host_path
    with suppress(HostError):
        if record.kind in SERVED:  # also by a number of the vhost-user store
            peers = find_connections(pid) if pid else None
            return (
                identify_file(path, host) if find_file_at(path) in (peers or {}).values() else None
            )
        match identity.kind:
            case IdentityKind.FILE:
                if _is_open(identity.key, pid, host):
                    return identify_file(identity.key, host)
            case IdentityKind.BLOCK:
                # While it is open no other device gets its number.
                if has_open(pid, f"block {identity.key}"):
                    directory = find_block_directory(DevNum.parse(identity.key), host)
                    return identify_block(
                        DevNum.parse(identity.key), host.real_path(directory), host
                    )
            case IdentityKind.VFIO:
                group = find_vfio_device(identity.key, host)
                # A function does not leave its group while that is open: an unbind waits.
                if _is_open(f"/dev/vfio/{group.number}", pid, host):
                    return identify(group, host)
            case _:
                pass
    return None


def _is_open(path: str, pid: int | None, host: HostRoot) -> bool:
    status = host.stat_or_none(path)
    return status is not None and bool(has_open(pid, file_id(status)))
