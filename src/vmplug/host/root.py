"""HostRoot: the only access to /sys, /proc and /dev, below any root directory.

It distinguishes three answers: absent is None (or an empty list), forbidden and broken are
AttributeReadError.
"""

import errno
import fcntl
import mmap
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError, BindError, PolicyError
from vmplug.log import Log

log = Log(__name__)

T = TypeVar("T")
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""Never wait, even if there is a FIFO in place of an attribute."""
_ENTER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.ESRCH})
"""ENODEV and ENXIO: the device disappeared between open and read; ESRCH: the process did."""

_TEXT_MAX_BYTES = 64 << 20
"""A table of /proc has a line of a hundred bytes or more for each mount or socket."""
_PIECE_BYTES = 1 << 16  # some files of /proc have no memory for a buffer of megabytes
PAGE_SIZE = 4096
"""A sysfs attribute is at most one page. Source: Documentation/filesystems/sysfs.rst."""
_PAUSE_S = 0.001
_DIRECT_UNITS = (1, 512, 1024, 2048, PAGE_SIZE)
"""Source: QEMU block/file-posix.c, raw_probe_alignment."""
_LINKS_MAX = 40
"""As the kernel's own MAXSYMLINKS. Source: include/linux/namei.h."""

AttributeBatch = tuple[
    list[bytes | AttributeReadError | None],
    list[str | AttributeReadError | None],
    list[int | AttributeReadError | None],
]
"""The answers of one device to `read_each`: its files, its links, the sizes of files."""


class HostRoot:
    """The host's files below `root`; `/` is the running host.

    Paths given and returned are the host's own (`/dev/sdb`), without the root in front.
    """

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        base = os.path.realpath(os.fspath(root))
        self._base = "" if base == "/" else base

    @property
    def path(self) -> str:
        """The root directory itself."""
        return self._base or "/"

    @property
    def is_live(self) -> bool:
        """Whether this is the running host: only then does opening a node reach its device."""
        return not self._base

    def require_live(self, what: str) -> None:
        """PolicyError unless this is the running host: another one's picture cannot be acted on.

        Devices that are checked there would be this machine's when they are plugged.
        """
        if not self.is_live:
            raise PolicyError(
                f"{self.path} is a picture of a host: vmplug cannot {what} there, only on the "
                "host that it runs on",
                hint="leave --root out; vmplug check and plan work with it",
            )

    @property
    def sys_dev(self) -> str:
        """Devices by number; Kata's SysDevPrefix."""
        return "/sys/dev"

    @property
    def iommu_groups(self) -> str:
        """IOMMU groups by number; Kata's SysIOMMUPath."""
        return "/sys/kernel/iommu_groups"

    @property
    def pci_devices(self) -> str:
        """PCI functions by address; Kata's SysBusPciDevicesPath."""
        return "/sys/bus/pci/devices"

    def read_attribute(self, path: str) -> bytes | None:
        """A sysfs attribute in exactly three system calls; None when absent."""
        try:
            return _read_page(None, self._base + path)
        except OSError as error:
            return self._absent(path, error)

    def read_each(
        self,
        directory: str,
        names: Iterable[str],
        *,
        files: Sequence[str],
        links: Sequence[str],
        sizes: Sequence[str],
    ) -> Iterator[AttributeBatch]:
        """The same few files of many devices, the directories `names` of `directory`.

        An answer is that of `read_attribute`, `read_link` or `size`, or the error that it raises.
        """
        try:
            above = os.open(self._base + directory, _ENTER)
        except OSError as error:
            return self._absent(directory, error)
        try:
            for name in names:
                yield _read_batch(above, directory, name, files, links, sizes)
        finally:
            os.close(above)

    def write_attribute(self, path: str, text: str) -> int | None:
        """Write a sysfs attribute in one system call; the errno if the kernel refuses, else None.

        The file is never made. Raises BindError for the picture of a host, which is not changed.
        """
        if not self.is_live:
            *_, device, step = path.split("/")
            raise BindError(
                device,
                step,
                f"{self.path} is a picture of a host: vmplug changes nothing there, only on the "
                "host that it runs on",
                hint="run it on that host, without --root",
            )
        log.debug("write %r to %s", text, path)  # before it, as some writes last
        try:
            fd = os.open(self._base + path, os.O_WRONLY | os.O_CLOEXEC)
            with open(fd, "wb", buffering=0) as file:
                file.write(text.encode())
        except OSError as error:
            return error.errno
        return None

    def size(self, path: str) -> int | None:
        """The length of a file according to the file system; None when absent."""
        status = self.stat(path)
        return None if status is None else status.st_size

    def open_kernel_attribute(self, path: str) -> int | None:
        """A descriptor on an attribute of the running kernel's sysfs, for `reread_attribute`.

        None when absent, or when the file is not on sysfs.
        """
        try:
            fd = os.open(self._base + path, _READ)
        except OSError as error:
            return self._absent(path, error)
        device = os.fstat(fd).st_dev
        if os.stat("/sys").st_dev == device != os.stat("/").st_dev:
            return fd
        os.close(fd)
        return None

    def reread_attribute(self, descriptor: int) -> bytes | None:
        """The attribute's text now, in one system call; None once its device is gone."""
        try:
            return os.pread(descriptor, PAGE_SIZE, 0)
        except OSError as error:
            return self._absent("a kept sysfs attribute", error)

    def close_attribute(self, descriptor: int) -> None:
        """Close a descriptor from `open_kernel_attribute`."""
        os.close(descriptor)

    def read_text(self, path: str) -> str | None:
        """A whole file, undecodable bytes kept as surrogates; None when absent."""
        try:
            data, fd = bytearray(), os.open(self._base + path, _READ)
            with open(fd, "rb", buffering=0) as file:
                while len(data) <= _TEXT_MAX_BYTES and (piece := file.read(_PIECE_BYTES)):
                    data += piece
        except (OSError, ValueError) as error:
            return self._absent(path, error)
        if len(data) > _TEXT_MAX_BYTES:
            raise AttributeReadError(path, why=f"it is longer than {_TEXT_MAX_BYTES} bytes")
        return os.fsdecode(bytes(data))

    def read_int(self, path: str, *, base: int = 10) -> int | None:
        """A number in an attribute; None when absent, AttributeReadError when malformed."""
        return self._read_as(path, lambda data: int(data, base), "a number")

    def read_devnum(self, path: str) -> DevNum | None:
        """A `dev` attribute; None when absent, AttributeReadError when malformed."""
        return self._read_as(path, lambda data: DevNum.parse(data.decode().strip()), "MAJOR:MINOR")

    def _read_as(self, path: str, parse: Callable[[bytes], T], what: str) -> T | None:
        data = self.read_attribute(path)
        try:
            return None if data is None else parse(data)
        except ValueError:
            raise AttributeReadError(path, why=f"{(data or b'')[:40]!r} is not {what}") from None

    def _open_data(self, path: str, flags: int = 0) -> int:
        """A descriptor on a file or block device, for reading; OSError for anything else.

        It may be a link by now, to a watchdog that starts when it is opened, or a tape.
        """
        pin = os.open(self._base + path, os.O_PATH | os.O_CLOEXEC)
        try:
            if stat.S_IFMT(os.fstat(pin).st_mode) not in {stat.S_IFREG, stat.S_IFBLK}:
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), path)
            return os.open(f"/proc/self/fd/{pin}", _READ | flags)
        finally:
            os.close(pin)

    def read_at(self, path: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes of a file or block device from `offset`; empty when absent."""
        try:
            fd = self._open_data(path)
        except (OSError, ValueError) as error:
            self._absent(path, error)
            return b""
        try:
            return os.pread(fd, length, offset)
        except OSError as error:
            raise AttributeReadError(path, error.errno) from error
        finally:
            os.close(fd)

    def read_within(self, path: str, length: int, patience_s: float) -> bytes | None:
        """The first bytes of a block device; None when it does not answer within `patience_s`.

        Empty where the kernel cannot read it without waiting, as some of device-mapper and zram:
        a plain read of a device whose storage is gone cannot be ended, not even by a signal.
        """
        try:
            fd = os.open(self._base + path, _READ)
        except OSError as error:
            raise AttributeReadError(path, error.errno) from error
        deadline, head = time.monotonic() + patience_s, bytearray(length)
        try:
            while True:
                # This starts the read; no event says when the pages are there.
                os.posix_fadvise(fd, 0, length, os.POSIX_FADV_WILLNEED)
                try:
                    return bytes(head[: os.preadv(fd, [head], 0, os.RWF_NOWAIT)])
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        return None
                time.sleep(_PAUSE_S)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return b""
            raise AttributeReadError(path, error.errno) from error
        finally:
            os.close(fd)

    def stat(self, path: str) -> os.stat_result | None:
        """The status of `path`, through symlinks; None when absent."""
        try:
            return os.stat(self._base + path)
        except (OSError, ValueError) as error:
            return self._absent(path, error)

    def stat_or_none(self, path: str, *, follow_symlinks: bool = True) -> os.stat_result | None:
        """The status of `path`; None for any error, where a broken neighbour must not matter."""
        try:
            return os.stat(self._base + path, follow_symlinks=follow_symlinks)
        except (OSError, ValueError):
            return None

    def open_node(self, path: str) -> int:
        """A descriptor on a device node, for reading and writing."""
        try:
            return os.open(self._base + path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise AttributeReadError(path, error.errno) from error

    @staticmethod
    def stat_descriptor(descriptor: int) -> os.stat_result | None:
        """The file that a descriptor of this process is open on; None when it is not open."""
        try:
            return os.fstat(descriptor)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise AttributeReadError(f"/proc/self/fd/{descriptor}", error.errno) from error
            return None

    def read_link(self, path: str) -> str | None:
        """The text of a symlink; None when absent."""
        try:
            return os.readlink(self._base + path)
        except (OSError, ValueError) as error:
            return self._absent(path, error)

    def list_dir(self, path: str) -> list[str]:
        """The sorted names in a directory; empty when absent."""
        try:
            return sorted(os.listdir(self._base + path))
        except OSError as error:
            self._absent(path, error)
            return []

    def real_path(self, path: str) -> str:
        """`path` with all symlinks resolved, seen from inside the root."""
        if self.is_live:
            try:
                return os.path.realpath(path)
            except (OSError, ValueError) as error:  # a link of /proc that may not be read; a NUL
                raise AttributeReadError(path, getattr(error, "errno", None)) from error
        real, rest, links = "", path.split("/")[::-1], 0
        while rest:
            match rest.pop():
                case "" | ".":
                    continue
                case "..":
                    real = real.rpartition("/")[0]
                    continue
                case name:
                    real = f"{real}/{name}"
            target = self._link_target(real)
            if target is not None:
                links += 1
                if links > _LINKS_MAX:
                    raise AttributeReadError(path, errno.ELOOP)
                real = "" if target.startswith("/") else real.rpartition("/")[0]
                rest += target.split("/")[::-1]
        return real or "/"

    def _link_target(self, path: str) -> str | None:
        try:
            return os.readlink(self._base + path)
        except (OSError, ValueError):  # not a link, or not readable: as realpath(3) -m
            return None

    def open_errno(self, path: str, flags: int) -> int | None:
        """The errno with which the kernel refuses to open `path` so; None if it allows that."""
        try:
            os.close(self._open_data(path, flags))
        except OSError as error:
            return error.errno
        return None

    def direct_io_unit(self, path: str) -> int:
        """The smallest piece of a file to read without the page cache; as in QEMU, else a page."""
        try:
            fd = self._open_data(path, os.O_DIRECT)
        except OSError:
            return PAGE_SIZE
        with open(fd, "rb", 0), mmap.mmap(-1, PAGE_SIZE) as page, memoryview(page) as buffer:
            can = (unit for unit in _DIRECT_UNITS if _can_read(fd, buffer, unit))
            unit = next(can, PAGE_SIZE)
            return unit if unit > 1 else PAGE_SIZE

    def read_file_system(self, path: str) -> os.statvfs_result | None:
        """The flags and the room of the file system at `path`; None when absent."""
        try:
            return os.statvfs(self._base + path)
        except (OSError, ValueError) as error:
            return self._absent(path, error)

    def lacks_disc(self, path: str) -> bool:
        """Whether it is a CD drive without a disc, or with an open tray. Source: linux/cdrom.h."""
        with suppress(OSError), open(os.open(self._base + path, _READ), "rb", 0) as drive:
            return fcntl.ioctl(drive, 0x5326, 0x7FFFFFFF) in {1, 2}  # CDROM_DRIVE_STATUS
        return False

    def ask_node(self, path: str, request: int, length: int) -> bytes | None:
        """What an ioctl writes into a buffer of that length; None where the device does not."""
        with suppress(OSError), open(self._open_data(path), "rb", 0) as node:
            return fcntl.ioctl(node, request, bytes(length))
        return None

    def is_writable(self, path: str) -> bool:
        """Whether this process could write to `path`; nothing is opened."""
        return os.access(self._base + path, os.W_OK)

    def is_mounted_read_only(self, path: str) -> bool:
        """Whether the file system at `path` is read-only; False when absent."""
        facts = self.read_file_system(path)
        return bool(facts and facts.f_flag & os.ST_RDONLY)

    def ask_open(self, path: str, ask: Callable[[int], bool]) -> bool:
        """The answer about the file, open for reading; False when absent."""
        try:
            fd = self._open_data(path)
        except (OSError, ValueError) as error:
            self._absent(path, error)
            return False
        try:
            return ask(fd)
        except OSError as error:  # ENOLCK: a network file system without its lock daemon
            raise AttributeReadError(path, error.errno) from error
        finally:
            os.close(fd)

    @staticmethod
    def _absent(path: str, error: OSError | ValueError) -> None:
        if isinstance(error, OSError) and error.errno not in _ABSENT:  # else the path has a NUL
            raise AttributeReadError(path, error.errno) from error


THIS_HOST = HostRoot()
"""The running host."""


def _read_batch(
    above: int,
    directory: str,
    name: str,
    files: Sequence[str],
    links: Sequence[str],
    sizes: Sequence[str],
) -> AttributeBatch:
    """The answers of one device; `above` is open on the directory that it is in."""
    path = f"{directory}/{name}"
    try:
        device = os.open(name, _ENTER, dir_fd=above)
    except OSError as error:
        answer = _answer(error, path)
        return [answer] * len(files), [answer] * len(links), [answer] * len(sizes)
    try:
        return (
            [_attempt(_read_page, device, file, path) for file in files],
            [_attempt(_read_target, device, file, path) for file in links],
            [_attempt(_read_size, device, file, path) for file in sizes],
        )
    finally:
        os.close(device)


def _attempt(
    read: Callable[[int, str], T], device: int, file: str, path: str
) -> T | AttributeReadError | None:
    try:
        return read(device, file)
    except OSError as error:
        return _answer(error, f"{path}/{file}")


def _read_page(device: int | None, file: str) -> bytes:
    attribute = os.open(file, _READ, dir_fd=device)
    try:
        return os.read(attribute, PAGE_SIZE)
    finally:
        os.close(attribute)


def _read_target(device: int, file: str) -> str:
    return os.readlink(file, dir_fd=device)


def _read_size(device: int, file: str) -> int:
    return os.stat(file, dir_fd=device).st_size


def _answer(error: OSError, path: str) -> AttributeReadError | None:
    return None if error.errno in _ABSENT else AttributeReadError(path, error.errno)


def _can_read(fd: int, buffer: memoryview, length: int) -> bool:
    """As QEMU does, any other error counts as success: it is not about alignment."""
    try:
        os.preadv(fd, [buffer[:length]], 0)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def node_number(status: os.stat_result) -> DevNum:
    """The number of a device node."""
    return DevNum(os.major(status.st_rdev), os.minor(status.st_rdev))


def describe(status: os.stat_result | None) -> str:
    """The type of a file, in the words of find(1): `block device 8:0`, `directory`, `nothing`."""
    if status is None:
        return "nothing"
    kind = _FILE_KINDS[stat.S_IFMT(status.st_mode)]
    return f"{kind} {node_number(status)}" if status.st_rdev else f"a {kind}"


_FILE_KINDS = {
    stat.S_IFBLK: "block device",
    stat.S_IFCHR: "char device",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFDIR: "directory",
    stat.S_IFREG: "regular file",
    stat.S_IFLNK: "symlink",
}
