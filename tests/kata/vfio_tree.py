"""The host of a VFIO vector: its functions, groups and mediated devices at the kernel's places.

Kata's tests put them in directories of their own, and leave out what Kata does not look at.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tests.kata.vector import Case, Facts, Refusal, attempt
from tests.support.pci_tree import PciTree
from vmplug.address import Bdf
from vmplug.devnum import DevNum
from vmplug.host.device import HostDevice
from vmplug.host.pci.mdev import VFIODeviceType
from vmplug.host.resolve import resolve
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import VfioInfo

UUID = "f94290f8-78ac-45fb-bb22-e55e519fa64f"
"""For devices that a vector calls only "uuid"."""
TYPES = {1: VFIODeviceType.NORMAL, 2: VFIODeviceType.MEDIATED, 3: VFIODeviceType.AP}
"""By Kata's numbers."""
AP_MATRIX = "/sys/devices/vfio_ap/matrix"

_PLACES = {
    "pci": "/sys/bus/pci/devices",
    "groups": "/sys/kernel/iommu_groups",
    "char": "/sys/dev/char",
    "devices": "/sys/devices",
    "dev/pci0000:00": "/sys/devices/pci0000:00",
    "m": f"{AP_MATRIX}/{UUID}",
}
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def at(path: str) -> str:
    """Where the kernel has what a vector has at `path`."""
    path = path.removeprefix("$ROOT/").lstrip("/")
    for word, place in _PLACES.items():
        if path == word or path.startswith(f"{word}/"):
            return place + path.removeprefix(word)
    return f"/{path}"


def build(case: Case) -> PciTree:
    """The tree that `setup.fs` describes, and the links that the kernel makes to what is in it."""
    tree = PciTree(case.path)
    files: Mapping[str, Any] = case.setup.get("fs", {})
    for path in files.get("dirs", ()):
        _make_directory(tree, at(path))
    for path, text in files.get("files", {}).items():
        tree.file(at(path), text)
    for path, length in files.get("file_sizes", {}).items():
        tree.file(at(path), bytes(length))
    for path, target in files.get("symlinks", {}).items():
        is_whole = target.startswith("$ROOT")
        whole = target if is_whole else os.path.normpath(f"{os.path.dirname(path)}/{target}")
        link(tree, at(path), at(whole))
    for node in files.get("nodes", ()):
        tree.node(node["path"], node["type"], f"{node['major']}:{node['minor']}")
    _make_bus_links(tree)
    return tree


def _make_directory(tree: PciTree, path: str) -> None:
    (tree.path / path.lstrip("/")).mkdir(parents=True, exist_ok=True)


def link(tree: PciTree, path: str, target: str) -> None:
    """A link from one place of the tree to another, relative as the kernel's are."""
    tree.link(path, os.path.relpath(target, os.path.dirname(path)))


def _make_bus_links(tree: PciTree) -> None:
    devices = tree.path / "sys/devices"
    for path in sorted(entry for entry in devices.rglob("*") if entry.is_dir()):
        bus = "pci" if _is_bdf(path.name) else "mdev" if _UUID.fullmatch(path.name) else None
        place = f"/sys/bus/{bus}/devices/{path.name}"
        if bus and not os.path.lexists(tree.path / place.lstrip("/")):
            link(tree, place, f"/{path.relative_to(tree.path)}")


def _is_bdf(name: str) -> bool:
    return isinstance(attempt(lambda: Bdf.parse(name)), Bdf)


def give_to_vfio(tree: PciTree, functions: Iterable[str]) -> None:
    """Let vfio-pci have the functions, which Kata takes for granted."""
    for bdf in functions:
        driver = f"/sys/bus/pci/devices/{bdf}/driver"
        link(tree, driver, "/sys/bus/pci/drivers/vfio-pci")


def name_cdev(tree: PciTree, devnum: str) -> str:
    """What else the kernel shows of the device of that number; gives its node."""
    directory = tree.root.real_path(f"/sys/dev/char/{devnum}")
    name = os.path.basename(directory)
    major, minor = devnum.split(":")
    uevent = f"MAJOR={major}\nMINOR={minor}\nDEVNAME=vfio/devices/{name}\n"
    tree.file(f"{directory}/uevent", uevent)
    link(tree, f"/sys/class/vfio-dev/{name}", directory)
    return f"/dev/vfio/devices/{name}"


def add_cdev(tree: PciTree, bdf: str, node: str) -> DeviceInfo:
    """A device of a function, with a node of any name; gives the request for it."""
    name = os.path.basename(node)
    directory = f"{tree.real(bdf)}/vfio-dev/{name}"
    devname = node.removeprefix("/dev/")
    tree.file(f"{directory}/uevent", f"MAJOR=511\nMINOR=0\nDEVNAME={devname}\n")
    tree.file(node)
    link(tree, "/sys/dev/char/511:0", directory)
    link(tree, f"/sys/class/vfio-dev/{name}", directory)
    return node_request(node, 511, 0)


def node_request(path: str, major: int, minor: int) -> DeviceInfo:
    """The request for a node of VFIO by its number."""
    return DeviceInfo(
        container_path=path, dev_type=DevType.CHAR, devnum=DevNum(major=major, minor=minor)
    )


def named(device: str, **options: str) -> VfioInfo:
    """The request for a device by its address, UUID or node."""
    return VfioInfo(label="device", device=device, driver_options=options)


def find(tree: PciTree, device: str) -> HostDevice | Refusal:
    """What is behind an address, UUID or node."""
    return attempt(lambda: resolve(named(device), tree.root))


def add_mediated(
    tree: PciTree,
    kind: VFIODeviceType,
    parent: str,
    *,
    uuid: str = UUID,
    queues: Iterable[str] = (),
) -> None:
    """A mediated device in group 9; `parent` is its parent's directory."""
    tree.mdev_type(parent, "type", api="vfio-pci" if kind is TYPES[2] else str(kind))
    matrix = list(queues) if kind is VFIODeviceType.AP else None
    tree.mdev(uuid, parent, "type", group=9, matrix=matrix)


def hexadecimal(value: int | None, digits: int) -> str:
    """A number as sysfs writes it; empty for None."""
    return "" if value is None else f"{value:#0{digits + 2}x}"


def skip_places(setup: Facts) -> None:
    """Where Kata was told to look."""
    setup.skip("ours looks where the kernel has it", *({*_KATAS_PATHS} & {*setup}))


_KATAS_PATHS = ("SysBusPciDevicesPath", "SysIOMMUGroupPath", "sys_dev_char", "cwd")
