"""The socket of a process that serves a device, and the features of that process."""

from typing import NamedTuple

from vmplug.devnum import DevNum
from vmplug.host.kind import DeviceType, FoundBy, Identity, IdentityKind

_BLK_F_RO, _BLK_F_BLK_SIZE = 5, 6
_SCSI_FEATURES = 0b1111
_DEVICE_FEATURES = (1 << 24) - 1
"""Bits 0 to 23 are the device type's own. Source: virtio specification, 2.2."""


class Backend(NamedTuple):
    """The features of a vhost-user backend; `queues` is how many request queues it serves.

    `has_config`: it serves the device's configuration space. `has_memory_slots`: it maps guest
    memory in more than a few regions.
    """

    features: int
    queues: int
    has_config: bool = False
    has_memory_slots: bool = False

    @property
    def is_read_only(self) -> bool:
        """Whether a vhost-user-blk backend is read-only."""
        return bool(self.features >> _BLK_F_RO & 1)

    def can_be(self, kind: DeviceType) -> bool:
        """Whether a device of that kind could have these features.

        QEMU exits when a vhost-user-scsi device has the backend of another kind. It asks the
        backend of a disk for its size, which is in the configuration space. It also exits when a
        backend of a disk that offers its block size is used for a network.
        """
        own = self.features & _DEVICE_FEATURES
        match kind:
            case DeviceType.VHOST_USER_SCSI:
                return not own & ~_SCSI_FEATURES
            case DeviceType.VHOST_USER_BLK:
                return self.has_config
            case DeviceType.VHOST_USER_NET:
                return not (self.has_config and self.features >> _BLK_F_BLK_SIZE & 1)
            case _:
                return True


class VhostUserSocket(NamedTuple):
    """The socket of a process that serves a device: a disk, a network, a directory.

    `devnum` is the number that stands for it in the vhost-user store; None when the request named
    the socket itself. `backend` are the features of the process, None before it was asked.
    `file_id` is the file at that path (see `vmplug.host.file_id`), None where there is none.
    """

    kind: DeviceType
    socket_path: str
    found_by: FoundBy = FoundBy.VHOST_USER_STORE
    devnum: DevNum | None = None
    backend: "Backend | None" = None
    file_id: str | None = None

    @property
    def host_path(self) -> str:
        """What QEMU connects to."""
        return self.socket_path

    @property
    def identity(self) -> Identity:
        """Kind and number, or the socket's canonical path."""
        if self.devnum:
            return Identity.of_block(self.devnum)
        return Identity(IdentityKind.SOCKET, self.socket_path)

    @property
    def related_identities(self) -> tuple[Identity, ...]:
        """Empty: the device that the process serves is unknown."""
        return ()
