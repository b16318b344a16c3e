"""PCI functions: what sysfs says of them.

Source: Documentation/ABI/testing/sysfs-bus-pci; a function's uevent holds class, ids and driver.
"""

from collections.abc import Iterator
from typing import NamedTuple

from vmplug.address import Bdf
from vmplug.errors import AttributeReadError
from vmplug.host.root import HostRoot

BRIDGES = frozenset({0x0600, 0x0604})
"""Classes of host bridges and PCI-to-PCI bridges, which are never handed over themselves.

Class 0680, "other bridge", is not among them: NVSwitches are of it.
"""

LARGE_BAR_BYTES = 4 << 30
"""A BAR of more than this is large: the window of a port must be made for it."""

_BARS = 6
_IORESOURCE_MEM, _IORESOURCE_PREFETCH, _IORESOURCE_MEM_64 = 0x200, 0x2000, 0x100000
"""Source: include/linux/ioport.h."""

_NO_NUMA_NODE = -1
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
    return sorted(read_function(bdf, root) for bdf in _bdfs(root))


def _bdfs(root: HostRoot) -> Iterator[Bdf]:
    for name in root.names(root.pci_devices):
        try:
            yield Bdf.parse(name)
        except ValueError:
            continue


def find_function(bdf: Bdf, root: HostRoot) -> PciFunction | None:
    """One function; None when the host has none of that address."""
    if root.stat(f"{root.pci_devices}/{bdf}") is None:
        return None
    return read_function(bdf, root)


def read_function(bdf: Bdf, root: HostRoot) -> PciFunction:
    """One function, as far as its files can be read."""
    return _Reader(bdf, root).read()


class _Reader:
    """Reads one function, and goes on where a file is forbidden or makes no sense."""

    __slots__ = ("_base", "_bdf", "_root", "_unreadable")

    def __init__(self, bdf: Bdf, root: HostRoot) -> None:
        self._bdf = bdf
        self._root = root
        self._base = f"{root.pci_devices}/{bdf}"
        self._unreadable: list[str] = []

    def read(self) -> PciFunction:
        uevent = self._uevent()
        vendor, _, device = uevent.get("PCI_ID", "").partition(":")
        physfn = self._physfn()
        return PciFunction(
            bdf=self._bdf,
            class_code=self._number("class", uevent.get("PCI_CLASS")),
            vendor_id=self._number("vendor", vendor or None),
            device_id=self._number("device", device or None),
            modalias=uevent.get("MODALIAS"),
            driver=uevent.get("DRIVER") if uevent else self._link_name("driver"),
            iommu_group=self._iommu_group(),
            numa_node=self._numa_node(),
            pcie=True if physfn else self._pcie(),
            bars=self._bars(),
            physfn=physfn,
            unreadable=tuple(self._unreadable),
        )

    def _complain(self, file: str, why: str) -> None:
        self._unreadable.append(f"{self._base}/{file}: {why}")

    def _attribute(self, file: str) -> bytes | None:
        try:
            return self._root.read_attribute(f"{self._base}/{file}")
        except AttributeReadError as error:
            self._unreadable.append(error.message)
            return None

    def _uevent(self) -> dict[str, str]:
        text = self._attribute("uevent")
        if not text:
            return {}
        lines = text.decode(errors="surrogateescape").split("\n")
        return {key: value for key, equals, value in (x.partition("=") for x in lines) if equals}

    def _number(self, file: str, in_uevent: str | None) -> int | None:
        """A hexadecimal number, from the uevent or else from a file of its own."""
        if in_uevent is None:
            text = self._attribute(file)
            if text is None:
                return None
            in_uevent = text.decode(errors="replace").strip()
        try:
            return int(in_uevent, 16)
        except ValueError:
            self._complain(file, f"{in_uevent[:40]!r} is not a number")
            return None

    def _link_name(self, file: str) -> str | None:
        """The last component of a symlink; None when absent."""
        try:
            target = self._root.link(f"{self._base}/{file}")
        except AttributeReadError as error:
            self._unreadable.append(error.message)
            return None
        return target.rpartition("/")[2] if target else None

    def _iommu_group(self) -> int | None:
        """The number in the link; a copy of a host may have a directory in its place."""
        name = self._link_name("iommu_group")
        if name is None:
            return None
        if not (name.isascii() and name.isdigit()):
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
        return None if node == _NO_NUMA_NODE else node

    def _pcie(self) -> bool | None:
        """The extended configuration space, or the Express capability, says that it is PCIe.

        Whoever is not root sees 64 bytes only, and a copy of a host often has no more.
        """
        try:
            length = self._root.size(f"{self._base}/config")
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
        for index, line in enumerate(text.split(b"\n")[:_BARS]):
            try:
                start, end, flags = (int(word, 16) for word in line.split())
            except ValueError:
                if line.strip() or index == 0:
                    self._complain("resource", f"line {index + 1} is {line[:60]!r}")
                continue
            if end > start:
                bars.append(_bar(index, start, end, flags))
        return tuple(bars)

    def _physfn(self) -> Bdf | None:
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
        number=number,
        start=start,
        size_bytes=end - start + 1,
        is_memory=bool(flags & _IORESOURCE_MEM),
        is_64bit=bool(flags & _IORESOURCE_MEM_64),
        is_prefetchable=bool(flags & _IORESOURCE_PREFETCH),
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
