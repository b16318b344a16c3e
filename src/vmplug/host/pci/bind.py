"""Bind a PCI function to a driver, and give it back to the former one.

A name in `driver_override` lets that driver take the function and no other; `unbind` takes it from
the one that has it, `drivers_probe` offers it. The kernel reports success even if no driver took
it, so vmplug reads the `driver` link back.
Source: Documentation/ABI/testing/sysfs-bus-pci; Linux drivers/base/bus.c, drivers/base/dd.c.
"""

import errno
import os
from collections.abc import Callable, Mapping
from threading import Thread
from typing import TypeVar

import msgspec

from vmplug.address import Bdf
from vmplug.errors import BindError, DeviceError, NoSuchDevice
from vmplug.host.root import HostRoot
from vmplug.log import Log
from vmplug.waiting import waiting

log = Log(__name__)

T = TypeVar("T")

PCI_DRIVERS = "/sys/bus/pci/drivers"
PLAIN_DRIVER = "vfio-pci"

WRITE_TIMEOUT_S = 60.0
"""How long the kernel may take for one write. An unbind waits until no process has the device
open, a reset up to a minute for the device. Source: drivers/vfio/vfio_main.c,
drivers/pci/pci.c."""

_PROBE = "/sys/bus/pci/drivers_probe"
_NO_OVERRIDE = ("", "(null)")

_TRY_ROOT = "become root; in a container, mount the host's /sys for writing"
_TRY_AGAIN = "it disappeared, or another process took it just now: try again"
_HINTS = {
    errno.EACCES: _TRY_ROOT,
    errno.EPERM: _TRY_ROOT,
    errno.EROFS: _TRY_ROOT,
    errno.EBUSY: "a process still uses it: stop that process, then try again",
    errno.ENODEV: _TRY_AGAIN,
    errno.ENOENT: _TRY_AGAIN,
    errno.ETIMEDOUT: "a process still uses it: stop that process; vmplug reconcile "
    "then finishes this",
}
_SEE_LOG = "the kernel log (dmesg) may have the reason"


class FormerBinding(msgspec.Struct, frozen=True, kw_only=True):
    """The former binding; `driver` is None for no driver, `driver_override` None for any."""

    bdf: Bdf
    driver: str | None
    driver_override: str | None


class Writer(msgspec.Struct, frozen=True, kw_only=True):
    """Writes to sysfs on behalf of one device, each write a step with a deadline."""

    device: str
    root: HostRoot
    timeout_s: float = WRITE_TIMEOUT_S

    def write(self, step: str, path: str, text: str, *, hints: Mapping[int, str] = _HINTS) -> None:
        """One step. Raises BindError with the kernel's errno, ETIMEDOUT past the deadline.

        A write that overruns it continues in the kernel; its result is known when it has ended.
        """
        with waiting(f"the kernel to take {text.strip()!r} in {path}", self.timeout_s):
            answers = _within(self.timeout_s, lambda: self.root.write_attribute(path, text))
        number = answers[0] if answers else errno.ETIMEDOUT
        if number is not None:
            raise BindError(
                self.device,
                step,
                f"{self.device}: {step} failed: the kernel "
                + (f"says {os.strerror(number)!r}" if answers else _overran(self.timeout_s))
                + f" to {text.strip()!r} in {path}",
                errno=number,
                hint=hints.get(number) or _HINTS.get(number, _SEE_LOG),
            )


def _within(timeout_s: float, call: Callable[[], T]) -> list[T]:
    """The one answer of a call into the kernel, or none when the deadline passed before it."""
    answers: list[T] = []
    failures: list[DeviceError] = []

    def run() -> None:
        try:
            answers.append(call())
        except DeviceError as error:
            failures.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failures:
        raise failures[0]
    return answers


def _overran(timeout_s: float) -> str:
    return f"has not answered within {timeout_s:g} s"


def read_former(bdf: Bdf, root: HostRoot, *, timeout_s: float = WRITE_TIMEOUT_S) -> FormerBinding:
    """What a function is bound to now. Raises NoSuchDevice, and BindError past the deadline.

    While the kernel waits for the last user of a function that is being unbound, every reader of
    this waits. Source: device_lock in driver_override_show; measured on Linux 6.1.
    """
    base = f"{root.pci_devices}/{bdf}"
    if root.stat(base) is None:
        raise NoSuchDevice(str(bdf), f"no PCI function {bdf} on this host", found="nothing")
    with waiting(f"the kernel to unbind {bdf}", timeout_s):
        answers = _within(timeout_s, lambda: root.read_attribute(f"{base}/driver_override"))
    if not answers:
        raise BindError(
            str(bdf),
            "read",
            f"{bdf}: the kernel {_overran(timeout_s)} to a read of driver_override: it is still "
            "unbinding the function",
            errno=errno.ETIMEDOUT,
            hint=_HINTS[errno.ETIMEDOUT],
        )
    override = (answers[0] or b"").decode(errors="replace").strip()
    return FormerBinding(
        bdf=bdf,
        driver=read_driver(bdf, root),
        driver_override=None if override in _NO_OVERRIDE else override,
    )


def read_driver(bdf: Bdf, root: HostRoot) -> str | None:
    """The driver that has the function; None for none."""
    target = root.read_link(f"{root.pci_devices}/{bdf}/driver")
    return target.rpartition("/")[2] if target else None


def bind_function(
    bdf: Bdf, driver: str, root: HostRoot, *, timeout_s: float = WRITE_TIMEOUT_S
) -> None:
    """Bind a function to a driver that is loaded, and unbind it from its current one.

    Raises BindError, which names the step; the steps before it are not undone: see `restore`.
    """
    writer = Writer(device=str(bdf), root=root, timeout_s=timeout_s)
    _override(bdf, driver, writer)
    _unbind(bdf, writer)
    _probe(bdf, driver, writer)


def restore(former: FormerBinding, root: HostRoot, *, timeout_s: float = WRITE_TIMEOUT_S) -> None:
    """Restore a function's former binding; writes nothing if it already has it.

    A virtual function is reset before its driver gets it back. Raises BindError, and may then be
    repeated; NoSuchDevice when the function has gone.
    """
    writer = Writer(device=str(former.bdf), root=root, timeout_s=timeout_s)
    now = read_former(former.bdf, root, timeout_s=timeout_s)
    if now.driver != former.driver:
        if former.driver and now.driver_override != former.driver:
            _override(former.bdf, former.driver, writer)
        _unbind(former.bdf, writer)
        _reset_virtual(former.bdf, writer)
        if former.driver:
            _probe(former.bdf, former.driver, writer)
    now = read_former(former.bdf, root, timeout_s=timeout_s)
    if now.driver_override != former.driver_override:
        _override(former.bdf, former.driver_override, writer)


def reset_function(bdf: Bdf, root: HostRoot, *, timeout_s: float = WRITE_TIMEOUT_S) -> None:
    """Reset a function, so that no state of its last user is left in it. Raises BindError."""
    writer = Writer(device=str(bdf), root=root, timeout_s=timeout_s)
    writer.write("reset", f"{root.pci_devices}/{bdf}/reset", "1")


def _override(bdf: Bdf, driver: str | None, writer: Writer) -> None:
    path = f"{writer.root.pci_devices}/{bdf}/driver_override"
    writer.write("driver_override", path, f"{driver or ''}\n")


def _unbind(bdf: Bdf, writer: Writer) -> None:
    if driver := read_driver(bdf, writer.root):
        writer.write("unbind", f"{PCI_DRIVERS}/{driver}/unbind", str(bdf))


def _probe(bdf: Bdf, driver: str, writer: Writer) -> None:
    writer.write("drivers_probe", _PROBE, str(bdf))
    found = read_driver(bdf, writer.root)
    if found == driver:
        return
    is_loaded = writer.root.stat(f"{PCI_DRIVERS}/{driver}") is not None
    why = f"it is bound to {found}" if found else "it has no driver now"
    hint = _SEE_LOG
    if not is_loaded:
        hint = f"the driver is not loaded: modprobe {driver}, then try again"
    elif driver == PLAIN_DRIVER:
        hint += "; vfio-pci refuses a function without an IOMMU group, and one on its denylist"
    raise BindError(str(bdf), "drivers_probe", f"{driver} did not take {bdf}: {why}", hint=hint)


def _reset_virtual(bdf: Bdf, writer: Writer) -> None:
    """VFIO resets a function when its user closes it; this is for a user that died before that."""
    base = f"{writer.root.pci_devices}/{bdf}"
    if (
        writer.root.read_link(f"{base}/physfn") is None
        or writer.root.stat(f"{base}/reset") is None
    ):
        return
    try:
        reset_function(bdf, writer.root, timeout_s=writer.timeout_s)
    except BindError as error:
        log.warning("ignored: %s; vmplug gives it back without a reset", error)
