"""The spec files that vmplug writes by itself, in a directory that others use too.

A file is vmplug's own if its second line is the digest of its name and of the text below, and its
owner and mode are as vmplug writes it. So nothing else has to remember it, and a file that
somebody has edited, renamed or made belongs to them: it is never replaced and never removed. A new
file is linked into its place, which fails if another has the name in that moment.
"""

import errno
import fcntl
import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Self

import msgspec

from vmplug.cdi.read import BYTES_MAX
from vmplug.cdi.registry import read_directories
from vmplug.cdi.write import DRAFT_SUFFIX, SPEC_MODE, draft_of
from vmplug.errors import HostError, StateError

_HEAD = "# Written by vmplug, which replaces and removes it. Once edited, it is yours.\n"
_DIGEST = "# sha256: "
_SUFFIX = ".yaml"
_DRAFT = ".vmplug-spec-"
_DIRECTORY_MODE = 0o755


class OwnChanges(msgspec.Struct, frozen=True, kw_only=True):
    """The paths of vmplug's own files that were written, removed, and left as they are.

    `taken` are those of files of others, which have a name that vmplug wanted.
    """

    written: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()


class OwnFiles:
    """The files of one directory whose names begin with `prefix`; a context manager.

    One process writes to a directory at a time: the lock is on the directory itself, and is held
    from the first `update` on. Not thread-safe.
    """

    def __init__(self, directory: str, prefix: str) -> None:
        self.directory = directory
        self._prefix = prefix
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def update(self, texts: Mapping[str, str]) -> OwnChanges:
        """Make the own files those of `texts`, by file name; each at once or not at all.

        The directory is made for the first of them, but not the one above it. Nothing is
        written that is there already. Raises HostError, and StateError while another process
        writes here.
        """
        if not texts and not os.path.lexists(self.directory):
            return OwnChanges()
        with _saying(self.directory):
            self._lock()
            self._remove_drafts()
            wanted = {name: _mark(name, text) for name, text in texts.items()}
            changes = self._compare(wanted)
            for path in changes.removed:  # first, as it needs no room on the disk
                os.unlink(path)
            for path in changes.written:
                with draft_of(wanted[os.path.basename(path)], self.directory, _DRAFT) as draft:
                    _put(draft, path)
        return changes

    def compare(self, texts: Mapping[str, str]) -> OwnChanges:
        """What `update` would change. Raises HostError."""
        with _saying(self.directory):
            return self._compare({name: _mark(name, text) for name, text in texts.items()})

    def names_of_others(self) -> dict[str, str]:
        """The devices that other files of the directory define, each with its file.

        Raises HostError.
        """
        with _saying(self.directory):
            own = self._read_own()
        return {
            f"{file.spec.kind}={device.name}": file.file
            for file in read_directories([self.directory]).files
            if os.path.basename(file.file) not in own
            for device in file.spec.devices
        }

    def _compare(self, wanted: Mapping[str, str]) -> OwnChanges:
        own = self._read_own()
        taken = {name for name in wanted.keys() - own.keys() if os.path.lexists(self._path(name))}
        same = {name for name in wanted if own.get(name) == wanted[name]}
        return OwnChanges(
            written=self._paths(wanted.keys() - same - taken),
            removed=self._paths(own.keys() - wanted.keys()),
            unchanged=self._paths(same),
            taken=self._paths(taken),
        )

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _paths(self, names: set[str]) -> tuple[str, ...]:
        return tuple(map(self._path, sorted(names)))

    def _read_own(self) -> dict[str, str]:
        """The own files by their names, with their texts."""
        return {
            name: text
            for name in self._names()
            if name.startswith(self._prefix) and name.endswith(_SUFFIX)
            if (text := _read_own(self._path(name))) is not None
        }

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.directory)
        except FileNotFoundError:
            return []

    def _lock(self) -> None:
        """Lock the directory that has the name now."""
        if self._descriptor >= 0:
            if _is_at(self._descriptor, self.directory):
                return
            self._close()
        with suppress(FileExistsError):
            os.mkdir(self.directory, _DIRECTORY_MODE)
            os.chmod(self.directory, _DIRECTORY_MODE)  # whatever the umask is
        # Engines do not follow a link: what is behind it would be there for vmplug alone.
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self.directory, flags)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise StateError(
                f"another process writes specs in {self.directory}",
                state="written",
                required="free",
                hint="let it finish, or end the vmplug cdi write --watch that keeps them",
            ) from None

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _remove_drafts(self) -> None:
        """Those of a process that was killed: nobody else is writing now."""
        for name in self._names():
            if name.startswith(_DRAFT) and name.endswith(DRAFT_SUFFIX):
                os.unlink(self._path(name))


@contextmanager
def _saying(directory: str) -> Iterator[None]:
    """HostError for what the file system does not let vmplug do."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        hint = "pass a directory that engines read, with --directory"
        if os.path.islink(directory):
            why = "it is a symbolic link, which engines do not follow"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f"make room for them: df {shlex.quote(directory)}"
        elif not os.path.isdir(os.path.dirname(directory) or "."):
            hint = f"mkdir -p {shlex.quote(directory)}"
        raise HostError(f"cannot write specs in {directory}: {why}", hint=hint) from error


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _put(draft: str, path: str) -> None:
    if _read_own(path) is None:
        os.link(draft, path)
    else:
        os.replace(draft, path)


def _open_itself(path: str, flags: int) -> int:
    """An opener: what `open` makes no file of, such as a directory, is closed again."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _is_as_written(status: os.stat_result) -> bool:
    return status.st_mode == stat.S_IFREG | SPEC_MODE and status.st_uid == os.geteuid()


def _mark(name: str, text: str) -> str:
    return f"{_HEAD}{_DIGEST}{_digest(name, text)}\n{text}"


def _digest(name: str, text: str) -> str:
    return sha256(f"{name}\n{text}".encode()).hexdigest()


def _read_own(path: str) -> str | None:
    """The text of a file that vmplug wrote; None for anything else."""
    try:
        with open(path, "rb", opener=_open_itself) as file:
            status = os.fstat(file.fileno())
            text = file.read(BYTES_MAX).decode() if _is_as_written(status) else ""
    except (OSError, UnicodeDecodeError):  # what cannot be read is not vmplug's
        return None
    _, _, rest = text.partition("\n")
    line, _, below = rest.partition("\n")
    return text if line == _DIGEST + _digest(os.path.basename(path), below) else None
