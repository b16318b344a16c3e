"""The policy file: TOML, accepted as a whole or refused with the wrong rule and key.

Everything unknown is an error: a rule with a misspelt key must not allow more than was meant. A
file that cannot be read does not count as absent.
"""

import os
import stat
import tomllib
from collections.abc import Callable, Iterable
from typing import Annotated, NoReturn, TypeVar

import msgspec

from vmplug.errors import PolicyError
from vmplug.host.finding import NEVER_ALLOWED, Code
from vmplug.host.kind import DeviceType
from vmplug.host.permissions import who_writes, whose_link
from vmplug.oci.limits import REQUEST_S
from vmplug.policy.pattern import (
    CdiKindPattern,
    ClassPattern,
    NumberPattern,
    PathPattern,
    PciPattern,
)
from vmplug.policy.rules import Policy, Rule

_BYTES_MAX = 1 << 20
_REQUEST_S_MAX = 86400

_KINDS = [kind.word for kind in DeviceType]
_DEVICE_KEYS = ("kinds", "numbers", "paths", "pci", "classes", "cdi_kinds")
_OVERRULED = sorted(set(Code) - NEVER_ALLOWED)
Words = Annotated[list[str], msgspec.Meta(min_length=1)]
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
    name = os.fspath(path)
    said = _parse(name, _read(name))
    return Policy(
        name=name,
        rules=tuple(_parse_rule(rule, name) for rule in said.rule),
        request_s=said.limits.request_seconds,
        cdi_directories=None if said.cdi is None else tuple(said.cdi.directories),
    )


def _parse(name: str, data: bytes) -> _File:
    """The tables of the file `name`. Raises PolicyError."""
    try:
        tables = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError
        _wrong(name, f"is not TOML: {error}")
    try:
        said = msgspec.convert(tables, type=_File)
    except msgspec.ValidationError as error:
        _wrong(name, _in_words(error, tables))
    names = [rule.name for rule in said.rule]
    for twice in (rule for rule in names if names.count(rule) > 1):
        _wrong(name, f"has two rules named {twice!r}")
    for directory in said.cdi.directories if said.cdi else ():
        if not directory.startswith("/") or "\0" in directory:
            _wrong(name, f"is wrong at cdi.directories: {directory!r} is not an absolute path")
    return said


def _read(path: str) -> bytes:
    """The bytes of a file that only root and this user can write to."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                _wrong(path, "is not a regular file")
            if why := whose_link(path) or who_writes(status):
                hint = f"chown root {path}; chmod go-w {path}"
                raise PolicyError(f"the policy {path} {why}: vmplug refuses to use it", hint=hint)
            data = file.read(_BYTES_MAX + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        _cannot_read(path, error)
    if len(data) > _BYTES_MAX:
        _wrong(path, f"is longer than {_BYTES_MAX >> 20} MiB")
    return data


def _open_at_once(path: str, flags: int) -> int:
    """An opener: what `open` makes no file of, such as a directory, is closed again."""
    return os.open(path, flags | os.O_NONBLOCK)


def _cannot_read(path: str, error: OSError | ValueError) -> NoReturn:
    reason = error.strerror if isinstance(error, OSError) else error
    raise PolicyError(
        f"the policy {path} cannot be read: {reason}",
        hint="vmplug hands over nothing without it: fix it, or pass another with --policy",
    ) from error


def _wrong(path: str, what: str) -> NoReturn:
    raise PolicyError(
        f"the policy {path} {what}",
        hint="vmplug hands over nothing until it is fixed; docs/security.md describes the format",
    ) from None


def _in_words(error: msgspec.ValidationError, tables: dict[str, object]) -> str:
    """`Object contains unknown field ... - at $.rule[0]`, with the name of that rule."""
    what, _, where = str(error).partition(" - at ")
    where = where.strip("`").removeprefix("$").removeprefix(".") or "the file"
    rules = tables.get("rule")
    number = where.partition("[")[2].partition("]")[0]
    if where.startswith("rule[") and number.isdigit() and isinstance(rules, list):
        rule = rules[int(number)]
        name = rule.get("name") if isinstance(rule, dict) else None
        where += f" ({name!r})" if isinstance(name, str) else ""
    what = what.replace("`", "").replace("Object contains unknown", "unknown")
    if what.startswith("Invalid enum value"):
        what = (
            what.removeprefix("Invalid enum value ")
            + " is not one of "
            + ", ".join(_KINDS if ".kinds" in where else _OVERRULED)
        )
    return f"is wrong at {where}: {what[:1].lower() + what[1:]}"


def _parse_rule(said: _Rule, path: str) -> Rule:
    def parse(
        key: str, texts: Iterable[str] | None, one: Callable[[str], T]
    ) -> tuple[T, ...] | None:
        try:
            return None if texts is None else tuple(map(one, texts))
        except ValueError as error:
            _wrong(path, f"is wrong at {key} of rule {said.name!r}: {error}")

    for code in NEVER_ALLOWED & set(said.allow):
        _wrong(path, f"is wrong at allow of rule {said.name!r}: {code} cannot be overruled")
    if not any(getattr(said, key) for key in _DEVICE_KEYS):
        keys = ", ".join(_DEVICE_KEYS[:-1]).replace("_", "-")
        _wrong(
            path,
            f"has a rule {said.name!r} that names no devices: add {keys} or cdi-kinds",
        )
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
