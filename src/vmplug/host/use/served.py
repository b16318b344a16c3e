"""The file systems of another machine that a virtio device of this one brings, and their mounts.

A host that is a VM itself may have its root file system in this way. The source of such a mount is
the tag by which the kernel has found the device.
Source: Linux net/9p/trans_virtio.c, fs/fuse/virtio_fs.c; /sys/fs/virtiofs since Linux 6.9.
"""

import os
from collections.abc import Mapping

import msgspec

from vmplug.host.root import HostRoot
from vmplug.host.use.mounts import MountedDevice, parse_mounts

_TYPES = {"9pnet_virtio": "9p", "virtiofs": "virtiofs"}
"""The file systems of drivers."""
_TAGS = "/sys/fs/virtiofs"


class ServedTag(msgspec.Struct, frozen=True, kw_only=True):
    """A file system that a function brings; `tag` is None where the kernel does not show it."""

    fs_type: str
    tag: str | None


def read_served(path: str, root: HostRoot) -> list[ServedTag]:
    """The file systems of the virtio devices in a function's directory."""
    found = []
    for name in root.list_dir(path):
        target = root.read_link(f"{path}/{name}/driver") if name.startswith("virtio") else None
        fs_type = _TYPES.get((target or "").rpartition("/")[2])
        if fs_type == "9p":
            found.append(ServedTag(fs_type=fs_type, tag=_text(f"{path}/{name}/mount_tag", root)))
        elif fs_type:
            found.append(ServedTag(fs_type=fs_type, tag=_virtiofs_tag(name, root)))
    return found


def _virtiofs_tag(device: str, root: HostRoot) -> str | None:
    for number in root.list_dir(_TAGS):
        target = root.read_link(f"{_TAGS}/{number}/device") or ""
        if target.rpartition("/")[2] == device:
            return _text(f"{_TAGS}/{number}/tag", root)
    return None


def find_mounts_of(
    served: ServedTag, tables: Mapping[str, str], root: HostRoot
) -> list[MountedDevice]:
    """Its mounts; without a tag all that it may have."""
    return [
        MountedDevice(
            devnum=mount.devnum,
            mount_point=mount.path,
            read_only=mount.read_only,
            namespace=namespace,
        )
        for mount, namespace in parse_mounts(tables, root)
        if mount.fs_type == served.fs_type and served.tag in {None, mount.source}
    ]


def _text(path: str, root: HostRoot) -> str | None:
    data = root.read_attribute(path)
    return None if data is None else os.fsdecode(data).strip("\0\n")
