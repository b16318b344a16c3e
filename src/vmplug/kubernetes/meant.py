"""Which device a row of the journal means: an ID may stand for another one."""

from vmplug.host.root import HostRoot
from vmplug.journal.pod_devices import PodDevice, PodDeviceState
from vmplug.journal.process import read_boot_id
from vmplug.kubernetes.units import Unit


def row_of(unit: Unit, state: PodDeviceState, host: HostRoot) -> PodDevice:
    """A row that means this very device. Raises AttributeReadError."""
    return PodDevice(
        resource=unit.resource.name,
        id=unit.id,
        state=state,
        boot_id=read_boot_id(host),
        thing=unit.identify(host),
        named=unit.describe(host),
        serial=unit.read_serial(host),
    )


def unknown_row(resource: str, id_: str, host: HostRoot) -> PodDevice:
    """A row for what a pod has, and nobody knows which device it was when the pod got it."""
    return PodDevice(
        resource=resource,
        id=id_,
        state=PodDeviceState.STARTED,
        boot_id=read_boot_id(host),
        thing="",
        named="",
    )


def is_meant(unit: Unit, row: PodDevice, host: HostRoot) -> bool:
    """Whether it is the very device, in the boot of the row."""
    is_of_this_boot = row.boot_id == read_boot_id(host)
    return is_of_this_boot and bool(row.thing) and row.thing == unit.identify(host)


def why_other(unit: Unit, row: PodDevice, host: HostRoot) -> str | None:
    """Why it is not the device that a row means; None if it is. Raises AttributeReadError.

    Within a boot it is the same directory of sysfs, or the same disk by its sequence number. After
    a boot only a serial number proves it.
    """
    if not row.thing:
        return "the journal was lost, so nobody knows which device it was"
    serial = unit.read_serial(host)
    if row.boot_id == read_boot_id(host):
        if is_meant(unit, row, host) and (None in {serial, row.serial} or serial == row.serial):
            return None
        return f"another device has its place now, {unit.describe(host)}"
    if row.named != unit.describe(host):
        return f"after the boot it is another device, {unit.describe(host)}"
    if serial is None or serial != row.serial:
        return "the node has booted since, and no serial number proves that it is the same"
    return None
