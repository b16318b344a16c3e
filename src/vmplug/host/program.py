"""Programs of the host: run one to its end, and return the result."""

import errno
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Self

import msgspec

from vmplug.errors import AttributeReadError

if TYPE_CHECKING:
    import subprocess

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
    import subprocess  # noqa: PLC0415  3 ms, and `list` only looks

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
    import subprocess  # noqa: PLC0415  3 ms

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
        self._waiting: dict[str, Look] = {}
        self._killed: list[Look] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End those that wait."""
        for look in self._waiting.values():
            self._kill(look)
        self._waiting.clear()

    def _kill(self, look: "Look") -> None:
        look.kill()
        if not look.ends_within(_KILLED_TIMEOUT_S):
            self._killed.append(look)

    def find_silent(self, paths: Collection[str]) -> set[str]:
        """Those of the paths whose storage does not answer; the new ones share one deadline.

        One for which that leaves no time counts as silent.
        """
        self._killed = [look for look in self._killed if not look.ends_within(0)]
        waiting = self._waiting = {p: w for p, w in self._waiting.items() if not w.ends_within(0)}
        new = [path for path in paths if path not in waiting]
        parts = [
            new[first : first + _ASKED_TOGETHER] for first in range(0, len(new), _ASKED_TOGETHER)
        ]
        together = [self._ask(part) for part in parts]
        deadline, slow = time.monotonic() + self._timeout_s / 2, list[str]()
        for part, look in zip(parts, together, strict=True):
            if not look.ends_by(deadline):
                self._kill(look)
                slow += part
        asked = dict[str, Look]()
        deadline = time.monotonic() + self._timeout_s / 2
        for path in slow:
            if time.monotonic() < deadline:
                asked[path] = self._ask([path])
        waiting |= {p: one for p, one in asked.items() if not one.ends_by(deadline)}
        return (waiting.keys() | (set(slow) - asked.keys())) & set(paths)


class Look:
    """A process that ends when the storage of what it looks at has answered. It says nothing.

    Without the module subprocess, which takes a tenth of `list` to import.
    """

    def __init__(self, words: Sequence[str]) -> None:
        null = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
        # What the caller lets programs have, one that hangs would keep open. C libraries refuse to
        # close a number that is above the limit.
        numbers, limit = map(int, os.listdir("/proc/self/fd")), os.sysconf("SC_OPEN_MAX")
        close = [(os.POSIX_SPAWN_CLOSE, number) for number in numbers if 2 < number < limit]
        self.pid = os.posix_spawn(
            _find_program(words[0]),
            list(words),
            program_environment(),
            file_actions=[*null, *close],
            setsid=True,
        )
        self._has_ended = False

    def ends_within(self, timeout_s: float) -> bool:
        """Whether it ends in time; the caller may have waited for it, or ignore SIGCHLD."""
        if not self._has_ended and _ends_within(self.pid, timeout_s):
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self._has_ended = True
        return self._has_ended

    def ends_by(self, deadline: float) -> bool:
        """The same; one to which a busy host gives no CPU has not asked yet."""
        latest = deadline + _BUSY_S
        while not self.ends_within(max(0.0, deadline - time.monotonic())):
            now = time.monotonic()
            if now >= latest or not self._is_runnable():
                return self.ends_within(0)
            deadline = now + _BUSY_STEP_S
        return True

    def _is_runnable(self) -> bool:
        """Whether it runs, or would. Source: proc_pid_stat(5), field 3."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b") ")[2].startswith(b"R")
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            return False

    def kill(self) -> None:
        """Kill it with its children; one that hangs in the kernel does not end yet."""
        import signal  # noqa: PLC0415  0.6 ms, only for one that hangs

        if not self._has_ended:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def _ends_within(pid: int, timeout_s: float) -> bool:
    """Whether a child ends in time. Source: pidfd_open(2)."""
    import select  # noqa: PLC0415  the same as in vmplug.host.process

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:  # others have waited for it
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(descriptor)


def _find_program(name: str) -> str:
    """Its path. Raises FileNotFoundError."""
    for directory in PROGRAM_PATH.split(":"):
        if os.access(path := f"{directory}/{name}", os.X_OK):
            return path
    raise FileNotFoundError(errno.ENOENT, "no such program", name)


Ask = Callable[[Sequence[str]], Look]
"""Starts a process that ends when the storage of all paths has answered."""


def ask_status(paths: Sequence[str]) -> Look:
    """Ask the storage itself, and not the kernel, which remembers a file for a while."""
    return Look(["stat", "--dereference", "--cached=never", "--format=", "--", *paths])


def ask_content(paths: Sequence[str]) -> Look:
    """Ask for the first byte of regular files too: the kernel may remember the rest of a file.

    Nothing else is opened, as it may be a FIFO or a watchdog.
    """
    read = ("-type", "f", "-exec", "head", "--bytes=1", "--", "{}", "+")
    return Look(["find", "-L", *paths, "-maxdepth", "0", *read])


def _start(arguments: Sequence[str], stdin: int) -> "subprocess.Popen[bytes]":
    import subprocess  # noqa: PLC0415  the same

    return subprocess.Popen(
        arguments,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=program_environment(),
        umask=PROGRAM_UMASK,
        start_new_session=True,
    )


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill it with its children; do not wait for one that hangs in the kernel."""
    import signal  # noqa: PLC0415  the same
    import subprocess  # noqa: PLC0415

    os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_KILLED_TIMEOUT_S)
