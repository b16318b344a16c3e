"""Names of PCI vendors, devices and classes, from the list that distributions install.

The list, 1.4 MB, is read at the first request, and never decoded: it is searched for each
requested vendor or class once, and a vendor's part for its devices. Source: pci.ids(5),
https://pci-ids.ucw.cz.
"""

import re

from vmplug.errors import AttributeReadError
from vmplug.host.root import THIS_HOST, HostRoot

PCI_IDS = ("/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids")
"""Where Debian and where Fedora have it."""

_SECTION = re.compile(rb"\n(?=[^\t#\n])")
"""A line that is not indented begins the next vendor or class."""
_LIST_BYTES_MAX = 16 << 20

_BASES = {
    0x00: "Unclassified device",
    0x01: "Mass storage controller",
    0x02: "Network controller",
    0x03: "Display controller",
    0x04: "Multimedia controller",
    0x05: "Memory controller",
    0x06: "Bridge",
    0x07: "Communication controller",
    0x08: "Generic system peripheral",
    0x09: "Input device controller",
    0x0A: "Docking station",
    0x0B: "Processor",
    0x0C: "Serial bus controller",
    0x0D: "Wireless controller",
    0x0E: "Intelligent controller",
    0x0F: "Satellite communications controller",
    0x10: "Encryption controller",
    0x11: "Signal processing controller",
    0x12: "Processing accelerators",
}
_SUBCLASSES = {
    0x0108: "Non-Volatile memory controller",
    0x0200: "Ethernet controller",
    0x0300: "VGA compatible controller",
    0x0302: "3D controller",
    0x0600: "Host bridge",
    0x0604: "PCI bridge",
    0x0C03: "USB controller",
}
"""For a host without the list: the classes that are handed over most. Source:
include/linux/pci_ids.h; the words are those of pci.ids."""


class PciNames:
    """The names in a host's list, or else in the running host's."""

    def __init__(self, root: HostRoot) -> None:
        self._roots = (root,) if root.is_live else (root, THIS_HOST)
        self._text: bytes | None = None
        self._sections: dict[str, bytes] = {}
        self._known: dict[tuple[str, str], str | None] = {}

    def find_vendor(self, vendor_id: int | None) -> str | None:
        """`Intel Corporation`; None for one that is not listed."""
        return None if vendor_id is None else self._find(f"{vendor_id:04x}")

    def find_device(self, vendor_id: int | None, device_id: int | None) -> str | None:
        """`Ethernet Controller X710`; None for one that is not listed."""
        if vendor_id is None or device_id is None:
            return None
        return self._find(f"{vendor_id:04x}", f"{device_id:04x}")

    def find_class(self, class_code: int | None) -> str | None:
        """`Ethernet controller`, by the upper 16 bits of the class or else by the upper 8."""
        if class_code is None:
            return None
        base, both = class_code >> 16, class_code >> 8
        return (
            self._find(f"C {base:02x}", f"{both & 0xFF:02x}")
            or _SUBCLASSES.get(both)
            or self._find(f"C {base:02x}")
            or _BASES.get(base)
        )

    def _find(self, section: str, entry: str = "") -> str | None:
        key = section, entry
        if key not in self._known:
            self._known[key] = self._look_up(section, entry)
        return self._known[key]

    def _look_up(self, section: str, entry: str) -> str | None:
        if section not in self._sections:
            self._sections[section] = self._cut(section)
        text = self._sections[section]
        start = text.find(f"\n\t{entry}  ".encode()) if entry else 0
        if start < 0:
            return None
        line, _, _ = text[start + 1 : start + 400].partition(b"\n")
        return line.partition(b"  ")[2].strip().decode(errors="replace") or None

    def _cut(self, section: str) -> bytes:
        """The part of a vendor or class, with the line break before it; empty for none."""
        if self._text is None:
            self._text = self._read()
        # The classes are at its end.
        find = self._text.rfind if section.startswith("C ") else self._text.find
        start = find(f"\n{section}  ".encode())
        if start < 0:
            return b""
        end = _SECTION.search(self._text, start + 1)
        return self._text[start : end.start() if end else None]

    def _read(self) -> bytes:
        """The first list that can be read; a missing name is not an error."""
        for root in self._roots:
            for path in PCI_IDS:
                try:
                    text = root.read_at(path, 0, _LIST_BYTES_MAX)
                except AttributeReadError:
                    continue
                if text:
                    return b"\n" + text
        return b""
