"""What the host's screen and its console are on: the firmware's, the kernel's, a serial port.

Source: Documentation/ABI/testing/{sysfs-bus-pci,sysfs-tty}, boot_vga, console/active;
Documentation/fb/fbcon.rst; drivers/firmware/sysfb.c; drivers/video/fbdev/{efifb,vesafb}.c. The
kernel shows the firmware's picture inside the window of the card, whatever driver the card has.
"""

import os
import re
from collections.abc import Iterator, Sequence

import msgspec

from vmplug.cached import cached_property
from vmplug.host.pci.function import PciFunction
from vmplug.host.root import HostRoot

_DISPLAY = 0x03
_LINE = re.compile(r"( *)[0-9a-f]+-[0-9a-f]+ : (.*)", re.ASCII)
_PICTURES = frozenset({"efifb", "vesafb", "simpledrm", "simplefb", "efidrm", "vesadrm"})
_FIRMWARE = "BOOTFB"
"""The memory of the firmware's picture, with a driver or without."""
_GRAPHICS, _VTS, _TTYS = "/sys/class/graphics", "/sys/class/vtconsole", "/sys/class/tty"
_FRAMEBUFFER = re.compile(r"fb[0-9]+\Z", re.ASCII)
_CONSOLE = re.compile(r"\bconsole=([A-Za-z]+[0-9]*)", re.ASCII)


_OTHER_CARD = "choose another graphics card in the firmware"


class ConsoleUse(msgspec.Struct, frozen=True):
    """What a function has of the host's screens and consoles, what shows it, and what ends it."""

    what: str
    how: str
    remedy: str


class Consoles:
    """The host's screens and consoles, read when first needed."""

    def __init__(self, root: HostRoot) -> None:
        self._root = root

    def of(self, function: PciFunction) -> Iterator[ConsoleUse]:
        """What a function has of them. Raises AttributeReadError."""
        path = self._root.real_path(function.sysfs_path)
        is_display = function.class_code is not None and function.class_code >> 16 == _DISPLAY
        if is_display and (flag := self._boot_flag(function)):
            what = "is the graphics card that the host booted with"
            yield ConsoleUse(what, f"{flag} in sysfs", _OTHER_CARD)
        elif str(function.bdf) in self._with_picture:
            what = "has the memory of the firmware's screen, which the host uses"
            yield ConsoleUse(what, "/proc/iomem", _OTHER_CARD)
        elif self._framebuffer.startswith(f"{path}/"):
            what = f"has the host's screen, /dev/{self._framebuffer.rpartition('/')[2]}"
            yield ConsoleUse(what, "the framebuffer of the text console", self._unbind())
        for name in self._active:
            tty = self._root.real_path(f"{_TTYS}/{name}")
            if tty.startswith(f"{path}/") or (name.startswith("hvc") and self._is_virtio(path)):
                what = f"has the host's console {name}"
                yield ConsoleUse(what, f"{_TTYS}/console/active", self._detach(name))

    def list_of(self, function: PciFunction) -> list[ConsoleUse]:
        """The same as a list."""
        return list(self.of(function))

    def _boot_flag(self, function: PciFunction) -> str | None:
        flags = ("boot_vga", "boot_display")
        paths = {flag: f"{function.sysfs_path}/{flag}" for flag in flags}
        return next((flag for flag in flags if _word(paths[flag], self._root) == "1"), None)

    def _is_virtio(self, path: str) -> bool:
        """Whether it is a virtio console, which may have the ports that are called hvc."""
        drivers = (
            self._root.read_link(f"{path}/{name}/driver") or ""
            for name in self._root.list_dir(path)
            if name.startswith("virtio")
        )
        return any(driver.endswith("/virtio_console") for driver in drivers)

    @cached_property
    def _with_picture(self) -> frozenset[str]:
        """The functions of which a BAR has the firmware's picture in it, by their addresses."""
        found, above = set[str](), list[tuple[int, str]]()
        for line in (self._root.read_text("/proc/iomem") or "").splitlines():
            if match := _LINE.match(line):
                depth, name = len(match[1]), match[2]
                above = [entry for entry in above if entry[0] < depth]
                if name in _PICTURES or (name == _FIRMWARE and self._has_driver):
                    found.update(owner for _, owner in above)
                above.append((depth, name))
        return frozenset(found)

    @cached_property
    def _has_driver(self) -> bool:
        """Whether a driver shows the firmware's picture."""
        devices = "/sys/bus/platform/devices"
        names = (n for n in self._root.list_dir(devices) if "-framebuffer." in n)
        return any(self._root.read_link(f"{devices}/{name}/driver") for name in names)

    @cached_property
    def _framebuffer(self) -> str:
        """The directory of the one that the text console is on, the first; empty without one."""
        names = sorted(filter(_FRAMEBUFFER.match, self._root.list_dir(_GRAPHICS)), key=_number)
        if not names or not self._is_bound:
            return ""
        return self._root.real_path(f"{_GRAPHICS}/{names[0]}")

    @cached_property
    def _is_bound(self) -> bool:
        """Whether the text console is on a framebuffer; a copy of a host may not say it."""
        return bool(self._bound or not (self._root.list_dir(_VTS) or self._root.is_live))

    @cached_property
    def _bound(self) -> Sequence[str]:
        """The console drivers that show text on framebuffers, such as vtcon1."""
        return [
            name
            for name in self._root.list_dir(_VTS)
            if _word(f"{_VTS}/{name}/bind", self._root) == "1"
            and "frame buffer" in (_word(f"{_VTS}/{name}/name", self._root) or "")
        ]

    def _unbind(self) -> str:
        """Source: Documentation/driver-api/console.rst."""
        commands = [f"echo 0 > {_VTS}/{name}/bind" for name in self._bound]
        return f"take the text console off it ({'; '.join(commands)})" if commands else _OTHER_CARD

    def _detach(self, name: str) -> str:
        """A serial port alone can be taken from the kernel while it runs.

        Source: Documentation/ABI/testing/sysfs-tty, console.
        """
        otherwise = "choose another console= on the kernel's command line"
        if self._root.stat_or_none(f"{_TTYS}/{name}/console") is None:
            return otherwise
        return f"take the console off it (echo N > {_TTYS}/{name}/console), or {otherwise}"

    @cached_property
    def _active(self) -> Sequence[str]:
        """The names of the kernel's consoles, such as ttyS4."""
        active = _word(f"{_TTYS}/console/active", self._root)
        if active is None:
            return tuple(_CONSOLE.findall(self._root.read_text("/proc/cmdline") or ""))
        return active.split()


def _word(path: str, root: HostRoot) -> str | None:
    data = root.read_attribute(path)
    return None if data is None else os.fsdecode(data).strip()


def _number(name: str) -> int:
    return int(name.removeprefix("fb"))
