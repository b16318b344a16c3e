"""A thing of the host: for people as a tree, and as JSON."""

from collections.abc import Iterator
from typing import Any

import msgspec

from vmplug.cli.render.output import size
from vmplug.cli.render.terminal import Style
from vmplug.cli.render.tree import Line
from vmplug.host.finding import Severity
from vmplug.host.thing.thing import Relation, Thing, ThingKind, ThingUse

_RELATIONS = {
    Relation.BACKING_FILE: "its backing file",
    Relation.DATA_FILE: "its data file",
    Relation.BRIDGE: "in the same group",
    Relation.BUILT_FROM: "it is built from this",
    Relation.BUILT_ON_IT: "built on it",
    Relation.DISK: "its disk",
    Relation.FILE: "behind it",
    Relation.PARENT: "its parent",
    Relation.PHYSICAL_FUNCTION: "its physical function",
    Relation.SAME_DISK: "another name of the same disk",
    Relation.SAME_GROUP: "goes with it: the same IOMMU group",
    Relation.VIRTUAL_FUNCTION: "its virtual function",
}
"""Where the kind does not say it already."""


_KINDS = {
    ThingKind.DEVICE_MAPPER: "device-mapper",
    ThingKind.IOMMU_GROUP: "IOMMU group",
    ThingKind.LOOP: "loop device",
}


def thing_json(thing: Thing) -> dict[str, Any]:
    """The thing with all that it is made of; a fact that the host does not give is null."""
    document: dict[str, Any] = msgspec.to_builtins(thing)
    return document


def thing_lines(thing: Thing) -> list[Line]:
    """The tree; below each part who uses it, and what could not be looked for."""
    return [
        Line(0, (_title(thing),), Style.HEADING),
        *([Line(1, (f"identity: {thing.identity}",), Style.DETAIL)] if thing.identity else []),
        *_details(thing, 1),
        *([] if any(part.uses for part in thing.walk()) else [_unused()]),
        *(line for part in thing.made_of for line in _part(part, 1)),
    ]


def _unused() -> Line:
    return Line(1, ("in use by nothing that vmplug can see",), Style.DETAIL)


def _part(thing: Thing, depth: int) -> Iterator[Line]:
    yield Line(depth, (_title(thing),))
    yield from _details(thing, depth + 1)
    for part in thing.made_of:
        yield from _part(part, depth + 1)


def _title(thing: Thing) -> str:
    """`/dev/dm-0 (vg-root): device-mapper, 10 GiB, built on it`."""
    words = (
        _KINDS.get(thing.kind) or thing.kind.replace("-", " "),
        None if thing.size_bytes is None else size(thing.size_bytes),
        f"driver {thing.driver}" if thing.driver else None,
        _RELATIONS.get(thing.relation) if thing.relation else None,
    )
    name = f"{thing.name} ({thing.title})" if thing.title else thing.name
    return f"{name}: {', '.join(filter(None, words))}"


def _details(thing: Thing, depth: int) -> Iterator[Line]:
    for use in thing.uses:
        yield from _use(use, depth)
    for sentence in thing.unknown:
        yield Line(depth, (f"unknown: {sentence}",), Style.WARNING)


def _use(use: ThingUse, depth: int) -> Iterator[Line]:
    is_error = use.severity is Severity.ERROR
    who = f"{use.who}: {use.where}" if use.where else use.who
    stays = "" if is_error else ", which may stay"
    style = Style.ERROR if is_error else Style.PLAIN
    yield Line(depth, (f"in use by {who}{stays} [{use.code}]",), style)
    yield Line(depth + 1, (f"found by {use.found_by}",), Style.DETAIL)
    yield Line(depth + 1, (f"to free it: {use.hint}",), Style.DETAIL)
