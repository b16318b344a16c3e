"""A key twice in one object is found, and what is nested too deeply, however it is spelled."""

import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmplug.errors import SpecError
from vmplug.oci.document import check_nesting, check_repeats
from vmplug.oci.limits import NESTING_MAX


def spell(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in pairs) + "}"


KEY = st.sampled_from(["a", "b", '":', ":", '"', "\\", "é", ""])
VALUE = st.recursive(
    st.sampled_from(
        [
            "null",
            "1",
            '"x"',
            '":"',
            '"\\u003a"',
            '"\\u003A"',
            '"\\":"',
            '"\\u0022:"',
            '"\\\\":1'.partition(":")[0],
        ]
    ),
    lambda value: st.lists(st.tuples(KEY, value), max_size=4).map(spell),
    max_leaves=8,
)
BLANK = st.sampled_from(["", " ", "\n"])


def repeats(text: str) -> bool:
    found = []
    json.loads(text, object_pairs_hook=lambda pairs: found.append(len(dict(pairs)) < len(pairs)))
    return any(found)


@given(VALUE, BLANK)
def test_a_repeat_is_refused_and_nothing_else(text: str, blank: str) -> None:
    text = text.replace('":', f'"{blank}:')
    try:
        expected = repeats(text)
    except ValueError:
        return  # the blank stands where it may not
    if expected:
        with pytest.raises(SpecError, match="appears twice"):
            check_repeats("$", text)
    else:
        check_repeats("$", text)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":2}',
        '{"a" :1,"a":2}',
        '{"a":1,"\\u0061":2}',
        '{"a":1,"a":"\\u0022:"}',
        '{"a":1,"a":"\\u003a"}',
        '{"a":1,"a":"\\u003A"}',
        '{"x":[{"a":1,"a":"\\":"}],"y":{"b":{}}}',
        '{"a":"\\":","a":1}',
    ],
)
def test_a_repeat_is_not_hidden_by_its_spelling(text: str) -> None:
    with pytest.raises(SpecError, match="the key 'a' appears twice in one object"):
        check_repeats("$", text)


TEXT = st.text(st.sampled_from('[]{}"\\n'), max_size=4)
DOCUMENT = st.recursive(
    TEXT, lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXT, part, max_size=3)
)


def depth_of(value: object) -> int:
    if isinstance(value, str):
        return 0
    parts = value.values() if isinstance(value, dict) else value
    assert isinstance(parts, Iterable)
    return 1 + max(map(depth_of, parts), default=0)


@given(DOCUMENT)
def test_only_the_brackets_outside_of_strings_count_as_nesting(value: object) -> None:
    for _ in range(NESTING_MAX - depth_of(value)):
        value = [value]
    check_nesting("$", json.dumps(value).encode())
    with pytest.raises(SpecError, match=f"too deeply: {NESTING_MAX + 1} levels"):
        check_nesting("$", json.dumps([value]).encode())
