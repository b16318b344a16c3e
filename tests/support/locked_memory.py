"""A process whose memory nobody can read: it waits for a FUSE server with the lock of that held.

Any user can have one, with a FUSE server of his own. One thread reads a mapped file of the server
through /proc/self/mem, and another one waits to change the mappings, so further readers queue.
Source: Linux mm/memory.c, access_remote_vm, which holds mmap_lock while it waits for a page.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.silent_files import silent_files

_PROGRAM = """
import ctypes, mmap, os, sys, threading, time
mapped = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 4096, prot=mmap.PROT_READ)
with open("/proc/self/maps") as maps:
    (line,) = (line for line in maps if sys.argv[1] in line)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: its /proc/self is its own again
memory, address = os.open("/proc/self/mem", os.O_RDONLY), int(line.split("-")[0], 16)
print("mapped", flush=True)
sys.stdin.readline()
threading.Thread(target=os.pread, args=(memory, 1, address)).start()
while True:
    time.sleep(0.2)
    mmap.mmap(-1, 4096)
"""
_PATIENCE_S = 1.0


@contextmanager
def locked_memory(directory: Path) -> Iterator[int]:
    """A process of another user, whose environment and mappings cannot be read; gives its pid."""
    below, mounted = directory / "locked-below", directory / "locked"
    below.mkdir()
    mounted.mkdir()
    (below / "file").write_bytes(bytes(4096))
    with silent_files(below, mounted) as files:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(mounted / "file")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin
        assert process.stdout
        try:
            assert process.stdout.readline() == b"mapped\n"
            files.stop()
            process.stdin.write(b"\n")
            process.stdin.flush()
            _wait_locked(process.pid)
            yield process.pid
        finally:
            process.kill()
            files.go_on()
            process.communicate()


def _wait_locked(pid: int) -> None:
    """Until a reader of the memory waits."""
    while True:
        reader = subprocess.Popen(["cat", f"/proc/{pid}/environ"], stdout=subprocess.DEVNULL)
        try:
            reader.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            reader.kill()
            reader.wait()
            return
