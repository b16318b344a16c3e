"""Messages that docs and the README quote are the ones that the source prints."""

import re
from functools import cache

import pytest

from tests.test_plain_english import CODE, pages, texts

pytestmark = pytest.mark.together("source")

VALUE = re.compile(r": '.*|[^ ]*[/\d][^ ]*|'[^']*'|\.\.\.")
"""What a message names: a path, a number, an id, a quoted word, the reason that another gave."""


@cache
def source() -> str:
    """Comments and strings of the package; a message that goes over several lines is one again."""
    return " ".join(
        " ".join(text.replace(CODE, " ").split())
        for file, text in texts().items()
        if file.startswith("src/")
    )


def quotes() -> list[tuple[str, str]]:
    """Page and text of each message and hint in the examples of the docs."""
    return [
        (file, quote)
        for file, text in pages().items()
        if file.endswith(".md")
        for block in re.findall(r"(?ms)^```(?:console)?\n([#$] .*?)^```$", text)
        for quote in re.findall(r"(?m)^(?:vmplug: | *hint: |                +)(\w.*)$", block)
    ]


def longest_words(quote: str) -> str:
    """The longest part of a message between the values that it names."""
    return max((part.strip(" :;,") for part in VALUE.split(quote)), key=len)


def test_a_value_is_no_part_of_the_words() -> None:
    assert longest_words("VM sb1 (process 23176) has ended") == "has ended"


@pytest.mark.parametrize(("page", "quote"), quotes())
def test_a_quoted_message_is_one_of_the_source(page: str, quote: str) -> None:
    assert longest_words(quote) in source(), f"{page}: {quote!r} is not a message any more"
