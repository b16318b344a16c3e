"""The targets by name; a module is imported when its target is run, so that atheris sees it."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

TARGETS = {
    "spec": 2,
    "device": 1,
    "host": 4,
    "record": 1,
    "answers": 2,
    "qmp": 1,
    "cdi": 2,
    "kubernetes": 2,
}
"""With their shares of the time: a whole host takes longer to read than a line."""

CORPUS = Path(__file__).parent / "corpus"


def load(target: str) -> Callable[[bytes], None]:
    """The property of a target: a function of bytes."""
    check: Callable[[bytes], None] = import_module(f"tests.fuzz.{target}").check
    return check


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with; every one that has ever broken something is among them."""
    return [path.read_bytes() for path in sorted((CORPUS / target).glob("*"))]
