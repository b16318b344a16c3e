"""Everything of the library that can block has a coroutine of its name, which takes the same."""

import inspect
from typing import Any

import pytest

import vmplug
from tests.test_public_closure import PUBLIC
from vmplug import DeviceManager, Lease, Watch, aio
from vmplug.aio import AsyncDeviceManager, AsyncLease, AsyncWatch

ONLY_COMPUTES = {"parse_config"}
"""Public functions that need no thread."""
OWN = {"in_thread"}
"""What only an event loop needs."""

COROUTINES = sorted(
    name
    for name, value in PUBLIC.items()
    if inspect.isfunction(value) and name not in ONLY_COMPUTES
)
METHODS = sorted(
    name
    for name, value in vars(DeviceManager).items()
    if not name.startswith("_") and inspect.isroutine(value)
)


def same(one: Any, other: Any) -> bool:
    """Whether both take the same; what they return differs in its kind alone."""
    parameters = [inspect.signature(each).parameters for each in (one, other)]
    return [str(p) for p in parameters[0].values()] == [str(p) for p in parameters[1].values()]


def test_every_function_has_its_coroutine() -> None:
    names = {name for name in vars(aio) if inspect.isfunction(getattr(aio, name))}
    assert names - OWN == {*COROUTINES}, "vmplug/aio/calls.py has a row for each"


@pytest.mark.parametrize("name", COROUTINES)
def test_a_coroutine_takes_what_its_function_takes(name: str) -> None:
    function, coroutine = getattr(vmplug, name), getattr(aio, name)
    assert same(function, coroutine)
    assert inspect.iscoroutinefunction(coroutine) == (name != "watch")
    assert coroutine.__doc__


def test_every_method_of_the_manager_has_its_coroutine() -> None:
    found = {name for name in vars(AsyncDeviceManager) if not name.startswith("_")}
    assert found == {*METHODS}, "vmplug/aio/manager.py has a row for each"


@pytest.mark.parametrize("name", METHODS)
def test_a_coroutine_of_the_manager_takes_what_its_method_takes(name: str) -> None:
    method, coroutine = getattr(DeviceManager, name), getattr(AsyncDeviceManager, name)
    assert same(method, coroutine)
    assert inspect.iscoroutinefunction(coroutine)


def test_a_lease_has_what_a_lease_has() -> None:
    names = {name for name in vars(Lease) if not name.startswith("_")}
    assert {name for name in vars(AsyncLease) if not name.startswith("_")} == names
    for name in names - {"process", "descriptors"}:
        assert same(getattr(Lease, name), getattr(AsyncLease, name))
        assert inspect.iscoroutinefunction(getattr(AsyncLease, name)) == (name != "render")


def test_a_watch_has_what_a_watch_has() -> None:
    public = {name for name in vars(AsyncWatch) if not name.startswith("_")}
    assert public == {"close", "looked"}
    assert {name for name in vars(Watch) if not name.startswith("_")} == {"close", "take"}
