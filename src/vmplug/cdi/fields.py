"""A document's values as a spec: each field is converted by its type, every mistake is reported.

Keys are matched without regard to case, and null is the default of the field, as in the reference.
Source: encoding/json of Go; sigs.k8s.io/yaml, convertToJSONableObject.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from vmplug.cdi.document import as_text, child
from vmplug.cdi.spec import (
    NO_EDITS,
    ContainerEdits,
    Device,
    DeviceNode,
    Hook,
    IntelRdt,
    Mount,
    NetDevice,
    Spec,
)
from vmplug.cdi.version import VERSIONED

_INT64 = (-(2**63), 2**63 - 1)
_UINT32 = (0, 2**32 - 1)
_WORDS: Mapping[type, str] = {
    bool: "a bool",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


class Fields:
    """Reads a spec; `problems` are the mistakes.

    `versioned` are the fields that not every version has, by name and path.
    """

    def __init__(self) -> None:
        self.problems = list[tuple[str, str]]()
        self.versioned = list[tuple[str, str]]()

    def read(self, document: object) -> Spec:
        """The spec; where there are problems, it has defaults in their place."""
        if document is None:
            self.problems.append(("$", "the document is empty, expected a CDI spec"))
            return Spec()
        spec: Spec = _read_spec(self, document, "$")
        return spec

    def complain(self, path: str, value: object, expected: str) -> None:
        """Note that a value is of another type than its field."""
        shown = f"{value!r:.60}" if isinstance(value, str | int | float) else "it"
        self.problems.append((path, f"{shown} is {_WORDS[type(value)]}, expected {expected}"))


_Reader = Callable[[Fields, object, str], Any]


def _text(fields: Fields, value: object, path: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return as_text(value)
    fields.complain(path, value, "text")
    return ""


def _bool(fields: Fields, value: object, path: str) -> bool:
    if value is not None and not isinstance(value, bool):
        fields.complain(path, value, "true or false")
    return value is True


def _integer(limits: tuple[int, int]) -> _Reader:
    low, high = limits

    def read(fields: Fields, value: object, path: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or isinstance(value, bool) or not isinstance(value, int):
            if value is not None:
                fields.complain(path, value, "an integer")
            return 0
        if not low <= value <= high:
            expected = f"an integer from {low} to {high}"
            fields.problems.append((path, f"{value} is out of range, expected {expected}"))
            return 0
        return value

    return read


def _optional(reader: _Reader) -> _Reader:
    return lambda fields, value, path: None if value is None else reader(fields, value, path)


def _list(reader: _Reader) -> _Reader:
    def read(fields: Fields, value: object, path: str) -> tuple[Any, ...]:
        if value is None:
            return ()
        if not isinstance(value, list):
            fields.complain(path, value, "a list")
            return ()
        return tuple(reader(fields, each, f"{path}[{n}]") for n, each in enumerate(value))

    return read


def _texts_by_key(fields: Fields, value: object, path: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        fields.complain(path, value, "a mapping of text to text")
        return {}
    return {key: _text(fields, each, child(path, key)) for key, each in value.items()}


def _part(kind: type[msgspec.Struct], /, **readers: _Reader) -> _Reader:
    """Reads a mapping as a struct; `readers` has one for each of its fields."""
    names = dict(zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True))
    known = {names[attribute]: (attribute, reader) for attribute, reader in readers.items()}
    by_lower = {name.lower(): name for name in known}

    def read(fields: Fields, value: object, path: str) -> Any:
        found = dict[str, Any]()
        if not isinstance(value, dict):
            fields.complain(path, value, "a mapping")
            return kind()
        # Of two spellings the last in this order counts, as for the reference.
        for key in sorted(value) if len({key.lower() for key in value}) < len(value) else value:
            name = by_lower.get(key.lower())
            if name is None:
                expected = ", ".join(known)
                fields.problems.append(
                    (child(path, key), f"unknown field, expected one of {expected}")
                )
                continue
            if name in VERSIONED:
                fields.versioned.append((name, child(path, name)))
            attribute, reader = known[name]
            found[attribute] = reader(fields, value[key], child(path, name))
        return kind(**found)

    return read


_texts = _list(_text)
_int64 = _integer(_INT64)
_uint32 = _integer(_UINT32)


_read_node = _part(
    DeviceNode,
    path=_text,
    host_path=_text,
    type=_text,
    major=_optional(_int64),
    minor=_optional(_int64),
    file_mode=_optional(_uint32),
    permissions=_text,
    uid=_optional(_uint32),
    gid=_optional(_uint32),
)
_read_hook = _part(
    Hook,
    hook_name=_text,
    path=_text,
    args=_texts,
    env=_texts,
    timeout=_optional(_int64),
)
_read_mount = _part(Mount, host_path=_text, container_path=_text, options=_texts, type=_text)
_read_rdt = _part(
    IntelRdt,
    clos_id=_text,
    l3_cache_schema=_text,
    mem_bw_schema=_text,
    enable_cmt=_bool,
    enable_mbm=_bool,
    schemata=_texts,
    enable_monitoring=_bool,
)
_read_edits = _part(
    ContainerEdits,
    env=_texts,
    device_nodes=_list(_read_node),
    net_devices=_list(_part(NetDevice, host_interface_name=_text, name=_text)),
    hooks=_list(_read_hook),
    mounts=_list(_read_mount),
    intel_rdt=_optional(_read_rdt),
    additional_gids=_list(_uint32),
)


def _edits(fields: Fields, value: object, path: str) -> Any:
    return NO_EDITS if value is None else _read_edits(fields, value, path)


_read_spec = _part(
    Spec,
    cdi_version=_text,
    kind=_text,
    annotations=_texts_by_key,
    devices=_list(_part(Device, name=_text, annotations=_texts_by_key, container_edits=_edits)),
    container_edits=_edits,
)
