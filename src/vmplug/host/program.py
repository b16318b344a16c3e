"""Programs of the host: run one to its end, and return the result."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Self

import msgspec

from vmplug.errors import AttributeReadError

PROGRAM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where every program is found: never by the PATH of the caller, who may not be root."""
PROGRAM_UMASK = 0o077
"""Files that a program creates are for its user alone, whatever the caller's umask."""
_KILLED_TIMEOUT_S = 1.0
_ASKED_TOGETHER = 256
"""Paths that one process is asked for: all words of a program have 2 MiB, and a path may be 4 KiB.
Source: execve(2)."""
LOOK_TIMEOUT_S = 4.0
"""For the storage of files that a VM has: a busy one takes long, and one that is gone forever."""
_BUSY_S, _BUSY_STEP_S = 30.0, 0.05
"""How much longer a check may take while it has no CPU, which says nothing about the storage."""


class Finished(msgspec.Struct, frozen=True):
    """The result of a program; `status` is None when it did not run, or not to its end."""

    status: int | None
    stdout: str
    complaint: str


def program_environment(**more: str) -> dict[str, str]:
    """All of the environment of a program: none of the caller's variables changes what it does."""
    return {"PATH": PROGRAM_PATH, "LC_ALL": "C", **more}


def run_program(arguments: Sequence[str], *, timeout_s: float, stdin: str = "") -> Finished:
    """Run a program with that text on its stdin; one that overruns the deadline is killed."""
    try:
        process = _start(arguments, subprocess.PIPE if stdin else subprocess.DEVNULL)
    except FileNotFoundError:
        return Finished(None, "", f"the program {arguments[0]} is not installed")
    except OSError as error:
        return Finished(None, "", f"{arguments[0]} cannot be run: {error.strerror}")
    try:
        stdout, stderr = process.communicate(stdin.encode(), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill(process)
        return Finished(None, "", f"{arguments[0]} did not end within {timeout_s:g} s")
    said = "; ".join(stderr.decode(errors="replace").split("\n")[:3]).strip("; ")
    complaint = said or f"{arguments[0]} ended with status {process.returncode}"
    return Finished(process.returncode, stdout.decode(errors="replace"), complaint)


def read_start(path: str, length: int, *, timeout_s: float) -> bytes | None:
    """The first bytes of a device that may never answer; None when it has not within `timeout_s`.

    Another process reads them: the kernel ends nothing that waits for storage, so a thread would
    keep this process. Raises AttributeReadError.
    """
    process = _start(["head", f"--bytes={length}", path], subprocess.DEVNULL)
    try:
        data, complaint = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill(process)
        return None
    if process.returncode:
        raise AttributeReadError(path, why=complaint.decode(errors="replace").strip())
    return data


class Looks:
    """Looks at paths whose storage may not answer, each in a process that can wait instead of us.

    A process that waits is kept: until it ends, its path does not answer, and nobody waits for it
    a second time. A context manager, which ends those that wait.
    """

    def __init__(self, timeout_s: float = LOOK_TIMEOUT_S, ask: "Ask | None" = None) -> None:
        self._timeout_s = timeout_s
        self._ask = ask or ask_status
        self._waiting: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End those that wait."""
        for process in self._waiting.values():
            _kill(process)
        self._waiting.clear()

    def find_silent(self, paths: Collection[str]) -> set[str]:
        """Those of the paths whose storage does not answer; the new ones share one deadline.

        One for which that leaves no time counts as silent.
        """
        waiting = self._waiting = {p: w for p, w in self._waiting.items() if w.poll() is None}
        new = [path for path in paths if path not in waiting]
        parts = [
            new[first : first + _ASKED_TOGETHER] for first in range(0, len(new), _ASKED_TOGETHER)
        ]
        together = [self._ask(part) for part in parts]
        deadline, slow = time.monotonic() + self._timeout_s / 2, list[str]()
        for part, asking in zip(parts, together, strict=True):
            if not _ends(asking, deadline):
                _kill(asking)
                slow += part
        asked = dict[str, subprocess.Popen[bytes]]()
        deadline = time.monotonic() + self._timeout_s / 2
        for path in slow:
            if time.monotonic() < deadline:
                asked[path] = self._ask([path])
        waiting |= {p: one for p, one in asked.items() if not _ends(one, deadline)}
        return (waiting.keys() | (set(slow) - asked.keys())) & set(paths)


Ask = Callable[[Sequence[str]], "subprocess.Popen[bytes]"]
"""Starts a process that ends when the storage of all paths has answered."""


def ask_status(paths: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Ask the storage itself, and not the kernel, which remembers a file for a while."""
    words = ["stat", "--dereference", "--cached=never", "--format=", "--", *paths]
    return _start(words, subprocess.DEVNULL, subprocess.DEVNULL)


def ask_content(paths: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Ask for the first byte of regular files too: the kernel may remember the rest of a file.

    Nothing else is opened, as it may be a FIFO or a watchdog.
    """
    read = ("-type", "f", "-exec", "head", "--bytes=1", "--", "{}", "+")
    words = ["find", "-L", *paths, "-maxdepth", "0", *read]
    return _start(words, subprocess.DEVNULL, subprocess.DEVNULL)


def _ends(process: "subprocess.Popen[bytes]", deadline: float) -> bool:
    """Whether it ends in time; one to which a busy host gives no CPU has not asked yet."""
    latest = deadline + _BUSY_S
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        now = time.monotonic()
        if process.returncode is not None or now >= latest or not _is_runnable(process):
            return process.returncode is not None
        deadline = now + _BUSY_STEP_S


def _is_runnable(child: "subprocess.Popen[bytes]") -> bool:
    """Whether it runs, or would. Source: proc_pid_stat(5), field 3."""
    with open(f"/proc/{child.pid}/stat", "rb") as file:
        return file.read().rpartition(b") ")[2].startswith(b"R")


def _start(
    arguments: Sequence[str], stdin: int, output: int = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        arguments,
        stdin=stdin,
        stdout=output,
        stderr=output,
        env=program_environment(),
        umask=PROGRAM_UMASK,
        start_new_session=True,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill it with its children; do not wait for one that hangs in the kernel."""
    os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_KILLED_TIMEOUT_S)
