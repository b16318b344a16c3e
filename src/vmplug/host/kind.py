"""The kinds of device, how a request names one, and what identifies it."""

import re
from enum import StrEnum
from typing import NamedTuple, Self

from vmplug.devnum import DevNum


class DeviceType(StrEnum):
    """Kinds of device: the words of Kata's config.go, and two that it has no type for."""

    VFIO = "vfio"
    BLOCK = "block"
    GENERIC = "generic"
    VHOST_USER_SCSI = "vhost-user-scsi-pci"
    VHOST_USER_NET = "virtio-net-pci"
    VHOST_USER_BLK = "vhost-user-blk-pci"
    VHOST_USER_FS = "vhost-user-fs-pci"
    VIRTIO_9P = "virtio-9p-pci"
    VIRTIO_RNG = "virtio-rng-pci"

    @property
    def word(self) -> str:
        """The kind in messages and in the policy: a share has that of its option `filesystem`."""
        return _SHARES.get(self, self.value)

    @classmethod
    def _missing_(cls, value: object) -> "DeviceType | None":
        return next((kind for kind, word in _SHARES.items() if word == value), None)


SERVED = frozenset(
    {
        DeviceType.VHOST_USER_BLK,
        DeviceType.VHOST_USER_SCSI,
        DeviceType.VHOST_USER_NET,
        DeviceType.VHOST_USER_FS,
    }
)
"""Kinds that a process of the host serves through vhost-user."""


class SharedFilesystem(StrEnum):
    """How a directory is shared, in the words of Kata's config.go."""

    VIRTIO_9P = "virtio-9p"
    VIRTIO_FS = "virtio-fs"


_SHARES = {
    DeviceType.VHOST_USER_FS: str(SharedFilesystem.VIRTIO_FS),
    DeviceType.VIRTIO_9P: str(SharedFilesystem.VIRTIO_9P),
}


class FoundBy(StrEnum):
    """Where the host path comes from."""

    SYSFS = "sysfs"
    VHOST_USER_STORE = "vhost-user-store"
    CONTAINER_PATH = "container-path"
    BACKING_FILE = "backing-file"
    FILE = "file"


class IdentityKind(StrEnum):
    """What the key of an identity is.

    `block`, `char`: a device number. `fifo`, `file`, `rng`: a path. `socket`: a path, or `[INODE]`
    of one that this process holds open. `share`: a tag and a path. `vfio`: the address of a
    function, the UUID of a mediated device, or the number of a group without either.
    """

    BLOCK = "block"
    CHAR = "char"
    FIFO = "fifo"
    FILE = "file"
    RNG = "rng"
    SHARE = "share"
    SOCKET = "socket"
    VFIO = "vfio"


_NUMBERED = (IdentityKind.BLOCK, IdentityKind.CHAR)


class Identity(NamedTuple):
    """What makes a device the same for all requests and VMs; `str()` is what the journal keeps."""

    kind: IdentityKind
    key: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`block:7:0`, `file:/srv/a.img`, `vfio:0000:3b:00.0`; ValueError for anything else."""
        kind, _, key = text.partition(":")
        if not key:
            raise ValueError(f"{text!r} is not KIND:KEY, such as block:7:0")
        if kind in _NUMBERED:
            DevNum.parse(key)
        return cls(IdentityKind(kind), key)

    @classmethod
    def of_block(cls, devnum: DevNum) -> Self:
        """That of a block device."""
        return cls(IdentityKind.BLOCK, str(devnum))

    @classmethod
    def of_vfio(cls, name: object) -> Self:
        """That of a function by its address, or of a mediated device by its UUID."""
        return cls(IdentityKind.VFIO, str(name))

    @classmethod
    def of_share(cls, tag: str, path: str) -> Self:
        """That of a directory: under two tags it is two devices."""
        return cls(IdentityKind.SHARE, f"{tag}:{path}")

    @property
    def devnum(self) -> DevNum | None:
        """The number of a block or character device; None for any other kind."""
        return DevNum.parse(self.key) if self.kind in _NUMBERED else None

    @property
    def path(self) -> str | None:
        """The path in the key; None for a kind without one. A tag has no slash."""
        _, slash, rest = self.key.partition("/")
        return slash + rest or None

    def __str__(self) -> str:
        return f"{self.kind}:{self.key}"


def is_other_thing(then: str | None, now: str | None) -> bool:
    """Whether two texts of `vmplug.host.check.thing` are surely of two devices.

    False where one is unknown.
    A vmplug before journal version 8 did not write the vendor and device of a function.
    """
    if not (then and now):
        return False
    return then not in {now, re.sub(r"(?<=\.[0-7]):[0-9a-f]{4}:[0-9a-f]{4}(?=:)", "", now)}
