"""Disks and files that the kernel itself uses, which no holder, mount or open file shows.

It exports some to other machines: as NVMe or SCSI targets, as a USB stick, or file by file to the
clients of NFS. And it keeps data of its own on some: the journal of a file system, the pages of a
compressed disk, the memory of a host that hibernates, a cache.
Source: Linux drivers/nvme/target/configfs.c; drivers/target/target_core_{configfs,iblock,file}.c;
Documentation/usb/gadget_configfs.rst; Documentation/admin-guide/blockdev/zram.rst; fs/jbd2;
fs/nfsd/nfs4state.c; drivers/usb/usbip/stub_dev.c.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping

import msgspec

from vmplug.devnum import DevNum, FileKey, key_of, key_of_inode, key_of_node
from vmplug.errors import AttributeReadError
from vmplug.host.finding import Code
from vmplug.host.root import HostRoot

_CONFIG = "/sys/kernel/config"
_NVMET = f"{_CONFIG}/nvmet/subsystems"
_TARGET = f"{_CONFIG}/target/core"
_GADGETS = f"{_CONFIG}/usb_gadget"
_JOURNALS, _FILE_SYSTEMS = "/proc/fs/jbd2", "/sys/fs/ext4"
_VIRTUAL = "/sys/devices/virtual/block"
_USBIP = "/sys/bus/usb/drivers/usbip-host"
_BCACHE, _BLOCK = "/sys/fs/bcache", "/sys/class/block"
_RESUME = "/sys/power/resume"
_NFS_CLIENTS = "/proc/fs/nfsd/clients"

_NUMBER = r"Major: ([0-9]+) Minor: ([0-9]+)"
_FILE = r"File: (.+?) +Size: "
_NFS_STATE = re.compile(
    r"^- 0x[0-9a-f]+: \{ type: (?:open|deleg), access: ([^,]+), (?:deny: [^,]+, )?"
    r'superblock: "([0-9a-f]+):([0-9a-f]+):([0-9]+)"',
    re.MULTILINE | re.ASCII,
)
_NFS_ADDRESS = re.compile(r'^address: "([^"\n]+)"$', re.MULTILINE)


class KernelUser(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel uses a device or file for; `remedy` ends it.

    `code` is that of the finding: the kernel claims nothing for an export. `does` stands between
    its name and `who`. One that does not write harms nothing.
    """

    who: str
    how: str
    remedy: str
    does: str
    code: Code
    writes: bool = True


KernelUsers = Mapping[FileKey | str, list[KernelUser]]
"""By what is used; in a copy of a host also by its path."""


def read_kernel_users(root: HostRoot) -> KernelUsers:
    """The uses of all devices and files by the kernel. Raises AttributeReadError."""
    found: dict[FileKey | str, list[KernelUser]] = {}
    for used, user in _read_all(root):
        for key in _keys(used, root):
            found.setdefault(key, []).append(user)
    return found


def find_unknown_exports(root: HostRoot) -> Iterator[str]:
    """The exports that cannot be looked for: their part of configfs is not mounted, or hidden."""
    for module, directory in (("nvmet", f"{_CONFIG}/nvmet"), ("target_core_mod", _TARGET)):
        if root.stat_or_none(f"/sys/module/{module}") and not root.stat_or_none(directory):
            yield f"exports by {module} (no {directory}: mount -t configfs none {_CONFIG})"
    if _list_nfs_clients(root) is None:
        yield f"files that NFS clients have open (no permission for {_NFS_CLIENTS})"


def _read_all(root: HostRoot) -> Iterator[tuple[str | DevNum | FileKey, KernelUser]]:
    yield from _nfs_clients(root)
    yield from _nvme_targets(root)
    yield from _scsi_targets(root)
    yield from _usb_sticks(root)
    yield from _usbip(root)
    yield from _kept_data(root)
    yield from _hibernation(root)
    yield from _bcache(root)


def _keys(used: str | DevNum | FileKey, root: HostRoot) -> Iterator[FileKey | str]:
    if isinstance(used, DevNum):
        yield key_of_node(stat.S_IFBLK, used)
        return
    if not isinstance(used, str):
        yield used
        return
    if status := root.stat_or_none(used):
        yield key_of(status)
    if not root.is_live:
        yield from dict.fromkeys((used, root.real_path(used)))


def _nvme_targets(root: HostRoot) -> Iterator[tuple[str, KernelUser]]:
    for subsystem in root.list_dir(_NVMET):
        base = f"{_NVMET}/{subsystem}"
        exports = [f"namespaces/{number}" for number in root.list_dir(f"{base}/namespaces")]
        for export in (*exports, "passthru"):
            path = _text(f"{base}/{export}/device_path", root)
            if path.startswith("/") and root.read_int(f"{base}/{export}/enable"):
                yield path, _export("NVMe", subsystem, f"echo 0 > {base}/{export}/enable")


def _scsi_targets(root: HostRoot) -> Iterator[tuple[str | DevNum, KernelUser]]:
    """Backstores of LIO; those that a process serves (tcmu) have their files open there."""
    for hba in root.list_dir(_TARGET):
        for name in root.list_dir(f"{_TARGET}/{hba}"):
            base = f"{_TARGET}/{hba}/{name}"
            if root.read_int(f"{base}/enable"):
                user = _export("SCSI", name, f"rmdir {base}", ", after its LUNs (targetcli ls)")
                info = _text(f"{base}/info", root)
                if number := re.search(_NUMBER, info):
                    yield DevNum(int(number[1]), int(number[2])), user
                elif file := re.search(_FILE, info):
                    yield file[1], user
                elif (path := _text(f"{base}/udev_path", root)).startswith("/"):
                    yield path, user


def _usb_sticks(root: HostRoot) -> Iterator[tuple[str, KernelUser]]:
    for gadget in root.list_dir(_GADGETS):
        for function in root.list_dir(f"{_GADGETS}/{gadget}/functions"):
            base = f"{_GADGETS}/{gadget}/functions/{function}"
            for lun in root.list_dir(base) if function.startswith("mass_storage.") else ():
                path = _text(f"{base}/{lun}/file", root) if lun.startswith("lun.") else ""
                if path.startswith("/"):
                    yield path, _export("USB", gadget, f"echo > {base}/{lun}/file")


def _usbip(root: HostRoot) -> Iterator[tuple[FileKey, KernelUser]]:
    """USB devices for other machines; they go away with the controller that they are on."""
    for name in root.list_dir(_USBIP):
        if number := root.read_devnum(f"{_USBIP}/{name}/dev"):
            key = key_of_node(stat.S_IFCHR, number)
            yield key, _export("USB/IP", name, f"usbip unbind --busid={name}", how=_USBIP)


def _export(bus: str, name: str, remedy: str, more: str = "", how: str = _CONFIG) -> KernelUser:
    return KernelUser(
        who=f"the {bus} target {name}",
        how=f"the targets of the kernel, {how}",
        remedy=f"end the export ({remedy}){more}",
        does="is exported as",
        code=Code.IS_EXPORTED,
    )


def _nfs_clients(root: HostRoot) -> Iterator[tuple[FileKey, KernelUser]]:
    """The files that machines have open by NFS 4; NFS 3 has no open files."""
    for client in _list_nfs_clients(root) or ():
        base = f"{_NFS_CLIENTS}/{client}"
        states = _proc_text(f"{base}/states", root)
        address = _NFS_ADDRESS.search(_proc_text(f"{base}/info", root)) if states else None
        writers = dict[FileKey, bool]()
        for access, major, minor, inode in _NFS_STATE.findall(states):
            key = key_of_inode(major, minor, inode)
            writers[key] = writers.get(key, False) or "w" in access
        for key, writes in writers.items():
            yield (
                key,
                KernelUser(
                    who=f"the NFS client {address[1] if address else client}",
                    how=_NFS_CLIENTS,
                    remedy=f"close it there, or end that client: echo expire > {base}/ctl",
                    does=f"is open for {'writing' if writes else 'reading'} by",
                    code=Code.IS_EXPORTED,
                    writes=writes,
                ),
            )


def _list_nfs_clients(root: HostRoot) -> list[str] | None:
    """None where this user may not list them, as all but root."""
    try:
        return root.list_dir(_NFS_CLIENTS)
    except AttributeReadError:
        return None


def _proc_text(path: str, root: HostRoot) -> str:
    """Nothing for a client that has just gone."""
    try:
        return root.read_text(path) or ""
    except AttributeReadError as error:
        if error.errno != errno.ENXIO:
            raise
        return ""


def _kept_data(root: HostRoot) -> Iterator[tuple[str | DevNum, KernelUser]]:
    for name in root.list_dir(_JOURNALS):
        # A journal inside of its file system has an inode in its name: `sda1-8`.
        if number := root.read_devnum(f"/sys/class/block/{name}/dev"):
            yield (
                number,
                _keeper(
                    "the journal of a mounted file system",
                    f"{_JOURNALS}/{name}",
                    _unmount(name, root),
                ),
            )
    for name in root.list_dir(_VIRTUAL):
        backing = f"{_VIRTUAL}/{name}/backing_dev"
        if name.startswith("zram") and (path := _text(backing, root)).startswith("/"):
            yield path, _keeper(f"/dev/{name}", backing, f"zramctl --reset /dev/{name}")


def _hibernation(root: HostRoot) -> Iterator[tuple[DevNum, KernelUser]]:
    """Where the host keeps its memory, also while it does not swap there.

    At its next start it runs what it finds there. Source: Documentation/power/swsusp.rst.
    """
    if (number := root.read_devnum(_RESUME)) and number != DevNum(0, 0):
        yield (
            number,
            KernelUser(
                who="the memory of the host after hibernation",
                how=_RESUME,
                remedy="a guest that writes there can take over the host when that starts: take "
                "resume= from the kernel's command line and from the initramfs, and boot again",
                does="is where the kernel looks for",
                code=Code.IS_SWAP,
            ),
        )


def _bcache(root: HostRoot) -> Iterator[tuple[DevNum, KernelUser]]:
    """Its disks that no device is built on: a cache that serves none, a disk without its cache.

    Source: Documentation/admin-guide/bcache.rst; drivers/md/bcache/super.c, register_bcache.
    """
    if not root.stat_or_none(_BCACHE):
        return
    for name in root.list_dir(_BLOCK):
        # A bcache device itself has a link to that of its disk.
        base = f"{_BLOCK}/{name}/bcache"
        status = root.stat_or_none(base, follow_symlinks=False)
        if (
            status
            and stat.S_ISDIR(status.st_mode)
            and not root.list_dir(f"{_BLOCK}/{name}/holders")
        ):
            file = "set/unregister" if root.stat_or_none(f"{base}/set") else "stop"
            if number := root.read_devnum(f"{_BLOCK}/{name}/dev"):
                yield number, _keeper("bcache", base, f"echo 1 > {base}/{file}")


def _unmount(journal: str, root: HostRoot) -> str:
    """For the file system with that journal; which one it is says the thread that writes it.

    Source: Linux fs/ext4/sysfs.c, journal_task; fs/jbd2/journal.c.
    """
    for disk in root.list_dir(_FILE_SYSTEMS):
        pid = root.read_int(f"{_FILE_SYSTEMS}/{disk}/journal_task")
        if pid and (root.read_text(f"/proc/{pid}/comm") or "").strip() == f"jbd2/{journal}"[:15]:
            return f"umount --all-targets /dev/{disk.replace('!', '/')}"
    return "unmount the file system that has its journal there (blkid)"


def _keeper(who: str, how: str, remedy: str) -> KernelUser:
    return KernelUser(
        who=who,
        how=how,
        remedy=remedy,
        does="is in use by the kernel for",
        code=Code.OPEN_EXCLUSIVELY,
    )


def _text(path: str, root: HostRoot) -> str:
    return os.fsdecode(root.read_attribute(path) or b"").strip("\n")
