"""LeaseHolder: the hypervisor of a lease, for the manager. To plug is to open, and to lock.

What it opens is gone with the process that has it. Only a virtiofsd and a binding to VFIO can be
left behind; the journal has both before they are made.
"""

import fcntl
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum

import msgspec
from msgspec.structs import replace

from vmplug.arguments import check_fields
from vmplug.devnum import DevNum
from vmplug.drivers.place import LeasePlace, Place, Places, PlugMode
from vmplug.drivers.plug import BlockDrive, Plug, RNGDevice, VFIODevices, VhostUserDevice
from vmplug.drivers.ports import START_DAEMON, Choose, Command, Endpoint, Hypervisor, Step
from vmplug.drivers.ports import UnplugFailure as Failure
from vmplug.errors import AttributeReadError, CommandError, InUse, NoSuchDevice
from vmplug.host.file_id import pinned
from vmplug.host.finding import Code
from vmplug.host.pci.function import find_function
from vmplug.host.pci.vfio import is_vfio_driver, open_nodes, read_cdev
from vmplug.host.root import HostRoot
from vmplug.host.use.qemu_lock import take_lock
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner, VirtiofsdProcess
from vmplug.leases.device import Opened
from vmplug.manager.plan import Chosen, LeaseOffer


class Passing(StrEnum):
    """Which open files a lease has to pass on; what it has of a virtiofsd always is.

    `paths`: none. `files`: disks, images and character devices. `cdevs`: also the own nodes of
    VFIO devices, `groups`: also the nodes of their groups. A group that is open here cannot be
    opened by its path.
    """

    PATHS = "paths"
    FILES = "files"
    CDEVS = "cdevs"
    GROUPS = "groups"


class LeaseLock(StrEnum):
    """The locks of a lease on disks and images, besides its claim in the journal.

    `none`: for a VMM that locks what it opens, as QEMU and Cloud Hypervisor do. `flock`: flock(2),
    which QEMU and Cloud Hypervisor do not meet. `full`: also the bytes that QEMU locks: for a VMM
    without locks of its own, or that has them turned off. Both claim a block device (O_EXCL).
    """

    NONE = "none"
    FLOCK = "flock"
    FULL = "full"


class ShareEnd(StrEnum):
    """What a lease has of a virtiofsd that vmplug runs for it.

    `connection`: an open connection. `socket`: the path of its socket, for a VMM that takes
    nothing else. The process that inherits the lease's open files may connect to that, once.
    """

    CONNECTION = "connection"
    SOCKET = "socket"


class LeaseTerms(msgspec.Struct, frozen=True, kw_only=True):
    """How devices are leased; `allow` are the findings of `check` that do not matter."""

    allow: frozenset[Code] = frozenset()
    passing: Passing = Passing.FILES
    lock: LeaseLock = LeaseLock.NONE
    shares: ShareEnd = ShareEnd.CONNECTION

    def __post_init__(self) -> None:
        check_fields(self)


DEFAULT_TERMS = LeaseTerms()


class LeaseHolder(Hypervisor):
    """Holds the open files and daemons of one lease; see Hypervisor."""

    endpoint: Endpoint | None = None
    takes_vf_token = False

    def __init__(self, daemons: HostVirtiofsdRunner, host: HostRoot, terms: LeaseTerms) -> None:
        self._daemons = daemons
        self._host = host
        self._passing = terms.passing
        self._shares = terms.shares
        self.lock = terms.lock
        self._offer = LeaseOffer(
            machine="lease",
            ports=(),
            controllers=(),
            shared_memory=True,
            mode=PlugMode.LEASE,
            kvm=True,
            iommufd=True,
        )
        self._connections: dict[str, VirtiofsdProcess] = {}
        self.plugs: dict[str, Plug] = {}
        self.chosen: dict[str, Chosen] = {}
        self.opened: dict[str, Opened] = {}

    def places(self, known: Mapping[str, str]) -> Places:  # noqa: ARG002
        """See Hypervisor: any number of devices, and all that a VMM may be able to do."""
        return self._offer

    def claim_foreign_names(self, names: Mapping[str, str]) -> None:
        """See Hypervisor: there are none."""

    def steps(self, plug: Plug, place: Place) -> tuple[Step, ...]:  # noqa: ARG002
        """See Hypervisor: a daemon for a share; what is opened needs no undo."""
        daemon = plug.daemon if isinstance(plug, VhostUserDevice) else None
        if daemon is None:
            return ()
        return (Step(do=Command(START_DAEMON, {"directory": daemon.directory}), undo=None),)

    def plug(self, plug: Plug, place: Place) -> None:
        """See Hypervisor."""
        assert isinstance(place, LeasePlace)
        opened = Opened()
        with ExitStack() as undo:
            undo.callback(_close, opened)
            match plug:
                case BlockDrive():
                    self._open_disk(plug, opened)
                case RNGDevice(filename=path, file_id=str(checked)):
                    self._open_file(path, checked, os.O_RDONLY, opened)
                case VFIODevices():
                    self._check_bound(plug)
                    plug = self.with_cdevs(plug)
                    self._open_vfio(plug, opened)
                case VhostUserDevice(daemon=daemon) if daemon and self._shares is ShareEnd.SOCKET:
                    opened.socket = self._daemons.listen(daemon, plug.id)
                case VhostUserDevice(daemon=daemon) if daemon:
                    started = self._daemons.start(daemon, plug.id)
                    self._connections[plug.id] = started
                    opened.descriptor = os.dup(started.descriptor)
                case VhostUserDevice(descriptor=int(number)):
                    opened.descriptor = os.dup(number)
                case _:
                    pass
            undo.pop_all()
        self.plugs[plug.id], self.opened[plug.id] = plug, opened
        self.chosen[plug.id] = self._offer.chosen[place.number]

    def open_char(self, device_id: str, path: str, number: DevNum, *, read_only: bool) -> None:
        """Open a character device, which the manager only counts. Raises as `plug`."""
        opened = self.opened.setdefault(device_id, Opened())
        if opened.descriptor is not None:
            return
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NOCTTY | os.O_NONBLOCK
        self._open_file(path, f"char {number}", flags, opened)
        if opened.descriptor is not None:
            os.set_blocking(opened.descriptor, True)  # a tty would wait for its other end

    def _open_disk(self, drive: BlockDrive, opened: Opened) -> None:
        assert drive.file_id
        flags = os.O_RDONLY if drive.read_only else os.O_RDWR
        self._open_file(drive.file, drive.file_id, flags, opened)
        if self.lock is not LeaseLock.NONE:
            with pinned(drive.file, drive.file_id) as pin:
                opened.locks.append(_open_locked(pin, drive, is_full=self.lock is LeaseLock.FULL))

    def _open_file(self, path: str, checked: str, flags: int, opened: Opened) -> None:
        if self._passing is Passing.PATHS:
            return
        with pinned(path, checked) as pin:
            opened.descriptor = _open(pin, flags, path)

    def _check_bound(self, plug: VFIODevices) -> None:
        """NoSuchDevice for a function that is gone, or that another driver has taken since."""
        for device in plug.devices:
            function = find_function(device.bdf, self._host) if device.bdf else None
            if function and is_vfio_driver(function, self._host):
                continue
            is_there = device.sysfs_path and self._host.stat_or_none(device.sysfs_path)
            if function or not is_there:
                now = f"is bound to {function.driver or 'no driver'}" if function else "has gone"
                raise NoSuchDevice(
                    device.name,
                    f"{device.name} {now}, and VFIO does not have it",
                    found=now,
                    hint="nothing is leased; check that nothing else binds it, and try again",
                )

    def with_cdevs(self, plug: VFIODevices) -> VFIODevices:
        """The devices with their own nodes, which they have since they were bound."""
        found = (
            (d, read_cdev(d.sysfs_path, self._host) if d.sysfs_path else None)
            for d in plug.devices
        )
        return replace(plug, devices=tuple(replace(d, cdev_node=node) for d, node in found))

    def _open_vfio(self, plug: VFIODevices, opened: Opened) -> None:
        nodes = {d.name: d.cdev_node for d in plug.devices if d.cdev_node}
        if self._passing is Passing.GROUPS:
            nodes = {plug.node: plug.node}
        elif self._passing is not Passing.CDEVS:
            return
        with open_nodes(nodes, self._host) as files:
            kept = {name: os.dup(descriptor) for name, descriptor in files.items()}
        opened.group_descriptor = kept.pop(plug.node, None)
        opened.nodes = kept

    def request_unplug(self, device_ids: Sequence[str]) -> dict[str, CommandError]:
        """See Hypervisor: close what this process has of them."""
        for device_id in device_ids:
            if connection := self._connections.pop(device_id, None):
                connection.close()
            _close(self.opened.pop(device_id, Opened()))
        return {}

    def wait_unplugged(
        self,
        device_ids: Sequence[str],
        timeout_s: float,  # noqa: ARG002
    ) -> dict[str, Failure]:
        """See Hypervisor."""
        self._daemons.end(device_ids)
        return {}

    def close_files_of(self, device_id: str) -> None:
        """Close what it has open of a device, except the connection to a server of it."""
        if not isinstance(self.plugs[device_id], VhostUserDevice):
            _close(self.opened[device_id])
            self.opened[device_id] = Opened()

    def close_all(self) -> None:
        """Close everything: the process that has inherited it is its holder, if there is one."""
        self.request_unplug([*self.opened, *self._connections])

    def close_files(self, device_ids: Collection[str]) -> None:
        """See Hypervisor: nothing is passed that is not used."""

    def close_left_files(self, choose: Choose) -> None:
        """See Hypervisor: nothing is passed that is not used."""

    def resize(self, device_id: str, size_bytes: int) -> None:
        """See Hypervisor: never called for a lease."""

    def find_devices(self) -> dict[str, bool]:
        """See Hypervisor."""
        return dict.fromkeys(self.opened, True)

    def find_drivers(self) -> dict[str, str]:
        """See Hypervisor."""
        return {}

    def find_lost(self) -> set[str]:
        """See Hypervisor."""
        return set()

    def status(self) -> str:
        """See Hypervisor."""
        return "leased"

    def close(self) -> None:
        """See Hypervisor: what is open stays so."""


def _close(opened: Opened) -> None:
    for descriptor in opened.all():
        os.close(descriptor)


def _open(pin: int, flags: int, path: str) -> int:
    try:
        return os.open(f"/proc/self/fd/{pin}", flags | os.O_CLOEXEC)
    except OSError as error:
        raise AttributeReadError(path, error.errno) from error


def _open_locked(pin: int, drive: BlockDrive, *, is_full: bool) -> int:
    """An open file of its own, so that no VMM drops the locks with its own. InUse, when taken.

    It lasts as long as any process has it: the one that inherits it, and its children.
    """
    is_alone = not (drive.read_only or drive.share_rw)
    flags = os.O_EXCL if drive.is_device and is_alone else 0
    try:
        descriptor = os.open(f"/proc/self/fd/{pin}", os.O_RDONLY | os.O_CLOEXEC | flags)
    except OSError as error:
        raise _in_use(drive.file) from error
    with _closed_unless_kept(descriptor) as keep:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            is_ours = not is_full or take_lock(
                descriptor, read_only=drive.read_only, share_rw=drive.share_rw
            )
        except BlockingIOError as error:
            raise _in_use(drive.file) from error
        except OSError as error:  # ENOLCK: a network file system without its lock daemon
            raise AttributeReadError(drive.file, error.errno) from error
        if not is_ours:
            raise _in_use(drive.file)
        keep.pop_all()
    return descriptor


@contextmanager
def _closed_unless_kept(descriptor: int) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        yield stack


def _in_use(path: str) -> InUse:
    return InUse(
        path,
        f"{path} is locked by another program",
        codes=(Code.IMAGE_LOCKED,),
        hint="nothing is leased; vmplug check names the program, if it keeps the file open",
    )
