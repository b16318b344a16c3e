"""Check whether the host device of an attachment is unchanged, without asking the VM.

There is no result for a device that is plugging or detaching, or that cannot be seen: a descriptor
that was handed over, a socket of another network namespace, a file that this user cannot access.
"""

import stat
from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from vmplug.address import find_bdf
from vmplug.cached import cached_property
from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError
from vmplug.host.block.loop import read_backing_file
from vmplug.host.check.thing import has_changed, identify_block
from vmplug.host.kind import SERVED, DeviceType, IdentityKind
from vmplug.host.process import find_marked, is_running
from vmplug.host.program import Looks
from vmplug.host.root import HostRoot, node_number
from vmplug.host.use.file_handle import identify_file
from vmplug.journal.records import DeviceRecord, VmRecord, has_ended
from vmplug.journal.state import State

if TYPE_CHECKING:
    from vmplug.host.vhost_user.sockets import UnixSockets

_IDENTIFIED = {DeviceType.BLOCK, DeviceType.VFIO}
"""Kinds of which `vmplug.host.check.thing` knows every device."""
_LOOP_MAJOR = 7
"""Source: Documentation/admin-guide/devices.txt."""


class HostState(StrEnum):
    """The state of a host device, compared with the time when it was attached.

    `unidentified`: something has its name, and it is unknown whether that is what the VM has.
    `deleted`: its file, or the file behind its loop device, has lost its name. `replaced`: another
    file or device has its name. `disconnected`: its backend exists and has no client. `not
    answering`: nobody knows, as the storage of its file does not answer.
    """

    PRESENT = "present"
    UNIDENTIFIED = "unidentified"
    GONE = "gone"
    DELETED = "deleted"
    REPLACED = "replaced"
    OTHER_DRIVER = "other-driver"
    DISCONNECTED = "disconnected"
    NOT_ANSWERING = "not answering"


class DeviceHealth(msgspec.Struct, frozen=True):
    """`detail` is a sentence about the change, None without one.

    `size_bytes` is a disk's, None for anything else.
    """

    state: HostState
    detail: str | None = None
    size_bytes: int | None = None


def is_settled(record: DeviceRecord) -> bool:
    """Whether a device is in its VM, and not plugging or detaching."""
    return record.state in {State.ATTACHED, State.RETAINED}


def is_served(record: DeviceRecord) -> bool:
    """Whether a process of the host serves the device through vhost-user."""
    return record.kind in SERVED


def socket_of(record: DeviceRecord) -> str | None:
    """The path of the socket that a device's backend serves; None where it has none.

    A connection that was handed over and vmplug's own virtiofsd have no path.
    """
    is_own = record.identity.kind is IdentityKind.SHARE
    has_path = is_served(record) and not is_own and record.host_path.startswith("/")
    return record.host_path if has_path else None


def _unless_unidentified(record: DeviceRecord, health: DeviceHealth) -> DeviceHealth:
    """What is there may be another thing, where the journal does not say what was plugged."""
    has_thing = record.kind in _IDENTIFIED or record.identity.kind is IdentityKind.SHARE
    if record.thing or not has_thing or health.state is not HostState.PRESENT:
        return health
    told = f"vmplug does not know whether {record.host_path} is still what the VM has"
    return DeviceHealth(HostState.UNIDENTIFIED, told, health.size_bytes)


def _file_of(record: DeviceRecord) -> str | None:
    """The path of a file or directory whose storage may not answer; None for anything else."""
    is_other = is_served(record) or record.kind is DeviceType.VFIO or record.identity.devnum
    is_file = record.identity.kind is IdentityKind.SHARE or not is_other
    return record.host_path if is_file and record.host_path.startswith("/") else None


def find_silent(records: Iterable[DeviceRecord], looks: Looks, host: HostRoot) -> set[str]:
    """The paths of devices whose storage does not answer: looking at one would never end.

    That is for the moment before a snapshot; a storage that stops just then still holds it up.
    """
    paths = {path for record in records if is_settled(record) and (path := _file_of(record))}
    return looks.find_silent(sorted(paths)) if host.is_live and paths else set()


class HostSnapshot:
    """A snapshot of the host: facts that many devices need are read once.

    `daemons` are processes known to share directories, by device id; those found are added.
    `silent` are the paths whose storage does not answer: see `find_silent`.
    """

    def __init__(
        self,
        host: HostRoot,
        vms: Iterable[VmRecord],
        daemons: dict[str, int] | None = None,
        silent: Collection[str] = (),
    ) -> None:
        self._host = host
        self._vms = {vm.name: vm for vm in vms}
        self._open: dict[str, frozenset[str]] = {}
        self._daemons = {} if daemons is None else daemons
        self._silent = silent
        self._marked: Mapping[str, int] | None = None

    @cached_property
    def _sockets(self) -> "UnixSockets":
        from vmplug.host.vhost_user.sockets import UnixSockets  # noqa: PLC0415  1.3 ms

        return UnixSockets(self._host)

    def of(self, record: DeviceRecord) -> DeviceHealth | None:
        """The health of a device; None when it is unknown."""
        if not is_settled(record):
            return None
        try:
            health = self._look_at(record)
            return _unless_unidentified(record, health) if health else None
        except (AttributeReadError, ValueError):
            return None

    def _look_at(self, record: DeviceRecord) -> DeviceHealth | None:
        identity = record.identity
        if (path := _file_of(record)) in self._silent:
            return DeviceHealth(HostState.NOT_ANSWERING, f"the storage of {path} does not answer")
        if is_served(record):
            is_own = identity.kind is IdentityKind.SHARE
            return self._daemon(record) if is_own else self._backend(record)
        if record.kind is DeviceType.VFIO:
            return self._functions(record)
        if record.kind is DeviceType.BLOCK:
            number = identity.devnum
            return self._block(record, number) if number else self._file(record)
        return self._node(record)

    # disks

    def _block(self, record: DeviceRecord, number: DevNum) -> DeviceHealth | None:
        base = f"{self._host.sys_dev}/block"
        if self._host.stat(base) is None:
            return None
        sectors = self._host.read_int(f"{base}/{number}/size")
        if sectors is None:
            return DeviceHealth(HostState.GONE, f"{record.host_path} ({number}) no longer exists")
        backing = read_backing_file(f"{base}/{number}", self._host)
        if backing is None and number.major == _LOOP_MAJOR:
            return DeviceHealth(
                HostState.GONE, f"{record.host_path} no longer has a file behind it"
            )
        if record.is_other(
            identify_block(number, self._host.real_path(f"{base}/{number}"), self._host)
        ):
            return DeviceHealth(
                HostState.REPLACED, f"{record.host_path} ({number}) is now another device"
            )
        from vmplug.host.block.sysfs import SIZE_UNIT_BYTES  # noqa: PLC0415

        size_bytes = sectors * SIZE_UNIT_BYTES
        if backing and backing.deleted:
            told = f"{backing.backing_file}, the file behind {record.host_path}, has been deleted"
            return DeviceHealth(HostState.DELETED, told, size_bytes)
        return DeviceHealth(HostState.PRESENT, size_bytes=size_bytes)

    def _file(self, record: DeviceRecord) -> DeviceHealth:
        path = record.host_path
        status = self._host.stat(path)
        if status is None:
            return DeviceHealth(HostState.DELETED, f"{path} has been deleted or moved")
        is_other = record.is_other(identify_file(path, self._host))
        is_lost = f"{path} (deleted)" in self._files_of(record.vm)
        if is_other or is_lost or not stat.S_ISREG(status.st_mode):
            return DeviceHealth(HostState.REPLACED, f"{path} is now another file")
        return DeviceHealth(
            HostState.PRESENT, size_bytes=self._size_of_image(record, status.st_size)
        )

    def _size_of_image(self, record: DeviceRecord, length: int) -> int | None:
        """The size that a guest sees: a qcow2 file grows with writes; an NVDIMM is fixed."""
        if not record.can_be_unplugged:
            return None
        if record.options.get("format") != "qcow2":
            return length
        from vmplug.host.block.qcow2 import read_qcow2_header  # noqa: PLC0415  2 ms

        header = read_qcow2_header(record.host_path, self._host)
        return header.virtual_size_bytes if header else None

    def _files_of(self, vm: str) -> frozenset[str]:
        """The files that the process of a VM has open, as /proc names them; empty where unknown.

        A file that has lost its name is marked. Source: proc_pid_fd(5).
        """
        if vm not in self._open:
            known, host = self._vms.get(vm), self._host
            found = set[str | None]()
            if known and known.pid and is_running(known.pid, known.started_at, host):
                directory = f"/proc/{known.pid}/fd"
                try:
                    found = {
                        host.read_link(f"{directory}/{name}") for name in host.list_dir(directory)
                    }
                except AttributeReadError:  # another user's process: then it is unknown
                    found = set()
            self._open[vm] = frozenset(name for name in found if name)
        return self._open[vm]

    # functions

    def _functions(self, record: DeviceRecord) -> DeviceHealth:
        """The first changed member counts for all: they are handed over together."""
        address = record.guest_address
        members = [function.host for function in address.functions] if address else []
        looks = (self._function(name) for name in members or [record.identity.key])
        if changed := next((look for look in looks if look), None):
            return changed
        if has_changed(record.thing, self._host):
            told = f"{record.host_path} is now another device than the VM has"
            return DeviceHealth(HostState.REPLACED, told)
        return DeviceHealth(HostState.PRESENT)

    def _function(self, name: str) -> DeviceHealth | None:
        """The change; None when there is none."""
        bdf = find_bdf(name)
        if bdf is None:
            from vmplug.host.pci.mdev import MDEV_DEVICES  # noqa: PLC0415  0.6 ms

            is_there = self._host.stat(f"{MDEV_DEVICES}/{name}") is not None
            return None if is_there else DeviceHealth(HostState.GONE, f"{name} no longer exists")
        from vmplug.host.pci.function import find_function  # noqa: PLC0415  2 ms, with VFIO
        from vmplug.host.pci.vfio import is_vfio_driver  # noqa: PLC0415

        function = find_function(bdf, self._host)
        if function is None:
            return DeviceHealth(HostState.GONE, f"{name} no longer exists")
        if is_vfio_driver(function, self._host):
            return None
        driver = f"the driver {function.driver}" if function.driver else "no driver"
        return DeviceHealth(HostState.OTHER_DRIVER, f"{name} is bound to {driver}, not to VFIO's")

    # devices that other processes serve

    def _backend(self, record: DeviceRecord) -> DeviceHealth | None:
        path = socket_of(record)
        if path is None:
            return None
        if self._sockets.is_connected(path):
            is_other = record.is_other(identify_file(path, self._host))
            if is_other and not record.follows_its_path:
                return DeviceHealth(HostState.REPLACED, f"another socket has the path {path} now")
            return DeviceHealth(HostState.PRESENT)
        if not self._sockets.is_listening(path):
            return DeviceHealth(HostState.GONE, f"no process serves {path} any more")
        vm = self._vms.get(record.vm)
        if vm is None or has_ended(vm, self._host):
            return DeviceHealth(HostState.PRESENT)
        return DeviceHealth(HostState.DISCONNECTED, f"the backend at {path} has no client")

    def _daemon(self, record: DeviceRecord) -> DeviceHealth | None:
        """A virtiofsd that vmplug runs has no socket path by which to find it."""
        if not self._host.is_live:
            return None
        if not is_running(self._daemons.get(record.id, 0), None, self._host):
            if self._marked is None:
                from vmplug.drivers.plug import DAEMON_MARK  # noqa: PLC0415  2 ms, with places

                marks = find_marked(DAEMON_MARK).items()
                self._marked = {mark.partition(" ")[0]: pid for pid, mark in marks}
            if record.id not in self._marked:
                self._daemons.pop(record.id, None)
                told = f"the virtiofsd that shares {record.host_path} has ended"
                return DeviceHealth(HostState.GONE, told)
            self._daemons[record.id] = self._marked[record.id]
        return self._directory(record)

    # nodes and directories

    def _directory(self, record: DeviceRecord) -> DeviceHealth:
        """A share is of the directory that was opened, wherever that is now."""
        path = record.host_path
        if self._host.stat(path) is None:
            return DeviceHealth(HostState.DELETED, f"{path} has been deleted or moved")
        if record.is_other(identify_file(path, self._host)):
            return DeviceHealth(HostState.REPLACED, f"{path} is now another directory")
        return DeviceHealth(HostState.PRESENT)

    def _node(self, record: DeviceRecord) -> DeviceHealth | None:
        path, number = record.host_path, record.identity.devnum
        if record.identity.kind is IdentityKind.SHARE:
            return self._directory(record)
        status = self._host.stat(path)
        if number is None:
            if status:
                return DeviceHealth(HostState.PRESENT)
            return DeviceHealth(HostState.GONE, f"{path} no longer exists")
        if self._host.stat(f"{self._host.sys_dev}/char/{number}"):
            return DeviceHealth(HostState.PRESENT)
        if status and node_number(status) == number:
            return None  # a node without a device, or a device that sysfs does not list
        return DeviceHealth(HostState.GONE, f"{path} ({number}) no longer exists")
