"""Block devices and disk images as disks: their options, their drive, their place."""

import os
from collections.abc import Collection, Iterator, Mapping
from shlex import quote
from typing import Self

import msgspec

from vmplug.drivers.disk_limits import check_limits
from vmplug.drivers.format import check_format, opens_others
from vmplug.drivers.free_places import (
    ccw_places,
    cold_plug_only,
    memory_slot,
    mmio_places,
    more_places,
    pci_places,
    scsi_places,
)
from vmplug.drivers.options import Option, number, parse_options, switch, text, word
from vmplug.drivers.place import (
    CcwPlace,
    MemorySlot,
    MmioPlace,
    PciPlace,
    Place,
    Places,
    PlugMode,
    ScsiPlace,
)
from vmplug.drivers.plug import Aio, BlockDrive, Cache, DiskFrontend, ErrorAction, Throttle
from vmplug.drivers.pmem import NVDIMM_OPTIONS, check_nvdimm, is_pmem
from vmplug.drivers.ports import NewPlug
from vmplug.errors import CannotPlug, NoFreePort, SpecError
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.formats import ImageFormat
from vmplug.host.block.qcow2 import ImageFile
from vmplug.host.device import HostDevice
from vmplug.host.finding import Code, Finding, Severity

_SECTOR_BYTES = 512
"""What QEMU takes too, for a device of which the host says nothing."""
_LOCALLY_ASSIGNED = 3 << 60
_SERIAL_BYTES_MAX = 20
_SCSI_SERIAL_BYTES_MAX = 36
"""virtio-blk silently truncates a serial at 20 bytes. Source: virtio specification, 5.2.6;
QEMU hw/scsi/scsi-disk.c."""


class BlockDiskDriver(msgspec.Struct, frozen=True, kw_only=True):
    """`driver_options` of a disk, checked.

    None leaves the choice to vmplug: `driver` by what the VM offers, `cache` and `aio` by what the
    file supports, `serial` the device id; or to QEMU: `werror` and `rerror`. An unset `format` is
    raw: a guest can write any header into a raw disk, so vmplug never guesses from contents.
    """

    driver: DiskFrontend | None = None
    format: ImageFormat | None = None
    cache: Cache | None = None
    aio: Aio | None = None
    discard: bool = False
    share_rw: bool = False
    serial: str | None = None
    iothread: bool = False
    throttle: Throttle | None = None
    werror: ErrorAction | None = None
    rerror: ErrorAction | None = None
    fs_type: str | None = None

    def __post_init__(self) -> None:
        if self.aio is Aio.NATIVE and self.cache and not self.cache.direct:
            raise SpecError(
                "option aio",
                f"native does not work with cache={self.cache}",
                hint="set cache=none or cache=directsync, or aio=io_uring",
            )
        _check_fits(self, self.driver)
        _check_limits(self.throttle or Throttle())

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> Self:
        """The options by their names in `OPTIONS`; SpecError names the one that is wrong."""
        values = parse_options(options, OPTIONS, "a disk")
        limits = {key: values.pop(key) for key in Throttle.__struct_fields__ if key in values}
        return cls(**values, throttle=Throttle(**limits) if limits else None)

    def check(
        self,
        device: HostDevice,
        *,
        read_only: bool,
    ) -> Iterator[Finding]:
        """See Driver."""
        assert isinstance(device, BlockDevice | DiskFile)
        if self.driver_of(device) is DiskFrontend.NVDIMM:
            return check_nvdimm(device, self.format, read_only=read_only)
        return check_disk(device, self, read_only=read_only)

    def driver_of(self, device: BlockDevice | DiskFile) -> DiskFrontend | None:
        """The given driver, or the one that the device or another option implies."""
        if self.driver is None and isinstance(device, DiskFile) and is_pmem(device):
            return DiskFrontend.NVDIMM
        if self.driver is None and self.iothread:
            return DiskFrontend.VIRTIO_BLOCK
        return self.driver

    def choose_place(self, device: HostDevice, offer: Places, taken: Collection[str]) -> Place:
        """See Driver."""
        assert isinstance(device, BlockDevice | DiskFile)
        return choose_place(offer, self.driver_of(device), taken)[1]

    def plan(self, new: NewPlug, place: Place, offer: Places) -> BlockDrive:  # noqa: ARG002
        """See Driver."""
        assert isinstance(new.device, BlockDevice | DiskFile)
        driver = _DRIVER_AT.get(type(place)) or self.driver_of(new.device)
        driver = driver or DiskFrontend.VIRTIO_BLOCK  # of a lease: the VMM chooses
        return plan_drive(new.id, new.device, self, read_only=new.read_only, driver=driver)


_DRIVER_AT = {
    PciPlace: DiskFrontend.VIRTIO_BLOCK,
    ScsiPlace: DiskFrontend.VIRTIO_SCSI,
    CcwPlace: DiskFrontend.VIRTIO_BLOCK_CCW,
    MmioPlace: DiskFrontend.VIRTIO_MMIO,
    MemorySlot: DiskFrontend.NVDIMM,
}


def _check_fits(options: BlockDiskDriver, driver: DiskFrontend | None) -> None:
    if options.iothread and driver is DiskFrontend.VIRTIO_SCSI:
        raise SpecError(
            "option iothread",
            "a SCSI disk runs in the iothread of its controller",
            hint="set block-driver=virtio-blk, or leave iothread out",
        )
    if driver is DiskFrontend.NVDIMM:
        said = [key for key, option in OPTIONS.items() if _is_said(options, option.field)]
        for key in said:
            if key not in NVDIMM_OPTIONS:
                raise SpecError(
                    f"option {key}",
                    "does not apply to an NVDIMM, which the guest maps directly",
                    hint="leave it out, or set block-driver=virtio-blk",
                )


def _is_said(options: BlockDiskDriver, field: str) -> bool:
    owner = options.throttle if field in Throttle.__struct_fields__ else options
    return owner is not None and bool(getattr(owner, field))


def _check_limits(limits: Throttle) -> None:
    """A total excludes its parts. Source: QEMU util/throttle.c, throttle_is_valid."""
    if limits.bps_total and (limits.bps_read or limits.bps_write):
        raise SpecError("option bps-total", "cannot be combined with bps-read or bps-write")
    if limits.iops_total and (limits.iops_read or limits.iops_write):
        raise SpecError("option iops-total", "cannot be combined with iops-read or iops-write")


_LIMIT_MAX = 10**15
"""Source: QEMU include/qemu/throttle.h, THROTTLE_VALUE_MAX."""


_LIMITS = {
    name: Option(name.replace("-", "_"), number(1, _LIMIT_MAX), f"limit of {what} a second")
    for name, what in (
        ("bps-total", "bytes"),
        ("bps-read", "bytes read"),
        ("bps-write", "bytes written"),
        ("iops-total", "operations"),
        ("iops-read", "reads"),
        ("iops-write", "writes"),
    )
}

OPTIONS: Mapping[str, Option] = {
    "block-driver": Option(
        "driver", word(*DiskFrontend), f"{', '.join(DiskFrontend)}; default: per VM"
    ),
    "format": Option("format", word(*ImageFormat), "raw (default) or qcow2"),
    "cache": Option(
        "cache",
        word(*Cache),
        "none (default if possible), writeback, writethrough, directsync or unsafe",
    ),
    "aio": Option("aio", word(*Aio), "native, io_uring or threads; default: depends on cache"),
    "discard": Option("discard", switch("unmap", "ignore"), "unmap or ignore (default)"),
    "share-rw": Option(
        "share_rw", switch("on", "off"), "on if others write to it too; default: off"
    ),
    "serial": Option(
        "serial", text, "the serial number that the guest sees; default: the device id"
    ),
    "iothread": Option(
        "iothread", switch("on", "off"), "on for a thread of its own; default: off"
    ),
    "werror": Option(
        "werror",
        word(ErrorAction.ENOSPC, ErrorAction.STOP, ErrorAction.REPORT),
        "when a write fails: stop, report, or (default) enospc: stop on a full disk",
    ),
    "rerror": Option(
        "rerror",
        word(ErrorAction.REPORT, ErrorAction.STOP),
        "when a read fails: report (default) or stop",
    ),
    "fstype": Option("fs_type", text, "the file system on it, for the agent"),
    **_LIMITS,
}
"""Every option of a disk, with one line of help."""


def check_disk(
    device: BlockDevice | DiskFile, options: BlockDiskDriver, *, read_only: bool = False
) -> Iterator[Finding]:
    """Reasons not to plug this disk with these options."""
    yield from check_format(device, options.format, read_only=read_only)
    yield from check_aio(device, options, read_only=read_only)
    if isinstance(device, BlockDevice):
        yield from check_limits(device, read_only=read_only)
        return
    yield from check_size(device, options, read_only=read_only)
    cache = options.cache or (Cache.NONE if options.aio is Aio.NATIVE else Cache.WRITEBACK)
    if cache.direct and not device.direct_io:
        yield Finding(
            Code.NO_DIRECT_IO,
            f"the file system of {device.host_path} does not support cache={cache}"
            + ("" if options.cache else ", which aio=native needs"),
            "leave cache and aio out, or set cache=writeback",
        )


def choose_io(
    device: BlockDevice | DiskFile, options: BlockDiskDriver, *, read_only: bool
) -> tuple[Cache, Aio]:
    """How QEMU does I/O: as the request says, else without the page cache where that works."""
    can = device.direct_io and not (
        isinstance(device, DiskFile) and _is_odd(device, options, read_only=read_only)
    )
    wants_direct = can or options.aio is Aio.NATIVE
    cache = options.cache or (Cache.NONE if wants_direct else Cache.WRITEBACK)
    native = cache.direct and device.has_aio
    return cache, options.aio or (Aio.NATIVE if native else Aio.THREADS)


def _is_odd(device: DiskFile, options: BlockDiskDriver, *, read_only: bool) -> bool:
    """Whether the file ends within a unit of direct I/O: then QEMU cannot write it directly."""
    is_raw = options.format is not ImageFormat.QCOW2  # an image grows by itself
    unit = device.direct_io_bytes
    return is_raw and not read_only and unit is not None and device.size_bytes % unit != 0


def check_size(
    device: DiskFile, options: BlockDiskDriver, *, read_only: bool
) -> Iterator[Finding]:
    """A file whose size does not fit direct I/O: another cache mode, if the request leaves it."""
    if not _is_odd(device, options, read_only=read_only):
        return
    cache, _ = choose_io(device, options, read_only=read_only)
    unit, size = device.direct_io_bytes, device.size_bytes
    why = f"{device.host_path} has {size} bytes, not a multiple of the {unit} of direct I/O"
    hint = f"truncate --size=%{unit} {_quoted(device.host_path)}"
    if cache.direct:
        hint += ", or leave cache and aio out"
        yield Finding(Code.ODD_SIZE, f"{why}: cache={cache} cannot write it", hint)
    elif options.cache is None:
        what = f"{why}: vmplug uses cache={cache}"
        yield Finding(Code.ODD_SIZE, what, hint, Severity.WARNING)


def check_aio(
    device: BlockDevice | DiskFile, options: BlockDiskDriver, *, read_only: bool
) -> Iterator[Finding]:
    """No context left for aio=native: QEMU uses threads, unless the request says native."""
    cache, _ = choose_io(device, options, read_only=read_only)
    if device.has_aio or not cache.direct or options.aio not in {None, Aio.NATIVE}:
        return
    hint = "raise fs.aio-max-nr (sysctl), or set aio=io_uring or aio=threads"
    why = f"the host has no AIO contexts left for {device.host_path} (fs.aio-nr, fs.aio-max-nr)"
    if options.aio is Aio.NATIVE:
        yield Finding(Code.NO_AIO_CONTEXT, f"{why}: QEMU would refuse aio=native", hint)
    else:
        what = f"{why}: vmplug uses aio=threads"
        yield Finding(Code.NO_AIO_CONTEXT, what, hint, Severity.WARNING)


def _wwn(device: BlockDevice | DiskFile) -> int:
    """A name of a disk for guests: another one for every disk, and the same whenever it comes.

    The way to it does not matter where the disk has a name of its own. The guest's is a locally
    assigned one (NAA 3), of 60 bits. Source: SPC-5, 7.7.6.6.
    """
    from hashlib import sha256  # noqa: PLC0415  5 ms that only a plan needs

    own = device.own_name if isinstance(device, BlockDevice) else None
    digest = sha256(os.fsencode(own or device.host_path)).digest()
    return _LOCALLY_ASSIGNED | int.from_bytes(digest[:8], "big") >> 4


def _quoted(path: str) -> str:
    return quote(path)


def plan_drive(
    device_id: str,
    device: BlockDevice | DiskFile,
    options: BlockDiskDriver,
    *,
    read_only: bool,
    driver: DiskFrontend,
) -> BlockDrive:
    """The drive to plug.

    SpecError when the serial is too long for the driver, or an iothread is not possible.
    """
    _check_fits(options, driver)
    image = _image_of(device)
    cache, aio = choose_io(device, options, read_only=read_only)
    serial = device_id if options.serial is None else options.serial
    wwn = _wwn(device)
    limit = _SERIAL_BYTES_MAX
    if driver is DiskFrontend.VIRTIO_SCSI:
        limit = _SCSI_SERIAL_BYTES_MAX
    if len(serial.encode()) > limit:
        raise SpecError("option serial", f"{serial!r} is longer than {limit} bytes")
    return BlockDrive(
        id=device_id,
        file=device.host_path,
        is_device=isinstance(device, BlockDevice),
        driver=driver,
        format=options.format or ImageFormat.RAW,
        backing=image.backing if image else None,
        data_file=image.data_file if image else None,
        read_only=read_only,
        share_rw=options.share_rw,
        cache=cache,
        aio=aio,
        aio_is_choice=options.aio is None,
        discard=options.discard,
        serial=serial,
        disk_id=options.serial or f"{wwn:016x}",
        wwn=wwn,
        sector_bytes=device.sector_bytes or _SECTOR_BYTES,
        physical_bytes=device.physical_bytes or _SECTOR_BYTES,
        iothread=options.iothread,
        throttle=options.throttle,
        werror=options.werror,
        rerror=options.rerror,
        size_bytes=device.size_bytes,
        file_id=device.file_id,
    )


def _image_of(device: BlockDevice | DiskFile) -> ImageFile | None:
    """What an image opens besides; CannotPlug where vmplug could not follow its header."""
    if isinstance(device, BlockDevice) or not opens_others(device):
        return None
    if device.image is None:
        raise CannotPlug(
            "unusable-image",
            f"{device.host_path} names other files that vmplug cannot check",
            hint="flatten it (qemu-img convert -O qcow2 OLD NEW)",
        )
    return device.image


def choose_place(
    offer: Places, driver: DiskFrontend | None, taken: Collection[str]
) -> tuple[DiskFrontend, Place]:
    """The lowest free place for a disk, and the driver for that place.

    `taken` are places, as text, that the journal has assigned. Without a `driver`, a place of its
    own (PCI, CCW, virtio-mmio) comes first and SCSI second. Raises NoFreePort and CannotPlug.
    """
    if driver is DiskFrontend.NVDIMM:
        return driver, memory_slot(offer, taken)
    _check_machine(offer, driver)
    for place in _places(offer, driver, taken):
        if str(place) not in taken:
            return _DRIVER_AT[type(place)], place
    raise _no_free_port(offer, driver)


def _places(offer: Places, driver: DiskFrontend | None, taken: Collection[str]) -> Iterator[Place]:
    for kind, places in (
        (DiskFrontend.VIRTIO_BLOCK, pci_places(offer, taken)),
        (DiskFrontend.VIRTIO_BLOCK_CCW, ccw_places(offer)),
        (DiskFrontend.VIRTIO_MMIO, mmio_places(offer)),
        (DiskFrontend.VIRTIO_SCSI, scsi_places(offer, taken)),
    ):
        if driver in {None, kind}:
            yield from places


def _check_machine(offer: Places, driver: DiskFrontend | None) -> None:
    """CannotPlug when this VM never has a place for the driver."""
    if driver is DiskFrontend.VIRTIO_MMIO and not offer.is_microvm:
        raise CannotPlug(
            "no-virtio-mmio",
            f"the VM ({offer.machine}) has no virtio-mmio transports",
            hint="start it with --machine microvm, or leave block-driver out",
        )
    if driver is DiskFrontend.VIRTIO_BLOCK_CCW and offer.ccw_used is None:
        raise CannotPlug(
            "no-channel-subsystem",
            f"the VM ({offer.machine}) has no channel subsystem, which s390 machines have",
            hint="leave block-driver out",
        )
    if driver is DiskFrontend.VIRTIO_BLOCK and _has_no_pci(offer):
        raise CannotPlug(
            "no-pci",
            f"the VM ({offer.machine}) has no PCI ports",
            hint="leave block-driver out",
        )
    may_be_mmio = driver in {None, DiskFrontend.VIRTIO_MMIO}
    if may_be_mmio and offer.mode is PlugMode.HOT and offer.is_microvm:
        raise cold_plug_only("a virtio-mmio disk")


def _has_no_pci(offer: Places) -> bool:
    return offer.is_microvm or (not offer.ports and offer.ccw_used is not None)


def _no_free_port(offer: Places, driver: DiskFrontend | None) -> NoFreePort:
    if driver is DiskFrontend.VIRTIO_SCSI:
        return NoFreePort(
            "the VM has no virtio-scsi controller with a free address",
            hint="start QEMU with a virtio-scsi-pci device, or set block-driver=virtio-blk",
        )
    what = "has no free PCI port left" if offer.ports else "has no PCI port to plug into"
    if driver is None and offer.controllers:
        what += " and no free SCSI address"
    return NoFreePort(
        f"the VM ({offer.machine}) {what}",
        hint=("set block-driver=virtio-scsi, " if driver and offer.controllers else "")
        + more_places(offer),
    )
