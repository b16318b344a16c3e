"""Write the members of a tar file, and read those of one that may come from anybody.

A record of a large host has hundreds of thousands of members, for which Python's tarfile takes
several times as long. Only what tar(1), pax(1) and `vmplug record` write is understood: ustar, its
extensions by pax and GNU, no sparse files. Source: tar(5); pax(1), POSIX.1-2001.
"""

import os
import stat
import struct
from collections.abc import Iterator, Mapping
from typing import IO
from zlib import adler32

import msgspec

BLOCK_BYTES = 512
FILE, LINK, DIRECTORY = b"0", b"2", b"5"
NODES = {b"3": stat.S_IFCHR, b"4": stat.S_IFBLK}

_ZEROS = bytes(BLOCK_BYTES)
_EXTENSIONS = frozenset({b"x", b"X", b"g", b"L", b"K"})
_EXTENSIONS_MAX = 8
"""In a row; tar(1) writes at most three."""
_EXTENSION_MAX_BYTES = 1 << 16
_CHECKSUM = slice(148, 156)
_BLANKS = 8 * ord(" ")
_HALF_BYTES = 256


_HEADER = struct.Struct("100s8s16x12s12s8sc100s8s64x8s8s155s12x")
_MAGIC = b"ustar\x0000"
_NAME_BYTES_MAX, _PREFIX_BYTES_MAX = 100, 155


class TarError(Exception):
    """What cannot be understood; the message says why."""


class Member(msgspec.Struct, frozen=True):
    """One member; `keywords` are those of its pax header."""

    name: str
    type: bytes
    size_bytes: int
    target: str
    keywords: Mapping[str, str]
    header: bytes

    @property
    def mode(self) -> int:
        """Type and permissions of a device node."""
        return NODES[self.type] | _number(self.header[100:108]) & 0o777

    @property
    def number(self) -> tuple[int, int]:
        """The major and minor of a device node."""
        return _number(self.header[329:337]), _number(self.header[337:345])


def read_members(file: IO[bytes]) -> Iterator[Member]:
    """The members in their order; the caller reads the content of each file with `read_content`.

    Raises TarError.
    """
    keywords: dict[str, str] = {}
    extensions = count = 0
    while header := file.read(BLOCK_BYTES):
        if header == _ZEROS:
            break
        count += 1
        _check(header, count)
        kind = header[156:157]
        if kind in _EXTENSIONS:
            extensions += 1
            if extensions > _EXTENSIONS_MAX:
                raise TarError(f"more than {_EXTENSIONS_MAX} extensions of one member")
            keywords |= _read_extension(kind, _number(header[124:136]), file)
            continue
        yield _member(header, kind, keywords)
        if keywords:
            keywords = {}
        extensions = 0
    if not count and not header:
        raise TarError("empty file")


def read_content(member: Member, file: IO[bytes]) -> bytes:
    """The bytes of a member that is a file; less than its size where the file ends."""
    length = member.size_bytes
    return file.read(length + -length % BLOCK_BYTES)[:length]


def _check(header: bytes, count: int) -> None:
    """TarError unless it is a header."""
    if len(header) == BLOCK_BYTES and header[257:262] == b"ustar":
        told = header[_CHECKSUM]
        if _sum_of(header) - sum(told) + _BLANKS == _number(told):
            return
    raise TarError(f"header {count} is not that of a tar file")


def _sum_of(header: bytes | bytearray) -> int:
    """The sum of the bytes of a header, ten times as fast as `sum`.

    It is in the low half of Adler-32, which has room for that of 256 bytes. Source: RFC 1950.
    """
    first, second = adler32(header[:_HALF_BYTES], 0), adler32(header[_HALF_BYTES:], 0)
    return (first & 0xFFFF) + (second & 0xFFFF)


def _member(header: bytes, kind: bytes, keywords: Mapping[str, str]) -> Member:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    target = _text(header[157:257]) if kind == LINK else ""
    size_bytes = 0 if kind in NODES or kind in {LINK, DIRECTORY} else _number(header[124:136])
    if keywords:
        if any(keyword.startswith("GNU.sparse.") for keyword in keywords):
            kind = b"S"
        name, target = keywords.get("path", name), keywords.get("linkpath", target)
        size_bytes = int(keywords.get("size", size_bytes))
    if kind == b"\0":
        kind = DIRECTORY if name.endswith("/") else FILE
    return Member(name, kind, size_bytes, target, keywords, header)


def _read_extension(kind: bytes, size_bytes: int, file: IO[bytes]) -> dict[str, str]:
    if not 0 <= size_bytes <= _EXTENSION_MAX_BYTES:
        raise TarError(f"{size_bytes} bytes are announced for one member")
    data = file.read(size_bytes + len(padding(size_bytes)))[:size_bytes]
    if kind in {b"L", b"K"}:
        return {"path" if kind == b"L" else "linkpath": _text(data)}
    return _keywords(data) if kind != b"g" else {}  # which is for people: a comment


def _keywords(data: bytes) -> dict[str, str]:
    """Lines of `LENGTH KEYWORD=VALUE`, whose length counts all of it."""
    found = {}
    while data:
        length, _, _ = data.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 8 else 0
        keyword, equals, value = data[len(length) + 1 : size].partition(b"=")
        if not (equals and value.endswith(b"\n") and size <= len(data)):
            raise TarError(f"no pax header: {data[:40]!r}")
        found[_decode(keyword)] = _decode(value[:-1])
        data = data[size:]
    return found


def _number(field: bytes) -> int:
    """Octal digits; a number too large for them in base 256, with a bit to say so."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if not digits.isdigit():
        raise TarError(f"{digits!r} is not a number")
    try:
        return int(digits, 8)
    except ValueError:
        raise TarError(f"{digits!r} is not an octal number") from None


def _text(field: bytes) -> str:
    return _decode(field.partition(b"\0")[0])


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def make_header(
    name: str,
    kind: bytes,
    *,
    size_bytes: int = 0,
    target: str = "",
    node: os.stat_result | None = None,
    keywords: Mapping[str, str] | None = None,
) -> bytes:
    """The header of a member, after the pax header of what has no place in it.

    The content follows, then `padding`.
    """
    said = dict(keywords or {})
    short, prefix = _split(os.fsencode(name if kind != DIRECTORY else f"{name}/"))
    if len(short) > _NAME_BYTES_MAX:
        said["path"] = name
    if len(os.fsencode(target)) > _NAME_BYTES_MAX:
        said["linkpath"] = target
    mode = stat.S_IMODE(node.st_mode) if node else 0o755 if kind == DIRECTORY else 0o644
    number = node.st_rdev if node else 0
    major, minor = os.major(number), os.minor(number)
    fields = (
        *(short, b"%07o" % mode, b"%011o" % size_bytes, b"%011o" % 0),
        *(b" " * 8, kind, os.fsencode(target), _MAGIC, b"%07o" % major, b"%07o" % minor, prefix),
    )
    whole = bytearray(_HEADER.pack(*fields))
    whole[_CHECKSUM] = b"%06o\0 " % _sum_of(whole)
    return (_pax_header(said) if said else b"") + whole


def padding(size_bytes: int) -> bytes:
    """What follows a content of that length."""
    return bytes(-size_bytes % BLOCK_BYTES)


def _split(name: bytes) -> tuple[bytes, bytes]:
    """A long name as its end and its beginning, where a slash divides them so that both fit."""
    if len(name) <= _NAME_BYTES_MAX:
        return name, b""
    at = name.find(b"/", len(name) - _NAME_BYTES_MAX - 1, -1)
    if not 0 < at <= _PREFIX_BYTES_MAX:
        return name, b""
    return name[at + 1 :], name[:at]


def _pax_header(keywords: Mapping[str, str]) -> bytes:
    data = b""
    for keyword, value in keywords.items():
        line = os.fsencode(f" {keyword}={value}\n")
        length = len(line) + len(str(len(line)))
        length = len(line) + len(str(length))
        data += b"%d%s" % (length, line)
    header = make_header("pax", b"x", size_bytes=len(data))
    return header + data + padding(len(data))
