"""The virtiofsd processes that vmplug runs: one for each shared directory of a VM.

A daemon inherits a listening socket whose name was removed, and serves the one connection that was
made before it started, or the first of a process that has the socket's file open. No other process
can connect, and it ends when QEMU closes the connection.
Its environment has its device's id and its VM, so that every vmplug can find it again. What it
prints is in TMPDIR/vmplug-ID-*/virtiofsd.log until the share is gone.
Source: virtiofsd(1); measured on that of QEMU 7.2, in C, and on 1.13 and 1.14, in Rust.

pathlib, shutil and tempfile are imported where they are used: every attach imports this module,
and few VMs have a share.
"""

import os
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Protocol, Self

import msgspec
from msgspec.structs import replace

from vmplug.drivers.plug import DAEMON_MARK, VirtiofsdSpec
from vmplug.errors import BackendError, CommandError, DeviceError, HypervisorError
from vmplug.host.file_id import file_replaced, pinned, read_open_id
from vmplug.host.process import end_processes, find_marked
from vmplug.host.program import program_environment
from vmplug.host.root import THIS_HOST
from vmplug.host.use.claim import LEASE_PREFIX
from vmplug.log import Log

log = Log(__name__)

_UMASK = 0o022
"""A virtiofsd sets its own to 0, as the guest has its own; this is for one that does not."""
_GRACE_S = 2.0
_SANDBOX_TIMEOUT_S, _SANDBOX_STEP_S = 10.0, 0.005
_SUBMOUNTS, _FUSE_SUBMOUNTS = "--announce-submounts", "-o announce_submounts"
"""The guest sees mounts below as such: else two of its files could have one inode number."""
_READ_ONLY = "--readonly"
_NO_FILE_HANDLES = "--inode-file-handles=never"
"""By their handles a daemon may open all files of the file system, outside of its directory too.
1.14 does so by default, and fails where a directory's name has a space beyond ASCII.
"""
_DIRECTORY = "VMPLUG_DIRECTORY"
"""For people who look at the processes: a mount hides it from the arguments."""
_NO_SANDBOX = ("mount(/, MS_REC|MS_SLAVE)", "CleanMount")
"""Errors of virtiofsd (in C and in Rust) when it cannot make / private or leave it."""
_PIPE_BYTES = 1 << 16
_LOG, _LOGS, _KEEPER = "virtiofsd.log", re.compile(r"vmplug-(.+)-\w+"), ".log"
_MOUNT_POINT = "/sys"
_MOUNT = f'mount -c -o "$0" -- . {_MOUNT_POINT} && cd / && exec "$@"'
"""Its working directory, which is the one that was checked, at a place that every host has, in a
mount namespace of its own: that directory stays, whatever its name leads to by now. Without `-c`,
mount(8) would go back to the name."""


def command_line(daemon: VirtiofsdSpec, descriptor: int | str) -> list[str]:
    """The daemon's arguments, with the options that it supports."""
    if not _is_mounted(daemon):
        return _plain(daemon, descriptor)
    if _is_mounted_read_only(daemon):
        namespace, how = ["--mount"], "bind,ro"  # without mounts below, which would be writable
    else:
        # What the host mounts below it later appears in the share, as without a namespace.
        namespace, how = ["--mount", "--propagation=slave"], "rbind"
    there = replace(daemon, directory=_MOUNT_POINT)
    return ["unshare", *namespace, "sh", "-c", _MOUNT, how, *_plain(there, descriptor)]


def _plain(daemon: VirtiofsdSpec, descriptor: int | str) -> list[str]:
    options = _long_options if "--shared-dir" in daemon.options else _fuse_options
    return [daemon.program, f"--fd={descriptor}", *options(daemon)]


def _is_mounted(daemon: VirtiofsdSpec) -> bool:
    """Whether it shares a private mount of the directory, and not what its name leads to."""
    return daemon.file_id is not None or _is_mounted_read_only(daemon)


def _is_mounted_read_only(daemon: VirtiofsdSpec) -> bool:
    """Whether it can share the directory read-only only by a mount."""
    return daemon.read_only and _READ_ONLY not in daemon.options


def _long_options(daemon: VirtiofsdSpec) -> list[str]:
    """For the one in Rust. Its `-o`, for compatibility with the other, has no escape."""
    wanted = [_SUBMOUNTS, _NO_FILE_HANDLES, *([_READ_ONLY] if daemon.read_only else [])]
    return [
        f"--shared-dir={daemon.directory}",
        f"--cache={daemon.cache}",
        "--sandbox=namespace",
        *(option for option in wanted if option.partition("=")[0] in daemon.options),
    ]


def _fuse_options(daemon: VirtiofsdSpec) -> list[str]:
    """For the one in C. A backslash escapes a comma.

    Source: libfuse lib/fuse_opt.c.
    """
    source = daemon.directory.replace("\\", "\\\\").replace(",", "\\,")
    cache = "none" if daemon.cache == "never" else daemon.cache
    wanted = [f"source={source}", f"cache={cache}", "sandbox=namespace"]
    if _FUSE_SUBMOUNTS in daemon.options:
        wanted.append(_FUSE_SUBMOUNTS.removeprefix("-o "))
    return [word for option in wanted for word in ("-o", option)]


class _Output(msgspec.Struct):
    """What a daemon prints: it stays in a pipe until the daemon is left to itself."""

    reading: int
    device_id: str
    vm: str
    said: bytes = b""

    def tail(self) -> str:
        while _events(self.reading) & select.POLLIN:
            self.said += os.read(self.reading, _PIPE_BYTES)
        return "; ".join(self.said.decode(errors="replace").splitlines()[-3:])

    def has_ended(self) -> bool:
        """Whether no process can print to it any more."""
        return bool(_events(self.reading) & select.POLLHUP)

    def leave(self) -> None:
        """Leave the pipe to a keeper. Without one, output is lost, and the share works as well."""
        try:
            if not self.has_ended():
                self._keep()
        except (OSError, subprocess.CalledProcessError) as error:
            facts = {"device_id": self.device_id}
            log.debug("virtiofsd: %s", error)
            log.warning("what the virtiofsd of %s prints is lost", self.device_id, extra=facts)
        finally:
            os.close(self.reading)

    def _keep(self) -> None:
        from pathlib import Path  # noqa: PLC0415  3 ms
        from tempfile import mkdtemp  # noqa: PLC0415  2 ms

        from vmplug.hypervisor.keeper import start_keeper  # noqa: PLC0415  it has pathlib too

        directory = mkdtemp(prefix=f"vmplug-{self.device_id}-")
        mark = f"{DAEMON_MARK}={_keeper_id(self.device_id)} {self.vm}"
        start_keeper(self.reading, Path(directory, _LOG), mark=mark)


class VirtiofsdProcess(msgspec.Struct):
    """A running daemon, and the connection to it for QEMU; as a context manager closes ours.

    `_output` is None for one whose output nobody has.
    """

    connection: socket.socket
    _output: _Output | None = None

    @property
    def descriptor(self) -> int:
        """The connection's."""
        return self.connection.fileno()

    def stderr_tail(self) -> str:
        """Its error output so far."""
        return self._output.tail() if self._output else ""

    def close(self) -> None:
        """Close our end of it; the daemon keeps serving QEMU."""
        self.connection.close()
        if self._output:
            self._output.leave()
            self._output = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class VirtiofsdRunner(Protocol):
    """The interface to the daemons."""

    def start(self, daemon: VirtiofsdSpec, device_id: str) -> VirtiofsdProcess:
        """Start one; BackendError when that fails, NoSuchDevice for another directory."""

    def find(self, device_ids: Iterable[str] | None = None) -> Mapping[str, int]:
        """Pids by device id: of these devices, or of all."""

    def end(self, device_ids: Iterable[str]) -> None:
        """End those that still run."""


class HostVirtiofsdRunner(VirtiofsdRunner):
    """Daemons of one VM as processes of this host; `vm` is its QMP socket.

    One that `grace_s` after SIGTERM still runs is killed.
    """

    def __init__(self, vm: str, *, grace_s: float = _GRACE_S) -> None:
        self._vm = vm
        self._grace_s = grace_s

    def start(self, daemon: VirtiofsdSpec, device_id: str) -> VirtiofsdProcess:
        """See VirtiofsdRunner. It outlives this process, and is not its child."""
        with _entered(daemon) as directory, _nameless_listener(daemon) as (listener, name):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(f"/proc/self/fd/{name}")
            with _closed_on_error(connection):
                output = self._begin(daemon, listener, device_id, directory)
        started = VirtiofsdProcess(connection, output)
        with _closed_on_error(started):
            self._check_directory(daemon, device_id, lambda: _has_hung_up(connection))
        return started

    def listen(self, daemon: VirtiofsdSpec, device_id: str) -> int:
        """Start one for the first process that connects; a descriptor of its socket (O_PATH).

        A process that has that open connects to /proc/self/fd/N. Raises as `start`. The daemon in
        C enters its directory only then, so what it says of that comes later.
        """
        with _entered(daemon) as directory, _nameless_listener(daemon) as (listener, name):
            output = self._begin(daemon, listener, device_id, directory)
            try:
                if "--shared-dir" in daemon.options:
                    self._check_directory(daemon, device_id, output.has_ended)
                if output.has_ended():
                    raise _cannot_start(daemon, output.tail())
                return os.dup(name)
            finally:
                output.leave()

    def _begin(
        self, daemon: VirtiofsdSpec, listener: socket.socket, device_id: str, directory: str
    ) -> _Output:
        reading, writing = os.pipe()
        output = _Output(reading, device_id, self._vm)
        try:
            self._run(daemon, listener, device_id, directory, writing)
        except (OSError, subprocess.CalledProcessError) as error:
            why = output.tail() or error
            output.leave()
            raise _cannot_start(daemon, why) from error
        return output

    def _run(
        self,
        daemon: VirtiofsdSpec,
        listener: socket.socket,
        device_id: str,
        directory: str,
        output: int,
    ) -> None:
        marks = {DAEMON_MARK: f"{device_id} {self._vm}", _DIRECTORY: daemon.directory}
        try:
            subprocess.run(
                ["setsid", "--fork", *command_line(daemon, listener.fileno())],
                check=True,
                cwd=directory,
                env=program_environment(**marks),
                umask=_UMASK,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # setsid(1) leaves our session a moment later
            )
        finally:
            os.close(output)

    def _check_directory(
        self, daemon: VirtiofsdSpec, device_id: str, has_ended: Callable[[], bool]
    ) -> None:
        """Wait until it has confined itself to the directory that was checked; else end it.

        One that has died reports the reason itself.
        """
        try:
            self._wait_confined(daemon, device_id, has_ended)
        except DeviceError:
            self.end([device_id])
            raise

    def _wait_confined(
        self, daemon: VirtiofsdSpec, device_id: str, has_ended: Callable[[], bool]
    ) -> None:
        checked, outside = daemon.file_id, read_open_id("/")
        deadline = time.monotonic() + _SANDBOX_TIMEOUT_S
        while checked and not has_ended():
            pids = self.processes([device_id]).get(device_id, [])
            roots = {read_open_id(f"/proc/{pid}/root") for pid in pids}
            if checked in roots:
                return
            if roots - {outside, None}:
                raise file_replaced(daemon.directory, THIS_HOST)
            if time.monotonic() > deadline:
                raise BackendError(
                    daemon.program,
                    f"{daemon.program} did not confine itself to {daemon.directory} within "
                    f"{_SANDBOX_TIMEOUT_S:g} s",
                    hint="the VM is unchanged; try again",
                )
            time.sleep(_SANDBOX_STEP_S)  # there is no event for a new root of a process

    def find(self, device_ids: Iterable[str] | None = None) -> Mapping[str, int]:
        """See VirtiofsdRunner."""
        found = self.processes(device_ids)
        return {i: pids[0] for i, pids in found.items() if not i.endswith(_KEEPER)}

    def end(self, device_ids: Iterable[str]) -> None:
        """See VirtiofsdRunner: QEMU has disconnected, and most have ended by themselves."""
        wanted = list(device_ids)
        found = self.processes([*wanted, *map(_keeper_id, wanted)]).values()
        end_processes([pid for pids in found for pid in pids], self._grace_s)
        _remove_logs(wanted)

    def processes(self, device_ids: Iterable[str] | None) -> dict[str, list[int]]:
        """By device id, the processes of a daemon: its sandbox is a child of the first.

        One that is just being executed has no environment for a moment, and is not found. It ends
        when its connection does.
        """
        wanted = None if device_ids is None else set(device_ids)
        found: dict[str, list[int]] = {}
        for pid, mark in sorted(find_marked(DAEMON_MARK).items()):
            device_id, _, vm = mark.partition(" ")
            is_ours = vm == self._vm
            if wanted is not None:  # what a VM has taken over is still marked with its lease
                is_ours = device_id in wanted and (is_ours or vm.startswith(LEASE_PREFIX))
            if is_ours:
                found.setdefault(device_id, []).append(pid)
        return found


def _cannot_start(daemon: VirtiofsdSpec, why: object) -> BackendError:
    return BackendError(
        daemon.program,
        f"{daemon.program} cannot be started on {daemon.directory}: {why}",
        hint="check that the directory exists and that this user may enter it",
    )


@contextmanager
def _closed_on_error(opened: "socket.socket | VirtiofsdProcess") -> Iterator[None]:
    try:
        yield
    except BaseException:
        opened.close()
        raise


def daemon_failed(daemon: VirtiofsdSpec, error: HypervisorError, said: str) -> BackendError:
    """The error for a share that was refused, with what its daemon has said."""
    words = f"; {daemon.program} reports: {said}" if said else ""
    hint = error.hint if isinstance(error, CommandError) else None
    if any(piece in said for piece in _NO_SANDBOX):
        hint = (
            "where vmplug runs, / must be a mount point: mount --bind it on itself before chroot"
        )
    return BackendError(
        daemon.program,
        f"{daemon.directory} cannot be shared: {error}{words}",
        hint=hint
        or "the VM is unchanged; try again, or share it as virtio-9p when you start the VM",
    )


def _events(reading: int) -> int:
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    return next((events for _, events in poll.poll(0)), 0)


def _keeper_id(device_id: str) -> str:
    """What the keeper of a daemon's output is marked with, in place of the device's id."""
    return device_id + _KEEPER


def _remove_logs(device_ids: Collection[str]) -> None:
    """Remove what is left of the output of daemons of this user."""
    from shutil import rmtree  # noqa: PLC0415  1 ms
    from tempfile import gettempdir  # noqa: PLC0415  2 ms

    try:
        entries = os.scandir(gettempdir())
    except OSError as error:  # all of them are full, say: the share has gone without this
        log.debug("virtiofsd: %s", error)
        return
    with entries as found:
        for entry in found:
            named = _LOGS.fullmatch(entry.name)
            if named and named[1] in device_ids and _is_of_this_user(entry):
                rmtree(entry.path, ignore_errors=True)


def _is_of_this_user(entry: "os.DirEntry[str]") -> bool:
    """False also for one that another vmplug, which ended the same daemon, has just removed."""
    try:
        return entry.stat(follow_symlinks=False).st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _has_hung_up(connection: socket.socket) -> bool:
    """Whether the peer of a connection, on which no data was sent yet, is gone."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@contextmanager
def _entered(daemon: VirtiofsdSpec) -> Iterator[str]:
    """Where it starts: in the directory that was checked if it is mounted from there, else in /.

    The path is one that nobody can turn. NoSuchDevice when another directory is there by now.
    """
    if not _is_mounted(daemon):
        yield "/"
        return
    if daemon.file_id is None:
        yield daemon.directory
        return
    with pinned(daemon.directory, daemon.file_id) as descriptor:
        yield f"/proc/self/fd/{descriptor}"


@contextmanager
def _nameless_listener(daemon: VirtiofsdSpec) -> Iterator[tuple[socket.socket, int]]:
    """A listening socket, and a descriptor of its file, whose name was never visible to others.

    A process of any user that has the descriptor may connect.
    """
    from tempfile import TemporaryDirectory  # noqa: PLC0415  2 ms

    try:
        private = TemporaryDirectory(prefix="vmplug-")
    except OSError as error:
        raise BackendError(
            daemon.program,
            f"{daemon.program} cannot be started on {daemon.directory}: {error.strerror}",
            hint="virtiofsd needs a temporary directory: set TMPDIR to one",
        ) from error
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        with private as directory:
            path = f"{directory}/s"
            listener.bind(path)
            os.chmod(path, 0o666)  # noqa: S103  it has no name soon
            listener.listen(1)
            name = os.open(path, os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, name)
        yield listener, name
