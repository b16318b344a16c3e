"""A JSON document that a tenant wrote, before it is decoded: how deep is it, and is it one?

A repeated key may mean one thing here and another to the engine that runs the container, so it is
refused. Source: RFC 8259, section 4.
"""

import json
import re
from collections import Counter
from itertools import accumulate

import msgspec

from vmplug.errors import SpecError
from vmplug.oci.limits import NESTING_MAX

_STRING = re.compile(rb'"[^"]*+"?')
"""A string that is not closed goes to the end, so that no byte is scanned twice."""
_NOT_NESTING = bytes(set(range(256)) - set(b'[]{}"'))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def check_nesting(where: str, data: bytes) -> None:
    """SpecError for a document that is nested too deeply; it need not be JSON yet."""
    if b"\\" in data:
        data = data.replace(rb"\\", b"").replace(rb"\"", b"")
    # Most strings have no brackets. What ends there and what begins there may also be two strings.
    marks = data.translate(None, _NOT_NESTING).replace(b'""', b"")
    if _is_surely_shallow(marks):
        return
    depth = max(accumulate(map(_STEPS.__getitem__, _STRING.sub(b"", marks))), default=0)
    if depth > NESTING_MAX:
        raise SpecError(where, f"nested too deeply: {depth} levels; at most {NESTING_MAX}")


def check_repeats(where: str, text: str) -> None:
    """SpecError for a document in which an object has one key twice; it must be JSON."""
    if _is_surely_without_repeats(text):
        return

    def look(pairs: list[tuple[str, object]]) -> None:
        if len(dict(pairs)) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise SpecError(where, f"the key {twice[:60]!r} appears twice in one object")

    # Numbers are not used here, and parsing one with many digits takes long.
    json.loads(text, object_pairs_hook=look, parse_int=len, parse_float=len)


def _is_surely_shallow(marks: bytes) -> bool:
    """Whether taking out what is innermost, one level at a time, leaves nothing: mostly so."""
    for _ in range(NESTING_MAX // 2):
        left = marks.replace(b"{}", b"").replace(b"[]", b"")
        if len(left) == len(marks):
            break
        marks = left
    return not marks


_ESCAPED_COLON = re.compile(r"\\u003[aA]")


def _is_surely_without_repeats(text: str) -> bool:
    """Whether it has as many colons as what is read of it: five times as fast, for most documents.

    Every key has one. So have strings, as many in the document as in what is written again, unless
    one is spelled with an escape; of repeated keys only one is written again.
    """
    if "\\" in text and _ESCAPED_COLON.search(text):
        return False
    try:
        again = msgspec.json.encode(msgspec.json.decode(text))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return again.count(b":") == text.count(":")
