"""PCI functions: what sysfs says of them.

Source: Documentation/ABI/testing/sysfs-bus-pci; a function's uevent holds class, ids and driver.
"""

import errno
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vmplug.address import Bdf
from vmplug.devnum import is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.iommu import read_membership
from vmplug.host.root import Directory, HostRoot

BRIDGES = frozenset({0x0600, 0x0604})
"""Classes of host bridges and PCI-to-PCI bridges, which are never handed over themselves.

Class 0680, "other bridge", is not among them: NVSwitches are of it.
"""

LARGE_BAR_BYTES = 4 << 30
"""A BAR of more than this is large: the window of a port must be made for it."""

_BARS = 6
_IORESOURCE_MEM, _IORESOURCE_PREFETCH, _IORESOURCE_MEM_64 = 0x200, 0x2000, 0x100000
"""Source: include/linux/ioport.h."""

_NO_BAR = b" ".join([b"0x0000000000000000"] * 3) + b"\n"
_USUAL_BAR = re.compile(rb"(0x[0-9a-f]{16}) (0x[0-9a-f]{16}) (0x[0-9a-f]{16})\n")
_BAR_LINES = tuple((number, number * len(_NO_BAR)) for number in range(_BARS))
"""Source: resource_show, Linux drivers/pci/pci-sysfs.c."""
_USUAL_UEVENT = re.compile(
    r"(?:DRIVER=(.+)\n)?PCI_CLASS=([0-9A-F]{1,6})\nPCI_ID=([0-9A-F]{4}):([0-9A-F]{4})\n"
    r"PCI_SUBSYS_ID=.*\nPCI_SLOT_NAME=.*\nMODALIAS=(.*)\n",
    re.ASCII,
)
"""Source: pci_uevent, Linux drivers/pci/pci-driver.c."""

_CONFIG_BYTES, _HEADER_BYTES = 256, 64
_STATUS, _HAS_CAPABILITIES, _CAPABILITIES = 0x06, 0x10, 0x34
_EXPRESS = 0x10
"""Source: include/uapi/linux/pci_regs.h."""


class Bar(NamedTuple):
    """A base address register of a function: one window of its memory or ports."""

    number: int
    start: int
    size_bytes: int
    is_memory: bool
    is_64bit: bool
    is_prefetchable: bool

    @property
    def is_large(self) -> bool:
        """Whether it is of more than 4 GiB."""
        return self.size_bytes > LARGE_BAR_BYTES


class PciFunction(NamedTuple):
    """A PCI function. What the host does not say is None; an unbound one has `driver` None.

    `class_code` has 24 bits. `pcie` is None where the configuration space is cut off too early to
    tell. `unreadable` are sentences about files that are there and could not be read or made no
    sense.
    """

    bdf: Bdf
    class_code: int | None = None
    vendor_id: int | None = None
    device_id: int | None = None
    modalias: str | None = None
    driver: str | None = None
    iommu_group: int | None = None
    numa_node: int | None = None
    pcie: bool | None = None
    bars: tuple[Bar, ...] = ()
    physfn: Bdf | None = None
    unreadable: tuple[str, ...] = ()

    @property
    def sysfs_path(self) -> str:
        """Its directory."""
        return f"/sys/bus/pci/devices/{self.bdf}"

    @property
    def is_bridge(self) -> bool:
        """Whether it is a host bridge or a PCI-to-PCI bridge."""
        return self.class_code is not None and self.class_code >> 8 in BRIDGES


def read_functions(root: HostRoot) -> list[PciFunction]:
    """Every function of the host, in the order of the bus."""
    devices = root.open_directory(root.pci_devices)
    if devices is None:
        return []
    with devices:
        reader = _Reader(devices, root)
        return sorted(reader.read(bdf, name) for name, bdf in _addresses(root))


def _addresses(root: HostRoot) -> Iterator[tuple[str, Bdf]]:
    for name in root.names(root.pci_devices):
        try:
            yield name, Bdf.parse(name)
        except ValueError:
            continue


def find_function(bdf: Bdf, root: HostRoot) -> PciFunction | None:
    """One function; None when the host has none of that address."""
    if root.stat(f"{root.pci_devices}/{bdf}") is None:
        return None
    return read_function(bdf, root)


def read_function(bdf: Bdf, root: HostRoot) -> PciFunction:
    """One function, as far as its files can be read."""
    devices = root.open_directory(root.pci_devices)
    if devices is None:
        return PciFunction(bdf)
    with devices:
        return _Reader(devices, root).read(bdf, str(bdf))


class _Reader:
    """Reads functions, and goes on where a file is forbidden or makes no sense.

    Three files, a link and two looks a function: that is nearly all that it costs, so whatever is
    added here is felt on a host of thousands.
    """

    __slots__ = ("_base", "_devices", "_directory", "_groups", "_root", "_unreadable")

    _directory: Directory

    def __init__(self, devices: Directory, root: HostRoot) -> None:
        self._devices = devices
        self._root = root
        self._base = ""
        self._groups: Mapping[str, int] | None = None
        self._unreadable: list[str] = []

    def read(self, bdf: Bdf, name: str) -> PciFunction:
        """The function in the directory `name` of the bus."""
        self._base = f"{self._root.pci_devices}/{name}"
        self._unreadable = []
        try:
            directory = self._devices.open_directory(name)
        except AttributeReadError as error:
            return PciFunction(bdf, unreadable=(error.message,))
        if directory is None:  # a link that leads nowhere, as in a copy of a host
            return PciFunction(bdf)
        with directory:
            self._directory = directory
            return self._read(bdf)

    def _read(self, bdf: Bdf) -> PciFunction:
        driver, class_code, vendor_id, device_id, modalias = self._identity()
        physfn = self._physfn()
        return PciFunction(
            bdf,
            class_code,
            vendor_id,
            device_id,
            modalias,
            driver,
            self._iommu_group(bdf),
            self._numa_node(),
            True if physfn else self._pcie(),
            self._bars(),
            physfn,
            tuple(self._unreadable),
        )

    def _identity(self) -> tuple[str | None, int | None, int | None, int | None, str | None]:
        """Driver, class, vendor, device and modalias, as the uevent has them in one read."""
        text = (self._attribute("uevent") or b"").decode(errors="surrogateescape")
        if usual := _USUAL_UEVENT.match(text):
            driver, class_code, vendor, device, modalias = usual.groups()
            return driver, int(class_code, 16), int(vendor, 16), int(device, 16), modalias
        lines = (line.partition("=") for line in text.split("\n"))
        words = {key: value for key, equals, value in lines if equals}
        vendor, _, device = words.get("PCI_ID", "").partition(":")
        return (
            words.get("DRIVER") if words else self._link_name("driver"),
            self._number("class", words.get("PCI_CLASS"), 0xFFFFFF),
            self._number("vendor", vendor or None, 0xFFFF),
            self._number("device", device or None, 0xFFFF),
            words.get("MODALIAS"),
        )

    def _complain(self, file: str, why: str) -> None:
        self._unreadable.append(f"cannot read {self._base}/{file}: {why}")

    def _attribute(self, file: str) -> bytes | None:
        try:
            return self._directory.read_attribute(file)
        except AttributeReadError as error:
            self._unreadable.append(error.message)
            return None

    def _number(self, file: str, in_uevent: str | None, most: int) -> int | None:
        """A hexadecimal number, from the uevent or else from a file of its own."""
        if in_uevent is None:
            text = self._attribute(file)
            if text is None:
                return None
            in_uevent = text.decode(errors="replace").strip()
        try:
            number = int(in_uevent, 16)
        except ValueError:
            number = -1
        if 0 <= number <= most:
            return number
        self._complain(file, f"{in_uevent[:40]!r} is not a number of it")
        return None

    def _link_name(self, file: str) -> str | None:
        """The last component of a symlink; None when absent."""
        try:
            target = self._directory.link(file)
        except AttributeReadError as error:
            self._unreadable.append(error.message)
            return None
        return target.rpartition("/")[2] if target else None

    def _iommu_group(self, bdf: Bdf) -> int | None:
        """The number in the link; where a copy of a host has a directory, the groups tell."""
        try:
            target = self._directory.link("iommu_group")
        except AttributeReadError as error:
            if error.errno != errno.EINVAL:
                self._unreadable.append(error.message)
                return None
            if self._groups is None:
                self._groups = read_membership(self._root)
            return self._groups.get(str(bdf))
        if target is None:
            return None
        name = target.rpartition("/")[2]
        if not is_decimal(name):
            self._complain("iommu_group", f"{name[:40]!r} is not a number")
            return None
        return int(name)

    def _numa_node(self) -> int | None:
        text = self._attribute("numa_node")
        if text is None:
            return None
        try:
            node = int(text)
        except ValueError:
            self._complain("numa_node", f"{text[:40]!r} is not a number")
            return None
        return None if node < 0 else node

    def _pcie(self) -> bool | None:
        """The kernel shows a link's speed of PCIe functions only; Linux 4.13.

        Else the extended configuration space or the Express capability says it. Whoever is not
        root sees 64 bytes only, and a copy of a host often has no more.
        """
        if self._directory.has("current_link_speed"):
            return True
        try:
            length = self._directory.size("config")
            if length is None:
                return None
            if length > _CONFIG_BYTES:
                return True
            config = self._root.read_at(f"{self._base}/config", 0, _CONFIG_BYTES)
        except AttributeReadError as error:
            self._unreadable.append(error.message)
            return None
        return has_express_capability(config)

    def _bars(self) -> tuple[Bar, ...]:
        text = self._attribute("resource")
        if text is None:
            return ()
        bars = []
        for number, offset in _BAR_LINES:
            if text.startswith(_NO_BAR, offset):
                continue
            line = _USUAL_BAR.match(text, offset)
            if line is None:
                return self._odd_bars(text)
            start, end, flags = line.groups()
            bars.append(_bar(number, int(start, 16), int(end, 16), int(flags, 16)))
        return tuple(bars)

    def _odd_bars(self, text: bytes) -> tuple[Bar, ...]:
        """What there is in a file that is not quite as the kernel writes it."""
        bars = []
        for index, line in enumerate(text.split(b"\n")[:_BARS]):
            try:
                start, end, flags = [int(word, 16) for word in line.split()]
            except ValueError:
                if line.strip() or index == 0:
                    self._complain("resource", f"line {index + 1} is {line[:60]!r}")
                continue
            if end > start:
                bars.append(_bar(index, start, end, flags))
        return tuple(bars)

    def _physfn(self) -> Bdf | None:
        if not self._directory.has("physfn"):
            return None
        name = self._link_name("physfn")
        if name is None:
            return None
        try:
            return Bdf.parse(name)
        except ValueError:
            self._complain("physfn", f"{name[:40]!r} is not a PCI address")
            return None


def _bar(number: int, start: int, end: int, flags: int) -> Bar:
    return Bar(
        number,
        start,
        end - start + 1,
        flags & _IORESOURCE_MEM != 0,
        flags & _IORESOURCE_MEM_64 != 0,
        flags & _IORESOURCE_PREFETCH != 0,
    )


def has_express_capability(config: bytes) -> bool | None:
    """Whether a configuration space lists the PCI Express capability; None when it is cut off.

    A virtual function's own header reads FFFF, and says nothing either.
    Source: PCI Local Bus specification, 6.7; PCI Express Base specification, 7.5.3.
    """
    if len(config) < _HEADER_BYTES or config[:2] == b"\xff\xff":
        return None
    if not config[_STATUS] & _HAS_CAPABILITIES:
        return False
    pointer, seen = config[_CAPABILITIES] & 0xFC, set[int]()
    while pointer and pointer not in seen:
        if pointer + 1 >= len(config):
            return None
        if config[pointer] == _EXPRESS:
            return True
        seen.add(pointer)
        pointer = config[pointer + 1] & 0xFC
    return False


def read_reset_methods(bdf: Bdf, root: HostRoot) -> tuple[str, ...] | None:
    """How the kernel can reset a function: `flr`, `pm`, `bus`, ...; empty when it cannot.

    None when the host does not say. Linux before 5.15 has a file `reset` and names no method.
    """
    base = f"{root.pci_devices}/{bdf}"
    methods = root.read_attribute(f"{base}/reset_method")
    if methods is not None:
        return tuple(methods.decode(errors="replace").split())
    if root.stat(f"{base}/reset"):
        return ("unknown",)
    return () if root.stat(f"{base}/uevent") else None


def read_virtfns(bdf: Bdf, root: HostRoot) -> tuple[Bdf, ...]:
    """The virtual functions of a physical one, in the order of their numbers."""
    base = f"{root.pci_devices}/{bdf}"
    links = [name for name in root.names(base) if name.startswith("virtfn")]
    targets = (root.link(f"{base}/{name}") for name in sorted(links, key=_virtfn_number))
    return tuple(Bdf.parse(target.rpartition("/")[2]) for target in targets if target)


def _virtfn_number(name: str) -> int:
    digits = name.removeprefix("virtfn")
    return int(digits) if digits.isdecimal() else -1
