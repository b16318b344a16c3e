"""`vmplug.cdi`: what it exports, and what an import of it costs."""

import inspect
import subprocess
import sys
import typing
from typing import Any

import pytest

from vmplug import cdi, errors

api: Any = cdi
"""As for those who have no type checker."""


def test_it_needs_nothing_of_the_rest_of_vmplug() -> None:
    code = "import sys, vmplug.cdi; vmplug.cdi.parse_spec; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    loaded = set(done.stdout.split())
    ours = {name for name in loaded if name.startswith("vmplug.")}
    assert {name for name in ours if not name.startswith("vmplug.cdi")} == {
        "vmplug.arguments",
        "vmplug.errors",
    }
    assert not loaded & {"yaml", "click", "sqlite3", "asyncio"}


def test_json_below_comments_is_read_without_yaml() -> None:
    """As `vmplug cdi write` makes it."""
    spec = (
        '# one\\n{"cdiVersion": "0.5.0", "kind": "vendor.com/class", '
        '"devices": [{"name": "a", "containerEdits": {"env": ["A=b"]}}]}'
    )
    code = f"import sys; from vmplug import cdi; cdi.parse_spec('{spec}'); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert "yaml" not in done.stdout.split()


def classes_in(annotation: object) -> list[type]:
    parts = [annotation, *typing.get_args(annotation)]
    others = [kind for part in parts[1:] for kind in classes_in(part)]
    is_ours = isinstance(annotation, type) and annotation.__module__.startswith("vmplug.")
    return [*others, *([annotation] if isinstance(annotation, type) and is_ours else [])]


@pytest.mark.parametrize("name", cdi.__all__)
def test_what_a_public_call_takes_and_returns_is_public(name: str) -> None:
    value = getattr(cdi, name)
    public = {getattr(cdi, each) for each in cdi.__all__ if inspect.isclass(getattr(cdi, each))}
    if callable(value):
        for annotation in typing.get_type_hints(value).values():
            assert [kind for kind in classes_in(annotation) if kind not in public] == []
        assert value.__doc__
        if inspect.isclass(value) and issubclass(value, Exception):
            assert issubclass(value, errors.DeviceError)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: api.inject([], ["v/c=1"], cdi.Registry(directories=())),
            "inject: config must be",
        ),
        (lambda: api.inject({}, ["v/c=1"], {}), "inject: registry must be Registry, not dict"),
        (lambda: api.QualifiedName.parse(7), "QualifiedName.parse: text must be str, not int"),
        (lambda: api.parse_spec(None), "parse_spec: text must be"),
        (lambda: api.write_spec({}, "/tmp/a.json"), "write_spec: spec must be Spec, not dict"),
        (lambda: api.read_directories("/etc/cdi"), "read_directories: directories must be"),
    ],
)
def test_a_wrong_type_is_an_error_that_names_the_argument(call: Any, told: str) -> None:
    with pytest.raises(TypeError, match=f"^{told}"):
        call()
