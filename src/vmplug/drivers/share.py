"""Directories shared with the guest: virtio-fs, which a virtiofsd serves, and virtio-9p."""

from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from typing import Self

import msgspec

from vmplug.drivers.free_places import check_shared_memory, cold_plug_only, virtio_place
from vmplug.drivers.options import Option, number, parse_options, power_of_two, word
from vmplug.drivers.place import Place, Places, PlugMode
from vmplug.drivers.plug import SharedFS, VhostUserDevice, VirtiofsdSpec
from vmplug.drivers.ports import NewPlug
from vmplug.errors import SpecError
from vmplug.host.device import HostDevice, OpenConnection, SharedDirectory
from vmplug.host.finding import Code, Finding
from vmplug.host.kind import DeviceType, SharedFilesystem
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.host.vhost_user.virtiofsd import Virtiofsd


class ShareCache(StrEnum):
    """How much the guest may cache of what it has read; `none` is an old name for never.

    Source: virtiofsd(1), -o cache and --cache.
    """

    NONE = "none"
    NEVER = "never"
    AUTO = "auto"
    ALWAYS = "always"


QUEUE_SIZE = 1024
_QUEUE_SIZE_MAX = 1024
"""Source: virtio specification, 2.6; QEMU hw/virtio/vhost-user-fs.c, VIRTQUEUE_MAX_SIZE."""
_CACHE_SIZE_MAX_MIB = 1 << 20
_NOT_IN_OPTIONS = frozenset(",=\\")
"""The virtiofsd in Rust splits `-o source=...` at each comma, without an escape; its --shared-dir
accepts any name. The one of QEMU, which lists `-o source`, parses it like libfuse.
Source: virtiofsd src/main.rs, parse_compat."""
_ANY_NAME = frozenset({"--shared-dir", "-o source"})
_TAG_9P_BYTES_MAX = 31
"""Source: QEMU hw/9pfs/9p.h, MAX_TAG_LEN."""

OPTIONS: Mapping[str, Option] = {
    "filesystem": Option(
        "filesystem", word(*SharedFilesystem), "virtio-fs (default), or virtio-9p: cold plug only"
    ),
    "cache": Option(
        "cache", word(*ShareCache), "virtio-fs: auto (default), always, or never (also: none)"
    ),
    "cache-size": Option(
        "cache_size_mib",
        number(0, _CACHE_SIZE_MAX_MIB),
        "virtio-fs: MiB of a DAX window, if QEMU supports it; default: 0, none",
    ),
    "queue-size": Option(
        "queue_size", power_of_two(1, _QUEUE_SIZE_MAX), f"virtio-fs: default {QUEUE_SIZE}"
    ),
}


class ShareDriver(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a share, checked; None leaves the choice to vmplug."""

    tag: str
    filesystem: SharedFilesystem = SharedFilesystem.VIRTIO_FS
    cache: ShareCache | None = None
    cache_size_mib: int = 0
    queue_size: int | None = None

    @property
    def share_rw(self) -> bool:
        """Always true: the server of a file system coordinates its writers."""
        return True

    @classmethod
    def parse(cls, tag: str, device: HostDevice | None, options: Mapping[str, str]) -> Self:
        """The options by their names in `OPTIONS`; SpecError names the one that is wrong."""
        parsed = cls(tag=tag, **parse_options(options, OPTIONS, "a share"))
        is_9p = parsed.filesystem is SharedFilesystem.VIRTIO_9P
        if is_9p and (parsed.cache or parsed.cache_size_mib or parsed.queue_size):
            raise SpecError(
                "option filesystem",
                "virtio-9p has no cache, cache-size or queue-size",
                hint="leave them out, or set filesystem=virtio-fs",
            )
        if is_9p and len(tag.encode()) > _TAG_9P_BYTES_MAX:
            raise SpecError(
                "option filesystem",
                f"the tag {tag!r} is longer than the {_TAG_9P_BYTES_MAX} bytes that virtio-9p "
                "allows",
            )
        if isinstance(device, VhostUserSocket | OpenConnection):
            if is_9p:
                raise SpecError("option filesystem", "virtio-9p shares a directory, not a socket")
            if parsed.cache:
                raise SpecError(
                    "option cache",
                    f"belongs to the virtiofsd behind {device.host_path}, which is already "
                    "running",
                    hint="start that virtiofsd with this option, or share the directory itself",
                )
        return parsed

    def check(self, device: HostDevice, *, read_only: bool) -> Iterator[Finding]:
        """See Driver."""
        if isinstance(device, VhostUserSocket | OpenConnection):
            if read_only:
                yield Finding(
                    Code.CANNOT_BE_READ_ONLY,
                    f"{device.host_path} is requested read-only, and only its virtiofsd can "
                    "enforce that",
                    "start that virtiofsd on a read-only mount, or share the directory itself",
                )
            return
        assert isinstance(device, SharedDirectory)
        if device.read_only and not read_only:
            yield Finding(
                Code.READ_ONLY_DEVICE,
                f"the file system of {device.host_path} is read-only, and the request is for "
                "writing",
                "request it read-only, or remount it for writing",
            )
        if device.kind is DeviceType.VHOST_USER_FS:
            yield from _check_virtiofsd(device)

    def choose_place(self, device: HostDevice, offer: Places, taken: Collection[str]) -> Place:
        """See Driver."""
        if device.kind is DeviceType.VIRTIO_9P:
            if offer.mode is PlugMode.HOT:
                raise cold_plug_only("a virtio-9p share")
            return virtio_place(offer, taken, "a virtio-9p share")
        check_shared_memory(offer, "a virtio-fs share")
        return virtio_place(offer, taken, "a virtio-fs share")

    def plan(self, new: NewPlug, place: Place, offer: Places) -> VhostUserDevice | SharedFS:  # noqa: ARG002
        """See Driver."""
        device = new.device
        if device.kind is DeviceType.VIRTIO_9P:
            return SharedFS(
                id=new.id,
                directory=device.host_path,
                tag=self.tag,
                read_only=new.read_only,
                file_id=device.file_id if isinstance(device, SharedDirectory) else None,
            )
        return VhostUserDevice(
            id=new.id,
            type=DeviceType.VHOST_USER_FS,
            socket_path=device.host_path if isinstance(device, VhostUserSocket) else None,
            descriptor=device.descriptor if isinstance(device, OpenConnection) else None,
            daemon=self._daemon(device, read_only=new.read_only),
            file_id=device.file_id if isinstance(device, VhostUserSocket) else None,
            tag=self.tag,
            queue_size=self.queue_size or QUEUE_SIZE,
            cache_size_mib=self.cache_size_mib,
        )

    def _daemon(self, device: HostDevice, *, read_only: bool) -> VirtiofsdSpec | None:
        if not isinstance(device, SharedDirectory) or device.virtiofsd is None:
            return None
        cache = self.cache or ShareCache.AUTO
        return VirtiofsdSpec(
            program=device.virtiofsd.path,
            options=device.virtiofsd.options or frozenset(),
            directory=device.host_path,
            cache=ShareCache.NEVER if cache is ShareCache.NONE else cache,
            read_only=read_only,
            file_id=device.file_id,
        )


def _check_virtiofsd(device: SharedDirectory) -> Iterator[Finding]:
    program = device.virtiofsd
    if program is None:
        yield Finding(
            Code.NO_BACKEND,
            f"no virtiofsd is installed to share {device.host_path}",
            "on Debian 12: apt install qemu-system-common, later: apt install virtiofsd",
        )
    elif _NOT_IN_OPTIONS & set(device.host_path) and not _takes_any_name(program):
        yield Finding(
            Code.NO_BACKEND,
            f"{program.path} would read part of the name {device.host_path} as options",
            "share the directory above it, or give it a name without ',', '=' and '\\'",
        )


def _takes_any_name(program: Virtiofsd) -> bool:
    """Also true for one on another root, which vmplug does not run and cannot ask."""
    return program.options is None or bool(program.options & _ANY_NAME)
