"""Reads one spec: from a file, or from its text."""

import os
import re
import stat

import msgspec

from vmplug.cdi.document import DocumentError, read_document
from vmplug.cdi.fields import Fields
from vmplug.cdi.problem import CdiError, Problem
from vmplug.cdi.spec import Spec
from vmplug.cdi.validate import find_problems
from vmplug.cdi.version import VERSIONED

_VERSIONED_KEYS = tuple(f'"{name}"'.encode() for name in VERSIONED)
BYTES_MAX = 64 << 20
"""Of a spec: a device has some 200 bytes."""
_BLANK = b" \r\n"
_COMMENTS = re.compile(rb"(?:#[ -~]*\n)*")
_ODD_ESCAPES = re.compile(rb"\\/|\\u[dD]|\\u003[aA]")
"""A slash and half a character, which YAML lacks; a colon, which `_is_written_as` counts."""
_DECODER = msgspec.json.Decoder(Spec)


def read_spec(path: str | os.PathLike[str]) -> Spec:
    """The spec of a file; CdiError with every mistake if it is not valid or cannot be read."""
    file = os.fspath(path)
    try:
        data = _read_file(file)
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise CdiError([Problem(file=file, field="$", message=message)]) from error
    return parse_spec(data, file=file)


def parse_spec(text: str | bytes, *, file: str = "-") -> Spec:
    """The spec of a text, JSON or YAML; CdiError, with `file` for its name, if it is not valid."""
    data = text.encode(errors="surrogateescape") if isinstance(text, str) else text
    fields = Fields()
    spec = _read_plain_json(data)
    if spec is None:
        try:
            spec = fields.read(read_document(data))
        except DocumentError as error:
            problem = Problem(file=file, field=error.field, message=error.message)
            raise CdiError([problem]) from error
    found = fields.problems or find_problems(spec, fields.versioned)
    problems = [Problem(file=file, field=field, message=message) for field, message in found]
    if problems:
        raise CdiError(problems)
    return spec


def _read_file(file: str) -> bytes:
    with open(file, "rb", opener=_open_at_once) as reader:
        status = os.fstat(reader.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "not a regular file")
        if status.st_size > BYTES_MAX:
            raise OSError(0, f"longer than {BYTES_MAX >> 20} MiB")
        return reader.read()


def _open_at_once(path: str, flags: int) -> int:
    """An opener: what `open` makes no file of, such as a directory, is closed again."""
    # A FIFO or a device by that name must not keep the reader waiting.
    return os.open(path, flags | os.O_NONBLOCK)


def _read_plain_json(data: bytes) -> Spec | None:
    """The spec, if its text is JSON that has one meaning for every parser: most are.

    Such JSON is ASCII, has no key twice and no odd escapes: it is read fifty times as fast, also
    below comments, where it is YAML. None says nothing about what the text is.
    """
    text = data.strip(_BLANK)
    if comments := _COMMENTS.match(text):
        text = text[comments.end() :]
    if not (text.startswith(b"{") and text.isascii()) or b"\x7f" in text:
        return None
    if b"\\" in text and _ODD_ESCAPES.search(text):
        return None
    try:
        spec = _DECODER.decode(text)
        # A key that is there twice is a colon that is not written again; so is an empty field.
        if _is_written_as(text, spec):
            return spec
        if b"\\" in text or any(key in text for key in _VERSIONED_KEYS):
            return None
        return spec if _is_written_as(text, msgspec.json.decode(text)) else None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _is_written_as(text: bytes, value: object) -> bool:
    """Whether JSON has all its keys and strings again in what it says, by the colons in it."""
    return msgspec.json.encode(value).count(b":") == text.count(b":")
