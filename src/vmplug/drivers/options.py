"""Options as text, `KEY=VALUE`: each driver has a table of its options."""

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from vmplug.errors import SpecError


class Option(msgspec.Struct, frozen=True):
    """One option: the field that it sets, the parser of its text, and one line of help.

    `parse` raises ValueError with what was expected.
    """

    field: str
    parse: Callable[[str], object]
    help: str

    @property
    def words(self) -> tuple[str, ...]:
        """The words of which it takes one; none where it takes other text."""
        return self.parse.words if isinstance(self.parse, _Word | _Switch) else ()


def parse_options(
    options: Mapping[str, str], known: Mapping[str, Option], what: str
) -> dict[str, Any]:
    """The values by field; SpecError names the option that is wrong or unknown for `what`."""
    values: dict[str, Any] = {}
    for key, said in options.items():
        option = known.get(key)
        if option is None:
            hint = "known options: " + ", ".join(known) if known else "it has no options"
            raise SpecError(f"option {key}", f"unknown for {what}", hint=hint)
        try:
            values[option.field] = option.parse(said)
        except ValueError as error:
            wrong = f"{said!r} is not {error}"
            raise SpecError(f"option {key}", wrong, hint=f"{key}: {option.help}") from None
    return values


class _Word(msgspec.Struct, frozen=True):
    words: tuple[StrEnum, ...]

    def __call__(self, said: str) -> StrEnum:
        for known in self.words:
            if known == said:
                return known
        raise ValueError(f"one of {', '.join(self.words)}")


def word(*words: StrEnum) -> Callable[[str], StrEnum]:
    """One of the words."""
    return _Word(words)


class _Switch(msgspec.Struct, frozen=True):
    words: tuple[str, str]

    def __call__(self, said: str) -> bool:
        on, off = self.words
        if said not in self.words:
            raise ValueError(f"{on} or {off}")
        return said == on


def switch(on: str, off: str) -> Callable[[str], bool]:
    """True for the one word, False for the other."""
    return _Switch((on, off))


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def number(least: int, most: int) -> Callable[[str], int]:
    """A whole number, with K, M, G or T for powers of 1024."""

    def parse(said: str) -> int:
        match = re.fullmatch(r"([0-9]{1,16})([KMGT]?)", said, re.ASCII)
        value = int(match[1]) * _UNITS[match[2]] if match else -1
        if not least <= value <= most:
            raise ValueError(f"a number from {least} to {most}, optionally with K, M, G or T")
        return value

    return parse


def power_of_two(least: int, most: int) -> Callable[[str], int]:
    """A power of two."""

    def parse(said: str) -> int:
        value = int(said) if re.fullmatch(r"[0-9]{1,9}", said, re.ASCII) else 0
        if not least <= value <= most or value & (value - 1):
            raise ValueError(f"a power of two from {least} to {most}")
        return value

    return parse


def text(said: str) -> str:
    """Printable text."""
    if not said or not said.isprintable():
        raise ValueError("printable text")
    return said
