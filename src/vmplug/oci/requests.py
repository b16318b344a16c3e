"""Requests that OCI cannot express: PCI functions, networks, shared directories, randomness.

Separate from DeviceInfo, which is all that most requests need. They come from annotations of the
bundle (`vmplug.oci.annotations`), from the command line, or from a program.
"""

import re
from collections.abc import Mapping
from typing import ClassVar

import msgspec

from vmplug.arguments import check_fields
from vmplug.devnum import is_decimal
from vmplug.errors import SpecError
from vmplug.oci.info import DeviceInfo
from vmplug.oci.limits import NAME_BYTES_MAX, check_path, check_text

DESCRIPTOR_PREFIX = "fd:"

DEFAULT_SOURCE = "/dev/urandom"

_DESCRIPTOR_DIGITS = 9
"""A descriptor is a C int; nobody has so many."""

VFIO_DEVICE = (
    r"([0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]"
    r"|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    r"|/dev/vfio/([0-9]{1,9}|devices/vfio[0-9]{1,9}))\Z"
)

TAG_BYTES_MAX = 36
"""Longest mount tag of virtio-fs. Source: virtio specification, 5.11.4."""


class _ByName(msgspec.Struct, frozen=True, kw_only=True):
    driver_options: Mapping[str, str] = msgspec.field(default_factory=dict)

    def __hash__(self) -> int:
        """Without the options: a Struct would hash each field, and a dict has no hash."""
        names = (name for name in self.__struct_fields__ if name != "driver_options")
        return hash(tuple(getattr(self, name) for name in names))


class NetInfo(_ByName, frozen=True, kw_only=True):
    """A network device whose other end is a vhost-user backend listening on `socket_path`.

    `driver_options` are those of `vmplug.drivers.vhost_user`.
    """

    label: str
    socket_path: str
    read_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        _check_label("net", self.label)
        _check_source(self.name, self.socket_path)

    @property
    def name(self) -> str:
        """The name of the request: `net:eth0`."""
        return f"net:{self.label}"

    @property
    def description(self) -> str:
        """The device in a few words, for messages."""
        return f"vhost-user network {self.socket_path}"


class ShareInfo(_ByName, frozen=True, kw_only=True):
    """A directory of the host to share with the guest, which mounts it by its `tag`.

    `source` is the directory, the socket of a virtiofsd that another program runs, or `fd:N`, a
    connection to one that this process holds open. `driver_options` are those of
    `vmplug.drivers.share`.
    """

    tag: str
    source: str
    read_only: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        _check_label("share", self.tag)
        if len(self.tag.encode()) > TAG_BYTES_MAX:
            raise SpecError(self.name, f"a mount tag has at most {TAG_BYTES_MAX} bytes")
        if self.descriptor is None:
            _check_source(self.name, self.source)

    @property
    def descriptor(self) -> int | None:
        """The descriptor of `fd:N`; None for a path."""
        number = self.source.removeprefix(DESCRIPTOR_PREFIX)
        if number == self.source or not is_decimal(number) or len(number) > _DESCRIPTOR_DIGITS:
            return None
        return int(number)

    @property
    def name(self) -> str:
        """The name of the request: `share:work`."""
        return f"share:{self.tag}"

    @property
    def description(self) -> str:
        """The share in a few words, for messages."""
        return f"share of {self.source}"


class RngInfo(_ByName, frozen=True, kw_only=True):
    """A source of random numbers: a character device of the host such as /dev/urandom.

    `driver_options` are those of `vmplug.drivers.rng`.
    """

    label: str = "rng0"
    source: str = DEFAULT_SOURCE
    read_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        _check_label("rng", self.label)
        _check_source(self.name, self.source)

    @property
    def name(self) -> str:
        """The name of the request: `rng:rng0`."""
        return f"rng:{self.label}"

    @property
    def description(self) -> str:
        """The source in a few words, for messages."""
        return f"random numbers from {self.source}"


class VfioInfo(_ByName, frozen=True, kw_only=True):
    """A device to hand over through VFIO, with its whole IOMMU group.

    `device` is a PCI function's address (`0000:3b:00.0`), a mediated device's UUID, or a node
    below /dev/vfio. `driver_options` are those of `vmplug.drivers.vfio`.
    """

    label: str
    device: str
    read_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        _check_label("vfio", self.label)
        if not re.match(VFIO_DEVICE, self.device):
            raise SpecError(
                self.name,
                f"{self.device!r} is not a PCI address, a UUID or a VFIO node",
                hint="write 0000:3b:00.0, a UUID, /dev/vfio/26 or /dev/vfio/devices/vfio0; "
                "/dev/vfio/vfio is not a device",
            )

    @property
    def name(self) -> str:
        """The name of the request: `vfio:gpu0`."""
        return f"vfio:{self.label}"

    @property
    def description(self) -> str:
        """The device in a few words, for messages."""
        return f"VFIO device {self.device}"


Named = NetInfo | ShareInfo | RngInfo | VfioInfo
"""A request by name on the host, not by type and number."""

Request = DeviceInfo | Named
"""One device or share that a container requests."""


def _check_label(kind: str, label: str) -> None:
    if not label or not label.isprintable() or "/" in label:
        raise SpecError(f"{kind} {label!r}", "a name must be printable text without '/'")
    check_text(kind, label, NAME_BYTES_MAX)


def _check_source(name: str, path: str) -> None:
    if not path.startswith("/") or "\0" in path:
        raise SpecError(name, f"{path!r} is not an absolute path")
    check_path(name, path)
