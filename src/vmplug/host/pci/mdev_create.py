"""Mediated devices: create one of a type that a parent offers, and remove it.

Source: Documentation/driver-api/vfio-mediated-device.rst.
"""

import time
from contextlib import suppress
from uuid import uuid4

from vmplug.errors import BindError, NoSuchDevice, SpecError
from vmplug.host.pci.bind import Writer
from vmplug.host.pci.iommu import find_group
from vmplug.host.pci.mdev import MDEV_DEVICES, UUID, MdevType, read_mdev_types
from vmplug.host.root import HostRoot
from vmplug.waiting import waiting

MADE_TIMEOUT_S = 10.0
_STEP_S = 0.01


def create_mediated(
    parent: str,
    type_name: str,
    root: HostRoot,
    *,
    uuid: str | None = None,
    timeout_s: float = MADE_TIMEOUT_S,
) -> str:
    """Create a mediated device, and return its UUID, which is random unless given.

    Waits up to `timeout_s` until it is in an IOMMU group. Raises SpecError for a malformed UUID,
    NoSuchDevice for a parent or a type that is not there, BindError when the kernel does not
    create it; then nothing is left.
    """
    uuid = uuid.lower() if uuid else str(uuid4())
    if not UUID.match(uuid):
        raise SpecError(
            "--uuid", f"{uuid!r} is not a UUID", hint="leave it out, and vmplug generates one"
        )
    found = _find_type(parent, type_name, root)
    if root.stat(f"{MDEV_DEVICES}/{uuid}"):
        raise BindError(
            uuid,
            "create",
            f"the mediated device {uuid} already exists",
            hint="choose another UUID",
        )
    if found.available == 0:
        raise BindError(
            uuid,
            "create",
            f"{parent} cannot make another {type_name}",
            hint="remove one that is not in use (vmplug mdev remove UUID); vmplug host lists them",
        )
    writer = Writer(device=uuid, root=root)
    base = f"/sys/class/mdev_bus/{parent}/mdev_supported_types/{type_name}"
    writer.write("create", f"{base}/create", uuid)
    with waiting(f"the kernel to make mediated device {uuid}", timeout_s):
        is_made = _wait(uuid, root, timeout_s)
    if not is_made:
        with suppress(NoSuchDevice):
            remove_mediated(uuid, root)
        raise BindError(
            uuid,
            "create",
            f"{uuid} was created, but is not in an IOMMU group: no VFIO driver took it",
            hint="modprobe vfio_mdev; the kernel log (dmesg) may have the reason",
        )
    return uuid


def remove_mediated(uuid: str, root: HostRoot) -> None:
    """Remove a mediated device; the caller must make sure that it is not in use.

    Raises NoSuchDevice or BindError.
    """
    base = f"{MDEV_DEVICES}/{uuid}"
    if not UUID.match(uuid) or root.stat(base) is None:
        raise NoSuchDevice(
            uuid,
            f"no mediated device {uuid} on this host",
            found="nothing",
            hint="vmplug host lists the devices",
        )
    Writer(device=uuid, root=root).write("remove", f"{base}/remove", "1")
    if root.stat(base) is not None:
        raise BindError(
            uuid,
            "remove",
            f"the kernel accepted the removal of {uuid}, but it is still there",
            hint="the kernel log (dmesg) may have the reason",
        )


def _find_type(parent: str, type_name: str, root: HostRoot) -> MdevType:
    offered = read_mdev_types(root)
    of_parent = [offer for offer in offered if offer.parent == parent]
    for offer in of_parent:
        if offer.name == type_name:
            return offer
    if of_parent:
        names = ", ".join(offer.name for offer in of_parent)
        message = f"{parent} makes no mediated devices of type {type_name!r}"
        raise NoSuchDevice(type_name, message, found="nothing", hint=f"it makes {names}")
    parents = ", ".join(dict.fromkeys(offer.parent for offer in offered))
    raise NoSuchDevice(
        parent,
        f"{parent!r} makes no mediated devices",
        found="nothing",
        hint=f"{parents} do" if parents else "no device of this host does",
    )


def _wait(uuid: str, root: HostRoot, timeout_s: float) -> bool:
    """Whether it exists and is in a group before the deadline."""
    deadline = time.monotonic() + timeout_s
    path = f"{MDEV_DEVICES}/{uuid}"
    while root.stat(path) is None or find_group(path, root) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_STEP_S)  # the kernel gives no event for the group
    return True
