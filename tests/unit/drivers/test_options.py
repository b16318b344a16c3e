"""Options as text: every reader takes what it says and refuses the rest with what it expected."""

import re
from collections.abc import Callable, Mapping
from enum import StrEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmplug.drivers import block, rng, share, vhost_user
from vmplug.drivers.generic import check_options
from vmplug.drivers.options import Option, number, parse_options, power_of_two, switch, text, word
from vmplug.errors import SpecError


class Colour(StrEnum):
    RED = "red"
    DARK_BLUE = "dark-blue"


PARSERS: Mapping[str, Callable[[str], object]] = {
    "word": word(*Colour),
    "switch": switch("on", "off"),
    "number": number(0, 1 << 40),
    "power": power_of_two(1, 1024),
    "text": text,
}
KNOWN = {name: Option(f"{name}_field", parse, "help") for name, parse in PARSERS.items()}


def outcome(parse: Callable[[str], object], said: str) -> object:
    """What a reader makes of a text, or the error."""
    try:
        return parse(said)
    except ValueError as error:
        return error


def refusal(options: Mapping[str, str], known: Mapping[str, Option] = KNOWN) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse_options(options, known, "a device")
    return caught.value


# The table


def test_every_option_sets_its_field() -> None:
    options = {"word": "red", "switch": "on", "number": "2K", "power": "64", "text": "a b"}
    assert parse_options(options, KNOWN, "a device") == {
        "word_field": Colour.RED,
        "switch_field": True,
        "number_field": 2048,
        "power_field": 64,
        "text_field": "a b",
    }


def test_nothing_said_sets_nothing() -> None:
    assert parse_options({}, KNOWN, "a device") == {}
    assert parse_options({}, {}, "a device") == {}


def test_an_unknown_option_is_answered_with_the_known_ones() -> None:
    error = refusal({"colour": "red"})
    assert error.message == "option colour: unknown for a device"
    assert error.hint == "known options: word, switch, number, power, text"


def test_a_device_without_options_refuses_any() -> None:
    assert refusal({"colour": "red"}, {}).hint == "it has no options"


def test_a_wrong_value_is_answered_with_what_was_said_and_expected() -> None:
    error = refusal({"text": "fine", "word": "RED"})
    assert error.where == "option word"
    assert error.message == "option word: 'RED' is not one of red, dark-blue"
    assert error.hint == f"word: {KNOWN['word'].help}"


# The readers


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("0", 0),
        ("7", 7),
        ("007", 7),
        ("1K", 1 << 10),
        ("3M", 3 << 20),
        ("1024G", 1 << 40),
        ("1T", 1 << 40),
        (str(1 << 40), 1 << 40),
    ],
)
def test_a_number_may_be_in_powers_of_1024(said: str, value: int) -> None:
    assert number(0, 1 << 40)(said) == value


@pytest.mark.parametrize(
    "said", ["", "-1", "+1", "1.5", "1k", "1P", "1KB", "K", "0x10", " 1", "1\n", "٣", "²", "1_0"]
)
def test_anything_else_is_no_number(said: str) -> None:
    with pytest.raises(ValueError, match=r"a number from 0 to 9, optionally with K, M, G or T"):
        number(0, 9)(said)


@pytest.mark.parametrize("said", ["4", "0", "10", "1K", "9" * 5000])
def test_a_number_out_of_range_is_refused_with_the_range(said: str) -> None:
    with pytest.raises(ValueError, match="a number from 5 to 9,"):
        number(5, 9)(said)


@given(st.integers(0, 40), st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_a_number_is_taken_if_and_only_if_it_is_in_range(value: int, one: int, other: int) -> None:
    least, most = sorted((one, other))
    for candidate in (value, one, other, (one + other) // 2):
        is_taken = outcome(number(least, most), str(candidate)) == candidate
        assert is_taken is (least <= candidate <= most)


@given(st.integers(-5, 3000))
def test_powers_of_two_in_range_are_taken_and_no_others(value: int) -> None:
    answer = outcome(power_of_two(4, 1024), str(value))
    if value in {4, 8, 16, 32, 64, 128, 256, 512, 1024}:
        assert answer == value
    else:
        assert str(answer) == "a power of two from 4 to 1024"


@pytest.mark.parametrize("said", ["", "1K", "64 ", "٤", "0", "-4", "4.0", "9" * 5000])
def test_anything_else_is_no_power_of_two(said: str) -> None:
    with pytest.raises(ValueError, match="a power of two from 1 to 1024"):
        power_of_two(1, 1024)(said)


@pytest.mark.parametrize("said", ["", "RED", "dark_blue", "DARK_BLUE", "red ", "blue"])
def test_only_the_words_themselves_are_words(said: str) -> None:
    assert [word(*Colour)(str(colour)) for colour in Colour] == list(Colour)
    with pytest.raises(ValueError, match="one of red, dark-blue"):
        word(*Colour)(said)


@pytest.mark.parametrize("said", ["", "ON", "true", "1", "yes"])
def test_a_switch_has_two_words(said: str) -> None:
    assert [switch("on", "off")(known) for known in ("on", "off")] == [True, False]
    with pytest.raises(ValueError, match="on or off"):
        switch("on", "off")(said)


@given(st.text())
def test_text_is_what_can_be_printed(said: str) -> None:
    answer = outcome(text, said)
    if said and said.isprintable():
        assert answer == said
    else:
        assert str(answer) == "printable text"


@given(st.sampled_from(list(KNOWN)) | st.text(max_size=4), st.text())
def test_any_text_is_taken_or_refused_with_its_option(key: str, said: str) -> None:
    error, values = None, {}
    try:
        values = parse_options({key: said}, KNOWN, "a device")
    except SpecError as caught:
        error = caught
    if error is None:
        assert values.keys() == {f"{key}_field"}
    else:
        assert error.where == f"option {key}"
        assert key not in KNOWN or repr(said) in error.message


# The drivers' tables

TABLES = {
    "disk": block.OPTIONS,
    "share": share.OPTIONS,
    "rng": rng.OPTIONS,
    **{str(kind): options for kind, options in vhost_user.OPTIONS.items()},
}


@pytest.mark.parametrize("table", TABLES)
def test_every_option_has_a_short_name_and_a_line_of_help(table: str) -> None:
    for key, option in TABLES[table].items():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", key)
        assert option.help.isprintable()
        assert 0 < len(option.help) < 100
        with pytest.raises(ValueError, match=r"\w"):
            option.parse("")


def test_a_character_device_has_no_options() -> None:
    check_options({})
    with pytest.raises(SpecError, match="unknown for a character device") as caught:
        check_options({"cache": "none"})
    assert caught.value.where == "option cache"
    assert caught.value.hint == "it has no options"
