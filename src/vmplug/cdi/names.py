"""Names of CDI: `vendor.com/class=device`, and the annotations of a container that carry them.

Source: the specification, sections "Kind" and "CDI Devices"; annotations as Kubernetes' device
plugins and container engines write them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Self

import msgspec

from vmplug.errors import SpecError

ANNOTATION_PREFIX = "cdi.k8s.io/"
_KEY_LENGTH_MAX = 63

_LABEL = re.compile(r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?")
_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?")

_LABEL_RULE = "a letter first, a letter or digit last, and only letters, digits, _ - . between"
_NAME_RULE = "a letter or digit at both ends, and only letters, digits, _ - . : between"

is_device_name = _NAME.fullmatch


def find_kind_problem(kind: str) -> str | None:
    """What is wrong with a kind, VENDOR/CLASS; None if it is one."""
    vendor, slash, device_class = kind.partition("/")
    if not (slash and vendor and device_class):
        return f"{kind!r:.60} is not a kind, expected VENDOR/CLASS"
    for word, label in (("vendor", vendor), ("class", device_class)):
        if not _LABEL.fullmatch(label):
            return f"{label!r:.60} is not a {word}, expected {_LABEL_RULE}"
    return None


def find_name_problem(name: str) -> str | None:
    """What is wrong with the name of a device within its kind; None if it is one."""
    return None if is_device_name(name) else f"{name!r:.60} is not a name, expected {_NAME_RULE}"


class QualifiedName(msgspec.Struct, frozen=True):
    """`vendor.com/class=name`."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}={self.name}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """SpecError if it is not a qualified name, with the part that is wrong."""
        kind, equals, name = text.partition("=")
        if not equals:
            raise SpecError(text or "''", "not a CDI device, expected VENDOR/CLASS=NAME")
        problem = find_kind_problem(kind) or find_name_problem(name)
        if problem is not None:
            raise SpecError(text, problem)
        return cls(kind, name)


def make_annotation(plugin: str, device_id: str, names: Iterable[str]) -> tuple[str, str]:
    """The key and the value with which a device plugin asks for devices; SpecError if it cannot.

    The key is `cdi.k8s.io/PLUGIN_DEVICEID` with `/` as `_`, so a PCI address cannot be in it.
    """
    if not plugin or not device_id:
        raise SpecError("annotation", "a plugin and a device id are needed, one is empty")
    key = f"{plugin}_{device_id.replace('/', '_')}"
    if len(key.encode()) > _KEY_LENGTH_MAX:
        raise SpecError(key, f"the annotation's name is longer than {_KEY_LENGTH_MAX} characters")
    if not _KEY.fullmatch(key):
        rule = "a letter or digit at both ends, and only letters, digits, _ - . between"
        raise SpecError(key, f"not the name of an annotation, expected {rule}")
    return ANNOTATION_PREFIX + key, ",".join(str(QualifiedName.parse(name)) for name in names)


def parse_annotations(annotations: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The names that each annotation of CDI asks for, by its key, in the order of the keys.

    SpecError names the annotation that holds anything else than names joined by commas.
    """
    asked = dict[str, tuple[str, ...]]()
    for key in sorted(annotations):
        if key.startswith(ANNOTATION_PREFIX):
            names = annotations[key].split(",")
            for name in names:
                _check_annotated(key, name)
            asked[key] = tuple(names)
    return asked


def _check_annotated(key: str, name: str) -> None:
    try:
        QualifiedName.parse(name)
    except SpecError as error:
        raise SpecError(f"annotation {key}", str(error)) from error
