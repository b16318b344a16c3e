"""A file of the operator's: TOML, accepted as a whole or refused with what is wrong in it.

Everything unknown is an error: a misspelt key must not allow more than was meant. A file that
cannot be read does not count as absent.
"""

import os
import stat
import tomllib
from collections.abc import Callable, Iterable
from typing import Annotated, NoReturn, TypeVar

import msgspec

from vmplug.errors import PolicyError
from vmplug.host.permissions import who_writes, whose_link

_BYTES_MAX = 1 << 20

T = TypeVar("T")
Words = Annotated[list[str], msgspec.Meta(min_length=1)]
"""The texts of a key, which must not be an empty list."""


class OperatorsFile(msgspec.Struct, frozen=True, kw_only=True):
    """The file at `path`, which messages call `what`: `the policy`.

    `named` is the table whose rows have names. The hints are the remedies where it cannot be read,
    and where something in it is wrong.
    """

    path: str
    what: str
    named: str
    hint_unread: str
    hint_wrong: str

    def read_tables(self) -> dict[str, object]:
        """What is in it.

        Raises PolicyError when it cannot be read, is not TOML, or others than root and this user
        may write to it.
        """
        data = self._read()
        try:
            return tomllib.loads(data.decode())
        except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError
            self.refuse(f"is not TOML: {error}")

    def convert(
        self, tables: dict[str, object], kind: type[T], words: dict[str, list[str]] | None = None
    ) -> T:
        """The tables as a value of that type. Raises PolicyError.

        `words` are those that a key may have, for messages; the key "" is for every other one.
        """
        try:
            return msgspec.convert(tables, type=kind)
        except msgspec.ValidationError as error:
            self.refuse(self._in_words(error, tables, words or {}))

    def parse(
        self, where: str, texts: Iterable[str] | None, one: Callable[[str], T]
    ) -> tuple[T, ...] | None:
        """The patterns of a key, each read by `one`; None where it is not there.

        Raises PolicyError that names `where` when `one` raises ValueError.
        """
        try:
            return None if texts is None else tuple(map(one, texts))
        except ValueError as error:
            self.refuse(f"is wrong at {where}: {error}")

    def require_absolute(self, where: str, directory: str) -> None:
        """Raise PolicyError that names `where` for a directory without an absolute path."""
        if not directory.startswith("/") or "\0" in directory:
            self.refuse(f"is wrong at {where}: {directory!r} is not an absolute path")

    def refuse(self, why: str) -> NoReturn:
        """Raise PolicyError with what is wrong in the file."""
        raise PolicyError(f"{self.what} {self.path} {why}", hint=self.hint_wrong) from None

    def _read(self) -> bytes:
        """The bytes of a file that only root and this user can write to."""
        path = self.path
        try:
            with open(path, "rb", opener=_open_at_once) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    self.refuse("is not a regular file")
                if why := whose_link(path) or who_writes(status):
                    hint = f"chown root {path}; chmod go-w {path}"
                    raise PolicyError(
                        f"{self.what} {path} {why}: vmplug refuses to use it", hint=hint
                    )
                data = file.read(_BYTES_MAX + 1)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise PolicyError(
                f"{self.what} {path} cannot be read: {reason}", hint=self.hint_unread
            ) from error
        if len(data) > _BYTES_MAX:
            self.refuse(f"is longer than {_BYTES_MAX >> 20} MiB")
        return data

    def _in_words(
        self,
        error: msgspec.ValidationError,
        tables: dict[str, object],
        words: dict[str, list[str]],
    ) -> str:
        """`Object contains unknown field ... - at $.rule[0]`, with the name of that rule."""
        what, _, where = str(error).partition(" - at ")
        where = where.strip("`").removeprefix("$").removeprefix(".") or "the file"
        rows = tables.get(self.named)
        number = where.partition("[")[2].partition("]")[0]
        if where.startswith(f"{self.named}[") and number.isdigit() and isinstance(rows, list):
            row = rows[int(number)]
            name = row.get("name") if isinstance(row, dict) else None
            where += f" ({name!r})" if isinstance(name, str) else ""
        what = what.replace("`", "").replace("Object contains unknown", "unknown")
        if what.startswith("Invalid enum value"):
            key = next((key for key in words if key and f".{key}" in where), "")
            wrong = what.removeprefix("Invalid enum value ")
            what = f"{wrong} is not one of {', '.join(words.get(key, ()))}"
        return f"is wrong at {where}: {what[:1].lower() + what[1:]}"


def _open_at_once(path: str, flags: int) -> int:
    """An opener: what `open` makes no file of, such as a directory, is closed again."""
    return os.open(path, flags | os.O_NONBLOCK)
