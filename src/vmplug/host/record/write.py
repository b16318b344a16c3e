"""Record a host: the parts of /sys, /proc and /dev that vmplug reads, in one tar file.

vmplug runs everything that `vmplug host`, `resolve` and `check` may read, on a HostRoot that notes
each path. It reads only the tables of /proc in `_PROC`, and only types and numbers of /dev: the
contents of other files stay on the host.

In the file a node is a device entry and a link is a link. The error of a forbidden file is a
keyword of its pax header. Source: pax(1), POSIX.1-2001; tar(5).
"""

import errno
import gzip
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO

import msgspec

from vmplug.devnum import DevNum
from vmplug.errors import DeviceError, SpecError
from vmplug.host.block.usage import HostUsage, read_usage
from vmplug.host.check.device import check_device
from vmplug.host.device import HostDevice
from vmplug.host.finding import Access
from vmplug.host.inventory import read_inventory, with_reset_methods
from vmplug.host.pci.uses import RECORDED_NETWORK
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.record.read import ERRNO_KEYWORD, FORMAT, NOTE
from vmplug.host.record.tar import (
    BLOCK_BYTES,
    DIRECTORY,
    FILE,
    LINK,
    NODES,
    make_header,
    padding,
)
from vmplug.host.resolve import resolve
from vmplug.host.root import PAGE_SIZE, AttributeBatch, HostRoot
from vmplug.host.use.interfaces import read_own
from vmplug.host.use.mounts import mounts_in
from vmplug.host.use.namespaces import RECORDED
from vmplug.oci.info import DeviceInfo, DevType

_PROC = re.compile(
    r"/proc/(swaps|interrupts|iomem|sys/kernel/osrelease"
    r"|net/(route|ipv6_route|if_inet6|fib_trie|pppoe|packet)"
    r"|[0-9]+/(mountinfo|ns/mnt))\Z",
    re.ASCII,
)
_TABLE_MAX_BYTES = 4 << 20
_PIECE = 1 << 16
"""Some files of /proc cannot be read with a buffer of megabytes."""
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_CONFIG_BYTES = 256
"""The part of a configuration space that the kernel has read itself; reading more can upset a
device."""

_NAMESPACE = "/ns/mnt"
_NODES = {mode: kind for kind, mode in NODES.items()}
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.ESRCH}
_LINKS_MAX = 40

_FUNCTION_FILES = (
    *("class", "vendor", "device", "subsystem_vendor", "subsystem_device", "revision", "driver"),
    *(
        "driver_override",
        "boot_vga",
        "boot_display",
        "max_link_speed",
        "sriov_totalvfs",
        "sriov_numvfs",
    ),
)
"""Read only where a uevent is missing, or by verbs that change a function."""


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a record; `unreadable` are existing files that could not be read."""

    files: int
    links: int
    nodes: int
    unreadable: tuple[str, ...]


def write_record(path: str, root: HostRoot, *, replace: bool = False) -> Recorded:
    """Write the host to the tar file `path`, completely or not at all.

    Compressed when the name ends in .gz or .tgz. Raises SpecError when the file exists and may not
    be replaced, or cannot be written.
    """
    if not replace and os.path.lexists(path):
        raise _exists(path)
    noting, members = _RecordingRoot(root), _Members(root)
    for _ in _read_everything(noting):
        members.add_asked(noting)
    if root.is_live:
        members.add_mount_tables(read_usage(root).namespaces.tables)
        members.add_file(RECORDED_NETWORK, _read_network())
    try:
        _write_file(path, members, replace=replace)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise SpecError(path, f"the record cannot be written: {error.strerror}") from error
    return members.summary()


def _read_network() -> bytes:
    """What only netlink says; names of interfaces may be no UTF-8."""
    return json.dumps(msgspec.to_builtins(read_own(), order="sorted")).encode()


def _exists(path: str) -> SpecError:
    return SpecError(path, "already exists", hint="name another file, or pass --force")


def _write_file(path: str, members: "_Members", *, replace: bool) -> None:
    directory = os.path.dirname(os.path.abspath(path))
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=".vmplug-record-")
    try:
        with open(descriptor, "wb") as file:
            if path.endswith((".gz", ".tgz")):
                with gzip.GzipFile(fileobj=file, mode="wb") as compressed:
                    members.write(compressed)
            else:
                members.write(file)
            file.flush()
            os.fsync(descriptor)
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _read_everything(root: "_RecordingRoot") -> Iterator[None]:
    """Read everything that the reading verbs would read, one device of the host after the other.

    The paths of all devices together would take more memory than what is recorded.
    """
    inventory = read_inventory(root)
    usage = read_usage(root)
    for directory, dev_type in (("block", DevType.BLOCK), ("char", DevType.CHAR)):
        for number in root.list_dir(f"{root.sys_dev}/{directory}"):
            with suppress(DeviceError, ValueError):
                path = f"/dev/{directory}/{number}"
                devnum = DevNum.parse(number)
                info = DeviceInfo(container_path=path, dev_type=dev_type, devnum=devnum)
                _check(resolve(info, root), usage, root)
            yield
    seen: set[int] = set()
    for entry in inventory.pci:
        with_reset_methods(entry, root)
        root.noted.update(f"{entry.function.sysfs_path}/{name}" for name in _FUNCTION_FILES)
        group = entry.function.iommu_group
        if group is None or group not in seen:
            seen.update(() if group is None else (group,))
            with suppress(DeviceError):
                _check(find_vfio_device(str(entry.function.bdf), root), usage, root)
        yield
    for mediated in inventory.mdev:
        with suppress(DeviceError):
            _check(find_vfio_device(mediated.uuid, root), usage, root)
    root.read_text("/proc/sys/kernel/osrelease")
    yield


def _check(device: HostDevice, usage: HostUsage, root: HostRoot) -> None:
    check_device(device, Access(read_only=False), usage=usage, root=root)


class _RecordingRoot(HostRoot):
    """Notes every path of /sys, /dev and those tables of /proc that is asked for.

    It does not count as the running host, so that no node is opened.
    """

    def __init__(self, root: HostRoot) -> None:
        super().__init__(root.path)
        self.noted: set[str] = set()
        self.listed: set[str] = set()
        self._targets: dict[str, str | None] = {}

    def forget(self) -> None:
        """Forget what was asked for, and where links led, before the next device."""
        self.noted.clear()
        self.listed.clear()
        self._targets.clear()

    @property
    def is_live(self) -> bool:
        """Never."""
        return False

    def _note(self, path: str) -> bool:
        """Whether the path may be read; what may be is noted."""
        if path.startswith(("/sys/", "/dev/")) or _PROC.match(path):
            self.noted.add(path)
            return True
        return False

    def read_attribute(self, path: str) -> bytes | None:
        return super().read_attribute(path) if self._note(path) else None

    def read_text(self, path: str) -> str | None:
        return super().read_text(path) if self._note(path) else None

    def read_at(self, path: str, offset: int, length: int) -> bytes:
        is_attribute = path.startswith("/sys/") and self._note(path)
        return super().read_at(path, offset, length) if is_attribute else b""

    def read_each(
        self,
        directory: str,
        names: Iterable[str],
        *,
        files: Sequence[str],
        links: Sequence[str],
        sizes: Sequence[str],
    ) -> Iterator[AttributeBatch]:
        names = list(names)
        for name in names:
            self.noted.update(f"{directory}/{name}/{file}" for file in (*files, *links, *sizes))
        return super().read_each(directory, names, files=files, links=links, sizes=sizes)

    def stat(self, path: str) -> os.stat_result | None:
        self._note(path)
        return super().stat(path)

    def stat_or_none(self, path: str, *, follow_symlinks: bool = True) -> os.stat_result | None:
        self._note(path)
        return super().stat_or_none(path, follow_symlinks=follow_symlinks)

    def read_link(self, path: str) -> str | None:
        return super().read_link(path) if self._note(path) else None

    def real_path(self, path: str) -> str:
        self._note(path)
        return super().real_path(path)

    def _link_target(self, path: str) -> str | None:
        """Read once for a device: most of its paths lead through the same directories."""
        if path not in self._targets:
            self._targets[path] = super()._link_target(path)
        return self._targets[path]

    def list_dir(self, path: str) -> list[str]:
        if path == "/proc":
            return super().list_dir(path)
        if not path.startswith(("/sys/", "/dev/")):
            return []
        self.listed.add(path)
        return super().list_dir(path)


class _Members:
    """The members of the file by path; no path contains a link."""

    def __init__(self, root: HostRoot) -> None:
        self._base = "" if root.is_live else root.path
        self._real_directories: dict[str, str | None] = {}
        self._directories: set[str] = set()
        self._links: dict[str, str] = {}
        self._files: dict[str, bytes] = {}
        self._longer: dict[str, int] = {}  # configuration spaces, of which the rest is zeros
        self._nodes: dict[str, os.stat_result] = {}
        self._errors: dict[str, int] = {}

    def add_asked(self, root: "_RecordingRoot") -> None:
        """Add what was asked for since the last time."""
        for path in root.noted:
            # A process counts for its mount namespace if its mounts were read.
            if (
                not path.endswith(_NAMESPACE)
                or path.replace(_NAMESPACE, "/mountinfo") in root.noted
            ):
                self._add(path)
        for path in root.listed:
            self._add_names(path)
        root.forget()

    def add_file(self, path: str, data: bytes) -> None:
        """Add what no file of the host has."""
        self._files[path] = data

    def add_mount_tables(self, tables: Mapping[str, str]) -> None:
        """Add those with mounts that no process has which is recorded.

        They are those of threads, of a chroot's surroundings, and of namespaces without processes.
        """
        own = (data for path, data in self._files.items() if path.endswith("/mountinfo"))
        known = {mount for data in own for mount in mounts_in(os.fsdecode(data))}
        for path, table in tables.items():
            mounts = set(mounts_in(table))
            if not mounts <= known:
                name = path.replace("/", "!")
                self.add_file(f"{RECORDED}/{name}", os.fsencode(table)[:_TABLE_MAX_BYTES])
            known |= mounts

    def _add(self, path: str) -> None:
        """Add what is at `path`, with the links and directories on the way to it."""
        if path.startswith("/proc/"):
            self._add_table(path)
            return
        directory, _, name = path.rpartition("/")
        if name in {"", ".", ".."}:
            self._follow(path)
        elif real := self._real_directory(directory):
            target = self._add_entry(f"{real}/{name}")
            if target is not None:
                self._follow(f"{real}/{target}")

    def _real_directory(self, path: str) -> str | None:
        """The directory without links; None for anything else."""
        if path not in self._real_directories:
            real = self._follow(path, with_content=False)
            self._real_directories[path] = real if real in self._directories else None
        return self._real_directories[path]

    def _follow(self, path: str, *, with_content: bool = True) -> str | None:
        """Add what is at `path`, with the links and directories on the way to it.

        Gives the path without links; None when it does not exist, or is not recorded.
        """
        real, rest, links = "", path.split("/")[::-1], 0
        while rest:
            match rest.pop():
                case "" | ".":
                    continue
                case "..":
                    real = real.rpartition("/")[0]
                    continue
                case name:
                    here = f"{real}/{name}"
            if here in self._directories:
                real = here
                continue
            target = self._add_entry(here, with_content=with_content and not rest)
            if target is not None:
                links += 1
                rest += target.split("/")[::-1]
            elif here in self._directories:
                real = here
            if links > _LINKS_MAX or (target is None and real != here):
                return here if here in self._files or here in self._nodes else None
        return real

    def _add_names(self, path: str) -> None:
        """Add what a directory lists: its links, directories and nodes, but no file's content."""
        real = self._real_directory(path)
        if real is None:
            return
        try:
            with os.scandir(self._base + real) as entries:
                others = [one.name for one in entries if not one.is_file(follow_symlinks=False)]
        except OSError:
            return  # this path has been recorded before
        for name in others:
            self._add_entry(f"{real}/{name}", with_content=False)

    def _add_entry(self, path: str, *, with_content: bool = True) -> str | None:
        """Add one thing; the target, if it is a link that may be followed."""
        if path in self._links:
            return self._links[path]
        if path in self._files or path in self._nodes:
            return None
        try:
            status = os.lstat(self._base + path)
            if stat.S_ISLNK(status.st_mode):
                target = os.readlink(self._base + path)
                if not _stays_inside(path, target):
                    return None
                self._links[path] = target
                return target
        except OSError as error:
            self._add_error(path, error)
            return None
        if stat.S_ISDIR(status.st_mode):
            self._directories.add(path)
        elif stat.S_IFMT(status.st_mode) in _NODES:
            self._nodes[path] = status
        elif with_content and path.startswith("/sys/") and stat.S_ISREG(status.st_mode):
            self._add_attribute(path, status.st_size)
        return None

    def _add_attribute(self, path: str, size_bytes: int) -> None:
        is_config = path.endswith("/config")
        length = _CONFIG_BYTES if is_config else PAGE_SIZE
        try:
            data = _read(self._base + path, length)
        except OSError as error:
            self._add_error(path, error)
            return
        if is_config and size_bytes > _CONFIG_BYTES:
            self._longer[path] = min(size_bytes, PAGE_SIZE)
        self._files[path] = data

    def _add_table(self, path: str) -> None:
        """A file or link of /proc; files of another user's process are skipped."""
        try:
            if path.endswith(_NAMESPACE):
                self._links[path] = os.readlink(self._base + path)
            else:
                self._files[path] = _read(self._base + path, _TABLE_MAX_BYTES)
        except OSError as error:
            if not path.endswith(("/mountinfo", _NAMESPACE)):
                self._add_error(path, error)

    def _add_error(self, path: str, error: OSError) -> None:
        if error.errno not in _GONE and error.errno is not None:
            self._files[path] = b""
            self._errors[path] = error.errno

    def summary(self) -> Recorded:
        """The number of members."""
        unreadable = (f"{path}: {os.strerror(number)}" for path, number in self._errors.items())
        files = len(self._files) - len(self._errors)
        return Recorded(
            files=files,
            links=len(self._links),
            nodes=len(self._nodes),
            unreadable=tuple(sorted(unreadable)),
        )

    def write(self, file: IO[bytes] | gzip.GzipFile) -> None:
        """The tar file: the note first, then the members by name."""
        paths = sorted({*self._directories, *self._links, *self._files, *self._nodes})
        note = "".join(f"unreadable {line}\n" for line in self.summary().unreadable)
        text = f"format {FORMAT}\nmembers {len(paths)}\n{note}".encode(errors="surrogateescape")
        file.write(_file(NOTE, text))
        for path in paths:
            file.write(self._member(path))
        file.write(bytes(2 * BLOCK_BYTES))

    def _member(self, path: str) -> bytes:
        name = path.lstrip("/")
        if path in self._directories:
            return make_header(name, DIRECTORY)
        if path in self._links:
            return make_header(name, LINK, target=self._links[path])
        if path in self._nodes:
            status = self._nodes[path]
            return make_header(name, _NODES[stat.S_IFMT(status.st_mode)], node=status)
        data, error = self._files[path], self._errors.get(path)
        data = data.ljust(self._longer.get(path, 0), b"\0")
        return _file(name, data, {} if error is None else {ERRNO_KEYWORD: str(error)})


def _file(name: str, data: bytes, keywords: Mapping[str, str] | None = None) -> bytes:
    header = make_header(name, FILE, size_bytes=len(data), keywords=keywords)
    return header + data + padding(len(data))


def _stays_inside(path: str, target: str) -> bool:
    """Whether a link leads into /sys, /proc or /dev by a relative path."""
    whole = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return not target.startswith("/") and whole.startswith(("/sys/", "/proc/", "/dev/"))


def _read(path: str, length: int) -> bytes:
    descriptor, data = os.open(path, _READ), b""
    try:
        while piece := os.read(descriptor, min(length - len(data), _PIECE)):
            data += piece
        return data
    finally:
        os.close(descriptor)
