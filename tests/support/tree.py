"""HostTree: another host's /sys, /proc and /dev, with only the files that a test is about.

The shapes are the kernel's: /sys/dev/block/8:0 is a relative link into /sys/devices, a partition's
directory lies in its disk's, `size` counts sectors of 512 bytes, mountinfo is written as it is
read, escapes and all.
"""

import os
import stat
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from vmplug.host.root import HostRoot

MIB, GIB = 1 << 20, 1 << 30
INIT_NAMESPACE = "mnt:[4026531840]"
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_NO_SWAPS = "Filename\t\t\t\tType\t\tSize\tUsed\tPriority\n"
_KINDS = {"b": stat.S_IFBLK, "c": stat.S_IFCHR, "p": stat.S_IFIFO, "s": stat.S_IFSOCK}


class HostTree:
    """Builds the files below `path`; every method may be chained.

    From the start it has one process, without mounts and open files, and no swap space.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = HostRoot(path)
        self._base = os.path.abspath(path)
        if self._base == "/":  # the running host has its own
            return
        os.makedirs(f"{self._base}/proc/1/fd", exist_ok=True)
        self.file("/proc/1/mountinfo").file("/proc/swaps", _NO_SWAPS)

    def file(self, path: str, content: str | bytes = b"") -> Self:
        """A file with its directories; text keeps undecodable bytes."""
        target = f"{self._base}/{path.lstrip('/')}"
        try:
            descriptor = os.open(target, _NEW_FILE, 0o666)
        except FileNotFoundError:
            descriptor = os.open(self._below(path), _NEW_FILE, 0o666)
        os.write(descriptor, os.fsencode(content) if isinstance(content, str) else content)
        os.close(descriptor)
        return self

    def hole(self, path: str, size_bytes: int) -> Self:
        """A file of zeros, which takes no space and no time."""
        self.file(path)
        os.truncate(f"{self._base}/{path.lstrip('/')}", size_bytes)
        return self

    def link(self, path: str, target: str) -> Self:
        """A symlink."""
        try:
            os.symlink(target, f"{self._base}/{path.lstrip('/')}")
        except FileNotFoundError:
            os.symlink(target, self._below(path))
        return self

    def node(self, path: str, kind: str, number: str = "0:0") -> Self:
        """A node as mknod(1) makes it; types b and c need root, p and s (a socket) do not."""
        major, minor = map(int, number.split(":"))
        os.mknod(self._below(path), _KINDS[kind] | 0o600, os.makedev(major, minor))
        return self

    def block_device(
        self,
        number: str,
        name: str,
        *,
        size_bytes: int = GIB,
        ro: bool = False,
        removable: bool = False,
        sector_bytes: int = 512,
        holders: Sequence[str] = (),
        partitions: Mapping[str, str] | None = None,
        loop: Mapping[str, str | bytes] | None = None,
    ) -> Self:
        """A whole disk; `partitions` are numbers with their names, `loop` the files of loop/,
        with offset 0 unless they have another."""
        disk = f"/sys/devices/virtual/block/{name}"
        self._block_directory(disk, number, size_bytes, holders, ro=ro)
        self.file(f"{disk}/removable", f"{int(removable)}\n")
        self.file(f"{disk}/queue/logical_block_size", f"{sector_bytes}\n")
        self.link(f"/sys/block/{name}", f"../devices/virtual/block/{name}")
        for index, (part_number, part) in enumerate((partitions or {}).items(), start=1):
            self._block_directory(f"{disk}/{part}", part_number, size_bytes // 2, (), ro=ro)
            self.file(f"{disk}/{part}/partition", f"{index}\n")
        for attribute, content in ({"offset": "0\n", **loop} if loop else {}).items():
            self.file(f"{disk}/loop/{attribute}", content)
        return self

    def char_device(self, number: str, name: str) -> Self:
        """A character device; `name` is its DEVNAME and may hold directories."""
        directory = f"/sys/devices/virtual/misc/{name.replace('/', '!')}"
        self.link(f"/sys/dev/char/{number}", f"../..{directory.removeprefix('/sys')}")
        return self._device_files(directory, number, name)

    def hold(self, name: str, holder: str) -> Self:
        """Lets `holder` be built on the block device `name`, a disk or a partition."""
        directory = os.path.realpath(self.path / f"sys/class/block/{name}")
        os.symlink(f"../../{holder}", f"{directory}/holders/{holder}")
        return self

    def mount(
        self,
        source: str,
        mount_point: str,
        number: str,
        *,
        fs_options: str = "rw",
        mount_options: str = "rw,relatime",
        shown: str = "/",
        fs_type: str = "ext4",
        pid: int = 1,
        namespace: str = INIT_NAMESPACE,
    ) -> Self:
        """One more line of a process's mountinfo; names are written as they are given.

        `shown` is the directory of the file system that is mounted.
        """
        mount = f"36 1 {number} {shown} {mount_point} {mount_options} shared:1"
        line = f"{mount} - {fs_type} {source} {fs_options}\n"
        with open(self._below(f"/proc/{pid}/mountinfo"), "ab") as file:
            file.write(os.fsencode(line))
        link = self._below(f"/proc/{pid}/ns/mnt")
        if not os.path.islink(link):
            os.symlink(namespace, link)
        return self

    def pmem_file(
        self, path: str, *, data_offset: int = 2 * MIB, size_bytes: int = 8 * MIB
    ) -> Self:
        """A file with the information block of a namespace in mode fsdax.

        Source: Linux drivers/nvdimm/pfn.h, struct nd_pfn_sb.
        """
        block = b"NVDIMM_PFN_INFO\0" + bytes(32 + 4) + struct.pack("<HHQ", 1, 4, data_offset)
        with open(self._below(path), "wb") as file:
            file.seek(4096)
            file.write(block)
            file.truncate(size_bytes)
        return self

    def unix_socket(self, path: str, inode: int, *, listens: bool = True) -> Self:
        """One more line of /proc/net/unix: a listener, or a connection that one has accepted."""
        flags, state = ("00010000", "01") if listens else ("00000000", "03")
        with open(self._below("/proc/net/unix"), "ab") as file:
            if not file.tell():
                file.write(b"Num       RefCount Protocol Flags    Type St Inode Path\n")
            line = f"00000000deadbeef: 00000002 00000000 {flags} 0001 {state} {inode:5} {path}\n"
            file.write(os.fsencode(line))
        return self

    def process(self, pid: int, name: str, *open_files: str) -> Self:
        """A process of that name, and what its descriptors from 3 on are open on."""
        self.file(f"/proc/{pid}/comm", f"{name}\n")
        for number, target in enumerate(open_files, start=3):
            self.link(f"/proc/{pid}/fd/{number}", target)
        return self

    def swap(self, *paths: str) -> Self:
        """The whole of /proc/swaps."""
        lines = "".join(f"{path:<40}partition\t1048572\t0\t-2\n" for path in paths)
        return self.file("/proc/swaps", _NO_SWAPS + lines)

    def _block_directory(
        self, path: str, number: str, size_bytes: int, holders: Sequence[str], *, ro: bool
    ) -> None:
        name = path.rpartition("/")[2]
        self._device_files(path, number, name.replace("!", "/"))
        self.file(f"{path}/size", f"{size_bytes // 512}\n").file(f"{path}/ro", f"{int(ro)}\n")
        os.mkdir(f"{self._base}{path}/holders")
        below_sys = path.removeprefix("/sys/")
        self.link(f"/sys/dev/block/{number}", f"../../{below_sys}")
        self.link(f"/sys/class/block/{name}", f"../../{below_sys}")
        for holder in holders:
            self.hold(name, holder)

    def _device_files(self, directory: str, number: str, devname: str) -> Self:
        major, minor = number.split(":")
        self.file(f"{directory}/dev", f"{number}\n")
        uevent = f"MAJOR={major}\nMINOR={minor}\nDEVNAME={devname}\n"
        return self.file(f"{directory}/uevent", uevent)

    def _below(self, path: str) -> str:
        target = f"{self._base}/{path.lstrip('/')}"
        above = os.path.dirname(target)
        if not os.path.isdir(above):
            os.makedirs(above, exist_ok=True)
        return target
