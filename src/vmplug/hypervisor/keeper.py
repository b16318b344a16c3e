"""Keepers: they bound what is printed by programs that outlive vmplug.

QEMU, its guest's console and a virtiofsd print into a pipe each. A keeper reads that, and keeps
the end. It ends when the last process that can print does, and needs neither vmplug nor the
journal. When it is killed, the output is dropped and the program goes on: these ignore SIGPIPE.
Its environment has a mark, so that every vmplug can find it again. It is a shell and dd(1), with
0.3 MiB of memory each where the programs are shared (Pss). Source: measured on Debian 12.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmplug.host.process import end_processes, find_marked
from vmplug.host.program import PROGRAM_UMASK, program_environment

LOG_BYTES = 1 << 20
"""Of each of the two files of a log; the older one has `.1` behind its name."""
KEEPER_MARK = "VMPLUG_KEEPER"
"""The environment variable of a keeper of a VM that vmplug started: the VM, by its QMP socket."""
_GRACE_S = 10.0
"""It has read all within milliseconds, unless the host is busy or somebody has stopped it."""

_KEEP = """
exec 3<&0
{
trap '' HUP INT TERM
exec >/dev/null
while :
do
    if dd bs=1 count="$2" of="$1"
    then kept=$(wc -c <"$1") || kept=$2
    elif [ "$(dd bs=1 count=4096 | wc -c)" = 4096 ]
    then kept=$2
    else exit
    fi
    [ "$kept" = "$2" ] || exit
    mv -f "$1" "$1.1"
done
} <&3 3<&- &
"""
"""One byte at a time, as QEMU writes them, so that the file always has all of them. Where the file
cannot be written, 4 KiB are dropped before the next try: a pipe that nobody empties would hold up
the guest. It ends at the end of the pipe, not by SIGTERM: a VM that was killed may have spoken.
A command in the background would read /dev/null, and is not our child."""


def start_keeper(reading: int, log: Path, *, mark: str, bound_bytes: int = LOG_BYTES) -> None:
    """Keep what comes out of a pipe in `log`; the caller closes its own end. `mark` is NAME=VALUE.

    Raises OSError and CalledProcessError.
    """
    log.touch(mode=0o600)
    name, _, value = mark.partition("=")
    subprocess.run(
        ["/bin/sh", "-c", _KEEP, "sh", log.name, str(bound_bytes)],
        check=True,
        cwd=log.parent,
        env=program_environment(**{name: value}),
        umask=PROGRAM_UMASK,
        stdin=reading,
        stdout=subprocess.PIPE,  # which it closes when it is ready
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@contextmanager
def kept_output(log: Path, vm: str, *, bound_bytes: int = LOG_BYTES) -> Iterator[int]:
    """Start the keeper of a log of a VM; gives the descriptor for QEMU to print to.

    It ends when no process has the descriptor any more, so also when there will be no QEMU.
    """
    reading, writing = os.pipe()
    try:
        try:
            start_keeper(reading, log, mark=f"{KEEPER_MARK}={vm}", bound_bytes=bound_bytes)
        finally:
            os.close(reading)
        yield writing
    finally:
        os.close(writing)


def read_log(log: Path) -> str:
    """What a keeper has kept."""
    files = (log.with_name(f"{log.name}.1"), log)
    return "".join(f.read_text(errors="replace") for f in files if f.exists())


def end_keepers(vm: str) -> None:
    """Wait until the keepers of a VM that has ended have read all; kill one that does not end."""
    found = find_marked(KEEPER_MARK)
    end_processes([pid for pid, marked in found.items() if marked == vm], _GRACE_S)
