"""A wrong type is a TypeError that names the argument, for every public call.

The package wraps a public function, and the methods of a public class, when `vmplug.NAME` is first
used. Modules of vmplug import from each other, so a verb pays nothing. Structs that authors make
have no method to wrap, and call `check_fields`.

A call that changes something is checked before it begins, and at once if types like these have
passed before. A lookup takes microseconds and changes nothing: it is checked only after it has
failed.
"""

import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, wraps
from typing import Any, TypeGuard

LOOKUPS = frozenset({"HostPathCache", "get_host_path", "resolve", "resolve_all"})
"""Classes and functions whose calls are checked after they have failed."""

INSIDE = frozenset({"HostRoot", "Hypervisor", "VhostUserStore"})
"""Classes whose methods vmplug itself calls, thousands of times; only making one is checked."""

_NUMBERS: Mapping[object, tuple[type, ...]] = {int: (int,), float: (int, float)}
"""What may be passed for a number. True is 1 to Python, and a mistake here."""

_FIELDS = ("__struct_fields__", "__dataclass_fields__", "_fields")
"""What the classes of values have: one of these."""

_Test = Callable[[object], bool]


def checked(value: Any) -> Any:
    """The public value, whose calls raise TypeError for arguments of other types."""
    if isinstance(value, types.FunctionType):
        return _checked_function(value, is_lookup=value.__name__ in LOOKUPS)
    if isinstance(value, type):
        _check_methods(value)
    return value


def check_fields(value: Any) -> None:
    """Raise TypeError when a field has a value of another type; it serves as __post_init__."""
    kind: Any = type(value)
    for name in kind.__struct_fields__:
        field = getattr(value, name)
        if not _test(kind, name, field is None)(field):
            raise _wrong_type(kind, name, field)


def _check_methods(kind: type) -> None:
    """Check the methods that the class itself has, and how it is made.

    Those of values change nothing. Nobody calls those of a protocol.
    """
    if _is_protocol(kind):
        return
    is_value = any(hasattr(kind, fields) for fields in _FIELDS)
    # A NamedTuple has a `__new__` that nobody wrote.
    makes = {"__init__"} if "_fields" in vars(kind) else {"__init__", "__new__"}
    for name, member in list(vars(kind).items()):
        if name not in makes and (name.startswith("_") or kind.__name__ in INSIDE):
            continue
        is_lookup = name not in makes and (is_value or kind.__name__ in LOOKUPS)
        if isinstance(member, types.FunctionType):
            setattr(kind, name, _checked_function(member, is_lookup=is_lookup))
        elif isinstance(member, classmethod | staticmethod):
            inner: Any = member.__func__
            wrapped = _checked_function(inner, is_lookup=is_lookup)
            setattr(kind, name, type(member)(wrapped))


def _checked_function(function: types.FunctionType, *, is_lookup: bool) -> Any:
    if hasattr(function, "__wrapped__") or not function.__annotations__.keys() - {"return"}:
        return function
    passed = set[tuple[object, ...]]()

    @wraps(function)
    def check_first(*arguments: object, **named: object) -> object:
        types_given = (*map(type, arguments), *named, *map(type, named.values()))
        if types_given not in passed:
            check_arguments(function, arguments, named)
            if not any(map(_has_parts, (*arguments, *named.values()))):
                passed.add(types_given)
        return function(*arguments, **named)

    @wraps(function)
    def look_up(*arguments: object, **named: object) -> object:
        try:
            return function(*arguments, **named)
        except (AssertionError, AttributeError, TypeError):
            check_arguments(function, arguments, named)
            raise

    return look_up if is_lookup else check_first


def check_arguments(
    function: types.FunctionType, arguments: Iterable[object], named: Mapping[str, object]
) -> None:
    """Raise TypeError for the first argument of another type than the annotation's."""
    given = dict(zip(function.__code__.co_varnames, arguments, strict=False), **named)
    for name, value in given.items():
        if not _test(function, name, value is None)(value):
            raise _wrong_type(function, name, value)


def _has_parts(value: object) -> TypeGuard[Collection[object]]:
    """Whether more is tested of a value than its type."""
    return isinstance(value, Collection) and not _is_one_value(type(value))


def _is_one_value(kind: type) -> bool:
    """A text, and a NamedTuple."""
    return issubclass(kind, str | bytes) or hasattr(kind, "_fields")


def _wrong_type(annotated: Any, name: str, value: object) -> TypeError:
    """`annotated` is a function or a class."""
    wanted = _annotation(annotated, name)
    text = wanted.__name__ if isinstance(wanted, type) else str(wanted)
    text = re.sub(r"\b[a-z_][\w.]*\.(?=[A-Z])", "", text).replace(" | ", " or ")
    where = annotated.__qualname__.removesuffix(".__init__").removesuffix(".__new__")
    return TypeError(f"{where}: {name} must be {text}, not {_kind_of(value)}")


def _kind_of(value: object) -> str:
    """`list of int`."""
    kind = type(value).__name__
    if _has_parts(value) and not isinstance(value, Mapping) and value:
        return f"{kind} of " + ", ".join(sorted({type(part).__name__ for part in value}))
    return kind


def _raw_annotation(annotated: Any, name: str) -> object:
    """The annotation as it is written; `object` for `self` and what the caller made up."""
    for place in getattr(annotated, "__mro__", (annotated,)):
        if name in getattr(place, "__annotations__", {}):
            return place.__annotations__[name]
    return object


@cache
def _annotation(annotated: Any, name: str) -> Any:
    """The annotation. A name that its module imports for type checkers only is public."""
    raw = _raw_annotation(annotated, name)
    if not isinstance(raw, str):
        return raw
    package = sys.modules["vmplug"]
    public = {
        word: getattr(package, word) for word in re.findall(r"\w+", raw) if word in dir(package)
    }
    return eval(raw, vars(sys.modules[annotated.__module__]) | public)  # noqa: S307  our own text


@cache
def _test(annotated: Any, name: str, is_none: bool) -> _Test:  # noqa: FBT001  a cache key
    """Whether a value may be passed as this. For None nothing is imported."""
    raw = _raw_annotation(annotated, name)
    if is_none and isinstance(raw, str) and raw.endswith("| None"):
        return lambda _: True
    return _test_of(_annotation(annotated, name))


def _test_of(annotation: Any) -> _Test:
    """Whether a value is of this type, with what it contains."""
    parts = typing.get_args(annotation)
    match typing.get_origin(annotation) or annotation:
        case typing.Union | types.UnionType:
            tests = [_test_of(part) for part in parts]
            return lambda value: any(test(value) for test in tests)
        case kind if kind in _NUMBERS:
            return lambda value: isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
        case type() as kind if _is_protocol(kind):
            names = [name for name in vars(kind) if not name.startswith("_")]
            # Its class's: a property of a hypervisor asks QEMU.
            return lambda value: all(hasattr(type(value), name) for name in names)
        case type() as kind if issubclass(kind, Iterable) and not issubclass(kind, str | bytes):
            return _test_of_many(kind, [_test_of(part) for part in parts if part is not Ellipsis])
        case type() as kind if kind is not Any:
            return lambda value: isinstance(value, kind)
        case _:  # Any, which is a class since Python 3.11, and Self
            return lambda _: True


def _is_protocol(kind: type) -> bool:
    """Whether it is one itself: a class that has one as its base inherits the mark."""
    return bool(vars(kind).get("_is_protocol"))


def _test_of_many(kind: type, tests: Sequence[_Test]) -> _Test:
    """What is one value may have parts too, and nobody means them.

    An iterator is not read before its time.
    """
    is_one = _is_one_value(kind)

    def test(value: object) -> bool:
        if not isinstance(value, kind) or _is_one_value(type(value)) is not is_one:
            return False
        if isinstance(value, Mapping) and len(tests) == 2:
            return all(tests[0](key) and tests[1](part) for key, part in value.items())
        if isinstance(value, Collection) and len(tests) == 1:
            return all(map(tests[0], value))
        return True

    return test
