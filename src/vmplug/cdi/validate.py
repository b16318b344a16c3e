"""The rules of CDI for a spec that has the right fields.

Source: the specification, section "CDI JSON Specification"; its library, container-edits.go.
"""

from collections.abc import Iterable, Iterator

from vmplug.cdi.names import find_kind_problem, find_name_problem, is_device_name
from vmplug.cdi.spec import (
    NO_EDITS,
    ContainerEdits,
    DeviceNode,
    Hook,
    IntelRdt,
    Mount,
    NetDevice,
    Spec,
)
from vmplug.cdi.version import SINCE_1_1, VERSIONS, find_needs, find_removed, find_version

HOOK_NAMES = (
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
)
_NODE_TYPES = ("", "b", "c", "u", "p")
_FILE_NAME_MAX = 4095

_Found = Iterator[tuple[str, str]]
"""Paths of fields, each with what is wrong and what is right."""


def find_problems(spec: Spec, versioned: Iterable[tuple[str, str]] = ()) -> _Found:
    """Every rule that a spec breaks; none means that it is valid.

    `versioned` are the fields that its text has and that not every version has, with their paths:
    of one that is there but empty, the spec itself knows nothing.
    """
    yield from _find_version_problems(spec, versioned)
    if not spec.kind:
        yield "$.kind", "is missing, expected VENDOR/CLASS"
    elif problem := find_kind_problem(spec.kind):
        yield "$.kind", problem
    yield from _below("$.containerEdits", _list_edits_problems(spec.container_edits))
    yield from _find_device_problems(spec)


def _find_version_problems(spec: Spec, versioned: Iterable[tuple[str, str]]) -> _Found:
    version = find_version(spec.cdi_version)
    if version is None:
        said = f"unknown version {spec.cdi_version!r:.60}" if spec.cdi_version else "is missing"
        yield "$.cdiVersion", f"{said}, expected one of {', '.join(VERSIONS)}"
        return
    said = f"the file declares {version}"
    told = set[str]()
    is_latest = version == VERSIONS[-1]
    for name, path in [*versioned, *(find_removed(spec) if is_latest else ())]:
        is_new = name in SINCE_1_1
        if is_new != is_latest and path not in told:
            told.add(path)
            only = "from 1.1.0 on" if is_new else "before 1.1.0"
            yield path, f"is only valid {only}, {said}"
    for needed, path in find_needs(spec, version):
        if path not in told:
            yield path, f"needs cdiVersion {needed} or later, {said}"


def _find_device_problems(spec: Spec) -> _Found:
    if not spec.devices:
        yield "$.devices", "is empty, expected at least one device"
    names = [device.name for device in spec.devices]
    if len(set(names)) < len(names) or not all(map(is_device_name, names)):
        yield from _find_name_problems(names)
    for index, device in enumerate(spec.devices):
        edits = device.container_edits
        if edits == NO_EDITS:
            yield f"$.devices[{index}].containerEdits", "is empty, expected at least one edit"
        elif problems := _list_edits_problems(edits):
            yield from _below(f"$.devices[{index}].containerEdits", problems)


def _find_name_problems(names: list[str]) -> _Found:
    for index, name in enumerate(names):
        path, first = f"$.devices[{index}].name", names.index(name)
        if not name:
            yield path, "is missing, expected the name of the device"
        elif problem := find_name_problem(name):
            yield path, problem
        elif first < index:
            yield path, f"{name!r:.60} is already the name of $.devices[{first}], expected another"


def _below(path: str, problems: Iterable[tuple[str, str]]) -> _Found:
    for field, problem in problems:
        yield f"{path}.{field}", problem


def _list_edits_problems(edits: ContainerEdits) -> list[tuple[str, str]]:
    """What is wrong with edits; called for thousands that are right, so it makes no generator."""
    found: list[tuple[str, str]] = []
    for entry in edits.env:
        if entry.find("=") < 1:
            found += _find_env_problems("env", edits.env)
            break
    for index, node in enumerate(edits.device_nodes):
        if problem := _find_node_problem(node):
            found.append((f"deviceNodes[{index}].{problem[0]}", problem[1]))
    if edits.net_devices:
        found += _find_net_problems(edits.net_devices)
    for index, hook in enumerate(edits.hooks):
        found += _below(f"hooks[{index}]", _find_hook_problems(hook))
    for index, mount in enumerate(edits.mounts):
        if not (mount.host_path and mount.container_path):
            found += _below(f"mounts[{index}]", _find_mount_problems(mount))
    if edits.intel_rdt is not None:
        found += _find_rdt_problems(edits.intel_rdt)
    return found


def _find_env_problems(field: str, env: tuple[str, ...]) -> _Found:
    for index, entry in enumerate(env):
        if entry.find("=") < 1:
            what = "has no name before '='" if "=" in entry else "has no '='"
            yield f"{field}[{index}]", f"{entry!r:.60} {what}, expected KEY=VALUE"


def _find_node_problem(node: DeviceNode) -> tuple[str, str] | None:
    """The first wrong field of a node: most of thousands have none."""
    if not node.path:
        return "path", "is missing, expected the path of the node in the container"
    if node.type not in _NODE_TYPES:
        return "type", f"{node.type!r:.60} is not a type of node, expected b, c, u or p"
    # A cgroup rule with -1 would be one for every device.
    if node.major is not None and node.major < 0:
        return "major", f"{node.major} is negative, expected the major number of a device"
    if node.minor is not None and node.minor < 0:
        return "minor", f"{node.minor} is negative, expected the minor number of a device"
    if node.permissions.strip("rwm") and node.permissions != "none":
        said = f"{node.permissions!r:.60} is not r, w and m"
        return "permissions", f"{said}, expected some of these, or 'none'"
    return None


def _find_net_problems(devices: tuple[NetDevice, ...]) -> _Found:
    for attribute, field in (("host_interface_name", "hostInterfaceName"), ("name", "name")):
        seen = set[str]()
        for index, device in enumerate(devices):
            name: str = getattr(device, attribute)
            if not name:
                yield f"netDevices[{index}].{field}", "is missing, expected an interface's name"
            elif name in seen:
                yield (
                    f"netDevices[{index}].{field}",
                    f"{name!r:.60} is there twice, expected it once",
                )
            seen.add(name)


def _find_hook_problems(hook: Hook) -> _Found:
    if hook.hook_name not in HOOK_NAMES:
        said = f"{hook.hook_name!r:.60} is not a hook" if hook.hook_name else "is missing"
        yield "hookName", f"{said}, expected one of {', '.join(HOOK_NAMES)}"
    if not hook.path:
        yield "path", "is missing, expected the path of a program"
    yield from _find_env_problems("env", hook.env)


def _find_mount_problems(mount: Mount) -> _Found:
    if not mount.host_path:
        yield "hostPath", "is missing, expected what is mounted"
    if not mount.container_path:
        yield "containerPath", "is missing, expected where it is mounted in the container"


def _find_rdt_problems(rdt: IntelRdt) -> _Found:
    name = rdt.clos_id
    if name == "/":  # the root class of service
        return
    if len(name.encode()) > _FILE_NAME_MAX or name in {".", ".."} or {"/", "\n"} & {*name}:
        yield "intelRdt.closID", f"{name!r:.60} is not the name of a file, expected one, or '/'"
