"""CDI names -> requests: the device nodes that the specs of this host give a container.

Nothing else of a spec is done: no variable is set, no hook runs, nothing is mounted or moved. That
is for the container, and for what starts it.
"""

import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterable, Sequence

from vmplug.cdi.inject import Edits, MissingNode, list_edits
from vmplug.cdi.names import QualifiedName
from vmplug.cdi.node import HostNode, complete, find_node
from vmplug.cdi.problem import CdiError, Problem
from vmplug.cdi.registry import DEFAULT_DIRECTORIES, FoundDevice, read_directories
from vmplug.cdi.spec import DeviceNode
from vmplug.devnum import DevNum
from vmplug.errors import NoSuchDevice, PolicyError
from vmplug.host.cdi.join import join
from vmplug.host.permissions import why_not_trusted
from vmplug.host.root import HostRoot
from vmplug.host.use.silent import find_silent, no_answer
from vmplug.oci.info import DeviceInfo, DevType, normal_container_path


class NothingToPlug(CdiError):
    """A device without a node, or with one that may be neither read nor written."""

    code = "nothing-to-plug"


def find_cdi_devices(
    names: Iterable[str], root: HostRoot, directories: Sequence[str] | None = None
) -> list[DeviceInfo]:
    """The device nodes that these names stand for, as requests: all of them, or an error.

    `directories` have the specs, lowest priority first: None for those that engines read, none for
    a host where CDI is off. vmplug checks each node. Raises SpecError for a malformed name, for a
    device that leaves nothing to plug and for a node that the host lacks, NoSuchDevice for a name
    that no spec defines, AttributeReadError for storage that does not answer, PolicyError when CDI
    is off or others can write to a spec.
    """
    asked = list(dict.fromkeys(str(QualifiedName.parse(name)) for name in names))
    if not asked:
        return []
    searched = DEFAULT_DIRECTORIES if directories is None else directories
    if not searched:
        raise PolicyError(
            f"{', '.join(asked)} cannot be resolved: CDI is off on this host",
            hint="the operator lists the directories of specs in the policy: directories, in the "
            "table cdi",
        )
    _require_answers(searched, root)
    registry = read_directories(_place(directory, root) for directory in searched)
    found = registry.resolve(asked)
    for device in found:
        _check_writers(device.source.file)
        _check_nodes(device)
    requests = dict[str, DeviceInfo]()
    listed = list(list_edits(found))
    nodes = [node for edits in listed for node in edits.edits.device_nodes]
    _require_answers([node.host_path or node.path for node in nodes], root)
    for edits in listed:
        for index in range(len(edits.edits.device_nodes)):
            request = _read_request(edits, index, root)
            path = request.container_path
            requests[path] = join(requests.get(path, request), request)
    return list(requests.values())


def _require_answers(paths: Sequence[str], root: HostRoot) -> None:
    silent = find_silent(set(paths), root)
    for path in paths:
        if path in silent:
            raise no_answer(path)


def _place(path: str, root: HostRoot) -> str:
    """Where a path of that host is on this one; what has the name is not followed."""
    if root.is_live:
        return path
    directory, name = posixpath.split(posixpath.normpath(path))
    return posixpath.join(f"{root.path}{root.real_path(directory)}", name)


def _check_writers(file: str) -> None:
    """PolicyError for a spec of which others decide what it says: names in it are root's word."""
    real = os.path.realpath(file)
    for path in (os.path.dirname(file), file, os.path.dirname(real)):
        if why := why_not_trusted(path):
            raise PolicyError(
                f"the CDI spec {file} cannot be trusted: {path} {why}",
                hint=f"chown root {path}; chmod go-w {path}",
            )


def _check_nodes(device: FoundDevice) -> None:
    """NothingToPlug for a device that brings no node, with what it has in place of one."""
    own, common = device.device.container_edits, device.source.spec.container_edits
    if own.device_nodes or common.device_nodes:
        return
    parts = Counter(
        {
            "env": len(own.env) + len(common.env),
            "mounts": len(own.mounts) + len(common.mounts),
            "hooks": len(own.hooks) + len(common.hooks),
            "netDevices": len(own.net_devices) + len(common.net_devices),
            "additionalGids": len(own.additional_gids) + len(common.additional_gids),
            "intelRdt": (own.intel_rdt is not None) + (common.intel_rdt is not None),
        }
    )
    only = " and ".join(part for part, count in parts.items() if count)
    raise NothingToPlug(
        [
            Problem(
                file=device.source.file,
                field=f"$.devices[{device.index}].containerEdits",
                message=f"{device.name} has no deviceNodes, only {only}: a VM gets devices alone",
            )
        ]
    )


def _read_request(edits: Edits, index: int, root: HostRoot) -> DeviceInfo:
    node = edits.edits.device_nodes[index]
    field = f"{edits.field}.deviceNodes[{index}]"
    if not node.is_usable:
        message = f"{node.permissions!r} allows neither reading nor writing: nothing is to plug"
        raise NothingToPlug(
            [Problem(file=edits.file, field=f"{field}.permissions", message=message)]
        )
    try:
        found = _find_host_node(node, root)
        number = None if found.type == DevType.FIFO else DevNum(found.major, found.minor)
    except (NoSuchDevice, ValueError) as error:
        name = "hostPath" if node.host_path else "path"
        problem = Problem(file=edits.file, field=f"{field}.{name}", message=str(error))
        raise MissingNode([problem]) from error
    return DeviceInfo(
        container_path=normal_container_path(node.path, f"{edits.file}: {field}.path"),
        dev_type=DevType(found.type),
        devnum=number,
        read_only=node.is_read_only,
        file_mode=None if node.file_mode is None else stat.S_IMODE(node.file_mode),
        uid=node.uid,
        gid=node.gid,
        cdi_names=(edits.name,),
    )


def _find_host_node(node: DeviceNode, root: HostRoot) -> HostNode:
    """The node that the spec means, and it must be the one that has its path now.

    An old spec has the number of another device: engines look at the host only where the spec has
    no number.
    """
    meant = complete(node, lambda path: find_node(_place(path, root)))
    path = node.host_path or node.path
    try:
        found = find_node(_place(path, root))
    except NoSuchDevice:
        if node.host_path:
            raise
        return meant  # of a path that is the container's alone
    if _kind_and_number(found) != _kind_and_number(meant):
        message = f"{path} is {_spoken(found)} on the host, the spec says {_spoken(meant)}"
        raise NoSuchDevice(path, message, found=_spoken(found))
    return meant


def _kind_and_number(node: HostNode) -> tuple[str, int, int]:
    return "c" if node.type == DevType.CHAR_UNBUFFERED else node.type, node.major, node.minor


def _spoken(node: HostNode) -> str:
    return f"{node.type} {node.major}:{node.minor}"
