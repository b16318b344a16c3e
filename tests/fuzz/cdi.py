"""A CDI spec: what is accepted can be injected, and written so that it is read again."""

from typing import Any

from tests.fuzz.guard import changes_only
from vmplug import cdi
from vmplug.cdi.document import read_document
from vmplug.cdi.fields import Fields
from vmplug.cdi.read import _read_plain_json

_TOLD_MAX = 2_000


def check(data: bytes) -> None:
    """Any bytes are refused with field and reason, or become a spec that keeps every promise."""
    with changes_only():
        first, second = _parse(data), _parse(data)
    assert first == second
    if isinstance(first, cdi.Spec):
        _check_shortcut(data, first)
        _check_written(first)
        _check_injected(first)


def _parse(data: bytes) -> cdi.Spec | list[str]:
    try:
        return cdi.parse_spec(data, file="a.yaml")
    except cdi.CdiError as error:
        told = [str(problem) for problem in error.problems]
        assert told
        assert all(each.startswith("a.yaml: $") and len(each) < _TOLD_MAX for each in told)
        return told


def _check_shortcut(data: bytes, spec: cdi.Spec) -> None:
    """JSON that is read without PyYAML says the same with it."""
    if _read_plain_json(data) is not None:
        fields = Fields()
        assert fields.read(read_document(data)) == spec
        assert not fields.problems


def _check_written(spec: cdi.Spec) -> None:
    version = cdi.minimum_version(spec)
    assert cdi.VERSIONS.index(version) <= cdi.VERSIONS.index(spec.cdi_version.removeprefix("v"))
    for is_yaml in (False, True):
        again = cdi.parse_spec(cdi.format_spec(spec, is_yaml=is_yaml))
        assert again.cdi_version == version
        assert (again.kind, again.devices) == (spec.kind, spec.devices)
        assert (again.annotations, again.container_edits) == (
            spec.annotations,
            spec.container_edits,
        )


def _check_injected(spec: cdi.Spec) -> None:
    source = cdi.SpecFile(file="a.yaml", priority=0, spec=spec)
    devices = [cdi.FoundDevice(source=source, index=n) for n in range(len(spec.devices))]
    try:
        config = cdi.apply({}, devices, find=_find_node)
    except cdi.MissingNode as error:
        field = error.problems[0].field
    else:
        _check_nodes(spec, config)
        return
    assert field.endswith(".type")


def _check_nodes(spec: cdi.Spec, config: dict[str, Any]) -> None:
    nodes = {
        node.path
        for edits in (spec.container_edits, *(device.container_edits for device in spec.devices))
        for node in edits.device_nodes
    }
    assert {node["path"] for node in config.get("linux", {}).get("devices", [])} == nodes


def _find_node(_path: str) -> cdi.HostNode:
    return cdi.HostNode(type="c", major=1, minor=3)
