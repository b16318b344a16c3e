"""Programs of the host: run one to its end, and return the result."""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from vmplug.errors import AttributeReadError

_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
"""The directory of modprobe and ip; the PATH of a service or user often lacks it."""
_KILLED_TIMEOUT_S = 1.0


class Finished(msgspec.Struct, frozen=True):
    """The result of a program; `status` is None when it did not run, or not to its end."""

    status: int | None
    stdout: str
    complaint: str


def run_program(arguments: Sequence[str], *, timeout_s: float, stdin: str = "") -> Finished:
    """Run a program with that text on its stdin; one that overruns the deadline is killed."""
    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
        )
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


def _environment() -> dict[str, str]:
    path = os.environ.get("PATH", "")
    return {**os.environ, "LC_ALL": "C", "PATH": f"{path}:{_SYSTEM_PATH}".lstrip(":")}


def read_start(path: str, length: int, *, timeout_s: float) -> bytes | None:
    """The first bytes of a device that may never answer; None when it has not within `timeout_s`.

    Another process reads them: the kernel ends nothing that waits for storage, so a thread would
    keep this process. Raises AttributeReadError.
    """
    process = subprocess.Popen(
        ["head", f"--bytes={length}", path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(),
        start_new_session=True,
    )
    try:
        data, complaint = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill(process)
        return None
    if process.returncode:
        raise AttributeReadError(path, why=complaint.decode(errors="replace").strip())
    return data


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill it with its children; do not wait for one that hangs in the kernel."""
    os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_KILLED_TIMEOUT_S)
