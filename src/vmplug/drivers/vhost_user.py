"""Devices that another process serves: vhost-user disks, SCSI controllers and networks."""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Self

import msgspec

from vmplug.drivers.free_places import check_memory_regions, check_shared_memory, virtio_place
from vmplug.drivers.options import Option, number, parse_options, text
from vmplug.drivers.place import CcwPlace, Place, Places
from vmplug.drivers.plug import VhostUserDevice
from vmplug.drivers.ports import NewPlug
from vmplug.errors import CannotPlug
from vmplug.host.device import HostDevice
from vmplug.host.finding import Code, Finding
from vmplug.host.kind import DeviceType
from vmplug.host.vhost_user.device import VhostUserSocket

RECONNECT_S = 1
"""The default interval at which QEMU reconnects to a lost backend."""

_QUEUES_MAX = 256
_RECONNECT_MAX_S = 3600


def _mac(said: str) -> str:
    """A unicast address of six bytes in lower case."""
    mac = said.lower()
    if not re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", mac):
        raise ValueError("a MAC address such as 52:54:00:12:34:56")
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise ValueError("the address of one network card: it is a multicast address, or zero")
    return mac


_QUEUES = Option(
    "queues",
    number(1, _QUEUES_MAX),
    "request queues; default: as many as the backend and the VM both support",
)
_RECONNECT = Option(
    "reconnect_s",
    number(0, _RECONNECT_MAX_S),
    f"seconds between attempts to reconnect to a lost backend; 0: never; default: {RECONNECT_S}",
)
BLK_OPTIONS: Mapping[str, Option] = {
    "num-queues": _QUEUES,
    "reconnect": _RECONNECT,
    "fstype": Option("fs_type", text, "the file system on it, for the agent"),
}
SCSI_OPTIONS: Mapping[str, Option] = {"num-queues": _QUEUES}
NET_OPTIONS: Mapping[str, Option] = {
    "mac": Option("mac", _mac, "the guest's MAC address; default: a random one in 52:54:00"),
    "queues": Option("queues", number(1, _QUEUES_MAX), "pairs of queues; default: 1"),
    "reconnect": _RECONNECT,
}

OPTIONS: Mapping[DeviceType, Mapping[str, Option]] = {
    DeviceType.VHOST_USER_BLK: BLK_OPTIONS,
    DeviceType.VHOST_USER_SCSI: SCSI_OPTIONS,
    DeviceType.VHOST_USER_NET: NET_OPTIONS,
}


class VhostUserDriver(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a vhost-user device, checked; None leaves the choice to vmplug.

    A vhost-user-scsi device of QEMU 7.2 does not reconnect to its backend, so it has no option for
    it.
    """

    type: DeviceType
    queues: int | None = None
    reconnect_s: int | None = None
    mac: str | None = None
    fs_type: str | None = None

    @property
    def share_rw(self) -> bool:
        """Always false: a backend serves one VM."""
        return False

    @classmethod
    def parse(cls, kind: DeviceType, options: Mapping[str, str]) -> Self:
        """The options by their names in `OPTIONS`; SpecError names the one that is wrong."""
        return cls(type=kind, **parse_options(options, OPTIONS[kind], f"a {kind} device"))

    def check(self, device: HostDevice, *, read_only: bool) -> Iterator[Finding]:
        """See Driver."""
        assert isinstance(device, VhostUserSocket)
        backend = device.backend
        if backend is None:
            return
        if self.queues and self.queues > backend.queues:
            yield Finding(
                Code.TOO_MANY_QUEUES,
                f"the backend of {device.socket_path} serves {backend.queues} queues; the "
                f"request is for {self.queues}",
                "request fewer, or give the backend more",
            )
        is_blk = self.type is DeviceType.VHOST_USER_BLK
        if read_only and not (is_blk and backend.is_read_only):
            yield Finding(
                Code.CANNOT_BE_READ_ONLY,
                f"{device.socket_path} is requested read-only, and its backend lets the guest "
                "write",
                "make the backend serve it read-only (QEMU's storage daemon: writable=off), or "
                "request it writable",
            )
        if is_blk and backend.is_read_only and not read_only:
            yield Finding(
                Code.READ_ONLY_DEVICE,
                f"the backend of {device.socket_path} is read-only, and the request is for "
                "writing",
                "request it read-only, or make the backend serve it writable",
            )

    def choose_place(self, device: HostDevice, offer: Places, taken: Collection[str]) -> Place:
        """See Driver."""
        what = f"a {device.kind} device"
        check_shared_memory(offer, what)
        assert isinstance(device, VhostUserSocket)
        if device.backend and not device.backend.has_memory_slots:
            check_memory_regions(offer, taken, what)
        is_disk = self.type is DeviceType.VHOST_USER_BLK
        place = virtio_place(offer, taken, what, is_disk=is_disk)
        if isinstance(place, CcwPlace) and self.type is not DeviceType.VHOST_USER_NET:
            raise CannotPlug(
                "no-such-model",
                f"QEMU has no {self.type.removesuffix('-pci')} device for a channel subsystem",
                hint="attach the disk itself: its block device or its file",
            )
        return place

    def plan(self, new: NewPlug, place: Place, offer: Places) -> VhostUserDevice:  # noqa: ARG002
        """See Driver. Without KVM, QEMU 7.2 dies when a network driver starts with MSI-X."""
        device = new.device
        assert isinstance(device, VhostUserSocket)
        reconnect_s = RECONNECT_S if self.reconnect_s is None else self.reconnect_s
        is_net = self.type is DeviceType.VHOST_USER_NET
        return VhostUserDevice(
            id=new.id,
            type=self.type,
            socket_path=device.socket_path,
            file_id=device.file_id,
            queues=self._queues(device, offer),
            reconnect_s=0 if self.type is DeviceType.VHOST_USER_SCSI else reconnect_s,
            msix=offer.kvm or not is_net,
            mac_address=(self.mac or _drawn_mac()) if is_net else None,
        )

    def _queues(self, device: VhostUserSocket, offer: Places) -> int:
        """The given number; by default for a disk one per CPU, if the backend supports it."""
        if self.queues:
            return self.queues
        match self.type:
            case DeviceType.VHOST_USER_BLK | DeviceType.VHOST_USER_SCSI:
                return min(offer.cpus, device.backend.queues if device.backend else 1)
            case _:
                return 1


def _drawn_mac() -> str:
    """An address of QEMU's own range. Source: QEMU net/net.c, qemu_macaddr_default_if_unset."""
    return "52:54:00:" + os.urandom(3).hex(":")
