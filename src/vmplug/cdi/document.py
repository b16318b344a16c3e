"""The text of a spec as plain values: YAML or JSON, read as the reference library reads it.

The reference reads both with a YAML 1.1 parser of Go's. What another parser reads differently gets
its answer: `y` is a bool, 010 is eight, 0000:01:00.0 is text, a key twice is an error, and
what follows the first document is not read. PyYAML gives the tokens (libyaml is the C code
that Go's parser was made from); what they mean is decided here.
Source: sigs.k8s.io/yaml, goyaml.v2 resolve.go and decode.go.
"""

import base64
import binascii
import json
import re
import struct
from collections.abc import Iterator
from itertools import chain
from typing import Any

ALIASED_MAX = 50_000
"""Values that may come from aliases: more is a bomb, not a spec."""

_TRUE = frozenset({"y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"})
_FALSE = frozenset({"n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"})
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INTEGER = re.compile(
    r"([-+]?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|0[oO]?([0-7]+)|(0|[1-9][0-9]*))"
)
_BASES = (16, 2, 8, 10)
_DIGITS_MAX = 70
"""Longer numbers fit no field."""
_EXPONENT_FROM = 6
"""Go writes a million as 1e+06."""

_OTHER_YAML = re.compile(rb"(?:[ \t]*(?:#.*)?\r?\n|%(?!YAML).*\n)*%YAML[ \t]+(?!1\.1\s)")
_ESCAPED_SLASH = re.compile(r"(?<!\\)(?:\\\\)*\\/")

_WORD = re.compile(r"[A-Za-z0-9_]+")
_SHOWN_MAX = 60

_PLAIN = "plain"
_TAG = "tag:yaml.org,2002:"
_DECODED = {"int": int, "float": float, "bool": bool, "null": type(None)}


class DocumentError(Exception):
    """The text is not a document; `field` is the path of the key that is there twice, or `$`."""

    def __init__(self, message: str, field: str = "$") -> None:
        super().__init__(message)
        self.message = message
        self.field = field


def read_document(data: bytes) -> object:
    """None, bool, int, float, str, and lists and dicts of them; None for an empty document."""
    import yaml  # noqa: PLC0415  20 ms, and JSON of the usual kind is read without it

    if _OTHER_YAML.match(data):
        raise DocumentError("not YAML 1.1, expected no other %YAML")
    try:
        node = _compose(yaml, data)
        return None if node is None else _Values(data).read(node, "$")
    except yaml.YAMLError as error:
        raise DocumentError(f"not YAML or JSON: {_describe(error)}") from error
    except (RecursionError, UnicodeError, ValueError) as error:
        raise DocumentError(f"not YAML or JSON: {error}") from error


def _compose(yaml: Any, data: bytes) -> Any:
    """The nodes of the first document, None if it is empty; what follows it is not read."""
    parser: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)

    class Loader(parser):  # type: ignore[misc]
        def resolve(self, kind: object, value: object, implicit: tuple[bool, bool]) -> str:
            """The tag of a value that has none: only a scalar without quotes has a meaning."""
            is_plain = kind is yaml.ScalarNode and implicit[0]
            return _PLAIN if is_plain else str(super().resolve(kind, value, implicit))

    loader = Loader(data)
    try:
        return loader.get_node() if loader.check_node() else None
    finally:
        loader.dispose()


def _describe(error: Any) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    return f"{problem}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(problem)


def child(path: str, key: str) -> str:
    """The path of a value in a mapping, whatever its key is: that is shortened and escaped."""
    name = key[:_SHOWN_MAX]
    return f"{path}.{name}" if _WORD.fullmatch(name) else f"{path}[{json.dumps(name)}]"


class _Values:
    """Reads nodes as values; counts what comes from aliases, and knows what it is inside of."""

    def __init__(self, data: bytes) -> None:
        self._slashes = data.decode() if b"\\/" in data else None
        self._has_marks = b"?" in data
        self._seen = set[int]()
        self._open = set[int]()
        self._aliased = 0

    def read(self, node: Any, path: str) -> object:
        if id(node) in self._open:
            raise DocumentError(f"an anchor contains itself, line {node.start_mark.line + 1}")
        self._aliased += id(node) in self._seen
        if self._aliased > ALIASED_MAX:
            raise DocumentError("too many aliases")
        self._seen.add(id(node))
        if isinstance(node.value, str):
            self._check_escapes(node)
            return _resolve(node.tag, node.value)
        self._open.add(id(node))
        try:
            return self._read_inside(node, path)
        finally:
            self._open.discard(id(node))

    def _check_escapes(self, node: Any) -> None:
        """Refuse an escape of JSON that YAML 1.1 lacks: libyaml has learnt it since."""
        if self._slashes and node.style == '"':
            written = self._slashes[node.start_mark.index : node.end_mark.index]
            if _ESCAPED_SLASH.search(written):
                line = node.start_mark.line + 1
                raise DocumentError(f"not YAML or JSON: found unknown escape \\/, line {line}")

    def _check_marks(self, node: Any) -> None:
        """Refuse a ? in plain text in brackets: it began a key, before libyaml 0.2."""
        pairs = node.value if node.id == "mapping" else [node.value]
        for each in chain.from_iterable(pairs):
            if each.id == "scalar" and each.style not in {"'", '"'} and "?" in each.value:
                line = each.start_mark.line + 1
                raise DocumentError(
                    f"not YAML or JSON: found ? in text without quotes, line {line}"
                )

    def _read_inside(self, node: Any, path: str) -> object:
        if self._has_marks and node.flow_style:
            self._check_marks(node)
        if node.id == "sequence":
            return [self.read(each, f"{path}[{index}]") for index, each in enumerate(node.value)]
        found = dict[str, object]()
        for key, value in self._read_pairs(node, path):
            if key in found:
                raise DocumentError("the key is there twice, expected it once", child(path, key))
            found[key] = value
        return found

    def _read_pairs(self, node: Any, path: str) -> Iterator[tuple[str, object]]:
        for key, value in node.value:
            if key.value == "<<" and key.tag in {_PLAIN, f"{_TAG}merge"}:
                yield from self._read_merged(value, path)
            else:
                name = self._read_key(key, path)
                yield name, self.read(value, child(path, name))

    def _read_merged(self, node: Any, path: str) -> Iterator[tuple[str, object]]:
        for each in reversed(node.value) if node.id == "sequence" else [node]:
            if each.id != "mapping":
                raise DocumentError("<< merges something that is not a mapping", path)
            value = self.read(each, path)
            if isinstance(value, dict):
                yield from value.items()

    def _read_key(self, node: Any, path: str) -> str:
        key = self.read(node, path)
        if key is None or isinstance(key, list | dict):
            raise DocumentError("a key is not text, expected the name of a field", path)
        return as_text(key)


def _resolve(tag: str, text: str) -> object:
    """What a scalar means. One in quotes is text, and so is one with a tag of somebody's own."""
    if tag == _PLAIN:
        return _resolve_plain(text)
    kind = tag.removeprefix(_TAG)
    if kind == "binary":
        try:
            encoded = text.translate({ord("\r"): None, ord("\n"): None})
            return base64.b64decode(encoded, validate=True).decode(errors="replace")
        except binascii.Error as error:
            raise DocumentError(f"!!binary of something else than base64: {error}") from error
    if kind not in _DECODED:
        return text
    value = _resolve_plain(text)
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value) is not _DECODED[kind]:
        raise DocumentError(f"!!{kind} of {text!r:.60}, which is not one")
    return value


def _resolve_plain(text: str) -> object:
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    if text[0] not in "+-.0123456789":
        return text
    digits = text if text[0] == "." else text.replace("_", "")
    value = None if text[0] == "." or len(digits) > _DIGITS_MAX else _read_integer(digits)
    if value is None and _FLOAT.fullmatch(digits):
        number = float(digits)
        return text if number in {float("inf"), float("-inf")} else number
    return text if value is None else value


def _read_integer(digits: str) -> int | None:
    """An integer of 64 bits, with or without sign; None for anything else."""
    match = _INTEGER.fullmatch(digits)
    if match is None:
        return None
    sign, *forms = match.groups()
    value = next(int(form, base) for form, base in zip(forms, _BASES, strict=True) if form)
    limit = 2**63 if sign else 2**64 - 1
    return None if value > limit or (sign == "+" and value == limit) else int(sign + str(value))


def as_text(value: object) -> str:
    """A scalar for a field of text, as the reference writes it: 010 is 8, 1.50 is 1.5."""
    match value:
        case bool():
            return "true" if value else "false"
        case float():
            return _write_float(value)
        case _:
            return str(value)


def _write_float(value: float) -> str:
    """The shortest digits that give the same number in 32 bits. Source: strconv.FormatFloat."""
    if value != value or value in {float("inf"), float("-inf")}:  # noqa: PLR0124  NaN
        return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}[str(value)]
    single = _as_float32(value)
    if single is None:
        return "+Inf" if value > 0 else "-Inf"
    written = (f"{single:.{digits}e}" for digits in range(17))
    text = next(each for each in written if _as_float32(float(each)) == single)
    mantissa, _, exponent = text.partition("e")
    if not -4 <= int(exponent) < _EXPONENT_FROM:
        return f"{mantissa}e{exponent}"
    digits = len(mantissa.lstrip("-").replace(".", ""))
    return f"{float(text):.{max(0, digits - 1 - int(exponent))}f}"


def _as_float32(value: float) -> float | None:
    """The number in 32 bits, None if it is too large for them."""
    try:
        packed = struct.pack(">f", value)
    except OverflowError:
        return None
    single: float = struct.unpack(">f", packed)[0]
    return single
