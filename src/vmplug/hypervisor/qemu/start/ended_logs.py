"""The last logs of VMs that have ended by themselves, so that somebody can see why.

The VMs that run have a directory each in one directory; beside that, `ended` has one for each of
the last that have ended. Nothing else has to remember them.
"""

import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from vmplug.log import Log

log = Log(__name__)

KEPT_OF_A_NAME = 2
KEPT = 8
CONSOLE_LOG, QEMU_LOG = "console.log", "qemu.log"
_LOGS = {f"{log}{age}" for log in (CONSOLE_LOG, QEMU_LOG) for age in ("", ".1")}
_STAMP = "%Y%m%dT%H%M%S.%fZ"
_DIRECTORY = re.compile(r"([0-9]{8}T[0-9]{6}\.[0-9]{6}Z)-(.+)")


class EndedLogs(msgspec.Struct, frozen=True, kw_only=True):
    """The logs of a VM that has ended by itself.

    `directory` has `console.log` with what the guest printed, and `qemu.log` with QEMU's own
    words: each the end, and its `.1` what came before. `found_at` is when vmplug found the end.
    """

    name: str
    found_at: datetime
    directory: str


def list_ended_logs(state_dir: Path) -> list[EndedLogs]:
    """The logs that are kept, the latest last: two of a name at most, and eight altogether."""
    ended = state_dir / "ended"
    return [
        EndedLogs(
            name=match[2],
            found_at=datetime.strptime(match[1], _STAMP).replace(tzinfo=UTC),
            directory=str(ended / name),
        )
        for name in (sorted(os.listdir(ended)) if ended.is_dir() else [])
        if (match := _DIRECTORY.fullmatch(name))
    ]


def keep_logs(directory: Path, name: str) -> None:
    """Keep the logs of a VM that has ended, and remove the rest of its directory and older logs.

    They move in one step: after a crash of vmplug they are in the one place or in the other. Where
    they cannot be kept, a warning says so: what the VM held must be free again all the same.
    """
    try:
        if directory.is_dir():
            _move(directory, name)
    except OSError as error:
        facts = {"vm": name}
        log.warning("the logs of VM %s cannot be kept: %s", name, error.strerror, extra=facts)


def _move(directory: Path, name: str) -> None:
    state_dir = directory.parent.parent
    (state_dir / "ended").mkdir(mode=0o700, exist_ok=True)
    kept = state_dir / "ended" / f"{datetime.now(UTC).strftime(_STAMP)}-{name}"
    directory.rename(kept)
    for path in kept.iterdir():
        if path.name not in _LOGS:
            path.unlink()
    _remove_older(state_dir)


def _remove_older(state_dir: Path) -> None:
    kept = list[str]()
    for logs in reversed(list_ended_logs(state_dir)):
        if len(kept) < KEPT and kept.count(logs.name) < KEPT_OF_A_NAME:
            kept.append(logs.name)
        else:
            shutil.rmtree(logs.directory, ignore_errors=True)
