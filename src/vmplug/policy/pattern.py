"""Patterns of a policy: paths, device numbers, PCI ids and classes, kinds of CDI.

Each is parsed once; a wrong one raises ValueError with what was expected.
"""

import re
from fnmatch import fnmatchcase
from typing import Self

import msgspec

from vmplug.devnum import DevNum

_NUMBER = re.compile(r"([bc]):([0-9]{1,10})(?::([0-9]{1,10}|\*))?\Z", re.ASCII)
_PCI = re.compile(r"([0-9a-f]{4}|\*):([0-9a-f]{4}|\*)\Z", re.ASCII)
_CLASS = re.compile(r"(?:0x)?((?:[0-9a-f]{2}){1,3})\Z", re.ASCII)
_CDI_KIND = re.compile(r"[A-Za-z0-9_.*?\[\]-]+/[A-Za-z0-9_.*?\[\]-]+\Z", re.ASCII)
_ANY_DEPTH = "**"
_WILDCARDS = frozenset("*?[")


class PathPattern(msgspec.Struct, frozen=True):
    """Canonical paths: `*`, `?` and `[...]` stay within a name, `**` is any number of names.

    At the end `**` is everything inside a directory, and not the directory itself.
    """

    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """`/srv/images/**`."""
        root, *names = text.split("/")
        if root or not text.isprintable() or {"", ".", ".."} & set(names):
            raise ValueError(
                f"{text!r} cannot match a path: write an absolute one without '//', '/.' and "
                "'..', such as /srv/images/**"
            )
        if any(_ANY_DEPTH in name and name != _ANY_DEPTH for name in names):
            raise ValueError(
                f"{text!r} has other text next to '**', which must be a whole name: /srv/**/a.img"
            )
        return cls((*names, "*") if names[-1] == _ANY_DEPTH else tuple(names))

    def __str__(self) -> str:
        is_inside = self.names[-2:] == (_ANY_DEPTH, "*")
        return "/" + "/".join(self.names[:-1] if is_inside else self.names)

    @property
    def is_one(self) -> bool:
        """Whether it names one path, without any wildcard."""
        return not any(_WILDCARDS.intersection(name) for name in self.names)

    def matches(self, path: str) -> bool:
        """Whether the path matches, in a time limited by the product of both lengths."""
        reached = self._skip({0})
        for name in filter(None, path.split("/")):
            stays = {at for at in reached if self.names[at : at + 1] == (_ANY_DEPTH,)}
            steps = {
                at + 1
                for at in reached - stays
                if at < len(self.names) and fnmatchcase(name, self.names[at])
            }
            reached = self._skip(stays | steps)
        return len(self.names) in reached

    def _skip(self, reached: set[int]) -> set[int]:
        """Also the position after a `**`, which may match nothing."""
        after = set(reached)
        for at in range(len(self.names)):
            if at in after and self.names[at] == _ANY_DEPTH:
                after.add(at + 1)
        return after


class NumberPattern(msgspec.Struct, frozen=True):
    """Devices by number; `minor` is None where it is any."""

    kind: str
    major: int
    minor: int | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`b:8`, `b:8:16` or `c:10:*`."""
        match = _NUMBER.match(text)
        if match is None:
            raise ValueError(f"{text!r} is not a device number: write b:8, b:8:16 or c:10")
        kind, major, minor = match.groups()
        wanted = None if minor in {None, "*"} else int(minor)
        number = DevNum(int(major), wanted or 0)
        return cls(kind, number.major, wanted)

    def __str__(self) -> str:
        return f"{self.kind}:{self.major}" + ("" if self.minor is None else f":{self.minor}")

    def matches(self, kind: str, number: DevNum) -> bool:
        """Whether it is one of them."""
        is_of_major = (kind, number.major) == (self.kind, self.major)
        return is_of_major and self.minor in {None, number.minor}


class PciPattern(msgspec.Struct, frozen=True):
    """PCI functions by vendor and device, in hexadecimal; None where it is any."""

    vendor_id: int | None
    device_id: int | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`8086:*` or `8086:10d3`, as `lspci -nn` writes them."""
        match = _PCI.match(text.lower())
        if match is None:
            raise ValueError(
                f"{text!r} is not a PCI ID: write 8086:10d3, or 8086:* for all of Intel's"
            )
        vendor, device = (None if part == "*" else int(part, 16) for part in match.groups())
        return cls(vendor, device)

    def __str__(self) -> str:
        parts = (self.vendor_id, self.device_id)
        return ":".join("*" if part is None else f"{part:04x}" for part in parts)

    def matches(self, vendor_id: int | None, device_id: int | None) -> bool:
        """Whether it is one of them; an unknown ID matches only "any"."""
        return self.vendor_id in {None, vendor_id} and self.device_id in {None, device_id}


class CdiKindPattern(msgspec.Struct, frozen=True):
    """Devices that a CDI name brought, by its kind."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`vendor.com/gpu` or `vendor.com/*`."""
        if not _CDI_KIND.match(text):
            raise ValueError(f"{text!r} is not a CDI kind: write vendor.com/gpu or vendor.com/*")
        return cls(text)

    def __str__(self) -> str:
        return self.text

    def matches(self, kind: str) -> bool:
        """Whether it is one of them."""
        return fnmatchcase(kind, self.text)


class ClassPattern(msgspec.Struct, frozen=True):
    """PCI functions by the first digits of their class."""

    digits: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`0x03`, `0x0300` or `0x030000`, as `lspci -nn` and sysfs write them."""
        match = _CLASS.match(text.lower())
        if match is None:
            raise ValueError(f"{text!r} is not a PCI class: write 0x03, 0x0300 or 0x030000")
        return cls(match[1])

    def __str__(self) -> str:
        return f"0x{self.digits}"

    def matches(self, class_code: int | None) -> bool:
        """Whether it is one of them; an unknown class never is."""
        return class_code is not None and f"{class_code:06x}".startswith(self.digits)
