"""Where a configuration is read from: a bundle directory, a file, or standard input.

The path may be a FIFO or a device, so the size and the wait are limited.
"""

import os
import select
import sys
import time
from pathlib import Path
from typing import IO

import msgspec

from vmplug.errors import SpecError
from vmplug.oci.limits import CONFIG_BYTES_MAX

PIPE_TIMEOUT_S = 10.0
"""How long the writer of a FIFO may take; a shell's `<(command)` is one too."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes that were read, the bundle directory's name, and the file that they are from.

    The latter are None for standard input.
    """

    data: bytes
    name: str | None
    file: str | None


def read_source(source: str | os.PathLike[str]) -> Source:
    """The configuration at `source`, or `-` for standard input, not yet parsed.

    Raises SpecError when it cannot be read, or is too long.
    """
    if source == "-":
        if sys.stdin is None:
            raise SpecError("standard input", "is closed; expected a config.json")
        return Source(data=_read("standard input", sys.stdin.buffer), name=None, file=None)
    path = Path(source)
    if os.path.isdir(path):  # Path.is_dir raises for a name too long to be one
        path /= "config.json"
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            data, name = _read(str(path), file), _container_name(path.parent.resolve())
            return Source(data=data, name=name, file=str(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a null byte in its path"
        raise SpecError(
            str(path),
            f"cannot be read: {reason}",
            hint="pass a directory with a config.json, that file itself, or - for standard input",
        ) from error


def _open_at_once(path: str, flags: int) -> int:
    """An opener: what `open` makes no file of, such as a directory, is closed again."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _read(where: str, file: IO[bytes]) -> bytes:
    """The whole configuration, in however many pieces it arrives."""
    pieces, left = list[bytes](), CONFIG_BYTES_MAX + 1
    deadline = time.monotonic() + PIPE_TIMEOUT_S
    while left > 0 and (piece := file.read(left)) != b"":
        if piece is None:  # an empty FIFO that a process has open for writing
            poll = select.poll()  # select(2) knows no descriptor above 1023
            poll.register(file, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise SpecError(where, f"no configuration arrived within {PIPE_TIMEOUT_S:g} s")
            continue
        pieces.append(piece)
        left -= len(piece)
    if left <= 0:
        raise SpecError(
            where, f"is longer than {CONFIG_BYTES_MAX} bytes, the limit for a configuration"
        )
    return b"".join(pieces)


def _container_name(directory: Path) -> str:
    """The bundle directory's name; podman and CRI-O keep a container's bundle in ID/userdata."""
    return (directory.parent if directory.name == "userdata" else directory).name
