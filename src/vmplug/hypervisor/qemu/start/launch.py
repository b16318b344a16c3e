"""Start a QEMU with places to plug into, for users without a VM of their own."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from contextlib import closing, suppress

from vmplug.errors import ConnectError, HypervisorError, SpecError
from vmplug.host.program import PROGRAM_UMASK, program_environment, run_program
from vmplug.hypervisor.keeper import end_keepers, kept_output, read_log
from vmplug.hypervisor.qemu.abilities import has_firmware
from vmplug.hypervisor.qemu.running import NO_AIO, Qemu
from vmplug.hypervisor.qemu.start.cold import ColdQemu
from vmplug.hypervisor.qemu.start.ended_logs import CONSOLE_LOG, QEMU_LOG
from vmplug.hypervisor.qemu.start.machine import (
    BINARY,
    PACKAGE,
    Machine,
    VmSpec,
    command_line,
    has_option,
)
from vmplug.log import Log

log = Log(__name__)

_SOCKET_PATH_MAX = 107
"""Longest path of a unix socket. Source: unix(7), sun_path."""
_QBOOT = "qboot.rom"
OLDEST_QEMU = (7, 2)
"""The oldest tested version. Source: docs/support.md."""
_VERSION_TIMEOUT_S = 10.0
_MOST_LINES = 20
"""Of QEMU's words, in an error. Its last line says why it ends."""


_WAIT_FOR_WORD = 'read -r word && exec "$@" </dev/null'
"""QEMU's process begins as a shell that waits for a line, and ends when we end before that."""


def launch(cold: ColdQemu, record: Callable[[int], None], *, timeout_s: float) -> int:
    """Start the machine with its plugs; returns QEMU's pid once it answers.

    It runs in its directory and outlives this process. `record` gets its pid before QEMU runs, so
    that no QEMU is unknown whenever this process dies. Raises HypervisorError with QEMU's own
    words when it does not start, NoSuchDevice when it opened another file than the one that was
    checked. After any exception no process is left. Where QEMU refuses only the aio=native that
    vmplug chose, as the host has no AIO context left, it is started again with threads.
    """
    try:
        return _launch(cold, record, timeout_s)
    except HypervisorError as error:
        files = cold.use_threads() if NO_AIO in error.message else []
        if not files:
            raise
        vm, count = cold.spec.name, len(files)
        words = "VM %s: vmplug uses aio=threads for %d of its disks"
        log.warning(words, vm, count, extra={"vm": vm})
    cold.qmp_socket.unlink()
    return _launch(cold, record, timeout_s)


def _launch(cold: ColdQemu, record: Callable[[int], None], timeout_s: float) -> int:
    spec, directory = cold.spec, cold.directory
    path = str(cold.qmp_socket)
    _require_program(BINARY[spec.machine])
    with (
        _listening(path) as listener,
        kept_output(directory / QEMU_LOG, path) as output,
        kept_output(directory / CONSOLE_LOG, path) as console,
    ):
        arguments = command_line(spec, listener.fileno(), console)
        arguments += [*_firmware(spec), *cold.arguments(), *spec.extra]
        stands_still = cold.opens_files and not has_option(spec.extra, "S")
        if stands_still:
            arguments.append("-S")
        process = subprocess.Popen(
            ["/bin/sh", "-c", _WAIT_FOR_WORD, "sh", *arguments],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno(), console, *cold.descriptors()],
            start_new_session=True,
            env=program_environment(),
            umask=PROGRAM_UMASK,
        )
    try:
        record(process.pid)
        assert process.stdin
        with suppress(BrokenPipeError), process.stdin as word:
            word.write(b"\n")
        with closing(Qemu.connect(path, timeout_s=timeout_s)) as qemu:
            cold.check_opened(process.pid, qemu)
            if stands_still:
                qemu.resume()
    except BaseException as error:
        process.kill()
        process.wait()
        end_keepers(path)  # they have read all, and the next ones write to the same files
        if not isinstance(error, ConnectError):
            raise
        words = "; ".join(read_log(directory / QEMU_LOG).splitlines()[-_MOST_LINES:])
        raise HypervisorError(
            f"QEMU did not start: {words or error.message}", hint=_advice(BINARY[spec.machine])
        ) from error
    process.returncode = 0  # it is meant to outlive us
    return process.pid


def _require_program(program: str) -> None:
    if shutil.which(program, path=program_environment()["PATH"]) is None:
        raise HypervisorError(
            f"{program} is not installed", hint=f"on Debian: apt install {PACKAGE[program]}"
        )


def _advice(program: str) -> str:
    """The hint for a QEMU that does not start; its version only explains the failure."""
    said = run_program([program, "--version"], timeout_s=_VERSION_TIMEOUT_S).stdout
    version = re.search(r"version (\d+)\.(\d+)", said)
    if version and (int(version[1]), int(version[2])) < OLDEST_QEMU:
        oldest = ".".join(map(str, OLDEST_QEMU))
        return f"{program} is {version[0]}, and vmplug needs {oldest} or later"
    return "vmplug vm start --help lists the options; --accel tcg does not need KVM"


def _firmware(spec: VmSpec) -> list[str]:
    """For a microvm with a kernel, the firmware that does not read the disks.

    SeaBIOS, the default of Debian 13, reads from every disk, and hangs on a vhost-user disk. But
    it boots from a disk, which qboot cannot. Source: measured on QEMU 7.2 and 10.
    """
    is_direct = spec.machine is Machine.MICROVM and spec.kernel is not None
    if is_direct and has_firmware(BINARY[spec.machine], _QBOOT):
        return ["-bios", _QBOOT]
    return []


def _listening(path: str) -> socket.socket:
    """A socket for QEMU to answer QMP on; connecting waits for it from now on.

    Raises SpecError when its path is too long.
    """
    if len(os.fsencode(path)) > _SOCKET_PATH_MAX:
        raise SpecError(
            "--state-dir",
            f"the socket {path} would be longer than {_SOCKET_PATH_MAX} bytes",
            hint="name a shorter directory",
        )
    listener = socket.socket(socket.AF_UNIX)
    os.fchmod(
        listener.fileno(), 0o600
    )  # the mode that bind gives the file. Source: net/unix/af_unix.c
    listener.bind(path)
    listener.listen(1)  # connecting fails when QEMU dies
    return listener
