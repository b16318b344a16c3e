"""A vector's host below a directory, and its requests."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from tests.kata.vector import Case, Facts
from tests.support.tree import HostTree
from vmplug.devnum import DevNum
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.spec import parse_config

DISK = {"ContainerPath": "/dev/sda", "DevType": "b", "Major": 8, "Minor": 0}
TTY = {"ContainerPath": "/dev/tty2", "DevType": "c", "Major": 4, "Minor": 2}


def disk(name: str, minor: int = 0) -> dict[str, Any]:
    """A request for a disk, in Kata's words."""
    return {**DISK, "ContainerPath": f"/dev/{name}", "Minor": minor}


def add_disks(tree: HostTree, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Disks that the host has, and the requests for them."""
    disks = {name: disk(name, 16 * index) for index, name in enumerate(names)}
    for asked in disks.values():
        add_device(tree, asked)
    return disks


def build_host(case: Case, *, with_sockets: bool = False) -> HostTree:
    """The tree that `setup.fs` describes; what Kata took for sockets are files, or sockets."""
    tree = HostTree(case.path)
    files: Mapping[str, Any] = case.setup.get("fs", {})
    for path in files.get("dirs", ()):
        os.makedirs(case.path / path)
    for path, text in files.get("files", {}).items():
        if with_sockets and "/sockets/" in path:
            tree.node(path, "s")
        else:
            tree.file(path, text)
    for path, target in files.get("symlinks", {}).items():
        tree.link(path, target)
    for node in files.get("nodes", ()):
        tree.node(node["path"], node["type"], f"{node['major']}:{node['minor']}")
    return tree


def add_node(tree: HostTree, device: Mapping[str, Any]) -> None:
    """The container path as a node of what is asked for."""
    number = f"{device['Major']}:{device['Minor']}"
    tree.node(device["ContainerPath"], device["DevType"], number)


def add_device(tree: HostTree, device: Mapping[str, Any]) -> None:
    """What is asked for, as the kernel shows a device that is there."""
    path, number = device["ContainerPath"], f"{device['Major']}:{device['Minor']}"
    match device["DevType"]:
        case _ if device.get("HostPath"):
            tree.file(device["HostPath"], bytes(512))
        case "b":
            tree.block_device(number, path.removeprefix("/dev/"))
        case "p":
            tree.node(path, "p")
        case _:
            tree.char_device(number, path.removeprefix("/dev/"))


def open_store(case: Case, tree: HostTree, facts: Facts) -> VhostUserStore | None:
    """The vhost-user store that `facts` turn on."""
    path = facts["vhost_user_store_path"].removeprefix("$ROOT")
    return VhostUserStore(path, root=tree.root) if facts["vhost_user_store_enabled"] else None


def request(
    device: Mapping[str, Any], *, rules: Iterable[Mapping[str, Any]] = (), **more: Any
) -> DeviceInfo:
    """What a container asks for, read from a configuration of the OCI specification.

    A regular file has no words there: Kata marks it with major -1 and keeps its path beside it.
    """
    numbers = (device["Major"], device["Minor"])
    if device["Major"] == -1 or device.get("HostPath"):
        return DeviceInfo(
            container_path=device["ContainerPath"],
            dev_type=DevType(device["DevType"]),
            devnum=None if device["Major"] == -1 else DevNum(*numbers),
            host_path=device["HostPath"],
            **more,
        )
    asked = {
        "path": device["ContainerPath"],
        "type": device["DevType"],
        "major": numbers[0],
        "minor": numbers[1],
    }
    config = {
        "ociVersion": "1.0.2",
        "linux": {"devices": [asked], "resources": {"devices": list(rules)}},
    }
    (info,) = parse_config(json.dumps(config).encode(), name=None).devices
    return info._replace(**more)
