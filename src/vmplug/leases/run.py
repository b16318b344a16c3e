"""Run a command with leased devices: its signals, its exit status, and the end of its lease."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from vmplug.errors import DeviceError, SpecError
from vmplug.host.kind import DeviceType
from vmplug.hypervisor.qemu.start.foreign import QemuCommand
from vmplug.leases.holder import Passing, ShareEnd
from vmplug.leases.lease import Lease
from vmplug.leases.template import fields_in, named_in, render_command
from vmplug.oci.requests import Request, ShareInfo

QEMU_ARGS = "{qemu-args}"
"""A word of a command that stands for the words of `Lease.qemu_args`."""
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
_FROM_TERMINAL = {signal.SIGINT, signal.SIGQUIT}
"""A terminal sends these to every process in its foreground. Source: termios(3), ISIG."""


def check_command(words: Sequence[str]) -> None:
    """Raise SpecError for a command that does not exist, before anything is leased for it."""
    if not words:
        raise SpecError("lease", "no command is given", hint="write it after --")
    if sum(word.count(QEMU_ARGS) for word in words) > words.count(QEMU_ARGS):
        raise SpecError(QEMU_ARGS, "it stands for many words, and must be a word of its own")
    if words.count(QEMU_ARGS) > 1:
        raise SpecError(QEMU_ARGS, "it is there twice, and a QEMU has each device once")
    if QEMU_ARGS in words:
        QemuCommand.read(words)
    if shutil.which(words[0]) is None:
        raise SpecError(
            words[0], "there is no such program", hint="nothing was leased; write it after --"
        )


def complete_command(lease: Lease, words: Sequence[str]) -> list[str]:
    """The command with the values of its fields, and the words for QEMU.

    Raises as `Lease.qemu_args` and `render_command`.
    """
    added = list[str]()
    if QEMU_ARGS in words:
        said = QemuCommand.read(words)
        added = lease.qemu_args(
            said.machine,
            memory=said.memory,
            shared_memory=said.shared_memory,
            kvm=said.kvm,
            program=said.program,
        )
    rendered = render_command(lease.devices, words)
    return [one for word in rendered for one in (added if word == QEMU_ARGS else [word])]


def passing_for(words: Sequence[str]) -> Passing:
    """The open files that a command with these fields needs. Raises SpecError."""
    fields = fields_in(words)
    if "group_descriptor" in fields:
        return Passing.GROUPS
    return Passing.CDEVS if "descriptor" in fields else Passing.PATHS


def share_end_for(words: Sequence[str], requests: Iterable[Request]) -> ShareEnd:
    """What a command needs of a virtiofsd: its socket where a word names that of a share."""
    of_shares = {name for name, field in named_in(words) if field == "socket"}
    names = {name for r in requests if isinstance(r, ShareInfo) for name in (r.name, r.tag)}
    kinds = {"share", DeviceType.VHOST_USER_FS.word}
    is_named = bool(names) and not of_shares.isdisjoint(names | kinds)
    return ShareEnd.SOCKET if is_named else ShareEnd.CONNECTION


def write_description(path: str, text: str) -> None:
    """Write what a launcher reads, for this user alone. Raises SpecError when that fails."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SpecError(
            f"--describe {path}",
            f"it cannot be written: {error.strerror}",
            hint="the devices are given back; name another file",
        ) from error


def run_command(lease: Lease, words: Sequence[str]) -> int:
    """Run a command as the process of a lease; returns its exit status, 128 + n for a signal n.

    SIGTERM and SIGHUP are passed on to it, and what a terminal sends where no terminal does. Call
    it from the main thread. Raises SpecError for a command that cannot be started.
    """
    with _passing_signals() as pass_to:
        try:
            process = subprocess.Popen([*words], pass_fds=lease.descriptors)
        except OSError as error:
            raise SpecError(
                words[0],
                f"it cannot be started: {os.strerror(error.errno or 0)}",
                hint="the devices are given back",
            ) from error
        pass_to(process.send_signal)
        with suppress(_EndedAtOnce):
            _give(lease, process)
        status = process.wait()
    return status if status >= 0 else 128 - status


class _EndedAtOnce(Exception):
    """The command ended before it was given anything; its status says the rest."""


def _give(lease: Lease, process: "subprocess.Popen[bytes]") -> None:
    try:
        lease.give_to(process.pid)
    except DeviceError:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0)
            raise _EndedAtOnce from None
        process.terminate()  # it must not have what the journal does not say that it has
        process.wait()
        raise


Send = Callable[[int], None]


@contextmanager
def _passing_signals() -> Iterator[Callable[[Send], None]]:
    """Pass signals on to the process that is named inside; those from before it come first."""
    sends, early = list[Send](), list[int]()

    def handle(number: int, _: FrameType | None) -> None:
        if number in _FROM_TERMINAL and _is_in_foreground():
            return
        if sends:
            sends[0](number)
        else:
            early.append(number)

    def pass_to(send: Send) -> None:
        sends.append(send)
        for number in early:
            send(number)

    before = {
        number: signal.signal(number, handle)
        for number in _PASSED_ON
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup(1): the command ignores it too
    }
    try:
        yield pass_to
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_in_foreground() -> bool:
    """Whether a terminal sends its signals to this process, and so to the command too."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
