"""Read a host from a file that `vmplug record` wrote.

The file is not trusted. It is read into memory and nothing is unpacked: so no link can be written
through, no root is needed and no device can be opened. Only directories, regular files, device
nodes and links that stay inside are taken.
"""

import errno
import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import msgspec

from vmplug.devnum import DevNum, is_decimal
from vmplug.errors import AttributeReadError, SpecError
from vmplug.host.record.tar import (
    DIRECTORY,
    FILE,
    LINK,
    NODES,
    Member,
    TarError,
    read_content,
    read_members,
)
from vmplug.host.root import PAGE_SIZE, AttributeBatch, HostRoot
from vmplug.oci.limits import NAME_BYTES_MAX

FORMAT = 1
NOTE = "vmplug-record"
"""A member for people, and for programs that read a later format."""
ERRNO_KEYWORD = "VMPLUG.errno"

_LINKS_MAX, _DEPTH_MAX = 40, 64
_STEPS_MAX = 256
"""Names on the way to where a link leads; on a host there are fewer than 50."""
_GZIP = b"\x1f\x8b"
_SECTOR_BYTES = 512
_NOTE_BYTES_MAX = 4096
_BUFFER_BYTES = 1 << 16
_SEE = "vmplug record writes such a file"
_UNREADABLE = (EOFError, ValueError, zlib.error, TarError)
"""The errors of gzip and of what is malformed inside."""


T = TypeVar("T")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a record; 10 000 PCI functions make 300 000 members of 300 MiB.

    `path_bytes` are those of all paths: a member of a few bytes may name many directories.
    """

    members: int = 1_000_000
    file_bytes: int = 4 << 20
    whole_bytes: int = 1 << 30
    path_bytes: int = 256 << 20


LIMITS = Limits()


class _Node(msgspec.Struct, frozen=True, kw_only=True):
    """A device node: its type and permissions, and its number."""

    mode: int
    number: int


class _Members(msgspec.Struct, kw_only=True):
    """What a record holds, by path; no path contains a link.

    `names` are those in each directory. A node and a file that could not be read have no bytes.
    """

    names: dict[str, list[str]] = msgspec.field(default_factory=lambda: {"": []})
    files: dict[str, bytes] = msgspec.field(default_factory=dict)
    links: dict[str, str] = msgspec.field(default_factory=dict)
    nodes: dict[str, _Node] = msgspec.field(default_factory=dict)
    errors: dict[str, int] = msgspec.field(default_factory=dict)


class RecordedRoot(HostRoot):
    """The host in a record, as this process sees it; `path` is the file's."""

    def __init__(self, path: str, members: _Members) -> None:
        super().__init__(path)
        self._members = members
        self._real_directories: dict[str, str] = {}

    def _real_directory(self, path: str) -> str:
        if path not in self._real_directories:
            self._real_directories[path] = super().real_path(path).removesuffix("/")
        return self._real_directories[path]

    def _place(self, path: str) -> str:
        """The path with all links resolved, except for the last name; empty for the root."""
        directory, _, name = path.rpartition("/")
        if name in {"", ".", ".."}:
            return self._real_directory(path)
        return f"{self._real_directory(directory)}/{name}"

    def _real(self, path: str) -> str:
        place = self._place(path)
        return self._real_directory(place) if place in self._members.links else place

    def real_path(self, path: str) -> str:
        """As on the host."""
        return self._real(path) or "/"

    def _link_target(self, path: str) -> str | None:
        return self._members.links.get(path)

    def _read(self, path: str) -> bytes | None:
        """The file's bytes; the error that the host had, and that of a directory."""
        real = self._real(path)
        number = self._members.errors.get(real)
        if number is None and real in self._members.names:
            number = errno.EISDIR
        if number is not None:
            raise AttributeReadError(path, number)
        return b"" if real in self._members.nodes else self._members.files.get(real)

    def read_attribute(self, path: str) -> bytes | None:
        """As on the host."""
        data = self._read(path)
        return None if data is None else data[:PAGE_SIZE]

    def read_text(self, path: str) -> str | None:
        """As on the host."""
        data = self._read(path)
        return None if data is None else os.fsdecode(data)

    def read_at(self, path: str, offset: int, length: int) -> bytes:
        """As on the host, except for nodes, which have no device behind them."""
        return (self._read(path) or b"")[offset : offset + length]

    def read_link(self, path: str) -> str | None:
        """As on the host."""
        place = self._place(path)
        target = self._members.links.get(place)
        if target is None and self._status(place) is not None:
            raise AttributeReadError(path, self._members.errors.get(place, errno.EINVAL))
        return target

    def read_each(
        self,
        directory: str,
        names: Iterable[str],
        *,
        files: Sequence[str],
        links: Sequence[str],
        sizes: Sequence[str],
    ) -> Iterator[AttributeBatch]:
        """As on the host."""
        if self._real_directory(directory) not in self._members.names:
            return
        for name in names:
            base = f"{directory}/{name}"
            yield (
                [_answer(self.read_attribute, f"{base}/{file}") for file in files],
                [_answer(self.read_link, f"{base}/{link}") for link in links],
                [_answer(self.size, f"{base}/{file}") for file in sizes],
            )

    def stat(self, path: str) -> os.stat_result | None:
        """As on the host, with type, permissions, number and size only."""
        return self._status(self._real(path))

    def stat_or_none(self, path: str, *, follow_symlinks: bool = True) -> os.stat_result | None:
        """As on the host, with type, permissions, number and size only."""
        try:
            return self._status(self._real(path) if follow_symlinks else self._place(path))
        except AttributeReadError:
            return None

    def _status(self, real: str) -> os.stat_result | None:
        known, size_bytes, number = self._members, 0, 0
        if real in known.files:
            mode, size_bytes = stat.S_IFREG | 0o600, len(known.files[real])
        elif real in known.names:
            mode = stat.S_IFDIR | 0o700
        elif real in known.nodes:
            mode, number = known.nodes[real].mode, known.nodes[real].number
        elif real in known.links:
            mode = stat.S_IFLNK | 0o777
        else:
            return None
        inode = hash(real) & 0xFFFFFFFF
        blocks = -(-size_bytes // _SECTOR_BYTES)
        facts = (mode, inode, 0, 1, 0, 0, size_bytes, 0, 0, 0)
        return os.stat_result(facts, {"st_rdev": number, "st_blocks": blocks, "st_ctime_ns": 0})

    def list_dir(self, path: str) -> list[str]:
        """As on the host."""
        return sorted(self._members.names.get(self._real(path), ()))

    def is_writable(self, path: str) -> bool:
        """Whether it is there."""
        return self.stat_or_none(path) is not None

    def open_errno(self, path: str, flags: int) -> int | None:  # noqa: ARG002
        """The same: nothing that the kernel would refuse is known."""
        return None if self.is_writable(path) else errno.ENOENT


def _answer(read: Callable[[str], T], path: str) -> T | AttributeReadError:
    try:
        return read(path)
    except AttributeReadError as error:
        return error


def read_record(path: str, limits: Limits = LIMITS) -> RecordedRoot:
    """The host in a tar file, compressed by gzip or not.

    Raises SpecError for a file that is not a record, or has forbidden contents.
    """
    reader = _Reader(path, limits)
    try:
        reader.read()
    except (OSError, *_UNREADABLE) as error:
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise SpecError(path, f"cannot be read as a tar file: {why}", hint=_SEE) from error
    return RecordedRoot(path, reader.members)


class _Reader:
    """Reads the members of one file."""

    def __init__(self, path: str, limits: Limits) -> None:
        self._path = path
        self._limits = limits
        self._promised: int | None = None
        self._path_bytes = 0
        self.members = _Members()

    def read(self) -> None:
        """Take the members as they come, then look where the links lead."""
        count = 0
        with self._open() as file:
            for member in read_members(file):
                count += 1
                if count > self._limits.members:
                    raise self._refusal(f"holds more than {self._limits.members} members")
                self._take(member, file)
        if self._promised is not None and self._promised != count - 1:
            raise self._refusal(f"is truncated: it has {count - 1} of {self._promised} members")
        for path, target in self.members.links.items():
            self._check_link(path, target)

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        most = self._limits.whole_bytes
        too_much = self._refusal(f"unpacks to more than {most} bytes")
        with open(self._path, "rb", buffering=0, opener=_open_at_once) as file:
            is_compressed = os.pread(file.fileno(), len(_GZIP), 0) == _GZIP
            stream = gzip.GzipFile(fileobj=file) if is_compressed else file
            yield io.BufferedReader(_Limited(stream, most, too_much), _BUFFER_BYTES)

    def _refusal(self, why: str) -> SpecError:
        return SpecError(self._path, why, hint=_SEE)

    def _take(self, member: Member, file: IO[bytes]) -> None:
        if member.name == NOTE:
            self._read_note(self._content(member, file))
            return
        path, members = self._path_of(member.name), self.members
        if member.type == DIRECTORY:
            self._make_directory(path)
            return
        directory, _, name = path.rpartition("/")
        self._make_directory(directory)
        if path in members.names or self._is_leaf(path):
            raise self._refusal(f"member {member.name!r} appears twice")
        self._add_name(directory, name)
        if member.type == LINK:
            members.links[path] = member.target
        elif member.type in NODES:
            members.nodes[path] = self._node(member)
        elif member.type == FILE:
            members.files[path] = self._content(member, file)
            if ERRNO_KEYWORD in member.keywords:
                members.errors[path] = self._errno(member)
        else:
            raise self._refusal(f"member {member.name!r} is not a file, a link or a device node")

    def _is_leaf(self, path: str) -> bool:
        members = self.members
        return path in members.files or path in members.links or path in members.nodes

    def _node(self, member: Member) -> _Node:
        try:
            number = DevNum(*member.number)
        except ValueError as error:
            raise self._refusal(f"member {member.name!r} has no device number: {error}") from None
        return _Node(mode=member.mode, number=os.makedev(number.major, number.minor))

    def _path_of(self, name: str) -> str:
        """The member's path with a slash before it; SpecError if it leaves the directory."""
        plain = name.removesuffix("/")  # tar(1) writes it behind a directory
        above, _, last = plain.rpartition("/")
        is_plain = last.isascii() and last.isprintable() and len(last) <= NAME_BYTES_MAX
        if is_plain and last not in {"", ".", ".."} and f"/{above}" in self.members.names:
            return f"/{plain}"
        parts = [part for part in name.split("/") if part not in {"", "."}]
        if name.startswith("/") or ".." in parts or "\0" in name:
            raise self._refusal(
                f"member {name!r} would leave the directory that it is unpacked into"
            )
        if any(len(os.fsencode(part)) > NAME_BYTES_MAX for part in parts):
            raise self._refusal(f"member {name[:40]!r}...: File name too long")
        if len(parts) > _DEPTH_MAX:
            raise self._refusal(
                f"member {name[:40]!r}... is nested deeper than any file of a host"
            )
        return "".join(f"/{part}" for part in parts)

    def _make_directory(self, path: str) -> None:
        if path in self.members.names:
            return
        if self._is_leaf(path):
            raise self._refusal(f"member {path[1:]!r} is both a directory and something else")
        above, _, name = path.rpartition("/")
        self._make_directory(above)
        self._add_name(above, name)
        self.members.names[path] = []

    def _add_name(self, directory: str, name: str) -> None:
        most = self._limits.path_bytes
        self._path_bytes += len(directory) + len(name)
        if self._path_bytes > most:
            raise self._refusal(f"has paths of more than {most} bytes")
        self.members.names[directory].append(name)

    def _content(self, member: Member, file: IO[bytes]) -> bytes:
        most = self._limits.file_bytes
        if not 0 <= member.size_bytes <= most:
            raise self._refusal(f"member {member.name!r} is larger than {most} bytes")
        data = read_content(member, file)
        if len(data) != member.size_bytes:
            raise self._refusal(f"is truncated in {member.name!r}")
        return data

    def _errno(self, member: Member) -> int:
        number = member.keywords[ERRNO_KEYWORD]
        if number not in map(str, errno.errorcode):
            raise self._refusal(f"member {member.name!r} has the error {number[:20]!r}")
        return int(number)

    def _read_note(self, note: bytes) -> None:
        words = dict(
            line.split(" ", 1)
            for line in note[:_NOTE_BYTES_MAX].decode(errors="replace").split("\n")
            if " " in line
        )
        if words.get("format") != str(FORMAT):
            raise self._refusal(
                f"is a record of format {words.get('format')!r}; this vmplug reads format {FORMAT}"
            )
        promised = words.get("members", "")
        self._promised = int(promised) if is_decimal(promised) else None

    def _leads_to_directory(self, path: str, target: str) -> bool:
        """Whether it leads up and then through directories alone, as most links of sysfs do."""
        directory = path.rpartition("/")[0]
        while directory and target.startswith("../"):
            directory, target = directory.rpartition("/")[0], target[3:]
        return f"{directory}/{target}" in self.members.names

    def _check_link(self, path: str, target: str) -> None:
        """SpecError for a link that would lead out, by itself or through others."""
        if self._leads_to_directory(path, target):
            return
        real, rest, links = path.rpartition("/")[0], target.split("/")[::-1], 0
        steps = len(rest)
        is_out = target.startswith("/") or not target or "\0" in target
        while rest and not is_out:
            if steps > _STEPS_MAX:
                raise self._refusal(f"link {path[1:]!r} leads through too many directories")
            match rest.pop():
                case "" | ".":
                    continue
                case "..":
                    is_out = not real
                    real = real.rpartition("/")[0]
                    continue
                case name:
                    here = f"{real}/{name}"
            further = self.members.links.get(here)
            if further is None:
                real = here
                continue
            links += 1
            if links > _LINKS_MAX:
                return  # leads nowhere: the kernel would fail too
            is_out = further.startswith("/")
            rest += further.split("/")[::-1]
            steps += further.count("/")
        if is_out:
            raise self._refusal(f"link {path[1:]!r} leads out of the record, to {target!r}")


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


class _Limited(io.RawIOBase):
    """A stream that fails after too many bytes: a small file may unpack to a lot."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, size_bytes: int, too_much: SpecError):
        super().__init__()
        self._stream = stream
        self._left = size_bytes
        self._too_much = too_much

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """At most as much as fits."""
        data = self._stream.read(min(len(buffer), self._left + 1)) or b""
        self._left -= len(data)
        if self._left < 0:
            raise self._too_much
        buffer[: len(data)] = data
        return len(data)
