"""The CDI files of resources: one for each, as Kata wants it.

The kind is the name of the resource, and a device's name is its ID.
"""

import os
from collections.abc import Iterable, Mapping

from vmplug.cdi.own import OwnFiles
from vmplug.cdi.registry import DEFAULT_DIRECTORIES
from vmplug.cdi.spec import ContainerEdits, Device, DeviceNode, Spec
from vmplug.cdi.write import format_spec
from vmplug.errors import StateError
from vmplug.kubernetes.config import Config
from vmplug.kubernetes.units import Unit

_PREFIX = "vmplug-kubernetes-"


def find_foreign(config: Config) -> dict[str, str]:
    """The files of others in the directories that engines read, by the devices that they define.

    Raises HostError.
    """
    found = dict[str, str]()
    for directory in dict.fromkeys((*DEFAULT_DIRECTORIES, config.cdi_directory)):
        found |= OwnFiles(os.path.abspath(directory), _PREFIX).names_of_others()
    return found


def write_specs(config: Config, units: Iterable[Unit]) -> None:
    """Make the files say what these units are; a file that is lost is written again.

    Raises HostError, and StateError where a file of somebody else has the name of one, or while
    another process writes there.
    """
    texts = format_specs(units)
    with OwnFiles(os.path.abspath(config.cdi_directory), _PREFIX) as own:
        changes = own.compare(texts)
        if changes.written or changes.removed:  # only then it is locked
            changes = own.update(texts)
    if changes.taken:
        path = changes.taken[0]
        raise StateError(
            f"{path} is not as vmplug wrote it, so its devices have no names in CDI",
            state="of somebody else",
            required="absent",
            hint="remove or rename it",
        )


def format_specs(units: Iterable[Unit]) -> Mapping[str, str]:
    """The texts of the files of all resources that need one, by file name."""
    by_resource = dict[str, list[Unit]]()
    for unit in units:
        if unit.resource.given.is_cdi:
            by_resource.setdefault(unit.resource.name, []).append(unit)
    return {
        f"{_PREFIX}{name.replace('/', '-')}.yaml": format_spec(
            Spec(kind=name, devices=tuple(map(_device, of_resource)))
        )
        for name, of_resource in by_resource.items()
    }


def _device(unit: Unit) -> Device:
    nodes = tuple(
        DeviceNode(
            path=node.container_path,
            host_path="" if node.host_path == node.container_path else node.host_path,
            permissions="rw",
        )
        for node in unit.nodes
    )
    return Device(name=unit.id, container_edits=ContainerEdits(device_nodes=nodes))
