"""Questions to the tree of QEMU's objects. Source: QEMU qapi/qom.json."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from vmplug.drivers.ports import Command
from vmplug.errors import CommandError
from vmplug.hypervisor.qemu.transaction import NOT_THERE

T = TypeVar("T")


_READ_ATTEMPTS = 10
"""A device of which some part was listed may be gone before the next command."""


def qom_list(path: str) -> Command:
    """The properties of an object."""
    return Command("qom-list", {"path": path})


def qom_get(path: str, name: str) -> Command:
    """One property of an object."""
    return Command("qom-get", {"path": path, "property": name})


def steadily(read: Callable[[], T]) -> T:
    """The answer of `read`, which is repeated when a device that was listed has gone meanwhile."""
    for _ in range(_READ_ATTEMPTS - 1):
        try:
            return read()
        except CommandError as error:
            if not any(words in error.desc for words in NOT_THERE):
                raise
    return read()


def children(entries: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """The names and types of the children among the entries of `qom-list`."""
    for entry in entries:
        if entry["type"].startswith("child<"):
            yield entry["name"], entry["type"][len("child<") : -1]


def is_occupant(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a bus is a device on it."""
    return str(entry["name"]).startswith("child[") and str(entry["type"]).startswith("link<")
