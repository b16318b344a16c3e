"""Block devices: the facts in sysfs.

Source: Documentation/ABI/stable/sysfs-block, Documentation/ABI/testing/sysfs-block.
"""

import os
import stat
from collections.abc import Iterator

from vmplug.devnum import DevNum
from vmplug.host.block.device import BlockDevice, DiskFile, DiskPart
from vmplug.host.block.loop import LoopBacking, read_backing_file
from vmplug.host.kind import FoundBy
from vmplug.host.root import HostRoot, node_number

SIZE_UNIT_BYTES = 512
"""The unit of a sysfs `size`, whatever the device's own block size."""


_CLASSES = ("/sys/class/block", "/sys/block")
"""Of the latter the partitions are in the directories of their disks."""


def find_block_directory(devnum: DevNum, root: HostRoot) -> str:
    """The way to a block device in sysfs: by its number, or where a copy of a host has it.

    A copy may have directories in the place of links.
    """
    link = f"{root.sys_dev}/block/{devnum}"
    if root.is_live or (root.stat_or_none(link) and root.real_path(link) != link):
        return link
    return _find_listed(devnum, root) or link


def _find_listed(devnum: DevNum, root: HostRoot) -> str | None:
    paths = list_block_directories(root).values()
    return next((path for path in paths if root.read_devnum(f"{path}/dev") == devnum), None)


def list_block_directories(root: HostRoot) -> dict[str, str]:
    """A directory of every block device by its kernel name, which may be a link.

    A copy of a host may have only one of the kernel's lists. A partition is where its disk is.
    """
    found: dict[str, str] = {}
    for directory in _CLASSES:
        for name in root.list_dir(directory):
            found.setdefault(name, f"{directory}/{name}")
        if root.is_live:
            return found
    for disk, path in list(found.items()):
        for name in root.list_dir(path):
            if name.startswith(disk) and root.stat_or_none(f"{path}/{name}/partition"):
                found[name] = f"{path}/{name}"
    return found


def find_block_node(devnum: DevNum, root: HostRoot) -> str | None:
    """The node by the name of the device's directory; None when sysfs has no such name.

    In a copy without links the directory may have the number for a name, which says nothing.
    """
    link = f"{root.sys_dev}/block/{devnum}"
    path = root.real_path(link)
    if path == link or root.stat_or_none(path) is None:
        found = None if root.is_live else _find_listed(devnum, root)
        if found is None:
            return None
        path = root.real_path(found)
    return f"/dev/{path.rpartition('/')[2].replace('!', '/')}"


def read_block_device(
    devnum: DevNum, device_node: str, found_by: FoundBy, root: HostRoot
) -> BlockDevice:
    """The facts of one block device; AttributeReadError when one cannot be read."""
    link = find_block_directory(devnum, root)
    sectors = root.read_int(f"{link}/size")
    if sectors is None:
        return BlockDevice(devnum=devnum, device_node=device_node, found_by=found_by)
    sysfs_path = root.real_path(link)
    disk_path = find_disk_path(sysfs_path, root)
    below, below_files = _below(disk_path, root)
    return BlockDevice(
        devnum=devnum,
        device_node=device_node,
        found_by=found_by,
        sysfs_path=sysfs_path,
        size_bytes=sectors * SIZE_UNIT_BYTES,
        sector_bytes=root.read_int(f"{disk_path}/queue/logical_block_size"),
        read_only=_read_flag(f"{sysfs_path}/ro", root),
        removable=_read_flag(f"{disk_path}/removable", root),
        holders=_read_holders(f"{sysfs_path}/holders", root),
        relatives=_relatives(sysfs_path, disk_path, root),
        below=below,
        below_files=below_files,
        backing=read_backing_file(sysfs_path, root),
    )


def read_disk_file(path: str, root: HostRoot, found_by: FoundBy = FoundBy.FILE) -> DiskFile:
    """The facts of a regular file that becomes a disk or an NVDIMM, by its canonical path."""
    from vmplug.host.block.pmem import read_pfn_info  # noqa: PLC0415  1 ms, with struct and formats
    from vmplug.host.block.qcow2 import read_qcow2_header  # noqa: PLC0415
    from vmplug.host.file_id import file_id  # noqa: PLC0415

    canonical = root.real_path(path)
    status = root.stat(canonical)
    return DiskFile(
        host_path=canonical,
        found_by=found_by,
        size_bytes=status.st_size if status else 0,
        file_id=file_id(status) if status else None,
        read_only=not root.is_writable(canonical),
        direct_io=root.open_errno(canonical, os.O_DIRECT) is None,
        qcow2=read_qcow2_header(canonical, root),
        pfn=read_pfn_info(canonical, root),
    )


def _read_flag(path: str, root: HostRoot) -> bool | None:
    number = root.read_int(path)
    return None if number is None else bool(number)


def _read_holders(path: str, root: HostRoot) -> tuple[str, ...] | None:
    names = tuple(root.list_dir(path))
    return names if names or root.stat(path) else None


def find_disk_path(sysfs_path: str, root: HostRoot) -> str:
    """The directory of the whole disk: the parent of a partition's."""
    if root.stat(f"{sysfs_path}/partition"):
        return sysfs_path.rpartition("/")[0]
    return sysfs_path


def read_command_nodes(disk_path: str, root: HostRoot) -> Iterator[tuple[str, DevNum]]:
    """The character devices that send commands to a disk past the block layer.

    Source: Linux drivers/scsi/sg.c; block/bsg.c; drivers/nvme/host/core.c, nvme_add_ns_cdev.
    """
    name = disk_path.rpartition("/")[2]
    found = [
        (f"/dev/{where}{node}", f"{disk_path}/device/{kind}/{node}")
        for kind, where in (("scsi_generic", ""), ("bsg", "bsg/"))
        for node in root.list_dir(f"{disk_path}/device/{kind}")
    ]
    if name.startswith("nvme"):
        generic = f"ng{name.removeprefix('nvme')}"
        found.append((f"/dev/{generic}", f"/sys/class/nvme-generic/{generic}"))
    for node, path in found:
        if number := root.read_devnum(f"{path}/dev"):
            yield node, number


def _relatives(sysfs_path: str, disk_path: str, root: HostRoot) -> tuple[DiskPart, ...]:
    paths = [disk_path]
    if disk_path == sysfs_path:
        names = (f"{sysfs_path}/{name}" for name in root.list_dir(sysfs_path))
        paths = [path for path in names if root.stat_or_none(f"{path}/partition")]
    return tuple(part for path in paths if (part := _part(path, root)))


def _below(disk_path: str, root: HostRoot) -> tuple[tuple[DevNum, ...], tuple[str, ...]]:
    """The block devices below this one (device-mapper, md, loop), at every level.

    Then the files behind the loop devices among them, or behind this one.
    """
    devnums, files, known, waiting = dict[DevNum, None](), list[str](), set[str](), [disk_path]
    while waiting:
        path = waiting.pop()
        if path in known:
            continue
        known.add(path)
        slaves = [
            root.real_path(f"{path}/slaves/{name}") for name in root.list_dir(f"{path}/slaves")
        ]
        backing = read_backing_file(path, root)
        if backing and not backing.deleted:
            slaves += _behind(backing, root)
            files.append(backing.backing_file)
        for slave in slaves:
            disk = find_disk_path(slave, root)
            numbers = (root.read_devnum(f"{each}/dev") for each in (slave, disk))
            devnums.update((number, None) for number in numbers if number)
            waiting.append(disk)
    return tuple(devnums), tuple(files)


def _behind(backing: LoopBacking, root: HostRoot) -> list[str]:
    """The directory of the block device behind a loop device; None for a regular file."""
    number = find_named_block(backing.backing_file, root)
    return [root.real_path(find_block_directory(number, root))] if number else []


def find_named_block(path: str, root: HostRoot) -> DevNum | None:
    """The number of the block device of that name; None for a regular file, or one that is absent.

    A copy of a host may have no nodes, only their names.
    """
    status = root.stat_or_none(path)
    if status and stat.S_ISBLK(status.st_mode):
        return node_number(status)
    if root.is_live or not path.startswith("/dev/") or "\0" in path:
        return None
    name = root.real_path(path).removeprefix("/dev/").replace("/", "!")
    return root.read_devnum(f"{list_block_directories(root).get(name, '/nowhere')}/dev")


def _part(sysfs_path: str, root: HostRoot) -> DiskPart | None:
    """None when it disappears while it is read."""
    devnum = root.read_devnum(f"{sysfs_path}/dev")
    if devnum is None:
        return None
    name = sysfs_path.rpartition("/")[2]
    return DiskPart(
        devnum=devnum,
        device_node=f"/dev/{name.replace('!', '/')}",
        holders=tuple(root.list_dir(f"{sysfs_path}/holders")),
    )
