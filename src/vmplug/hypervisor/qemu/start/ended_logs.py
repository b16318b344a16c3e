"""The last logs of VMs that have ended by themselves, so that somebody can see why.

The VMs that run have a directory each in one directory; beside that, `ended` has one for each of
the last that have ended. Nothing else has to remember them.
"""

import logging
import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from vmplug.hypervisor.qemu.start.console import CONSOLE_LOG

log = logging.getLogger(__name__)

KEPT_OF_A_NAME = 2
KEPT = 8
QEMU_LOG = "qemu.log"
_QEMU_LOG_BYTES = 1 << 20
_LOGS = {CONSOLE_LOG, f"{CONSOLE_LOG}.1", QEMU_LOG}
_STAMP = "%Y%m%dT%H%M%S.%fZ"
_DIRECTORY = re.compile(r"([0-9]{8}T[0-9]{6}\.[0-9]{6}Z)-(.+)")


class EndedLogs(msgspec.Struct, frozen=True, kw_only=True):
    """The logs of a VM that has ended by itself.

    `directory` has `console.log` with what the guest printed, `console.log.1` with what it printed
    before, and QEMU's own `qemu.log`. `found_at` is when vmplug found the end.
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
        log.warning("the logs in %s cannot be kept: %s", directory, error.strerror)


def _move(directory: Path, name: str) -> None:
    state_dir = directory.parent.parent
    (state_dir / "ended").mkdir(mode=0o700, exist_ok=True)
    kept = state_dir / "ended" / f"{datetime.now(UTC).strftime(_STAMP)}-{name}"
    directory.rename(kept)
    for path in kept.iterdir():
        if path.name not in _LOGS:
            path.unlink()
    _keep_end(kept / QEMU_LOG)
    _remove_older(state_dir)


def _keep_end(path: Path) -> None:
    """Only the end of QEMU's own log: the console's are bounded already."""
    if path.exists() and path.stat().st_size > _QEMU_LOG_BYTES:
        with path.open("rb") as file:
            file.seek(-_QEMU_LOG_BYTES, os.SEEK_END)
            end = file.read()
        path.write_bytes(end)


def _remove_older(state_dir: Path) -> None:
    kept = list[str]()
    for logs in reversed(list_ended_logs(state_dir)):
        if len(kept) < KEPT and kept.count(logs.name) < KEPT_OF_A_NAME:
            kept.append(logs.name)
        else:
            shutil.rmtree(logs.directory, ignore_errors=True)
