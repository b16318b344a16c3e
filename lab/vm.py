"""Run one command in the lab VM: start QEMU, pass its output on, end it in time."""

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from lab.command_line import Machine, command_line, make_disks
from lab.initrd import pack_initrd
from lab.kernel import BUILT, LabError, Version, find_kernel, first_built
from lab.topology import LAB_ADDRESS, NETWORK

RESULTS = BUILT / "results"
POLL_S = 0.05
TAIL_LINES = 40

ENVIRONMENT = {
    "HOME": "/root",
    "TERM": "dumb",
    "LAB_VM": "1",
    "TMPDIR": "/run/lab/tmp",
    "PYTEST_ADDOPTS": "-p no:cacheprovider -p no:hypothesispytest",
}
"""Without the plug-in of hypothesis, pytest starts ten seconds earlier on the emulated CPU."""
PASSED_ON = ("PATH", "LANG", "CI")
"""Variables that the command has from this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """How to run the lab VM.

    The command may write to the directories `shares`, at the same paths; whatever else it writes
    is thrown away. The IOMMU remaps interrupts unless `remapping` is False. `verbose` shows QEMU's
    command line and all that the kernel says.
    """

    version: Version = field(default_factory=first_built)
    shares: tuple[Path, ...] = (RESULTS,)
    timeout_s: float = 300.0
    remapping: bool = True
    verbose: bool = False


def run(lab: Lab, command: Sequence[str]) -> int:
    """Runs a command as root in the current directory; its exit status, 128 + N for a signal N.

    Its output goes to stdout, from both its streams. Raises LabError when the lab itself failed.
    """
    kernel = find_kernel(lab.version)
    for share in lab.shares:
        share.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="vmplug-lab-") as directory, _socket_pair() as monitor:
        machine = Machine(
            kernel=kernel,
            directory=Path(directory),
            shares=lab.shares,
            monitor=monitor,
            remapping=lab.remapping,
        )
        make_disks(machine.directory)
        initrd = pack_initrd(kernel, settings=_settings(machine), command=_script(command))
        (machine.directory / "initrd").write_bytes(initrd)
        _boot(lab, machine)
        return _read_status(machine.directory)


@contextmanager
def _socket_pair() -> Iterator[tuple[int, int]]:
    ends = socket.socketpair()
    with ends[0], ends[1]:
        yield ends[0].fileno(), ends[1].fileno()


def _settings(machine: Machine) -> str:
    shares = {f"share{number}": str(share) for number, share in enumerate(machine.shares)}
    return _assignments(
        {
            "modules": str(machine.kernel.modules),
            "network": NETWORK,
            "address": LAB_ADDRESS,
            **shares,
        }
    )


def _script(command: Sequence[str]) -> str:
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment = _assignments({**passed_on, **ENVIRONMENT}, prefix="export ")
    directory = shlex.quote(str(Path.cwd()))
    return f"{environment}cd {directory} || exit\nexec {shlex.join(command)}\n"


def _assignments(values: Mapping[str, str], prefix: str = "") -> str:
    return "".join(f"{prefix}{name}={shlex.quote(text)}\n" for name, text in values.items())


def _boot(lab: Lab, machine: Machine) -> None:
    """Runs QEMU to its end. Raises LabError when it does not end in time, or ends badly."""
    arguments = command_line(machine)
    if lab.verbose:
        print(f"lab: {shlex.join(arguments)}", file=sys.stderr)
    stderr, console = machine.directory / "stderr", machine.directory / "console"
    sources = {machine.directory / "output": sys.stdout.buffer}
    if lab.verbose:
        sources[console] = sys.stderr.buffer
    with _running(arguments, stderr, machine.monitor) as qemu:
        _pass_on(qemu, sources, time.monotonic() + lab.timeout_s)
        status = qemu.poll()
    if status is None:
        raise LabError(f"the command did not end within {lab.timeout_s:g} s{_tail(console)}")
    if status != 0:
        raise LabError(f"QEMU ended with status {status}{_tail(stderr)}")


@contextmanager
def _running(
    arguments: Sequence[str], stderr: Path, fds: Iterable[int]
) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU, which ends when this is left, and also when this process is killed."""
    with stderr.open("wb") as log:
        qemu = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=tuple(fds),
        )
    try:
        yield qemu
    finally:
        qemu.kill()  # does nothing once it has been waited for
        qemu.wait()


def _pass_on(
    qemu: subprocess.Popen[bytes], sources: Mapping[Path, BinaryIO], deadline: float
) -> None:
    """Copies what the files get until QEMU ends or the time is over, and then what is left."""
    with ExitStack() as opened:
        files = []
        for path, target in sources.items():
            path.touch()  # QEMU may not have made it yet
            files.append((opened.enter_context(path.open("rb")), target))
        is_over = False
        while not is_over:
            is_over = _has_ended(qemu) or time.monotonic() > deadline
            for file, target in files:
                target.write(file.read())
                target.flush()


def _has_ended(qemu: subprocess.Popen[bytes]) -> bool:
    try:
        qemu.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _read_status(directory: Path) -> int:
    """The exit status of the command, as the lab wrote it. Raises LabError when it wrote none."""
    status = (directory / "status").read_text(errors="replace").strip()
    if not status.isdecimal():
        raise LabError(f"the VM ended before the command did{_tail(directory / 'console')}")
    return int(status)


def _tail(log: Path) -> str:
    """The last lines of a file, to stand behind a sentence; nothing when it has none."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "".join(
        ["; it said last:" if lines else "", *(f"\n    {x}" for x in lines[-TAIL_LINES:])]
    )
