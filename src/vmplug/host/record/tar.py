"""Read the members of a tar file that may come from anybody.

A record of a large host has hundreds of thousands of members; tarfile(3) takes 20 times as long
for them. Only what tar(1), pax(1) and `vmplug record` write is understood: ustar, its extensions
by pax and GNU, no sparse files. Source: tar(5); pax(1), POSIX.1-2001.
"""

import stat
from collections.abc import Iterator, Mapping
from typing import IO

import msgspec

BLOCK_BYTES = 512
FILE, LINK, DIRECTORY = b"0", b"2", b"5"
NODES = {b"3": stat.S_IFCHR, b"4": stat.S_IFBLK}

_ZEROS = bytes(BLOCK_BYTES)
_EXTENSIONS = frozenset(b"xXgLK"[i : i + 1] for i in range(5))
_EXTENSIONS_MAX = 8
"""In a row; tar(1) writes at most three."""
_EXTENSION_MAX_BYTES = 1 << 16
_CHECKSUM = slice(148, 156)
_BLANKS = 8 * ord(" ")


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
    padding = -member.size_bytes % BLOCK_BYTES
    return file.read(member.size_bytes + padding)[: member.size_bytes]


def _check(header: bytes, count: int) -> None:
    """TarError unless it is a header. The sum of its bytes is taken modulo 255, which is fast."""
    if len(header) == BLOCK_BYTES and header[257:262] == b"ustar":
        told = header[_CHECKSUM]
        others = int.from_bytes(header, "big") - sum(told) + _BLANKS
        if (others - _number(told)) % 255 == 0:
            return
    raise TarError(f"header {count} is not that of a tar file")


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
    data = file.read(size_bytes + -size_bytes % BLOCK_BYTES)[:size_bytes]
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
