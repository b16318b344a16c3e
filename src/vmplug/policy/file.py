"""The policy file: its tables and keys."""

import os
from collections.abc import Callable, Iterable
from typing import Annotated, TypeVar

import msgspec

from vmplug.host.finding import NEVER_ALLOWED, Code
from vmplug.host.kind import DeviceType
from vmplug.oci.limits import REQUEST_S
from vmplug.policy.pattern import (
    CdiKindPattern,
    ClassPattern,
    NumberPattern,
    PathPattern,
    PciPattern,
)
from vmplug.policy.rules import Policy, Rule
from vmplug.policy.toml import OperatorsFile, Words

_REQUEST_S_MAX = 86400

_KINDS = [kind.word for kind in DeviceType]
_DEVICE_KEYS = ("kinds", "numbers", "paths", "pci", "classes", "cdi_kinds")
_OVERRULED = sorted(str(code) for code in set(Code) - NEVER_ALLOWED)
T = TypeVar("T")


class _Rule(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, frozen=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    kinds: Annotated[list[DeviceType], msgspec.Meta(min_length=1)] | None = None
    numbers: Words | None = None
    paths: Words | None = None
    pci: Words | None = None
    classes: Words | None = None
    cdi_kinds: Words | None = None
    vms: Words | None = None
    owners: Words | None = None
    read_only: bool = False
    cold_only: bool = False
    share_rw: bool = False
    allow: list[Code] = msgspec.field(default_factory=list)


class _Limits(
    msgspec.Struct, rename="kebab", forbid_unknown_fields=True, frozen=True, kw_only=True
):
    request_seconds: Annotated[float, msgspec.Meta(gt=0, le=_REQUEST_S_MAX)] = REQUEST_S


class _Cdi(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    directories: list[str]


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    rule: list[_Rule] = msgspec.field(default_factory=list)
    limits: _Limits = _Limits()
    cdi: _Cdi | None = None


def read_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy in a TOML file; see docs/security.md for its keys.

    PolicyError when it cannot be read, when anything in it is wrong or unknown, and when others
    than root and this user may write to it.
    """
    file = OperatorsFile(
        path=os.fspath(path),
        what="the policy",
        named="rule",
        hint_unread="vmplug hands over nothing without it: fix it, or pass another with --policy",
        hint_wrong="vmplug hands over nothing until it is fixed; docs/security.md describes the "
        "format",
    )
    said = _parse(file)
    return Policy(
        name=file.path,
        rules=tuple(_parse_rule(rule, file) for rule in said.rule),
        request_s=said.limits.request_seconds,
        cdi_directories=None if said.cdi is None else tuple(said.cdi.directories),
    )


def _parse(file: OperatorsFile) -> _File:
    """The tables of the file. Raises PolicyError."""
    said = file.convert(file.read_tables(), _File, {"kinds": _KINDS, "": _OVERRULED})
    names = [rule.name for rule in said.rule]
    for twice in (rule for rule in names if names.count(rule) > 1):
        file.refuse(f"has two rules named {twice!r}")
    for directory in said.cdi.directories if said.cdi else ():
        file.require_absolute("cdi.directories", directory)
    return said


def _parse_rule(said: _Rule, file: OperatorsFile) -> Rule:
    def parse(
        key: str, texts: Iterable[str] | None, one: Callable[[str], T]
    ) -> tuple[T, ...] | None:
        return file.parse(f"{key} of rule {said.name!r}", texts, one)

    for code in NEVER_ALLOWED & set(said.allow):
        file.refuse(f"is wrong at allow of rule {said.name!r}: {code} cannot be overruled")
    if not any(getattr(said, key) for key in _DEVICE_KEYS):
        keys = ", ".join(_DEVICE_KEYS[:-1]).replace("_", "-")
        file.refuse(f"has a rule {said.name!r} that names no devices: add {keys} or cdi-kinds")
    return Rule(
        name=said.name,
        kinds=None if said.kinds is None else frozenset(said.kinds),
        numbers=parse("numbers", said.numbers, NumberPattern.parse),
        paths=parse("paths", said.paths, PathPattern.parse),
        pci=parse("pci", said.pci, PciPattern.parse),
        classes=parse("classes", said.classes, ClassPattern.parse),
        cdi_kinds=parse("cdi-kinds", said.cdi_kinds, CdiKindPattern.parse),
        vms=None if said.vms is None else tuple(said.vms),
        owners=None if said.owners is None else tuple(said.owners),
        read_only=said.read_only,
        cold_only=said.cold_only,
        share_rw=said.share_rw,
        allow=frozenset(said.allow),
    )
