"""Read a host from a file that `vmplug record` wrote.

The file is not trusted. vmplug unpacks it into a private directory by itself, not with tarfile's
extraction: only directories, regular files and links that stay inside; links are made last, so
that nothing is written through one. A device node is only kept in memory: none is created, so no
root is needed and no device can be opened.
"""

import errno
import gzip
import io
import os
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Self, TypeVar

import msgspec

from vmplug.devnum import DevNum, is_decimal
from vmplug.errors import AttributeReadError, SpecError
from vmplug.host.root import AttributeBatch, HostRoot

FORMAT = 1
NOTE = "vmplug-record"
"""A member for people, and for programs that read a later format."""
ERRNO_KEYWORD = "VMPLUG.errno"

_LINKS_MAX, _DEPTH_MAX = 40, 64
_GZIP = b"\x1f\x8b"
_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE}
_NODES = {tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK}
_EXTENSIONS = {
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
}
_EXTENSION_MAX_BYTES = 1 << 16
"""The limit for a member's name, link and keywords, which tarfile reads at once."""
_NOTE_MAX_BYTES = 4096
_SEE = "vmplug record writes such a file"
_UNREADABLE = (EOFError, ValueError, RecursionError, zlib.error, tarfile.TarError)
"""The errors of tarfile: ValueError for malformed numbers, RecursionError when extensions extend
each other."""


T = TypeVar("T")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a record; 10 000 PCI functions make 300 000 members of 300 MiB."""

    members: int = 1_000_000
    file_bytes: int = 4 << 20
    whole_bytes: int = 1 << 30


LIMITS = Limits()


class _Node(msgspec.Struct, frozen=True, kw_only=True):
    """A device node: its type and permissions, and its number."""

    mode: int
    number: int


class RecordedRoot(HostRoot):
    """The unpacked files, with the nodes and the errors that the host had."""

    def __init__(self, path: str, nodes: Mapping[str, _Node], errors: Mapping[str, int]) -> None:
        super().__init__(path)
        self._nodes = nodes
        self._errors = errors

    def _refuse(self, path: str) -> None:
        """The error that the host returned for a file."""
        if self._errors:
            number = self._errors.get(self.real_path(path))
            if number is not None:
                raise AttributeReadError(path, number)

    def read_attribute(self, path: str) -> bytes | None:
        """As on the host."""
        self._refuse(path)
        return super().read_attribute(path)

    def read_text(self, path: str) -> str | None:
        """As on the host."""
        self._refuse(path)
        return super().read_text(path)

    def read_at(self, path: str, offset: int, length: int) -> bytes:
        """As on the host, except for nodes, which have no device behind them."""
        self._refuse(path)
        return super().read_at(path, offset, length)

    def read_link(self, path: str) -> str | None:
        """As on the host."""
        self._refuse(path)
        return super().read_link(path)

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
        if not self._errors:
            yield from super().read_each(directory, names, files=files, links=links, sizes=sizes)
            return
        for name in names:
            base = f"{directory}/{name}"
            yield (
                [_answer(self.read_attribute, f"{base}/{file}") for file in files],
                [_answer(self.read_link, f"{base}/{link}") for link in links],
                [_answer(self.size, f"{base}/{file}") for file in sizes],
            )

    def stat(self, path: str) -> os.stat_result | None:
        """As on the host, with type, permissions and number only."""
        return self._as_node(path, super().stat(path))

    def stat_or_none(self, path: str, *, follow_symlinks: bool = True) -> os.stat_result | None:
        """As on the host, with type, permissions and number only."""
        status = super().stat_or_none(path, follow_symlinks=follow_symlinks)
        if status and stat.S_ISLNK(status.st_mode):
            return status
        return self._as_node(path, status)

    def _as_node(self, path: str, status: os.stat_result | None) -> os.stat_result | None:
        node = self._nodes.get(self.real_path(path)) if status and self._nodes else None
        if status is None or node is None:
            return status
        return os.stat_result((node.mode, *status[1:]), {"st_rdev": node.number})


def _answer(read: Callable[[str], T], path: str) -> T | AttributeReadError:
    try:
        return read(path)
    except AttributeReadError as error:
        return error


@contextmanager
def open_record(path: str, limits: Limits = LIMITS) -> Iterator[RecordedRoot]:
    """The host in a tar file, compressed by gzip or not; the files are removed at the end.

    Raises SpecError for a file that is not a record, or has forbidden contents.
    """
    directory = tempfile.mkdtemp(prefix="vmplug-root-")
    try:
        unpacker = _Unpacker(path, directory, limits)
        try:
            unpacker.unpack()
        except (OSError, *_UNREADABLE) as error:
            why = (isinstance(error, OSError) and error.strerror) or str(error)
            raise SpecError(path, f"cannot be read as a tar file: {why}", hint=_SEE) from error
        yield RecordedRoot(directory, unpacker.nodes, unpacker.errors)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class _Unpacker:
    """Unpacks one file into an empty directory of its own."""

    def __init__(self, path: str, directory: str, limits: Limits) -> None:
        self._path = path
        self._directory = directory
        self._limits = limits
        self._directories = {""}
        self._leaves: set[str] = set()
        self._links: dict[str, str] = {}
        self._promised: int | None = None
        self.nodes: dict[str, _Node] = {}
        self.errors: dict[str, int] = {}

    def unpack(self) -> None:
        """Make directories and files as they come, then the links."""
        count = 0
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(descriptor, "rb") as file, self._open_tar(file) as tar:
            for member in tar:
                count += 1
                if count > self._limits.members:
                    raise self._refusal(f"holds more than {self._limits.members} members")
                self._take(member, tar)
        if self._promised is not None and self._promised != count - 1:
            raise self._refusal(f"is truncated: it has {count - 1} of {self._promised} members")
        for path, target in self._links.items():
            self._check_link(path, target)
        for path, target in self._links.items():
            os.symlink(target, self._directory + path)

    @contextmanager
    def _open_tar(self, file: IO[bytes]) -> Iterator[tarfile.TarFile]:
        is_compressed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        most = self._limits.whole_bytes
        too_much = self._refusal(f"unpacks to more than {most} bytes")
        stream = _Limited(gzip.GzipFile(fileobj=file) if is_compressed else file, most, too_much)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:
            yield tar

    def _refusal(self, why: str) -> SpecError:
        return SpecError(self._path, why, hint=_SEE)

    def _take(self, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        if member.name == NOTE:
            self._read_note(tar.extractfile(member))
            return
        path = self._path_of(member.name)
        if member.isdir():
            self._make_directory(path)
            return
        self._make_directory(path.rpartition("/")[0])
        if path in self._directories or path in self._leaves:
            raise self._refusal(f"member {member.name!r} appears twice")
        self._leaves.add(path)
        if member.issym():
            self._links[path] = member.linkname
            return
        if member.type in _NODES:
            self.nodes[path] = self._node(member)
        elif member.type not in _REGULAR or member.issparse():
            raise self._refusal(f"member {member.name!r} is not a file, a link or a device node")
        self._write(path, member, tar)

    def _node(self, member: tarfile.TarInfo) -> _Node:
        try:
            number = DevNum(member.devmajor, member.devminor)
        except ValueError as error:
            raise self._refusal(f"member {member.name!r} has no device number: {error}") from None
        mode = _NODES[member.type] | member.mode & 0o777
        return _Node(mode=mode, number=os.makedev(number.major, number.minor))

    def _path_of(self, name: str) -> str:
        """The member's path with a slash before it; SpecError if it leaves the directory."""
        parts = [part for part in name.split("/") if part not in {"", "."}]
        if name.startswith("/") or ".." in parts or "\0" in name:
            raise self._refusal(
                f"member {name!r} would leave the directory that it is unpacked into"
            )
        if len(parts) > _DEPTH_MAX:
            raise self._refusal(
                f"member {name[:40]!r}... is nested deeper than any file of a host"
            )
        return "".join(f"/{part}" for part in parts)

    def _make_directory(self, path: str) -> None:
        here = ""
        for part in path.split("/")[1:]:
            here = f"{here}/{part}"
            if here in self._leaves:
                raise self._refusal(f"member {here[1:]!r} is both a directory and something else")
            if here not in self._directories:
                os.mkdir(self._directory + here, 0o700)
                self._directories.add(here)

    def _write(self, path: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        most = self._limits.file_bytes
        if member.size > most:
            raise self._refusal(f"member {member.name!r} is larger than {most} bytes")
        keyword = member.pax_headers.get(ERRNO_KEYWORD)
        if keyword is not None:
            if keyword not in map(str, errno.errorcode):
                raise self._refusal(f"member {member.name!r} has the error {keyword[:20]!r}")
            self.errors[path] = int(keyword)
        content = tar.extractfile(member) if member.isreg() else None
        data = content.read() if content else b""
        if len(data) != member.size and member.isreg():
            raise self._refusal(f"is truncated in {member.name!r}")
        with open(self._directory + path, "xb") as file:
            file.write(data)

    def _read_note(self, note: IO[bytes] | None) -> None:
        words = dict(
            line.split(" ", 1)
            for line in (note.read(_NOTE_MAX_BYTES) if note else b"")
            .decode(errors="replace")
            .split("\n")
            if " " in line
        )
        if words.get("format") != str(FORMAT):
            raise self._refusal(
                f"is a record of format {words.get('format')!r}; this vmplug reads format {FORMAT}"
            )
        promised = words.get("members", "")
        self._promised = int(promised) if is_decimal(promised) else None

    def _check_link(self, path: str, target: str) -> None:
        """SpecError for a link that would lead out, by itself or through others."""
        real, rest, links = path.split("/")[1:-1], target.split("/")[::-1], 0
        is_out = target.startswith("/") or not target or "\0" in target
        while rest and not is_out:
            match rest.pop():
                case "" | ".":
                    continue
                case "..":
                    is_out = not real
                    real = real[:-1]
                    continue
                case name:
                    real.append(name)
            further = self._links.get("".join(f"/{part}" for part in real))
            if further is not None:
                links += 1
                if links > _LINKS_MAX:
                    return  # leads nowhere: the kernel would fail too
                real.pop()
                is_out = further.startswith("/")
                rest += further.split("/")[::-1]
        if is_out:
            raise self._refusal(f"link {path[1:]!r} leads out of the record, to {target!r}")


class _Header(tarfile.TarInfo):
    """A member's header, which may not announce more than is sensible."""

    def _proc_member(self, tar: tarfile.TarFile) -> Self:
        """Called by tarfile for every header, before it reads the member.

        Python 3.13 does not call `frombuf` of a subclass any more.
        """
        if self.type in _EXTENSIONS and self.size > _EXTENSION_MAX_BYTES:
            raise tarfile.ReadError(f"{self.size} bytes are announced for one member")
        found: Self = super()._proc_member(tar)  # type: ignore[misc]
        return found


class _Limited(io.RawIOBase):
    """A stream that fails after too many bytes: a small file may unpack to a lot."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, size_bytes: int, too_much: SpecError):
        super().__init__()
        self._stream = stream
        self._left = size_bytes
        self._too_much = too_much

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes."""
        data = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise self._too_much
        return data
