"""Addresses and names in QEMU, each checked once and then carried as a value.

Bdf names a PCI function of the host. PciSlot and PciPath say where a PCI device sits in the guest,
ScsiAddress is `id:lun`, CcwDevNo a device number of the s390 channel subsystem. `parse` reads what
`str()` writes.
"""

import os
import re
from typing import Self

import msgspec

from vmplug.devnum import is_decimal

NODE_NAME_MAX = 31
"""Longest node-name of the block graph. Source: QEMU include/block/block_int-common.h."""

QEMU_ID_PREFIX = "vmplug-"
JOURNAL_ID_DIGITS = 6

PERIPHERAL = "/machine/peripheral"
"""Where QEMU keeps devices that have an id. Source: QEMU docs/devel/qom.rst."""


_BDF = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([01][0-9a-f])\.([0-7])\Z", re.ASCII)
_SHORT_BDF = r"[0-9a-f]{2}:[01][0-9a-f]\.[0-7]\Z"


class Bdf(msgspec.Struct, frozen=True, order=True):
    """The address of a PCI function of the host, `0000:3b:00.1`; they sort as the bus does.

    A domain behind an Intel VMD has five digits and more. Source: `%04x:%02x:%02x.%d`, Linux
    drivers/pci/probe.c, pci_setup_device.
    """

    domain: int
    bus: int
    slot: int
    function: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The full form in lower case, as sysfs has it; ValueError for anything else."""
        match = _BDF.match(text)
        if match is None or (len(match[1]) > 4 and match[1][0] == "0"):
            raise ValueError(f"{text!r} is not DOMAIN:BUS:SLOT.FUNCTION, such as 0000:3b:00.1")
        return cls(int(match[1], 16), int(match[2], 16), int(match[3], 16), int(match[4]))

    @classmethod
    def parse_written(cls, text: str) -> Self:
        """As people write it too: in any case, and `3b:00.1` for domain 0000, as lspci(8) does.

        ValueError for anything else.
        """
        written = text.lower()
        return cls.parse(f"0000:{written}" if re.match(_SHORT_BDF, written) else written)

    @property
    def device(self) -> tuple[int, int, int]:
        """Domain, bus and slot: the same for all functions of one device."""
        return self.domain, self.bus, self.slot

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.slot:02x}.{self.function}"


class PciSlot(msgspec.Struct, frozen=True):
    """A device's place on one PCI bus: slot 0..31, function 0..7.

    Written `1f`, or `1f.7` for a function other than 0, as Kata's agent reads it.
    """

    slot: int
    function: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.slot <= 0x1F:
            raise ValueError(f"PCI slot {self.slot:#x} is not in 0..0x1f")
        if not 0 <= self.function <= 7:
            raise ValueError(f"PCI function {self.function} is not in 0..7")

    @classmethod
    def parse(cls, text: str) -> Self:
        """`2`, `02` or `02.1`, hexadecimal; ValueError for anything else."""
        slot, dot, function = text.partition(".")
        if not (_is_hex(slot) and len(slot) <= 2 and (not dot or is_decimal(function))):
            raise ValueError(f"{text!r} is not a PCI slot")
        return cls(int(slot, 16), int(function) if dot else 0)

    @classmethod
    def from_devfn(cls, devfn: int) -> Self:
        """The kernel's and QEMU's packed form, `slot << 3 | function`."""
        return cls(devfn >> 3, devfn & 7)

    def __str__(self) -> str:
        return f"{self.slot:02x}" + (f".{self.function}" if self.function else "")


class PciPath(msgspec.Struct, frozen=True):
    """Slots from a root bus of the guest down to a device, `02/00`.

    Slots are stable; the guest chooses the numbers of the buses behind them, so no path contains
    one. `root_bus` is 0 except behind an expander (pxb-pcie), whose number is on QEMU's command
    line: `20:00/00`.
    """

    slots: tuple[PciSlot, ...]
    root_bus: int = 0

    def __post_init__(self) -> None:
        if not self.slots:
            raise ValueError("a PCI path has at least one slot")
        if not 0 <= self.root_bus <= 0xFF:
            raise ValueError(f"bus {self.root_bus:#x} is not in 0..0xff")

    @classmethod
    def parse(cls, text: str) -> Self:
        """`02/00` or `20:00/00`; ValueError for an empty path or component."""
        bus, colon, slots = text.rpartition(":")
        if colon and not (_is_hex(bus) and len(bus) == 2):
            raise ValueError(f"{text!r} is not a PCI path")
        parsed = tuple(PciSlot.parse(part) for part in slots.split("/"))
        return cls(parsed, int(bus, 16) if colon else 0)

    def child(self, slot: PciSlot) -> "PciPath":
        """The path of the device in `slot` behind this bridge."""
        return PciPath((*self.slots, slot), self.root_bus)

    def __str__(self) -> str:
        bus = f"{self.root_bus:02x}:" if self.root_bus else ""
        return bus + "/".join(map(str, self.slots))


class ScsiAddress(msgspec.Struct, frozen=True):
    """`id:lun` on a virtio-scsi controller, each 0..255.

    QEMU takes luns up to 16383, but the guest shows a lun of 256 and more as lun + 16384.
    """

    scsi_id: int
    lun: int

    def __post_init__(self) -> None:
        if not 0 <= self.scsi_id <= 0xFF:
            raise ValueError(f"SCSI id {self.scsi_id} is not in 0..255")
        if not 0 <= self.lun <= 0xFF:
            raise ValueError(f"SCSI lun {self.lun} is not in 0..255")

    @classmethod
    def parse(cls, text: str) -> Self:
        """`0:3`; ValueError for anything else."""
        scsi_id, colon, lun = text.partition(":")
        if not (colon and is_decimal(scsi_id) and is_decimal(lun)):
            raise ValueError(f"{text!r} is not ID:LUN")
        return cls(int(scsi_id), int(lun))

    @classmethod
    def from_index(cls, index: int) -> Self:
        """The index-th address of a controller, 0..65535, luns first."""
        if not 0 <= index <= 0xFFFF:
            raise ValueError(f"SCSI index {index} is not in 0..65535")
        return cls(index >> 8, index & 0xFF)

    @property
    def index(self) -> int:
        """Its number among the addresses of a controller: the inverse of `from_index`."""
        return self.scsi_id << 8 | self.lun

    def __str__(self) -> str:
        return f"{self.scsi_id}:{self.lun}"


class CcwDevNo(msgspec.Struct, frozen=True):
    """A device of the channel subsystem as the guest names it, `0.2.0005`: ssid 0..3, number.

    QEMU puts virtual devices into css 0xfe, which the guest sees as its css 0; other numbers abort
    it. Source: QEMU hw/s390x/css.c, docs/system/s390x/css.rst.
    """

    ssid: int
    devno: int

    def __post_init__(self) -> None:
        if not 0 <= self.ssid <= 3:
            raise ValueError(f"subchannel set {self.ssid} is not in 0..3")
        if not 0 <= self.devno <= 0xFFFF:
            raise ValueError(f"device number {self.devno:#x} is not in 0..0xffff")

    @classmethod
    def parse(cls, text: str) -> Self:
        """`0.2.0005`, or `fe.2.0005` as QEMU writes it; ValueError for anything else."""
        css, _, rest = text.partition(".")
        ssid, dot, devno = rest.partition(".")
        if not (css in {"0", "fe"} and dot and is_decimal(ssid) and _is_hex(devno)):
            raise ValueError(f"{text!r} is not a device number 0.SSID.DEVNO")
        return cls(int(ssid), int(devno, 16))

    @property
    def qemu(self) -> str:
        """The value of QEMU's property `devno`."""
        return f"fe.{self.ssid}.{self.devno:04x}"

    def __str__(self) -> str:
        return f"0.{self.ssid}.{self.devno:04x}"


def virtio_disk_path(index: int) -> str:
    """The index-th virtio disk that Linux finds: /dev/vda, ..., /dev/vdz, /dev/vdaa.

    Source: Linux drivers/block/virtio_blk.c, virtblk_name_format.
    """
    if index < 0:
        raise ValueError(f"disk index {index} is negative")
    letters = ""
    while index >= 0:
        index, letter = divmod(index, 26)
        letters = chr(ord("a") + letter) + letters
        index -= 1
    return f"/dev/vd{letters}"


def new_id(journal_id: str = "") -> str:
    """A fresh id: 16 hexadecimal digits, as Kata's; that of a device begins with its journal's.

    So every name that has a device's id says whose device it is, and none is longer: a virtio
    serial has at most 20 characters.
    """
    return journal_id + os.urandom(8).hex()[len(journal_id) :]


def journal_id_of(device_id: str) -> str:
    """The id of the journal that drew a device's id; digits of nobody for an earlier vmplug's."""
    return device_id[:JOURNAL_ID_DIGITS]


def new_uuid() -> str:
    """A random UUID of version 4; importing `uuid` would take longer than the rest of a verb."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return "-".join(
        (digits[:8], digits[8:12], f"4{digits[13:16]}", variant + digits[17:20], digits[20:])
    )


def qemu_id(device_id: str, part: str = "") -> str:
    """The name in QEMU of one part of a device: `vmplug-0123456789abcdef`, `...-limit`.

    One rule for ids and node names: vmplug finds everything in QEMU that belongs to a device by
    its id, and the prefix marks the objects of vmplug. ValueError when it is too long for QEMU; a
    name is never truncated, as two devices would become one.
    """
    name = f"{QEMU_ID_PREFIX}{device_id}" + (f"-{part}" if part else "")
    if not device_id or len(name) > NODE_NAME_MAX:
        raise ValueError(f"{name!r} cannot name a part of a device in QEMU")
    return name


def qom_path(device_id: str) -> str:
    """Where QEMU's object tree has the device; its events are matched on it."""
    return f"{PERIPHERAL}/{qemu_id(device_id)}"


def device_id_of(name: str) -> str | None:
    """The device id in a name that `qemu_id` made; None for every other name."""
    if not name.startswith(QEMU_ID_PREFIX):
        return None
    return name.removeprefix(QEMU_ID_PREFIX).partition("-")[0]


def _is_hex(text: str) -> bool:
    return bool(text) and set(text) <= set("0123456789abcdefABCDEF")


def find_bdf(name: str) -> Bdf | None:
    """The address that a name spells; None for any other name."""
    try:
        return Bdf.parse(name)
    except ValueError:
        return None
