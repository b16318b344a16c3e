"""`vmplug`: arguments in; stdout, stderr and exit status out.

A verb runs in the process of the tests, as starting one costs ten times what most verbs do. The
installed program runs where the process itself is the matter: `as_process` to the end of it,
`begin` beside the test. tests/cli/test_runners.py holds both to the same answers.
"""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Self

from tests.cli.here import answered_here
from tests.cli.result import Result
from vmplug.host.program import PROGRAM_PATH

__all__ = [
    "PROGRAMS",
    "VMPLUG",
    "Result",
    "Vmplug",
    "config",
    "device",
    "ended",
    "first_in_path",
    "number_of",
    "write_bundle",
]

VMPLUG = Path(sys.executable).with_name("vmplug")
TIMEOUT_S = 300.0
PROGRAMS = "PROGRAMS_OF_THIS_TEST"
"""In `env`: the directories in which vmplug finds programs, which no user can choose."""
_WITH_PROGRAMS = """
import sys
import vmplug.host.program as program
program.PROGRAM_PATH = sys.argv.pop(1)
from vmplug.cli.main import run
run()
"""


@dataclass(frozen=True, slots=True)
class Vmplug:
    """`vmplug` with a journal of its own below `state_dir`."""

    state_dir: Path

    @property
    def environment(self) -> dict[str, str]:
        """The caller's, without anything that changes how output looks."""
        return {**_kept(), "VMPLUG_STATE_DIR": str(self.state_dir)}

    def __call__(
        self, *arguments: str | Path, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> Result:
        """Run to the end, here if that may be.

        `vm start` is run as a process: its QEMU outlives it, and would be a child of the tests.
        """
        run = self.as_process if arguments[:2] == ("vm", "start") else self.here
        return run(*arguments, stdin=stdin, env=env)

    def here(
        self, *arguments: str | Path, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> Result:
        """Run to the end in this process, what starts no QEMU."""
        return answered_here(arguments, stdin, {**self.environment, **(env or {})})

    def as_process(
        self, *arguments: str | Path, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> Result:
        """Run the installed program to its end."""
        done = subprocess.run(
            [*_program(env), *arguments],
            input=stdin.encode(),
            capture_output=True,
            env={**self.environment, **(env or {})},
            timeout=TIMEOUT_S,
            check=False,
        )
        return Result(done.stdout.decode(), done.stderr.decode(), done.returncode)

    def begin(
        self, *arguments: str | Path, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a run that `ended` waits for, or that the test kills."""
        with tempfile.TemporaryFile() as file:
            file.write(stdin.encode())
            file.seek(0)
            return subprocess.Popen(
                [*_program(env), *arguments],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**self.environment, **(env or {})},
            )

    def at_terminal(
        self, *arguments: str | Path, columns: int = 100, env: Mapping[str, str] | None = None
    ) -> Result:
        """Run here with stdout at a terminal of that width, whose line ends come back as "\\n"."""
        with _Terminal(columns) as terminal:
            environment = self._at_terminal(env)
            done = answered_here(arguments, "", environment, terminal=terminal.descriptor)
        return replace(done, stdout=terminal.shown)

    def at_terminal_as_process(
        self, *arguments: str | Path, columns: int = 100, env: Mapping[str, str] | None = None
    ) -> Result:
        """The same of the installed program."""
        with _Terminal(columns) as terminal:
            done = subprocess.run(
                [VMPLUG, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=terminal.descriptor,
                stderr=subprocess.PIPE,
                env=self._at_terminal(env),
                timeout=TIMEOUT_S,
                check=False,
            )
        return Result(terminal.shown, done.stderr.decode(), done.returncode)

    def _at_terminal(self, env: Mapping[str, str] | None) -> dict[str, str]:
        return {**self.environment, "TERM": "xterm-256color", **(env or {})}


@cache
def _kept() -> dict[str, str]:
    looks = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM", "VMPLUG_DEBUG"}
    kept = {key: value for key, value in os.environ.items() if key not in looks}
    kept.pop("PYTEST_CURRENT_TEST", None)  # is another for the next test
    return {**kept, "PATH": f"{VMPLUG.parent}:{os.environ['PATH']}"}


class _Terminal:
    """A terminal of that width; `shown` is all that came, once it is closed.

    A thread reads it meanwhile, as it holds a few kilobytes only.
    """

    def __init__(self, columns: int) -> None:
        self._main, self.descriptor = pty.openpty()
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        self._reader = Thread(target=self._read, daemon=True)
        self._pieces = list[bytes]()

    @property
    def shown(self) -> str:
        """With "\\n" for its line ends."""
        return b"".join(self._pieces).decode().replace("\r\n", "\n")

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.descriptor)
        self._reader.join(TIMEOUT_S)
        assert not self._reader.is_alive(), "something still has the terminal open"
        os.close(self._main)

    def _read(self) -> None:
        """Everything until the last writer has gone, which Linux tells as EIO. Source: pty(7)."""
        with suppress(OSError):
            while piece := os.read(self._main, 1 << 16):
                self._pieces.append(piece)


def first_in_path(directory: Path) -> dict[str, str]:
    """For `env`: programs in this directory stand in for the real ones."""
    return {PROGRAMS: f"{directory}:{PROGRAM_PATH}"}


def _program(env: Mapping[str, str] | None) -> list[str]:
    """The installed program, or the same with other directories for programs."""
    path = (env or {}).get(PROGRAMS)
    return [sys.executable, "-c", _WITH_PROGRAMS, path] if path else [str(VMPLUG)]


def ended(process: subprocess.Popen[bytes]) -> Result:
    """Wait for a process that `begin` started."""
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    return Result(stdout.decode(), stderr.decode(), process.returncode)


def device(path: str, number: str, kind: str = "b", **more: object) -> dict[str, object]:
    """One entry of `linux.devices`."""
    major, minor = map(int, number.split(":"))
    return {"path": path, "type": kind, "major": major, "minor": minor, **more}


def config(
    *devices: Mapping[str, object],
    mounts: list[Mapping[str, object]] | None = None,
    rules: list[Mapping[str, object]] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> str:
    """A config.json that asks for these devices."""
    linux = {"devices": list(devices), "resources": {"devices": rules or []}}
    parts = {"mounts": mounts or [], "linux": linux, "annotations": annotations or {}}
    return json.dumps({"ociVersion": "1.0.2", **parts})


def write_bundle(
    directory: Path,
    *devices: Mapping[str, object],
    mounts: list[Mapping[str, object]] | None = None,
    rules: list[Mapping[str, object]] | None = None,
) -> Path:
    """A bundle directory with that config.json."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(config(*devices, mounts=mounts, rules=rules))
    return directory


def number_of(node: Path) -> str:
    """`7:0` for /dev/loop0, as sysfs says."""
    return Path(f"/sys/class/block/{node.name}/dev").read_text().strip()
