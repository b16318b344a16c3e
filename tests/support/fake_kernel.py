"""FakeKernel: a tree that reacts to writes to sysfs as the kernel does, with failures switched on.

The tree itself is its whole state, so that a process that dies leaves what a crash would.
Source: Linux drivers/base/bus.c, drivers/base/dd.c, drivers/pci/pci-sysfs.c, drivers/pci/iov.c,
drivers/vfio/mdev/mdev_sysfs.c.
"""

import errno
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from threading import Event

from tests.support.pci_tree import PciTree
from vmplug.host.root import HostRoot

DIED = 77
"""The exit status of a process that a fault ended."""


class Fault(StrEnum):
    """What goes wrong besides an errno."""

    NOTHING_HAPPENS = "the kernel says yes and does nothing"
    DIE_BEFORE = "the process ends before the kernel does anything"
    DIE_AFTER = "the process ends when the kernel has done it"
    HANGS = "the kernel does not answer until it is let"


@dataclass(frozen=True, slots=True)
class Write:
    """One write: the attribute's name, the device that it is about, and the text."""

    step: str
    device: str
    text: str


@dataclass(slots=True)
class _Planned:
    what: int | Fault
    times: int


@dataclass(slots=True)
class _Drivers:
    """Which functions a driver takes by their ids, and which drivers start and then refuse."""

    takes: Mapping[str, Collection[str]]
    of_virtual: str | None = None
    refuse: set[tuple[str, str]] = field(default_factory=set)


class FakeKernel(HostRoot):
    """The host of a PciTree.

    `takes` are functions by the driver that takes them by their ids; `of_virtual` is the driver of
    virtual functions. VFIO's drivers take what `driver_override` gives them.
    """

    def __init__(
        self,
        tree: PciTree,
        *,
        takes: Mapping[str, Collection[str]] | None = None,
        of_virtual: str | None = None,
    ) -> None:
        super().__init__(tree.path)
        self.tree = tree
        self.writes: list[Write] = []
        self.release = Event()
        self.answered = Event()
        self._drivers = _Drivers(takes or {}, of_virtual)
        self._planned: dict[tuple[str, str | None], _Planned] = {}
        self._at_number: dict[int, int | Fault] = {}
        self._reactions: Mapping[str, Callable[[Path, Write], int | None]] = {
            "driver_override": self._set_override,
            "unbind": self._unbind,
            "bind": self._bind,
            "drivers_probe": self._probe,
            "reset": self._reset,
            "sriov_numvfs": self._set_numvfs,
            "sriov_drivers_autoprobe": self._set_autoprobe,
            "create": self._create,
            "remove": self._remove,
        }

    def require_live(self, what: str) -> None:
        """It plays the running host."""

    # what goes wrong

    def fail(
        self, step: str, what: int | Fault, device: str | None = None, *, times: int = 1
    ) -> None:
        """The next writes to that attribute, of one device or of any, go wrong."""
        self._planned[step, device] = _Planned(what, times)

    def fail_at(self, number: int, what: int | Fault) -> None:
        """The write of that number, from 0, goes wrong."""
        self._at_number[number] = what

    def refuse(self, driver: str, bdf: str) -> None:
        """From now on the driver's probe of a function fails, of which the kernel says nothing."""
        self._drivers.refuse.add((driver, bdf))

    # what is there

    def driver_of(self, bdf: str) -> str | None:
        """The driver of a function, as its link says."""
        link = self._function(bdf) / "driver"
        return os.readlink(link).rpartition("/")[2] if link.is_symlink() else None

    def override_of(self, bdf: str) -> str | None:
        """The text of driver_override; None for none."""
        text = (self._function(bdf) / "driver_override").read_text().strip()
        return None if text == "(null)" else text

    def picture(self) -> dict[str, str]:
        """Every link to a driver and every override, of every function of the host."""
        found = {}
        for path in sorted((self.tree.path / "sys/bus/pci/devices").iterdir()):
            found[path.name] = f"{self.driver_of(path.name)} {self.override_of(path.name)}"
        return found

    # HostRoot

    def write_attribute(self, path: str, text: str) -> int | None:
        """See HostRoot; unknown attributes are refused as the kernel refuses to make files."""
        target = self.tree.path / path.lstrip("/")
        write = _describe(path, text)
        fault = self._at_number.get(len(self.writes)) or self._fault(write)
        self.writes.append(write)
        match fault:
            case Fault.DIE_BEFORE:
                os._exit(DIED)
            case Fault.NOTHING_HAPPENS:
                return None
            case Fault.HANGS:
                self.release.wait(30)
            case int():
                return fault
            case _:
                pass
        if not target.parent.exists() or write.step not in self._reactions:
            return errno.ENOENT
        answer = self._reactions[write.step](target, write)
        if fault is Fault.DIE_AFTER:
            os._exit(DIED)
        if fault is Fault.HANGS:
            self.answered.set()
        return answer

    def _fault(self, write: Write) -> int | Fault | None:
        for key in ((write.step, write.device), (write.step, None)):
            planned = self._planned.get(key)
            if planned and planned.times:
                planned.times -= 1
                return planned.what
        return None

    # reactions

    def _set_override(self, target: Path, write: Write) -> int | None:
        if len(write.text) >= 4095:
            return errno.EINVAL
        target.write_text(f"{write.text or '(null)'}\n")
        return None

    def _unbind(self, target: Path, write: Write) -> int | None:
        driver = target.parent.name
        if not self._exists(write.device) or self.driver_of(write.device) != driver:
            return errno.ENODEV
        (self._function(write.device) / "driver").unlink()
        (target.parent / write.device).unlink()
        self._write_uevent(write.device, None)
        shutil.rmtree(self._function(write.device) / "vfio-dev", ignore_errors=True)
        return None

    def _bind(self, target: Path, write: Write) -> int | None:
        if not self._exists(write.device) or self.driver_of(write.device):
            return errno.ENODEV
        if not self._matches(target.parent.name, write.device):
            return errno.ENODEV
        return self._start(target.parent.name, write.device)

    def _probe(self, _: Path, write: Write) -> int | None:
        if not self._exists(write.device):
            return errno.ENODEV
        if self.driver_of(write.device) is None:
            for driver in sorted(os.listdir(self.tree.path / "sys/bus/pci/drivers")):
                if self._matches(driver, write.device):
                    self._start(driver, write.device)
                    break
        return None

    def _reset(self, target: Path, _: Write) -> int | None:
        return None if target.exists() else errno.ENOENT

    def _set_autoprobe(self, target: Path, write: Write) -> int | None:
        target.write_text(f"{write.text}\n")
        return None

    def _set_numvfs(self, target: Path, write: Write) -> int | None:
        base, bdf = target.parent, write.device
        if not target.exists() or self.driver_of(bdf) is None:
            return errno.ENOENT
        count, now = int(write.text), int(target.read_text())
        if count > int((base / "sriov_totalvfs").read_text()):
            return errno.ERANGE
        if count == now:
            return None
        if count and now:
            return errno.EBUSY
        for link in base.glob("virtfn*"):
            self._remove_function(os.readlink(link).rpartition("/")[2])
            link.unlink()
        self._add_virtfns(bdf, count)
        target.write_text(f"{count}\n")
        return None

    def _create(self, target: Path, write: Write) -> int | None:
        available = target.parent / "available_instances"
        left = int(available.read_text())
        if (self.tree.path / f"sys/bus/mdev/devices/{write.text}").exists():
            return errno.EEXIST
        if not left:
            return errno.EUSERS
        available.write_text(f"{left - 1}\n")
        parent = target.parent.parent.parent
        self.tree.mdev(
            write.text,
            f"/{os.path.realpath(parent).removeprefix(self.path).lstrip('/')}",
            target.parent.name,
            group=self._new_group(),
        )
        return None

    def _remove(self, target: Path, write: Write) -> int | None:
        device = target.parent
        available = Path(os.path.realpath(device / "mdev_type")) / "available_instances"
        available.write_text(f"{int(available.read_text()) + 1}\n")
        (available.parent / f"devices/{write.device}").unlink()
        self._leave_group(Path(os.path.realpath(device)))
        shutil.rmtree(os.path.realpath(device))
        device.unlink()
        return None

    # what they are made of

    def _function(self, bdf: str) -> Path:
        return self.tree.path / f"sys/bus/pci/devices/{bdf}"

    def _exists(self, bdf: str) -> bool:
        return self._function(bdf).exists()

    def _matches(self, driver: str, bdf: str) -> bool:
        override = self.override_of(bdf)
        if override is not None:
            return override == driver
        return bdf in self._drivers.takes.get(driver, ())

    def _start(self, driver: str, bdf: str) -> int | None:
        if (driver, bdf) in self._drivers.refuse:
            return errno.ENODEV
        base = self._function(bdf)
        real = os.path.realpath(base)
        depth = real.removeprefix(f"{self.path}/").count("/")
        (base / "driver").symlink_to("../" * depth + f"bus/pci/drivers/{driver}")
        (self.tree.path / f"sys/bus/pci/drivers/{driver}/{bdf}").symlink_to(real)
        self._write_uevent(bdf, driver)
        if driver.endswith(("vfio-pci", "vfio_pci")):
            (base / f"vfio-dev/vfio{self._new_cdev()}").mkdir(parents=True)
        return None

    def _write_uevent(self, bdf: str, driver: str | None) -> None:
        path = self._function(bdf) / "uevent"
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith("DRIVER=")]
        path.write_text("".join([*([f"DRIVER={driver}\n"] if driver else []), *kept]))

    def _new_cdev(self) -> int:
        return len(list(self.tree.path.glob("sys/bus/pci/devices/*/vfio-dev/*")))

    def _new_group(self) -> int:
        groups = self.tree.path / "sys/kernel/iommu_groups"
        return max((int(path.name) for path in groups.iterdir()), default=0) + 1

    def _add_virtfns(self, bdf: str, count: int) -> None:
        base = self._function(bdf)
        for number in range(count):
            virtfn = f"{bdf.rpartition(':')[0]}:10.{number}"
            self.tree.pci_function(
                virtfn, class_code=0x020000, group=self._new_group(), reset="", device=0x10CA
            )
            (self._function(virtfn) / "physfn").symlink_to(f"../{bdf}")
            (base / f"virtfn{number}").symlink_to(f"../{virtfn}")
            if (
                self._drivers.of_virtual
                and (base / "sriov_drivers_autoprobe").read_text() != "0\n"
            ):
                self._start(self._drivers.of_virtual, virtfn)

    def _remove_function(self, bdf: str) -> None:
        if driver := self.driver_of(bdf):
            (self.tree.path / f"sys/bus/pci/drivers/{driver}/{bdf}").unlink()
        real = Path(os.path.realpath(self._function(bdf)))
        self._leave_group(real)
        shutil.rmtree(real)
        self._function(bdf).unlink()

    def _leave_group(self, device: Path) -> None:
        group = Path(os.path.realpath(device / "iommu_group"))
        (group / f"devices/{device.name}").unlink()
        if not any((group / "devices").iterdir()):
            shutil.rmtree(group)


def _describe(path: str, text: str) -> Write:
    """What a write is about: the function in the path, or in the text."""
    directory, _, step = path.rpartition("/")
    text = text.strip()
    about_text = {"unbind", "bind", "drivers_probe", "create"}
    return Write(step, text if step in about_text else directory.rpartition("/")[2], text)


MODPROBE = """\
#!/bin/sh
# modprobe --dirname ROOT -- NAME, on a host whose modules are the files of lib/modules/known.
echo "$@" >> "$2/modprobe.log"
[ -e "$2/lib/modules/known/$4" ] || { echo "modprobe: FATAL: Module $4 not found." >&2; exit 1; }
mkdir -p "$2/sys/bus/pci/drivers/$(cat "$2/lib/modules/known/$4")"
"""


def fake_modprobe(directory: Path, tree: PciTree, **drivers: str) -> str:
    """A modprobe that knows modules and the names of their drivers; the directory it is in."""
    directory.mkdir(exist_ok=True)
    program = directory / "modprobe"
    program.write_text(MODPROBE)
    program.chmod(0o755)
    for module, driver in drivers.items():
        tree.file(f"/lib/modules/known/{module}", driver)
    return str(directory)
