"""Who uses what a lease has? A descriptor counts, a mapping, and a connection to a server of it.

What a lease has for reading only, random numbers and character devices are free with its process:
anybody may have them open.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from itertools import chain

import msgspec

from vmplug.address import find_bdf
from vmplug.devnum import key_of, key_of_node
from vmplug.host.kind import SERVED, DeviceType, IdentityKind
from vmplug.host.pci.iommu import find_group, group_node, is_noiommu
from vmplug.host.pci.mdev import MDEV_DEVICES
from vmplug.host.process import is_running
from vmplug.host.root import HostRoot
from vmplug.host.use.mapped import find_mapped, find_vfio_users
from vmplug.host.use.openers import DeviceNode, Opener, Wanted, read_open_files, wanted_node
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord, VmRecord, is_elsewhere

_CONNECTION = re.compile(r"\[([0-9]+)\]")
"""The key of a connection that the maker was given open (see IdentityKind)."""


class LeaseUser(msgspec.Struct, frozen=True, kw_only=True):
    """What uses a device of a lease, at `path`; `process` is None where none can be named."""

    path: str
    process: Opener | None
    how: str = "open"

    def __str__(self) -> str:
        """It as the subject of a sentence."""
        one = self.process
        return f"process {one.pid} ({one.name})" if one else "a process that vmplug cannot name"


def find_users(record: VmRecord, journal: Journal, host: HostRoot) -> Iterator[LeaseUser]:
    """The users of a lease's devices, except this process: those that can be named come first.

    For a disk they are those that write to it. A process that has the same device by a VM or a
    lease of its own does not count.
    """
    devices = journal.devices(record.name)
    nodes, disks, functions = Wanted(), Wanted(), list[str]()
    sockets = Wanted()
    for device in devices:
        if device.kind in SERVED:
            sockets |= _wanted_sockets(device, record, host)
        elif device.identity.kind is IdentityKind.VFIO:
            nodes |= _wanted_nodes(device, host)
            functions += _functions(device)
        elif device.identity.kind in {IdentityKind.BLOCK, IdentityKind.FILE}:
            disks |= Wanted() if device.read_only else _wanted_disk(device, host)
    sharers = _find_sharers(record, devices, journal)
    for user in _find_named(nodes, disks, sockets, host):
        if user.process and user.process.pid not in sharers.get(user.path, ()):
            yield user
    yield from _find_hidden(functions, record, journal, host)


def _find_named(
    nodes: Wanted, disks: Wanted, sockets: Wanted, host: HostRoot
) -> Iterator[LeaseUser]:
    if not (nodes or disks or sockets):
        return
    found = read_open_files(host)
    for wanted in (nodes, sockets):
        for one in found.find(wanted):
            yield LeaseUser(path=one.path, process=one)
    # One by one: a process that only reads one disk may write to another.
    opened = chain.from_iterable(found.find({key: path}) for key, path in disks.items())
    for how, users in (("open", opened), ("mapped", find_mapped(nodes | disks, host))):
        for one in users:
            if one.writes:
                yield LeaseUser(path=one.path, process=one, how=how)


def _find_hidden(
    functions: Sequence[str], record: VmRecord, journal: Journal, host: HostRoot
) -> Iterator[LeaseUser]:
    """The users of functions that the kernel has open, although no descriptor of one says so.

    It is the one process that uses VFIO without having a function by a VM or lease of its own.
    """
    from vmplug.host.pci.vfio_use import is_open  # noqa: PLC0415  3 ms, as for all of VFIO

    hidden = [name for name in functions if is_open(name, host)]
    if not hidden:
        return
    others = _find_holders_of_vfio(record, journal)
    found = [one for one in find_vfio_users(host) if one.pid not in others]
    for name in hidden:
        process = found[0] if len(found) == 1 else None
        yield LeaseUser(path=name, process=process, how="open or mapped")


def _find_holders_of_vfio(record: VmRecord, journal: Journal) -> set[int]:
    found = set[int]()
    for other in _running(record, journal):
        if other.pid and any(d.kind is DeviceType.VFIO for d in journal.devices(other.name)):
            found.add(other.pid)
    return found


def _running(record: VmRecord, journal: Journal) -> Iterator[VmRecord]:
    """The other VMs and leases whose process runs here."""
    for other in journal.all_holders():
        is_one = other.name != record.name and not is_elsewhere(other, journal.host)
        if is_one and other.pid and is_running(other.pid, other.started_at, journal.host):
            yield other


def _find_sharers(
    record: VmRecord, devices: Sequence[DeviceRecord], journal: Journal
) -> dict[str, set[int]]:
    """By the paths of devices, the processes that have them by another VM or lease."""
    paths, sharers = {one.identity: one.host_path for one in devices}, dict[str, set[int]]()
    for other in _running(record, journal):
        for device in journal.devices(other.name):
            if (path := paths.get(device.identity)) and other.pid:
                sharers.setdefault(path, set()).add(other.pid)
    return sharers


def _functions(device: DeviceRecord) -> list[str]:
    """The functions of a group, or a mediated device, by their addresses and UUIDs."""
    return [f.host for f in device.guest_address.functions] if device.guest_address else []


def _wanted_nodes(device: DeviceRecord, host: HostRoot) -> Wanted:
    from vmplug.host.pci.vfio import read_cdev  # noqa: PLC0415  3 ms, as for all of VFIO

    wanted = Wanted()
    for function in _functions(device):
        is_pci = find_bdf(function) is not None
        directory = f"{host.pci_devices if is_pci else MDEV_DEVICES}/{function}"
        number = find_group(directory, host)
        names = [read_cdev(directory, host)]
        if number is not None:
            names.append(group_node(number, is_noiommu=is_pci and is_noiommu(number, host)))
        for name in filter(None, names):
            wanted |= wanted_node(DeviceNode.of_char(name, host), host)
    return wanted


def _wanted_disk(device: DeviceRecord, host: HostRoot) -> Wanted:
    from vmplug.host.check.thing import find_place  # noqa: PLC0415  2 ms

    if number := device.identity.devnum:
        return {key_of_node(stat.S_IFBLK, number): device.host_path}
    if device.thing and (place := find_place(device.thing)):  # its name may lead elsewhere now
        return {(stat.S_IFREG, *place): device.host_path}
    status = host.stat_or_none(device.host_path)
    return {key_of(status): device.host_path} if status else {}


def _wanted_sockets(device: DeviceRecord, record: VmRecord, host: HostRoot) -> Wanted:
    """The ends of connections to what serves a device: a virtiofsd of the lease, or a socket."""
    if not host.is_live:
        return {}
    from vmplug.host.vhost_user.peer import find_peers, find_peers_of  # noqa: PLC0415  1 ms
    from vmplug.host.vhost_user.sockets import UnixSockets  # noqa: PLC0415  2 ms

    daemons = HostVirtiofsdRunner(record.qmp_socket).processes([device.id]).get(device.id, [])
    inodes = set[int]().union(*map(find_peers_of, daemons))
    if given := _CONNECTION.fullmatch(device.identity.key):
        inodes = {int(given[1])}
    elif not daemons:
        inodes = find_peers(UnixSockets(host).served_at(device.host_path))
    return {(stat.S_IFSOCK, _sockets_device(), inode): device.host_path for inode in inodes}


def _sockets_device() -> int:
    """The file system of all sockets."""
    import socket  # noqa: PLC0415  2 ms

    with socket.socket(socket.AF_UNIX) as one:
        return os.fstat(one.fileno()).st_dev
