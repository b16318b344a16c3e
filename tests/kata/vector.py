"""Vectors: what was asked, what Kata answered, and how its words become ours."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vmplug.errors import DeviceError

R = TypeVar("R")

VECTORS = Path(__file__).with_name("vectors.json")
DEVIATIONS = Path(__file__).with_name("deviations.txt")


class Facts(Mapping[str, Any]):
    """A JSON object that notes which of its keys were read, so that none is passed over."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts = {k: Facts(v) if isinstance(v, dict) else v for k, v in facts.items()}
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._facts[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def skip(self, why: str, *keys: str) -> None:
        """Leave keys out on purpose; `why` is for the reader."""
        assert why
        self._read.update(keys)

    def unread(self, where: str = "") -> list[str]:
        """The paths of everything that nobody looked at."""
        paths = []
        for key, value in self._facts.items():
            path = f"{where}.{key}"
            if key not in self._read:
                paths.append(path)
            elif isinstance(value, Facts):
                paths += value.unread(path)
        return paths


class Vector(NamedTuple):
    """One input with what Kata answered."""

    name: str
    function: str
    setup: Mapping[str, Any]
    input: Mapping[str, Any]
    expected: Mapping[str, Any]

    @property
    def node_types(self) -> set[str]:
        """Types of the device nodes that its tree holds."""
        return {node["type"] for node in self.setup.get("fs", {}).get("nodes", ())}


def load_vectors() -> list[Vector]:
    """Every vector of this stage."""
    return [Vector(**vector) for vector in json.loads(VECTORS.read_text())]


@dataclass(frozen=True, slots=True)
class Case:
    """One vector being run below `path`, with what is to be closed at its end.

    `restored`: every step of a life runs on a new manager, which knows only what was saved.
    `mended`: the host has what Kata took for granted.
    """

    name: str
    setup: Facts
    input: Facts
    expected: Facts
    path: Path
    at_end: ExitStack
    restored: bool = False
    mended: bool = False

    def unread(self) -> list[str]:
        """What the adapter did not look at."""
        return [
            *self.setup.unread("setup"),
            *self.input.unread("input"),
            *self.expected.unread("expected"),
        ]


class Answer(NamedTuple):
    """What vmplug answers, and what Kata answered in the same words."""

    ours: Any
    katas: Any


Adapter = Callable[[Case], Answer]


class Deviation(NamedTuple):
    """Where vmplug differs: from which numbered defect of Kata (None: by design), why, and the
    test that holds what vmplug does instead."""

    name: str
    defect: int | None
    why: str
    test: str


def load_deviations() -> list[Deviation]:
    """The table: one line for each deviation."""
    lines = [line.split(" | ") for line in DEVIATIONS.read_text().splitlines()]
    return [
        Deviation(name, None if defect == "-" else int(defect), why, test)
        for name, defect, why, test in lines
    ]


class Refusal(NamedTuple):
    """An error of vmplug; like Kata's it has only a kind."""

    kind: str

    @classmethod
    def of(cls, error: Exception) -> "Refusal":
        return cls(type(error).__name__)


def attempt(act: Callable[[], R]) -> R | Refusal:
    """What `act` gives, or its error."""
    try:
        return act()
    except (DeviceError, ValueError) as error:
        return Refusal.of(error)


def error_of(answer: object) -> Refusal | None:
    """The error that `attempt` gave; None when it gave something else."""
    return answer if isinstance(answer, Refusal) else None


def plain(answer: Any) -> Any:
    """An answer with the names of its errors, to be compared with Kata's."""
    match answer:
        case Refusal():
            return answer.kind
        case Mapping():
            return {key: plain(value) for key, value in answer.items()}
        case list():
            return [plain(value) for value in answer]
        case _:
            return answer


_KINDS = (
    (r"Empty path provided for device|Path cannot be empty for device", "SpecError"),
    (r"Block device \w+(-\w+)* not recognized", "SpecError"),
    (r"key-value delimiter not found|key 'DEVNAME' not exists", "AttributeReadError"),
    (r"is a directory", "AttributeReadError"),
    (r"no such file or directory|Required device node .* doesn't exist", "NoSuchDevice"),
    (r"strconv.ParseUint|should be in range", "ValueError"),
    (r"Index cannot be", "ValueError"),
    (r"no available block index|there are no empty slots", "NoFreePort"),
    (r"failed to get available address from bridges", "NoFreePort"),
    (r"hasn't been created|isn't attached|wasn't attached", "NotAttached"),
    (r"not present on bridge", "NotAttached"),
    (r"can't remove attached device", "StillAttached"),
    (r"inappropriate ioctl for device", "NoSuchDevice"),
    (r"Empty File, ID or Format for drive|invalid SCSI driver provided", "SpecError"),
    (r"Incorrect vhost-user device type found", "CannotPlug"),
    (r"Incorrect tokens found|unexpected device name format", "SpecError"),
    (r"device type mismatch|port is not set", "SpecError"),
    (r"No BDF found in resolved path", "NoSuchDevice"),
    (r"Incorrect VFIO device type found|\Aunsupported device type", "InUse"),
    (r"is string not a number", "ProtocolError"),
    (r"ConfidentialGuest needs IOMMUFD", "CannotPlug"),
    (r"<error of b>", "CommandError"),
    (r"boom|QMP command failed", "CommandError"),
)
"""Kata's errors are texts; these are the kinds of ours that mean the same."""


def kind_of(katas_error: str | None) -> str | None:
    """The kind of our error that means the same as Kata's; None for none."""
    if katas_error is None:
        return None
    return next(kind for pattern, kind in _KINDS if re.search(pattern, katas_error))


def kinds_of(katas_errors: Sequence[str | None]) -> list[str | None]:
    """`kind_of` for many."""
    return [kind_of(error) for error in katas_errors]


def katas_result(expected: Facts, key: str = "result") -> Any:
    """Kata's result, or the kind of its error."""
    result, error = expected[key], kind_of(expected["error"])
    return result if error is None else error
