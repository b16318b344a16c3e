"""Put the uses that `check` finds at the parts that are in use."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from vmplug.host.finding import Finding
from vmplug.host.thing.thing import Thing, ThingUse


def place_uses(thing: Thing, findings: Iterable[Finding]) -> Thing:
    """The thing with the findings that are uses: at the part that each names, else at the top.

    A finding that is about the device and not about a user is left out.
    """
    names = names_in(thing)
    placed = defaultdict[str, list[ThingUse]](list)
    for finding in dict.fromkeys(findings):
        if finding.used_by:
            on = finding.used_by.on
            placed[on if on in names else thing.name].append(_use(finding))
    return _with(thing, placed, set())


def names_in(thing: Thing) -> set[str]:
    """The names of all parts of a thing, as findings and claims call them."""
    return {name for part in thing.walk() for name in _names(part)}


def _names(thing: Thing) -> tuple[str, ...]:
    """The names by which findings call it, such as block:8:1 of an `Identity`."""
    words = (thing.identity or "").split(" ")
    number = [f"block:{words[1]}"] if words[0] == "block" else []
    return (thing.name, f"vfio:{thing.name}", f"file:{thing.name}", *number)


def _with(thing: Thing, placed: Mapping[str, Sequence[ThingUse]], done: set[str]) -> Thing:
    names = [name for name in _names(thing) if name not in done]
    done.update(names)
    uses = [*thing.uses, *(use for name in names for use in placed.get(name, ()))]
    return replace(
        thing,
        uses=tuple(dict.fromkeys(uses)),
        made_of=tuple(_with(part, placed, done) for part in thing.made_of),
    )


def _use(finding: Finding) -> ThingUse:
    assert finding.used_by
    return ThingUse(
        code=finding.code,
        who=finding.used_by.who,
        where=finding.used_by.where,
        found_by=finding.used_by.how,
        message=finding.message,
        hint=finding.hint,
        severity=finding.severity,
    )
