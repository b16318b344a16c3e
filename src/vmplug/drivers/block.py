"""Block devices and disk images as disks: their options, their drive, their place."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Self

from vmplug.address import ScsiAddress
from vmplug.drivers.base import (
    Aio,
    BlockDrive,
    BlockDriver,
    Cache,
    Offer,
    PciPlace,
    Place,
    ScsiPlace,
    Throttle,
)
from vmplug.errors import NoFreePort, SpecError
from vmplug.host.device import BlockDevice, DiskFile
from vmplug.host.image import ImageFormat
from vmplug.host.safety import Code, Finding

HOT_PLUGGED = (BlockDriver.VIRTIO_BLOCK, BlockDriver.VIRTIO_SCSI)

_SERIAL_BYTES = {BlockDriver.VIRTIO_BLOCK: 20, BlockDriver.VIRTIO_SCSI: 36}
"""virtio-blk cuts a serial at 20 bytes without a word. Source: virtio specification, 5.2.6;
QEMU hw/scsi/scsi-disk.c."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOptions:
    """`driver_options` of a disk, checked.

    None leaves the choice to vmplug: `driver` to what the VM offers, `cache` and `aio` to what the
    file can do, `serial` to the device id. An unstated `format` is raw: a guest can write any
    header into a raw disk, so contents are never guessed from.
    """

    driver: BlockDriver | None = None
    format: ImageFormat | None = None
    cache: Cache | None = None
    aio: Aio | None = None
    discard: bool = False
    share_rw: bool = False
    serial: str | None = None
    iothread: bool = False
    throttle: Throttle | None = None

    def __post_init__(self) -> None:
        if self.driver not in {None, *HOT_PLUGGED}:
            raise SpecError(
                "option block-driver",
                f"{self.driver} cannot be hot-plugged",
                hint="say " + " or ".join(HOT_PLUGGED),
            )
        if self.aio is Aio.NATIVE and self.cache and not self.cache.direct:
            raise SpecError(
                "option aio",
                f"native does not work with cache={self.cache}",
                hint="say cache=none or cache=directsync, or aio=io_uring",
            )
        _check_iothread(self, self.driver)
        _check_limits(self.throttle or Throttle())

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> Self:
        """The options by their names in `OPTIONS`; SpecError names the one that is wrong."""
        values: dict[str, Any] = {}
        limits: dict[str, Any] = {}
        for key, text in options.items():
            option = OPTIONS.get(key)
            if option is None:
                hint = "known are " + ", ".join(OPTIONS)
                raise SpecError(f"option {key}", "unknown for a disk", hint=hint)
            target = limits if key in _LIMITS else values
            try:
                target[option.field] = option.parse(text)
            except ValueError as error:
                raise SpecError(f"option {key}", f"{text!r} is not {error}") from None
        return cls(**values, throttle=Throttle(**limits) if limits else None)


def _check_iothread(options: BlockOptions, driver: BlockDriver | None) -> None:
    if options.iothread and driver is BlockDriver.VIRTIO_SCSI:
        raise SpecError(
            "option iothread",
            "a SCSI disk runs in the iothread of its controller",
            hint="say block-driver=virtio-blk, or leave iothread out",
        )


def _check_limits(limits: Throttle) -> None:
    """A total does not go beside its parts. Source: QEMU util/throttle.c, throttle_is_valid."""
    if limits.bps_total and (limits.bps_read or limits.bps_write):
        raise SpecError("option bps-total", "does not go with bps-read or bps-write")
    if limits.iops_total and (limits.iops_read or limits.iops_write):
        raise SpecError("option iops-total", "does not go with iops-read or iops-write")


class _Option(NamedTuple):
    field: str
    parse: Callable[[str], object]
    help: str


def _word(*words: StrEnum) -> Callable[[str], StrEnum]:
    def parse(text: str) -> StrEnum:
        for word in words:
            if word == text:
                return word
        raise ValueError(f"one of {', '.join(words)}")

    return parse


def _switch(on: str, off: str) -> Callable[[str], bool]:
    def parse(text: str) -> bool:
        if text not in {on, off}:
            raise ValueError(f"{on} or {off}")
        return text == on

    return parse


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LIMIT_MAX = 10**15
"""Source: QEMU include/qemu/throttle.h, THROTTLE_VALUE_MAX."""


def _limit(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,15})([KMG]?)", text)
    limit = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < limit <= _LIMIT_MAX:
        raise ValueError("a number from 1 to 10^15, with K, M or G if need be")
    return limit


def _serial(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("printable text")
    return text


_LIMITS = {
    name: _Option(name.replace("-", "_"), _limit, f"limit of {what} a second")
    for name, what in (
        ("bps-total", "bytes"),
        ("bps-read", "bytes read"),
        ("bps-write", "bytes written"),
        ("iops-total", "operations"),
        ("iops-read", "reads"),
        ("iops-write", "writes"),
    )
}

OPTIONS: Mapping[str, _Option] = {
    "block-driver": _Option(
        "driver", _word(*HOT_PLUGGED), "virtio-blk or virtio-scsi; default: what the VM offers"
    ),
    "format": _Option("format", _word(*ImageFormat), "raw (default) or qcow2"),
    "cache": _Option(
        "cache",
        _word(*Cache),
        "none (default if possible), writeback, writethrough, directsync or unsafe",
    ),
    "aio": _Option("aio", _word(*Aio), "native, io_uring or threads; default: by the cache"),
    "discard": _Option("discard", _switch("unmap", "ignore"), "unmap or ignore (default)"),
    "share-rw": _Option("share_rw", _switch("on", "off"), "others write to it too: on or off"),
    "serial": _Option("serial", _serial, "what the guest sees; default: the device id"),
    "iothread": _Option("iothread", _switch("on", "off"), "a thread of its own: on or off"),
    **_LIMITS,
}
"""Every option of a disk, with one line of help."""


def check_disk(device: BlockDevice | DiskFile, options: BlockOptions) -> Iterator[Finding]:
    """What speaks against plugging this disk with these options."""
    if isinstance(device, BlockDevice):
        if options.format is ImageFormat.QCOW2:
            yield Finding(
                Code.NOT_THAT_FORMAT,
                f"{device.host_path} is a block device, and format=qcow2 is for regular files",
                "hand it over as raw",
            )
        return
    header = device.qcow2
    if header and options.format is None:
        yield Finding(
            Code.FORMAT_NOT_STATED,
            f"{device.host_path} begins like a qcow2 image, but the format is not stated",
            "say format=qcow2, or format=raw if the guest is to see the very bytes of the file",
        )
    if options.format is ImageFormat.QCOW2 and header is None:
        yield Finding(
            Code.NOT_THAT_FORMAT,
            f"{device.host_path} is not a qcow2 image",
            "say format=raw, or name the right file (qemu-img info tells)",
        )
    if options.format is ImageFormat.QCOW2 and header and _opens_others(device):
        yield Finding(
            Code.HAS_BACKING_FILE,
            f"{device.host_path} makes QEMU open another file: "
            + (header.backing_file or "its external data file"),
            "flatten it (qemu-img rebase -b ''), or allow it if you made the image yourself",
        )
    cache = options.cache or (Cache.NONE if options.aio is Aio.NATIVE else Cache.WRITEBACK)
    if cache.direct and not device.direct_io:
        yield Finding(
            Code.NO_DIRECT_IO,
            f"the file system of {device.host_path} cannot do cache={cache}"
            + ("" if options.cache else ", which aio=native needs"),
            "leave cache and aio out, or say cache=writeback",
        )


def _opens_others(device: DiskFile) -> bool:
    return device.qcow2 is not None and bool(
        device.qcow2.backing_file or device.qcow2.external_data
    )


def plan_drive(
    device_id: str,
    device: BlockDevice | DiskFile,
    options: BlockOptions,
    *,
    read_only: bool,
    driver: BlockDriver,
) -> BlockDrive:
    """The drive to plug.

    SpecError when the serial is too long for the driver, or there can be no iothread.
    """
    _check_iothread(options, driver)
    cache = options.cache
    if cache is None:
        wants_direct = device.direct_io or options.aio is Aio.NATIVE
        cache = Cache.NONE if wants_direct else Cache.WRITEBACK
    serial = device_id if options.serial is None else options.serial
    if len(serial.encode()) > _SERIAL_BYTES[driver]:
        limit = _SERIAL_BYTES[driver]
        raise SpecError("option serial", f"{serial!r} is longer than {limit} bytes")
    return BlockDrive(
        id=device_id,
        file=device.host_path,
        is_device=isinstance(device, BlockDevice),
        driver=driver,
        format=options.format or ImageFormat.RAW,
        backing_allowed=isinstance(device, DiskFile) and _opens_others(device),
        read_only=read_only,
        share_rw=options.share_rw,
        cache=cache,
        aio=options.aio or (Aio.NATIVE if cache.direct else Aio.THREADS),
        discard=options.discard,
        serial=serial,
        sector_bytes=device.sector_bytes,
        iothread=options.iothread,
        throttle=options.throttle,
    )


def choose_place(
    offer: Offer, driver: BlockDriver | None, taken: Collection[str]
) -> tuple[BlockDriver, Place]:
    """The lowest free place for a disk, and the driver that it means.

    `taken` are places, as text, that the journal has given away. Without a wish, a PCI port comes
    first and SCSI second. Raises NoFreePort.
    """
    if driver is not BlockDriver.VIRTIO_SCSI:
        for pci in _pci_places(offer):
            if str(pci) not in taken:
                return BlockDriver.VIRTIO_BLOCK, pci
    if driver is not BlockDriver.VIRTIO_BLOCK:
        for scsi in _scsi_places(offer):
            if str(scsi) not in taken:
                return BlockDriver.VIRTIO_SCSI, scsi
    raise _no_free_port(offer, driver)


def _pci_places(offer: Offer) -> Iterator[PciPlace]:
    for port in offer.ports:
        for slot in port.free:
            yield PciPlace(bus=port.bus, slot=slot, path=port.path.child(slot))


def _scsi_places(offer: Offer) -> Iterator[ScsiPlace]:
    for controller in offer.controllers:
        for index in range(1 << 16):
            address = ScsiAddress.from_index(index)
            if address not in controller.used:
                yield ScsiPlace(bus=controller.bus, address=address, path=controller.path)


def _no_free_port(offer: Offer, driver: BlockDriver | None) -> NoFreePort:
    if driver is BlockDriver.VIRTIO_SCSI:
        return NoFreePort(
            "the VM has no virtio-scsi controller with a free address",
            hint="start QEMU with a virtio-scsi-pci device, or say block-driver=virtio-blk",
        )
    what = "has no free PCI port left" if offer.ports else "has no PCI port to plug into"
    if driver is None and offer.controllers:
        what += " and no free SCSI address"
    return NoFreePort(
        f"the VM ({offer.machine}) {what}",
        hint=("say block-driver=virtio-scsi, " if driver and offer.controllers else "")
        + "detach something, or start it with more ports (vmplug vm start --ports N)",
    )
