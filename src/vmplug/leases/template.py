"""Put the fields of leased devices into the words of a command. Words, never a shell line.

`{NAME.FIELD}` in a word of a command is the value of a field: `{vfio.sysfs_path}`. A word
`{NAME WORDS}` becomes these words once for each device and function of that name, with `{FIELD}`
in them: `{vfio --device path={sysfs_path}}`. Every other brace stays as it is, as JSON has them.
"""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from vmplug.errors import SpecError
from vmplug.leases.device import LeasedDevice, LeasedFunction

_KNOWN = (*LeasedDevice.__struct_fields__, *LeasedFunction.__struct_fields__)
FIELDS = tuple(name for name in dict.fromkeys(_KNOWN) if name != "functions")
_NAMED = re.compile(r"""\{([^{}"',\s]+)\.([a-z_]+)\}""", re.ASCII)
_FIELD = re.compile(r"\{([a-z_]+)\}", re.ASCII)
_EACH = re.compile(r"""\{([^{}"',\s]+) (.*\{[a-z_]+\}.*)\}""", re.ASCII | re.DOTALL)
_SEPARATORS = re.compile(r"""[,"'\\]|\s""")
"""With one of these in it a value is more than one to most programs: `path=/a,b.img`."""


def render(devices: Iterable[LeasedDevice], template: str | Sequence[str]) -> list[str]:
    """The words of a template once for each device, and for each function of a group.

    A text is split at blanks. Raises SpecError for an unknown field, one that the device does not
    have, and a value that would be read as several.
    """
    words = template.split() if isinstance(template, str) else template
    return [
        _fill(word, device.name, fields)
        for device in devices
        for fields in device.fields()
        for word in words
    ]


def render_command(devices: Sequence[LeasedDevice], command: Iterable[str]) -> list[str]:
    """A command with the values of its fields. Raises SpecError, also as `find_named`."""
    words = list[str]()
    for word in command:
        if each := _EACH.fullmatch(word):
            words += render(find_named(devices, each[1]), each[2])
        else:
            words.append(_NAMED.sub(partial(_value, devices), word))
    return words


def fields_in(command: Iterable[str]) -> set[str]:
    """The fields that a command names. Raises SpecError for one that there is not."""
    return {field for _, field in named_in(command)}


def named_in(command: Iterable[str]) -> set[tuple[str, str]]:
    """The names in a command, each with a field. Raises SpecError for one that there is not."""
    found = set[tuple[str, str]]()
    for word in command:
        each = _EACH.fullmatch(word)
        found.update(
            ((each[1], field) for field in _FIELD.findall(each[2]))
            if each
            else _NAMED.findall(word)
        )
    for _, field in sorted(found):
        _check_field(field)
    return found


def find_named(devices: Iterable[LeasedDevice], name: str) -> list[LeasedDevice]:
    """The devices that a name means: of that name, also without `/dev/`, `net:`, or of that kind.

    Raises SpecError when there is none.
    """
    known = list(devices)
    for is_meant in (
        lambda device: device.name == name,
        lambda device: name in {device.name.partition(":")[2], device.name.removeprefix("/dev/")},
        lambda device: name in {device.kind, device.name.partition(":")[0]},
    ):
        if found := [device for device in known if is_meant(device)]:
            return found
    names = ", ".join(f"{device.name} ({device.kind})" for device in known)
    raise SpecError(f"{{{name}}}", f"no leased device is called so; there is {names}")


def _value(devices: Sequence[LeasedDevice], match: "re.Match[str]") -> str:
    name, field = match[1], match[2]
    _check_field(field)
    meant = find_named(devices, name)
    found = [(device, fields) for device in meant for fields in device.fields()]
    values = {str(fields[field]) for _, fields in found}
    if len(meant) > 1 or len(values) > 1:
        what = "devices" if len(meant) > 1 else "functions"
        raise SpecError(
            match[0],
            f"it stands for {len(found)} {what}, and a word can have only one",
            hint=f"'{{{name} WORDS}}' repeats WORDS for each, with {{{field}}} in them",
        )
    return _text(field, found[0][1], found[0][0].name, alone=match.string == match[0])


def _fill(word: str, name: str, fields: dict[str, Any]) -> str:
    def value(match: "re.Match[str]") -> str:
        _check_field(match[1])
        return _text(match[1], fields, name, alone=word == match[0])

    return _FIELD.sub(value, word)


def _check_field(field: str) -> None:
    if field not in FIELDS:
        raise SpecError(
            f"{{{field}}}", "there is no such field", hint=f"one of {', '.join(FIELDS)}"
        )


def _text(field: str, fields: dict[str, Any], name: str, *, alone: bool) -> str:
    value = fields[field]
    if value is None:
        raise SpecError(f"{{{field}}}", f"{name} has no {field}")
    if isinstance(value, bool):
        return "on" if value else "off"
    if not alone and _SEPARATORS.search(str(value)):
        raise SpecError(
            f"{{{field}}}",
            f"{str(value)!r} would be read as more than one value",
            hint="let the field be a word of its own, or give the file another name",
        )
    return str(value)
