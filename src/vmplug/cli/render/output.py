"""What stands on stdout: one JSON document, and words that several verbs have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def print_json(document: Mapping[str, Any]) -> None:
    """One document, version first."""
    print_document({"version": 1, **document})


def print_document(document: Mapping[str, Any]) -> None:
    """One document in a format that others have specified."""
    import json  # noqa: PLC0415  3 ms, 4 % of `resolve` without --json

    click.echo(json.dumps(document, indent=2))


def size(size_bytes: int) -> str:
    """`16 MiB`, exact to one decimal."""
    amount, unit = float(size_bytes), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.1f}".removesuffix(".0") + f" {_UNITS[unit]}"


def access(*, read_only: bool | None) -> str:
    """`ro` or `rw`; `?` where it is unknown."""
    if read_only is None:
        return "?"
    return "ro" if read_only else "rw"


def resolved_json(annotations: Sequence[str]) -> dict[str, Any]:
    """The annotations of the bundle that no guest may get; no key where there are none."""
    return {"resolved_annotations": list(annotations)} if annotations else {}
