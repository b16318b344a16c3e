"""The vhost-user store: block device numbers that stand for sockets of storage daemons.

A node `STORE/block/devices/NAME` of major 241 (vhost-user-blk) or 242 (vhost-user-scsi) means the
socket `STORE/block/sockets/NAME`. Both majors are a convention of Kata Containers and may be
changed per host.

The index by number is valid only while the directory is unchanged *and* its last change was
already older than `_RACY_NS` when it was scanned. Even then a hit is checked against its node.
vmplug compares the change time, as a modification time can be set back (rsync, tar). tmpfs stamps
directories from a clock that ticks every 4 to 10 ms, so that two changes within one tick look like
one (measured: 1 of 300 immediate changes was visible). Git treats its index the same way.
"""

import os
import stat
import time
from collections.abc import Iterable

import msgspec

from vmplug.devnum import DevNum
from vmplug.errors import HostError, NoSuchDevice
from vmplug.host.file_id import file_id
from vmplug.host.kind import DeviceType
from vmplug.host.root import THIS_HOST, HostRoot, describe
from vmplug.host.vhost_user.device import VhostUserSocket

VHOST_USER_BLK_MAJOR = 241
VHOST_USER_SCSI_MAJOR = 242

_RACY_NS = 20_000_000


class _Stamp(msgspec.Struct, frozen=True):
    """Which directory, and when it last changed."""

    device: int
    inode: int
    changed_ns: int


class _Index(msgspec.Struct, frozen=True, kw_only=True):
    """Names of the store's block nodes by number, as of one scan.

    `settled`: every later change will be noticed. `loose`: an entry is a symlink or could not be
    read, so that the directory's time does not show every change.
    """

    names: dict[int, str]
    stamp: _Stamp
    settled: bool
    loose: bool


class VhostUserStore:
    """The sockets of one vhost-user store, found by device number.

    Long-lived: a repeated lookup is three `stat` calls, for any number of nodes in the store. Not
    thread-safe.
    """

    def __init__(
        self,
        path: str,
        *,
        blk_major: int = VHOST_USER_BLK_MAJOR,
        scsi_major: int = VHOST_USER_SCSI_MAJOR,
        root: HostRoot = THIS_HOST,
    ) -> None:
        self.path = path
        self.blk_major = blk_major
        self.scsi_major = scsi_major
        self._root = root
        self._devices = f"{path}/block/devices"
        self._sockets = f"{path}/block/sockets"
        self._index: _Index | None = None

    def owns(self, devnum: DevNum) -> bool:
        """Whether block devices of this number belong to the store."""
        return devnum.major in (self.blk_major, self.scsi_major)

    def kind_of(self, devnum: DevNum) -> DeviceType:
        """What a number of the store stands for."""
        is_blk = devnum.major == self.blk_major
        return DeviceType.VHOST_USER_BLK if is_blk else DeviceType.VHOST_USER_SCSI

    def find_socket(self, devnum: DevNum) -> str:
        """The path of the socket of a device number.

        Raises NoSuchDevice when the store, the node or the socket is absent or of another type,
        AttributeReadError when it cannot be read.
        """
        return self.find(devnum).socket_path

    def find(self, devnum: DevNum) -> VhostUserSocket:
        """The socket of a device number, as it is now. Raises as `find_socket` does."""
        return self._socket(devnum, self._indexed_name(os.makedev(devnum.major, devnum.minor)))

    def find_sockets(self, devnums: Iterable[DevNum]) -> dict[DevNum, VhostUserSocket | HostError]:
        """The sockets of many device numbers, from one new scan."""
        index = self._index = self._scan()
        found: dict[DevNum, VhostUserSocket | HostError] = {}
        for devnum in devnums:
            try:
                name = index.names.get(os.makedev(devnum.major, devnum.minor))
                found[devnum] = self._socket(devnum, name)
            except HostError as error:
                found[devnum] = error
        return found

    def _indexed_name(self, rdev: int) -> str | None:
        index = self._index
        if index is not None and index.settled and index.stamp == self._directory_stamp():
            name = index.names.get(rdev)
            if name is not None and self._is_node(name, rdev):
                return name
            if name is None and not index.loose:
                return None
        index = self._index = self._scan()
        return index.names.get(rdev)

    def _directory_stamp(self) -> _Stamp:
        status = self._root.stat(self._devices)
        if status is None:
            raise NoSuchDevice(
                self.path,
                f"the vhost-user store {self.path} does not exist: no directory {self._devices}",
                hint="pass this host's store with --vhost-user-store, or start the storage "
                "daemon that fills it",
            )
        return _Stamp(status.st_dev, status.st_ino, status.st_ctime_ns)

    def _scan(self) -> _Index:
        """Read every node. The first in name order wins, as in Kata; broken ones are skipped."""
        started_ns = time.time_ns()
        stamp = self._directory_stamp()
        names: dict[int, str] = {}
        loose = False
        for name in self._root.list_dir(self._devices):
            path = f"{self._devices}/{name}"
            status = self._root.stat_or_none(path, follow_symlinks=False)
            if status is None or stat.S_ISLNK(status.st_mode):
                loose = True
                status = self._root.stat_or_none(path)
            if status and stat.S_ISBLK(status.st_mode):
                names.setdefault(status.st_rdev, name)
        return _Index(
            names=names, stamp=stamp, settled=started_ns - stamp.changed_ns > _RACY_NS, loose=loose
        )

    def _is_node(self, name: str, rdev: int) -> bool:
        status = self._root.stat_or_none(f"{self._devices}/{name}")
        return status is not None and status.st_rdev == rdev and stat.S_ISBLK(status.st_mode)

    def _socket(self, devnum: DevNum, name: str | None) -> VhostUserSocket:
        if name is None:
            raise self._missing(devnum)
        path = f"{self._sockets}/{name}"
        status = self._root.stat(path)
        if status is None or not stat.S_ISSOCK(status.st_mode):
            found = describe(status)
            raise NoSuchDevice(
                f"vhost-user device {devnum}",
                f"vhost-user device {devnum} has no socket at {path}: found {found}",
                found=found,
                hint="start the storage daemon that serves it",
            )
        return VhostUserSocket(
            kind=self.kind_of(devnum), socket_path=path, devnum=devnum, file_id=file_id(status)
        )

    def _missing(self, devnum: DevNum) -> NoSuchDevice:
        return NoSuchDevice(
            f"vhost-user device {devnum}",
            f"the vhost-user store {self.path} has no block device node {devnum}",
            hint=f"create it below {self._devices} with mknod, under the name of its socket",
        )
