"""Which version of CDI a spec needs, and which fields a version does not have.

Source: the specification, section "Released versions"; its library, version.go.
"""

from collections.abc import Iterator

from vmplug.cdi.spec import ContainerEdits, IntelRdt, Spec

VERSIONS = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
"""Those that a spec may declare, oldest first. 0.1.0 and 0.2.0 have no specification."""

SINCE_1_1 = frozenset({"netDevices", "schemata", "enableMonitoring"})
UNTIL_1_0 = frozenset({"enableCMT", "enableMBM"})
VERSIONED = SINCE_1_1 | UNTIL_1_0
"""Fields that must not be in a spec of other versions at all, not even empty or false."""


def find_version(declared: str) -> str | None:
    """The version that a spec declares, None for an unknown one, which may begin with v."""
    version = declared.removeprefix("v")
    return version if version in VERSIONS else None


def minimum_version(spec: Spec) -> str:
    """The lowest version that has every field which the spec uses."""
    return max((version for version, _ in find_needs(spec)), default=VERSIONS[0])


def find_removed(spec: Spec) -> Iterator[tuple[str, str]]:
    """The fields that are true and that 1.1.0 has taken away, by name and path."""
    edits = {"$": spec.container_edits}
    edits |= {f"$.devices[{n}]": each.container_edits for n, each in enumerate(spec.devices)}
    for path, each in edits.items():
        if each.intel_rdt and each.intel_rdt.enable_cmt:
            yield "enableCMT", f"{path}.containerEdits.intelRdt.enableCMT"
        if each.intel_rdt and each.intel_rdt.enable_mbm:
            yield "enableMBM", f"{path}.containerEdits.intelRdt.enableMBM"


def find_needs(spec: Spec, above: str = VERSIONS[0]) -> Iterator[tuple[str, str]]:
    """Each version above this one that something in the spec needs, with the field's path."""
    return (need for need in _find_needs(spec, above) if need[0] > above)


def _find_needs(spec: Spec, above: str) -> Iterator[tuple[str, str]]:
    """Among them all that are above; lower ones are left out where that saves time."""
    has_old = above < "0.5.0"
    if "." in spec.kind.partition("/")[2]:
        yield "0.6.0", "$.kind"
    if spec.annotations:
        yield "0.6.0", "$.annotations"
    for version, field in _list_edits_needs(spec.container_edits, has_old=has_old):
        yield version, f"$.containerEdits.{field}"
    for index, device in enumerate(spec.devices):
        if has_old and device.name[:1].isdigit():
            yield "0.5.0", f"$.devices[{index}].name"
        if device.annotations:
            yield "0.6.0", f"$.devices[{index}].annotations"
        for version, field in _list_edits_needs(device.container_edits, has_old=has_old):
            yield version, f"$.devices[{index}].containerEdits.{field}"


def _list_edits_needs(edits: ContainerEdits, *, has_old: bool) -> list[tuple[str, str]]:
    """What edits need; called for thousands that need nothing, so it makes no generator."""
    found: list[tuple[str, str]] = []
    if has_old:
        for index, node in enumerate(edits.device_nodes):
            if node.host_path:
                found.append(("0.5.0", f"deviceNodes[{index}].hostPath"))
        for index, mount in enumerate(edits.mounts):
            if mount.type:
                found.append(("0.4.0", f"mounts[{index}].type"))
    if edits.additional_gids:
        found.append(("0.7.0", "additionalGids"))
    if edits.net_devices:
        found.append(("1.1.0", "netDevices"))
    if edits.intel_rdt is not None:
        found += _find_rdt_needs(edits.intel_rdt)
    return found


def _find_rdt_needs(rdt: IntelRdt) -> Iterator[tuple[str, str]]:
    yield "0.7.0", "intelRdt"
    if rdt.schemata:
        yield "1.1.0", "intelRdt.schemata"
    if rdt.enable_monitoring:
        yield "1.1.0", "intelRdt.enableMonitoring"
