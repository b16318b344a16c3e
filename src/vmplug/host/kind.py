"""The kinds of device, and how a request names one."""

from enum import StrEnum


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


class SharedFilesystem(StrEnum):
    """How a directory is shared, in the words of Kata's config.go."""

    VIRTIO_9P = "virtio-9p"
    VIRTIO_FS = "virtio-fs"


class FoundBy(StrEnum):
    """Where the host path comes from."""

    SYSFS = "sysfs"
    VHOST_USER_STORE = "vhost-user-store"
    CONTAINER_PATH = "container-path"
    BACKING_FILE = "backing-file"
    FILE = "file"
