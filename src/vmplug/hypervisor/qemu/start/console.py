"""The keeper of a VM's console: a small process that reads it from a pipe, and keeps its end.

QEMU writes the guest's console into the pipe. The keeper ends when QEMU does, and needs neither
vmplug nor the journal. When it is killed, QEMU drops the console's output and the guest goes on.
Its environment has its VM, so that every vmplug can find it again. It is a shell and dd(1), with
0.3 MiB of memory each where the programs are shared (Pss). Source: measured on Debian 12.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmplug.host.process import end_processes, find_marked
from vmplug.host.program import PROGRAM_UMASK, program_environment

CONSOLE_LOG = "console.log"
CONSOLE_LOG_BYTES = 1 << 20
"""Of each of the two files; the older one is `console.log.1`."""
CONSOLE_MARK = "VMPLUG_CONSOLE"
"""The environment variable of such a keeper: its VM, by the QMP socket."""
_GRACE_S = 10.0
"""It has read all within milliseconds, unless the host is busy or somebody has stopped it."""

_KEEP = f"""
exec 3<&0
{{
trap '' HUP INT TERM
exec >/dev/null
while :
do
    if dd bs=1 count="$1" of={CONSOLE_LOG}
    then kept=$(wc -c <{CONSOLE_LOG}) || kept=$1
    elif [ "$(dd bs=1 count=4096 | wc -c)" = 4096 ]
    then kept=$1
    else exit
    fi
    [ "$kept" = "$1" ] || exit
    mv -f {CONSOLE_LOG} {CONSOLE_LOG}.1
done
}} <&3 3<&- &
"""
"""One byte at a time, as QEMU writes them, so that the file always has all of them. Where the file
cannot be written, 4 KiB are dropped before the next try: a pipe that nobody empties would hold up
the guest. It ends at the end of the pipe, not by SIGTERM: a VM that was killed may have spoken.
A command in the background would read /dev/null, and is not our child."""


@contextmanager
def console_keeper(
    directory: Path, vm: str, *, bound_bytes: int = CONSOLE_LOG_BYTES
) -> Iterator[int]:
    """Start a keeper that writes below `directory`; gives the descriptor for QEMU to write to.

    It ends when no process has the descriptor any more, so also when there will be no QEMU.
    """
    (directory / CONSOLE_LOG).touch(mode=0o600)
    reading, writing = os.pipe()
    try:
        try:
            subprocess.run(
                ["/bin/sh", "-c", _KEEP, "sh", str(bound_bytes)],
                check=True,
                cwd=directory,
                env=program_environment(**{CONSOLE_MARK: vm}),
                umask=PROGRAM_UMASK,
                stdin=reading,
                stdout=subprocess.PIPE,  # which it closes when it is ready
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            os.close(reading)
        yield writing
    finally:
        os.close(writing)


def end_console_keeper(vm: str) -> None:
    """Wait until the keeper of a VM that has ended has read all; kill one that does not end."""
    found = find_marked(CONSOLE_MARK)
    end_processes([pid for pid, marked in found.items() if marked == vm], _GRACE_S)
