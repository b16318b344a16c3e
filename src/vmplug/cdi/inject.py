"""Puts devices into the OCI config of a container: what an engine does for `--device NAME`.

The order of everything in the result is that of the reference library. Unlike there, a failure
leaves nothing behind. Source: pkg/cdi/container-edits.go; runtime-tools, generate.go.
"""

import copy
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from vmplug.cdi.node import FindNode, OtherType, complete, find_node
from vmplug.cdi.problem import CdiError, Problem
from vmplug.cdi.registry import FoundDevice, Registry
from vmplug.cdi.spec import ContainerEdits, DeviceNode, Hook, IntelRdt, Mount
from vmplug.errors import NoSuchDevice, SpecError

Config = dict[str, Any]

_USER = {"uid": 0, "gid": 0}
_MADE = {("process",): {"user": _USER, "cwd": ""}, ("process", "user"): _USER}
"""What must be in these, also in a config that has none."""


class MissingNode(CdiError):
    """A device node of a spec is not on the host, or is another there than the spec says."""

    code = "no-such-cdi-node"


def inject(
    config: Mapping[str, Any],
    names: Iterable[str],
    registry: Registry,
    *,
    find: FindNode = find_node,
) -> Config:
    """A copy of the config that has the devices of these names; the config itself stays as it is.

    UnresolvableDevices has the names that are not in the registry, MissingNode the node that the
    host lacks; SpecError is for a config that is malformed. `find` looks at the host's nodes.
    """
    return apply(config, registry.resolve(names), find=find)


def apply(
    config: Mapping[str, Any], devices: Iterable[FoundDevice], *, find: FindNode = find_node
) -> Config:
    """A copy of the config with the edits of the devices, those of each spec before its first."""
    editor = _Editor(copy.deepcopy(dict(config)), find)
    edits = list(list_edits(devices))
    for each in edits:
        editor.set_env(each.edits.env)
    for each in edits:
        for index, node in enumerate(each.edits.device_nodes):
            editor.add_node(node, each, index)
    for each in edits:
        for device in each.edits.net_devices:
            interfaces = editor.mapping("linux", "netDevices")
            interfaces[device.host_interface_name] = {"name": device.name}
    editor.add_mounts([mount for each in edits for mount in each.edits.mounts])
    for each in edits:
        for hook in each.edits.hooks:
            editor.items("hooks", hook.hook_name).append(_drop_empty(hook, "hookName"))
    for each in edits:
        if each.edits.intel_rdt is not None:
            editor.mapping("linux")["intelRdt"] = _drop_empty(each.edits.intel_rdt)
    editor.add_gids(gid for each in edits for gid in each.edits.additional_gids)
    return editor.config


class Edits(msgspec.Struct, frozen=True):
    """Edits of a file, which are at that path in it, and the device that brings them."""

    name: str
    file: str
    field: str
    edits: ContainerEdits


def list_edits(devices: Iterable[FoundDevice]) -> Iterator[Edits]:
    """The edits of the devices in their order, those of each spec before its first."""
    begun = set[str]()
    for found in devices:
        source = found.source
        if source.file not in begun:
            begun.add(source.file)
            common = source.spec.container_edits
            yield Edits(found.name, source.file, "$.containerEdits", common)
        field = f"$.devices[{found.index}].containerEdits"
        yield Edits(found.name, source.file, field, found.device.container_edits)


def _drop_empty(part: Hook | IntelRdt, *others: str) -> dict[str, Any]:
    """The mapping of a part as the OCI config has it: what is empty is left out."""
    fields: dict[str, Any] = msgspec.to_builtins(part)
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in fields.items()
        if key not in others and value not in ((), [], "") and value is not False
    }


class _Editor:
    """An OCI config that is changed; what is missing on the way to a value is made."""

    def __init__(self, config: Config, find: FindNode) -> None:
        self.config = config
        self._find = find

    def mapping(self, *keys: str) -> dict[str, Any]:
        """The mapping at these keys."""
        found: dict[str, Any] = self._at(keys, dict)
        return found

    def items(self, *keys: str) -> list[Any]:
        """The list at these keys."""
        found: list[Any] = self._at(keys, list)
        return found

    def _at(self, keys: tuple[str, ...], kind: type[Any]) -> Any:
        inside: Any = self.config
        for depth, key in enumerate(keys, 1):
            wanted = kind if depth == len(keys) else dict
            if inside.get(key) is None:
                made = _MADE.get(keys[:depth])
                inside[key] = wanted() if made is None else copy.deepcopy(made)
            inside = inside[key]
            if not isinstance(inside, wanted):
                what = "a list" if wanted is list else "a mapping"
                raise SpecError(f"$.{'.'.join(keys[:depth])}", f"expected {what}")
        return inside

    def set_env(self, entries: Iterable[str]) -> None:
        """Set each entry in the place of the last with its key, or at the end."""
        for entry in entries:
            env = self.items("process", "env")
            places = {_key(other): index for index, other in enumerate(env)}
            index = places.get(_key(entry), len(env))
            env[index : index + 1] = [entry]

    def add_node(self, node: DeviceNode, edits: Edits, index: int) -> None:
        """Add a node in place of the one with its path, and the cgroup rule for it."""
        try:
            host_node = complete(node, self._find)
        except NoSuchDevice as error:
            name = "hostPath" if node.host_path else "path"
            if isinstance(error, OtherType):
                name = "type"
            field = f"{edits.field}.deviceNodes[{index}].{name}"
            problem = Problem(file=edits.file, field=field, message=error.message)
            raise MissingNode([problem]) from error
        device = {
            "path": node.path,
            "type": host_node.type,
            "major": host_node.major,
            "minor": host_node.minor,
            "fileMode": node.file_mode,
            "uid": self._owner("uid") if node.uid is None else node.uid,
            "gid": self._owner("gid") if node.gid is None else node.gid,
        }
        devices = self.items("linux", "devices")
        _remove(devices, "path", node.path)
        found = _find_index(devices, "path", node.path)
        devices[found : found + 1] = [{k: v for k, v in device.items() if v is not None}]
        if host_node.type in {"b", "c"}:
            self._allow(node, host_node.type, host_node.major, host_node.minor)

    def _allow(self, node: DeviceNode, kind: str, major: int, minor: int) -> None:
        access = {"": "rwm", "none": ""}.get(node.permissions, node.permissions)
        rule = {"allow": True, "type": kind, "major": major, "minor": minor}
        rules = self.items("linux", "resources", "devices")
        rules.append({**rule, "access": access} if access else rule)

    def _owner(self, which: str) -> int | None:
        """The user or group of the process, None for root and where there is no process."""
        if self.config.get("process") is None or self.mapping("process").get("user") is None:
            return None
        number = self.mapping("process", "user").get(which)
        return number if isinstance(number, int) and number > 0 else None

    def add_mounts(self, mounts: list[Mount]) -> None:
        """Add the mounts, each in place of one with its destination, and sort all by depth."""
        if not mounts:
            return
        present = self.items("mounts")
        for mount in mounts:
            _remove(present, "destination", mount.container_path)
            fields = {
                "destination": mount.container_path,
                "type": mount.type,
                "source": mount.host_path,
                "options": [*mount.options],
            }
            present.append({key: value for key, value in fields.items() if value})
        present.sort(key=_depth)

    def add_gids(self, gids: Iterable[int]) -> None:
        """Add groups to the process; root's is left out, and those that it has."""
        for gid in filter(None, gids):
            present = self.items("process", "user", "additionalGids")
            if gid not in present:
                present.append(gid)


def _key(entry: object) -> str:
    return str(entry).partition("=")[0]


def _find_index(items: list[Any], key: str, value: str) -> int:
    """The index of the first item with that value, or that of one more."""
    matches = (n for n, item in enumerate(items) if _value(item, key) == value)
    return next(matches, len(items))


def _remove(items: list[Any], key: str, value: str) -> None:
    found = _find_index(items, key, value)
    del items[found : found + 1]


def _value(item: Any, key: str) -> object:
    return item.get(key) if isinstance(item, dict) else None


def _depth(mount: Any) -> int:
    """Slashes of the destination, as Go's filepath.Clean writes it."""
    destination = _value(mount, "destination")
    path = posixpath.normpath(destination) if isinstance(destination, str) else ""
    return path.removeprefix("/" if path.startswith("//") else "").count("/")
