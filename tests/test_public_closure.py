"""What a public call takes, returns or raises is public itself."""

import builtins
import enum
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

import vmplug

PUBLIC: Mapping[str, Any] = {name: getattr(vmplug, name) for name in getattr(vmplug, "__all__")}  # noqa: B009  made when asked for

RAISED = re.compile(r"\b[A-Z]\w+(?:Error|Refused|Timeout|Attached|Port|Plug|Device|Use)\b")
"""What looks like an error in a docstring."""


def parts_of(value: object) -> Iterator[tuple[str, Callable[..., object]]]:
    """The public functions of a class, those behind its properties too; a function alone."""
    if inspect.isfunction(value):
        yield value.__name__, value
    elif isinstance(value, type):
        for name, member in inspect.getmembers(value):
            function = member.fget if isinstance(member, property) else member
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function) and not name.startswith("_"):
                yield f"{value.__name__}.{name}", function


def hints(annotated: Any) -> dict[str, Any]:
    """Its annotations; names that it imports for type checkers only are looked up as they do."""
    known = dict(vars(importlib.import_module(annotated.__module__)))
    while True:
        try:
            return typing.get_type_hints(annotated, known)
        except NameError as error:
            name = str(error.name)
            known[name] = find_class(name)


def find_class(name: str) -> object:
    """A class of the package that a module names in quotes."""
    if name in PUBLIC:
        return PUBLIC[name]
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vmplug.") and name in vars(module):
            return vars(module)[name]
    pytest.fail(f"no module has {name}")


def classes_in(annotation: object) -> Iterator[type]:
    """The vmplug classes that an annotation names."""
    if arguments := typing.get_args(annotation):
        for argument in arguments:
            yield from classes_in(argument)
    elif isinstance(annotation, list | tuple):
        for argument in annotation:
            yield from classes_in(argument)
    elif isinstance(annotation, type) and annotation.__module__.startswith("vmplug."):
        yield annotation


def test_what_a_public_call_takes_and_returns_is_public() -> None:
    missing = dict[str, str]()
    for name, value in PUBLIC.items():
        annotated = [*parts_of(value)]
        if isinstance(value, type) and not issubclass(value, enum.Enum):
            annotated.append((name, value))
        for where, thing in annotated:
            for argument, annotation in hints(thing).items():
                for kind in classes_in(annotation):
                    if argument[0] != "_" and PUBLIC.get(kind.__name__) is not kind:
                        missing[f"{kind.__module__}.{kind.__name__}"] = f"{where}, {argument}"
    assert missing == {}


def test_every_error_in_a_docstring_is_public() -> None:
    docs = {
        where: thing.__doc__ or ""
        for name, value in PUBLIC.items()
        for where, thing in (*parts_of(value), (name, value))
    }
    raised = {
        word for text in docs.values() if "raise" in text.lower() for word in RAISED.findall(text)
    }
    assert {"StateError", "NotAttached", "UnplugTimeout"} <= raised
    assert {word for word in raised if word not in PUBLIC and not hasattr(builtins, word)} == set()
