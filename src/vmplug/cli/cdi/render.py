"""CDI devices and files: for people, and as JSON."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec

from vmplug.cdi.node import HostNode, complete, find_node
from vmplug.cdi.version import minimum_version
from vmplug.cli.render.output import access
from vmplug.cli.render.table import Column, path_column, print_table
from vmplug.cli.render.terminal import Style, say, wrapped
from vmplug.cli.render.tree import Line
from vmplug.errors import NoSuchDevice
from vmplug.text import one_line

if TYPE_CHECKING:
    from vmplug.cdi.registry import FoundDevice, Registry
    from vmplug.cdi.spec import ContainerEdits, DeviceNode
    from vmplug.cli.cdi.read import CheckedFiles


def _host_path(node: "DeviceNode") -> str:
    return node.host_path or node.path


def _access(node: "DeviceNode") -> str:
    """`rw`, `ro`, or `none` for a node that may not be opened."""
    return access(read_only=node.is_read_only) if node.is_usable else "none"


# list


def print_devices(registry: "Registry") -> None:
    """A table, one line for each device."""
    if not registry.devices:
        click.echo(f"no usable file in {', '.join(registry.directories)} defines a CDI device")
    columns = (
        "DEVICE",
        path_column("NODES", 1),
        Column("OTHER EDITS", 3, least=12),
        path_column("FILE", 2),
    )
    print_table(columns, [_row(found) for found in registry.devices.values()])


def _row(found: "FoundDevice") -> tuple[str, ...]:
    edits = found.device.container_edits
    nodes = ", ".join(f"{_host_path(node)} {_access(node)}" for node in edits.device_nodes)
    others = Counter(line[0] for line in _edit_cells(edits) if line[0] != "node")
    told = ", ".join(f"{count} {what}" for what, count in others.items())
    return found.name, nodes or "-", told or "-", found.source.file


def print_unusable(registry: "Registry") -> None:
    """Report on stderr which files and names nobody can use."""
    for problem in registry.problems:
        say(f"vmplug: unusable: {one_line(str(problem))}", Style.WARNING, err=True)
    for name, files in registry.conflicts.items():
        say(f"vmplug: {one_line(_conflict(name, files))}", Style.WARNING, err=True)


def _conflict(name: str, files: Iterable[str]) -> str:
    return f"unusable: {name} is defined by several files of one directory: {', '.join(files)}"


def registry_json(registry: "Registry") -> dict[str, Any]:
    """Every device, and what cannot be used."""
    return {
        "directories": list(registry.directories),
        "devices": [device_json(found, registry) for found in registry.devices.values()],
        **_unusable_json(registry),
    }


def _unusable_json(found: "Registry | CheckedFiles") -> dict[str, Any]:
    return {
        "problems": [msgspec.to_builtins(problem) for problem in found.problems],
        "conflicts": {name: list(files) for name, files in found.conflicts.items()},
    }


# show


def device_json(found: "FoundDevice", registry: "Registry") -> dict[str, Any]:
    """A device with its file, what it does to a container, and the nodes on this host."""
    source, edits = found.source, found.device.container_edits
    nodes = (*source.spec.container_edits.device_nodes, *edits.device_nodes)
    return {
        "name": found.name,
        "file": source.file,
        "cdi_version": source.spec.cdi_version,
        "overrides": list(_overridden(found, registry)),
        "annotations": {**source.spec.annotations, **found.device.annotations},
        "nodes": [_node_json(node) for node in nodes],
        "spec_edits": msgspec.to_builtins(source.spec.container_edits),
        "device_edits": msgspec.to_builtins(edits),
    }


def _node_json(node: "DeviceNode") -> dict[str, Any]:
    host_node, problem = _find(node)
    return {
        "host_path": _host_path(node),
        "container_path": node.path,
        "device_type": host_node.type if host_node else None,
        "major": host_node.major if host_node else None,
        "minor": host_node.minor if host_node else None,
        "access": _access(node),
        "problem": problem,
    }


def _find(node: "DeviceNode") -> tuple[HostNode | None, str | None]:
    """The node of this host, or why it cannot be used."""
    try:
        return complete(node, find_node), None
    except NoSuchDevice as error:
        return None, error.message


def _overridden(found: "FoundDevice", registry: "Registry") -> Iterator[str]:
    """Files of lower priority that define a device of that name."""
    kind, name = found.source.spec.kind, found.device.name
    for file in registry.files:
        is_lower = file.priority < found.source.priority and file.spec.kind == kind
        if is_lower and any(device.name == name for device in file.spec.devices):
            yield file.file


def device_lines(found: "FoundDevice", registry: "Registry") -> list[Line]:
    """A device as a tree: its file, and what it does to a container."""
    spec = found.source.spec
    lines = [Line(0, (found.name,), Style.HEADING)]
    lines.append(Line(1, ("file", f"{found.source.file}, CDI {spec.cdi_version}")))
    lines += [Line(1, ("overrides", file)) for file in _overridden(found, registry)]
    annotations = {**spec.annotations, **found.device.annotations}
    lines += [Line(1, ("annotation", f"{key}={text}")) for key, text in annotations.items()]
    lines += _edit_lines(found.device.container_edits, 1)
    common = _edit_lines(spec.container_edits, 2)
    if common:
        lines += [Line(1, ("once for all devices of the file:",)), *common]
    return lines


def _edit_lines(edits: "ContainerEdits", depth: int) -> list[Line]:
    nodes = [_node_line(node, depth) for node in edits.device_nodes]
    return [*nodes, *(Line(depth, cells) for cells in _edit_cells(edits) if cells[0] != "node")]


def _node_line(node: "DeviceNode", depth: int) -> Line:
    host_node, problem = _find(node)
    place = f" as {node.path}" if node.path != _host_path(node) else ""
    what = f"{_host_path(node)}{place}, {_access(node)}"
    if host_node is None:
        return Line(depth, ("node", f"{what}: {problem}"), Style.ERROR)
    return Line(depth, ("node", f"{what}, {host_node.type} {host_node.major}:{host_node.minor}"))


def _edit_cells(edits: "ContainerEdits") -> Iterator[tuple[str, str]]:
    """Each edit: its word, and what it is."""
    for node in edits.device_nodes:
        yield "node", _host_path(node)
    for entry in edits.env:
        yield "env", entry
    for device in edits.net_devices:
        yield "interface", f"{device.host_interface_name} as {device.name}"
    for mount in edits.mounts:
        options = f" ({','.join(mount.options)})" if mount.options else ""
        yield "mount", f"{mount.host_path} at {mount.container_path}{options}"
    for hook in edits.hooks:
        yield "hook", f"{hook.hook_name} {' '.join(hook.args) or hook.path}, {hook.path}"
    if edits.intel_rdt is not None:
        fields = msgspec.to_builtins(edits.intel_rdt).items()
        yield "intelRdt", ", ".join(f"{key}={value}" for key, value in fields)
    for gid in edits.additional_gids:
        yield "group", str(gid)


# validate


def print_files(checked: "CheckedFiles") -> None:
    """A table of the valid files, and then each mistake of the others."""
    rows = [
        (
            file.file,
            file.spec.kind,
            str(len(file.spec.devices)),
            file.spec.cdi_version,
            minimum_version(file.spec),
        )
        for file in checked.valid
    ]
    columns = (
        path_column("VALID FILE"),
        Column("KIND", 1, least=12),
        "DEVICES",
        Column("VERSION", 2),
        Column("NEEDED", 3),
    )
    print_table(columns, rows)
    told = [*map(str, checked.problems)]
    told += [_conflict(name, files) for name, files in checked.conflicts.items()]
    for text in told:
        for line in wrapped(one_line(text), rest="  "):
            say(line, Style.ERROR)
    if not rows and not told:
        click.echo("there is no file to validate")


def files_json(checked: "CheckedFiles") -> dict[str, Any]:
    """The valid files, and what is wrong with the others."""
    files = [
        {
            "file": file.file,
            "kind": file.spec.kind,
            "devices": [device.name for device in file.spec.devices],
            "cdi_version": file.spec.cdi_version,
            "minimum_version": minimum_version(file.spec),
        }
        for file in checked.valid
    ]
    return {"ok": checked.are_valid, "files": files, **_unusable_json(checked)}
