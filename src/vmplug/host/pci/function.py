"""PCI functions: the facts in sysfs.

Source: Documentation/ABI/testing/sysfs-bus-pci; a function's uevent holds class, ids and driver.
"""

import errno
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import msgspec

from vmplug.address import Bdf, find_bdf
from vmplug.devnum import is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.pci.iommu import read_membership
from vmplug.host.root import AttributeBatch, HostRoot

BRIDGES = frozenset({0x0600, 0x0604, 0x0607, 0x0609})
"""Classes of host bridges and of bridges to PCI and CardBus, which are never handed over.

Class 0680, "other bridge", is not among them: NVSwitches have it.
"""

LARGE_BAR_BYTES = 4 << 30
"""A BAR of more than this is large: the window of a port must be made for it."""

_HOST_BRIDGE = 0x0600
_BARS = 6
_IORESOURCE_MEM, _IORESOURCE_PREFETCH, _IORESOURCE_MEM_64 = 0x200, 0x2000, 0x100000
_IORESOURCE_UNSET = 0x20000000
_KEPT = _IORESOURCE_MEM | _IORESOURCE_UNSET
"""Source: include/linux/ioport.h."""

_NO_BAR = b" ".join([b"0x0000000000000000"] * 3)
_LINE = len(_NO_BAR)
_NO_MORE = (b"\n" + _NO_BAR) * (_BARS - 1)
_BARS_END = _LINE + len(_NO_MORE)
T = TypeVar("T")

_CONFIG_BYTES, _HEADER_BYTES = 256, 64
_STATUS, _HAS_CAPABILITIES, _CAPABILITIES = 0x06, 0x10, 0x34
_EXPRESS = 0x10
"""Source: include/uapi/linux/pci_regs.h."""


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """A base address register of a function: one window of its memory or ports.

    `is_assigned`: the host gave it an address. `size_bytes` is 0 where the kernel lost it.
    """

    number: int
    start: int
    size_bytes: int
    is_memory: bool
    is_64bit: bool
    is_prefetchable: bool
    is_assigned: bool = True

    @property
    def is_large(self) -> bool:
        """Whether it is larger than 4 GiB."""
        return self.size_bytes > LARGE_BAR_BYTES


class PciFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A PCI function. Unknown facts are None; an unbound function has `driver` None.

    `class_code` has 24 bits. `pcie` is None where the configuration space is truncated before the
    answer. `unreadable` are sentences about files that are there and could not be read or made no
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
    bars: tuple[Bar, ...] | None = None
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
    return sorted(_read(_addresses(root), root), key=lambda function: function.bdf)


def _addresses(root: HostRoot) -> dict[str, Bdf]:
    names = root.list_dir(root.pci_devices)
    return {name: bdf for name in names if (bdf := find_bdf(name))}


def find_function(bdf: Bdf, root: HostRoot) -> PciFunction | None:
    """One function; None when the host has none of that address."""
    if root.stat(f"{root.pci_devices}/{bdf}") is None:
        return None
    return read_function(bdf, root)


def read_function(bdf: Bdf, root: HostRoot) -> PciFunction:
    """One function, as far as its files can be read."""
    return next(_read({str(bdf): bdf}, root), PciFunction(bdf=bdf))


_FILES = ("uevent", "resource", "numa_node")
_LINKS = ("iommu_group", "physfn")
_SIZES = ("config",)
"""The files that are read of every function. They are nearly its whole cost: each addition counts
on a host with thousands of functions."""


def _read(addresses: Mapping[str, Bdf], root: HostRoot) -> Iterator[PciFunction]:
    parser = _Parser(root)
    answers = root.read_each(root.pci_devices, addresses, files=_FILES, links=_LINKS, sizes=_SIZES)
    return map(parser.parse, addresses.items(), answers)


_Identity = tuple[str | None, int | None, int | None, int | None, str | None]
"""Driver, class, vendor, device and modalias."""


class _Parser:
    """Builds functions from their files, and continues after a forbidden or malformed one."""

    __slots__ = ("_groups", "_identities", "_name", "_physfns", "_root", "_unreadable")

    def __init__(self, root: HostRoot) -> None:
        self._root = root
        self._name = ""
        self._groups: Mapping[str, int] | None = None
        self._identities: dict[tuple[bytes, bytes], _Identity] = {}
        self._physfns: dict[str, Bdf] = {}
        self._unreadable: list[str] = []

    def parse(self, address: tuple[str, Bdf], answers: AttributeBatch) -> PciFunction:
        """The function in the directory of that name, from the answers to _FILES and so on."""
        self._name, bdf = address
        self._unreadable = []
        (uevent, resource, numa_node), (iommu_group, physical), (config_size,) = answers
        driver, class_code, vendor_id, device_id, modalias = self._identity(uevent)
        physfn = None if physical is None else self._physfn(physical)
        return PciFunction(
            bdf=bdf,
            class_code=class_code,
            vendor_id=vendor_id,
            device_id=device_id,
            modalias=modalias,
            driver=driver,
            iommu_group=self._iommu_group(iommu_group),
            numa_node=self._numa_node(numa_node),
            pcie=True if physfn else self._pcie(config_size, class_code),
            bars=self._bars(resource),
            physfn=physfn,
            unreadable=tuple(self._unreadable),
        )

    def _complain(self, file: str, why: str) -> None:
        self._unreadable.append(f"cannot read {self._path(file)}: {why}")

    def _path(self, file: str) -> str:
        return f"{self._root.pci_devices}/{self._name}/{file}"

    def _given(self, answer: T | AttributeReadError | None) -> T | None:
        """The answer; an error is recorded once and gives None."""
        if isinstance(answer, AttributeReadError):
            if answer.message not in self._unreadable:
                self._unreadable.append(answer.message)
            return None
        return answer

    def _identity(self, answer: bytes | AttributeReadError | None) -> _Identity:
        """The facts in its uevent, reused from the last function with the same ones."""
        text = self._given(answer) or b""
        before, _, rest = text.partition(b"PCI_SLOT_NAME=")
        key = before, rest.partition(b"\n")[2]
        known = self._identities.get(key)
        if known is None:
            known = self._parse_uevent(text.decode(errors="surrogateescape"))
            if b"PCI_CLASS=" in before and b"PCI_ID=" in before and not self._unreadable:
                self._identities[key] = known
        return known

    def _parse_uevent(self, text: str) -> _Identity:
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

    def _number(self, file: str, in_uevent: str | None, most: int) -> int | None:
        """A hexadecimal number, from the uevent or else from a file of its own."""
        if in_uevent is None:
            text = self._try(self._root.read_attribute, file)
            if text is None:
                return None
            in_uevent = text.decode(errors="replace").strip()
        try:
            number = int(in_uevent, 16)
        except ValueError:
            number = -1
        if 0 <= number <= most:
            return number
        self._complain(file, f"{in_uevent[:40]!r} is not a {file}")
        return None

    def _try(self, read: Callable[[str], T | None], file: str) -> T | None:
        try:
            return read(self._path(file))
        except AttributeReadError as error:
            return self._given(error)

    def _link_name(self, file: str) -> str | None:
        """The last component of a symlink; None when absent."""
        target = self._try(self._root.read_link, file)
        return target.rpartition("/")[2] if target else None

    def _iommu_group(self, answer: str | AttributeReadError | None) -> int | None:
        """The number in the link; in a copy of a host without links, from the groups."""
        if isinstance(answer, AttributeReadError) and answer.errno == errno.EINVAL:
            if self._groups is None:
                self._groups = read_membership(self._root)
            return self._groups.get(self._name)
        target = self._given(answer)
        if target is None:
            return None
        name = target.rpartition("/")[2]
        if is_decimal(name):
            return int(name)
        self._complain("iommu_group", f"{name[:40]!r} is not a number")
        return None

    def _numa_node(self, answer: bytes | AttributeReadError | None) -> int | None:
        text = self._given(answer)
        if text is None:
            return None
        try:
            node = int(text)
        except ValueError:
            self._complain("numa_node", f"{text[:40]!r} is not a number")
            return None
        return None if node < 0 else node

    def _pcie(
        self, answer: int | AttributeReadError | None, class_code: int | None
    ) -> bool | None:
        """Whether it is PCIe, from the extended configuration space or the Express capability.

        Without root only 64 bytes are visible, and a copy of a host often has no more: then a
        link speed decides, which only PCIe has. A host bridge has the large space in any case.
        Source: Linux drivers/pci/pci-sysfs.c, pcie_dev_attrs_are_visible.
        """
        size_bytes = self._given(answer)
        is_host_bridge = class_code is not None and class_code >> 8 == _HOST_BRIDGE
        if size_bytes is not None and size_bytes > _CONFIG_BYTES and not is_host_bridge:
            return True
        if size_bytes is not None:
            config = self._try(lambda path: self._root.read_at(path, 0, _CONFIG_BYTES), "config")
            known = None if config is None else has_express_capability(config)
            if known is not None:
                return known
        speed = self._try(self._root.read_attribute, "max_link_speed")
        return True if speed and speed.strip() else None

    def _bars(self, answer: bytes | AttributeReadError | None) -> tuple[Bar, ...] | None:
        text = self._given(answer)
        if text is None:
            return None
        bars = []
        lines = (text[:_LINE],) if text[_LINE:_BARS_END] == _NO_MORE else text.split(b"\n", _BARS)
        for index, line in enumerate(lines[:_BARS]):
            if line == _NO_BAR:
                continue
            try:
                if len(line) == _LINE:
                    start, end, flags = (
                        int(line[:18], 16),
                        int(line[19:37], 16),
                        int(line[38:], 16),
                    )
                else:
                    start, end, flags = [int(word, 16) for word in line.split()]
            except ValueError:
                if line.strip() or index == 0:
                    self._complain("resource", f"line {index + 1} is {line[:60]!r}")
                continue
            if end > start or (end == start and (end or flags & _KEPT)):
                bars.append(_bar(index, start, end, flags))
        return tuple(bars)

    def _physfn(self, answer: str | AttributeReadError) -> Bdf | None:
        target = self._given(answer)
        if target is None:
            return None
        if target not in self._physfns:
            bdf = find_bdf(target.rpartition("/")[2])
            if bdf is None:
                self._complain("physfn", f"{target[:40]!r} does not lead to a PCI function")
                return None
            self._physfns[target] = bdf
        return self._physfns[target]


def _bar(index: int, start: int, end: int, flags: int) -> Bar:
    """A BAR; one without an address begins at 0, and may have only its flags."""
    is_memory = flags & _IORESOURCE_MEM != 0
    return Bar(
        number=index,
        start=start,
        size_bytes=end - start + 1 if end else 0,
        is_memory=is_memory,
        is_64bit=flags & _IORESOURCE_MEM_64 != 0,
        is_prefetchable=flags & _IORESOURCE_PREFETCH != 0,
        is_assigned=not flags & _IORESOURCE_UNSET and not (is_memory and start == 0),
    )


def has_express_capability(config: bytes) -> bool | None:
    """Whether a configuration space lists the PCI Express capability; None when it is truncated.

    A virtual function's own header reads FFFF, which does not answer it either.
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

    None when it is unknown. Linux before 5.15 has a file `reset` and does not name the method.
    """
    base = f"{root.pci_devices}/{bdf}"
    methods = root.read_attribute(f"{base}/reset_method")
    if methods is not None:
        return tuple(methods.decode(errors="replace").split())
    if root.stat(f"{base}/reset"):
        return ("unknown",)
    return () if root.stat(f"{base}/uevent") else None


_EXTENDED, _SERIAL = 0x100, 0x0003
_CAPABILITIES_MAX = 48


def read_serial(bdf: Bdf, root: HostRoot) -> str | None:
    """The serial number of a function's card; None where it has none, or it cannot be read.

    Source: PCI Express Base Specification, Device Serial Number Extended Capability.
    """
    config = root.read_attribute(f"{root.pci_devices}/{bdf}/config") or b""
    at = _EXTENDED
    for _ in range(_CAPABILITIES_MAX):
        if len(config) < at + 12:
            return None
        head = int.from_bytes(config[at : at + 4], "little")
        if head & 0xFFFF == _SERIAL:
            return config[at + 4 : at + 12][::-1].hex("-")
        at = head >> 20
        if at < _EXTENDED:
            return None
    return None


def read_virtfns(bdf: Bdf, root: HostRoot) -> tuple[Bdf, ...]:
    """The virtual functions of a physical one, in the order of their numbers.

    Raises AttributeReadError for a link that does not lead to one.
    """
    base = f"{root.pci_devices}/{bdf}"
    links = [name for name in root.list_dir(base) if name.startswith("virtfn")]
    found = []
    for path in (f"{base}/{name}" for name in sorted(links, key=_virtfn_number)):
        if target := root.read_link(path):
            function = find_bdf(target.rpartition("/")[2])
            if function is None:
                raise AttributeReadError(path, why=f"{target[:60]!r} is not a PCI function")
            found.append(function)
    return tuple(found)


def _virtfn_number(name: str) -> int:
    digits = name.removeprefix("virtfn")
    return int(digits) if digits.isdecimal() else -1
