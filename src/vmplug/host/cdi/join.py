"""One request for a device that several names bring, or that a bundle has already."""

from collections.abc import Iterable, Mapping

from vmplug.errors import SpecError
from vmplug.oci.info import DeviceInfo


def add_cdi_devices(
    devices: Iterable[DeviceInfo],
    named: Iterable[DeviceInfo],
    options: Mapping[str, Mapping[str, str]],
) -> list[DeviceInfo]:
    """The devices of a bundle, and those that its annotations name; one that is both is one.

    `options` are those of named devices, by path. Raises SpecError when a path is two devices.
    """
    known = {device.container_path: device for device in devices}
    for each in named:
        path = each.container_path
        if path in options:
            each = each._replace(driver_options=options[path])  # noqa: PLW2901
        there = known.get(path)
        if there is None:
            known[path] = each
        elif (there.dev_type, there.devnum) == (each.dev_type, each.devnum):
            read_only = there.read_only or each.read_only
            known[path] = there._replace(read_only=read_only, cdi_names=each.cdi_names)
        else:
            raise _twice(there, each)
    return list(known.values())


def join(one: DeviceInfo, other: DeviceInfo) -> DeviceInfo:
    """One request for a node that several names bring. Raises SpecError when they differ."""
    if one != other:
        raise _twice(one, other)
    return one._replace(cdi_names=tuple(dict.fromkeys((*one.cdi_names, *other.cdi_names))))


def _twice(one: DeviceInfo, other: DeviceInfo) -> SpecError:
    return SpecError(
        one.container_path,
        f"is asked for twice with different settings: {_told(one)} and {_told(other)}",
    )


def _told(device: DeviceInfo) -> str:
    names = f" by {', '.join(device.cdi_names)}" if device.cdi_names else ""
    return f"{device.description}{', read-only' if device.read_only else ''}{names}"
