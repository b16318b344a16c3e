"""Daemons at the other end of vhost-user devices: started ready to serve, and surely ended.

Each is a process of its own with a socket at a short path, as paths of sockets may have 107 bytes
only. That it is ready is read from what it prints; nobody connects to find out, for some serve
one client only. What it prints is shown with a failing test.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vmplug.host.vhost_user.virtiofsd import VIRTIOFSD_PROGRAMS, ask_options

QEMU_STORAGE_DAEMON = Path("/usr/bin/qemu-storage-daemon")
"""In the Debian package qemu-system-common."""

VIRTIOFSD = next(
    (path for path in map(Path, VIRTIOFSD_PROGRAMS) if path.exists()), Path(VIRTIOFSD_PROGRAMS[0])
)
"""In the Debian package virtiofsd, for QEMU 7.2 in qemu-system-common: which the host has."""

TESTPMD = Path("/usr/bin/dpdk-testpmd")
"""In the Debian package dpdk-dev."""

PROJECT = Path(__file__).parents[2]
START_TIMEOUT_S = END_TIMEOUT_S = 60.0


class Daemon:
    """A running daemon that serves `socket_path`; made by the functions below."""

    def __init__(
        self,
        socket_path: Path,
        command: Sequence[str],
        *,
        ready: str,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.socket_path = socket_path
        self._command = command
        self._ready = ready
        self._pass_fds = pass_fds
        self._process, self._output = self._start()

    @property
    def pid(self) -> int:
        """Its process, another one after `restart`."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """What it has printed since it was last started."""
        return self._output.text

    def kill(self) -> None:
        """Ends it as a crash would, also when it is stopped; the socket's file stays.

        Nothing when it has ended. Sooner than SIGTERM, which virtiofsd may not notice.
        """
        self._process.kill()
        self.wait_ended()

    def wait_ended(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """Waits until it has ended by itself; its exit status, minus the signal's number."""
        status = self._process.wait(timeout_s)
        self._output.close()
        return status

    def stop(self) -> None:
        """Freezes it, so that it answers nothing; `cont` undoes that."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def cont(self) -> None:
        """Lets it go on after `stop`."""
        self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Starts it again at the same socket, first killing it if it still runs."""
        self.kill()
        self.socket_path.unlink(missing_ok=True)
        self._process, self._output = self._start()

    def _start(self) -> tuple[subprocess.Popen[bytes], "_Output"]:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,  # open and empty: testpmd ends when it can read something
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=PROJECT,
            pass_fds=self._pass_fds,
        )
        output = _Output(self._command[0], process, self._ready)
        try:
            output.wait_ready(START_TIMEOUT_S)
        except BaseException:
            process.kill()
            process.wait(END_TIMEOUT_S)
            output.close()
            raise
        return process, output


class _Output:
    """Keeps what a process prints, and knows the line it prints when it is ready."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], ready: str) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._name = name
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._ready = ready
        self._lines: list[str] = []
        self._has_news = threading.Event()  # the line, or the end
        self._is_ready = False
        self._reader = threading.Thread(target=self._read, args=(self._stdout,), daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        return "".join(self._lines).strip()

    def wait_ready(self, timeout_s: float) -> None:
        if not self._has_news.wait(timeout_s):
            raise TimeoutError(f"{self._name} is not ready after {timeout_s} s: {self.text}")
        if not self._is_ready:
            raise RuntimeError(f"{self._name} did not start: {self.text}")

    def close(self) -> None:
        """Frees what the process has left; only once it has ended."""
        self._reader.join(5.0)
        self._stdin.close()
        self._stdout.close()

    def _read(self, stdout: IO[bytes]) -> None:
        for line in stdout:
            self._lines.append(line.decode(errors="replace"))
            if self._ready in self._lines[-1]:
                self._is_ready = True
                self._has_news.set()
        self._has_news.set()


@contextmanager
def storage_daemon(
    image_or_node: Path,
    *,
    writable: bool = True,
    num_queues: int = 1,
    socket_path: Path | None = None,
) -> Iterator[Daemon]:
    """qemu-storage-daemon, serving a raw image or a block device as vhost-user-blk.

    One client after another; a second one waits until the first has gone.
    """
    file_driver = "host_device" if image_or_node.is_block_device() else "file"
    node = {
        "driver": "raw",
        "node-name": "disk",
        "read-only": not writable,
        "file": {"driver": file_driver, "filename": str(image_or_node.absolute())},
    }
    with _socket_path(socket_path) as path:
        export = {
            "type": "vhost-user-blk",
            "id": "export",
            "node-name": "disk",
            "writable": writable,
            "num-queues": num_queues,
            "addr": {"type": "unix", "path": str(path)},
        }
        command = [str(QEMU_STORAGE_DAEMON), "--blockdev", json.dumps(node)]
        command += ["--export", json.dumps(export)]
        # Options are done in their order: once the monitor greets, the socket listens.
        command += ["--chardev", "stdio,id=monitor", "--monitor", "monitor"]
        with _ending(Daemon(path, command, ready='{"QMP"')) as daemon:
            yield daemon


@contextmanager
def virtiofsd(directory_to_share: Path, *, socket_path: Path | None = None) -> Iterator[Daemon]:
    """virtiofsd at a socket that it makes; it serves one client and then ends. Needs root."""
    with _socket_path(socket_path) as path:
        command = [*_virtiofsd_command(directory_to_share), f"--socket-path={path}"]
        with _ending(Daemon(path, command, ready=_VIRTIOFSD_READY)) as daemon:
            yield daemon


@contextmanager
def virtiofsd_on(listener: socket.socket, directory_to_share: Path) -> Iterator[Daemon]:
    """virtiofsd given a listening socket, which the caller may close. It cannot be restarted."""
    path = Path(os.fsdecode(listener.getsockname()))
    command = [*_virtiofsd_command(directory_to_share), f"--fd={listener.fileno()}"]
    started = Daemon(path, command, ready=_VIRTIOFSD_READY, pass_fds=[listener.fileno()])
    with _ending(started) as daemon:
        yield daemon


_VIRTIOFSD_READY = "Waiting for vhost-user socket connection"


def _virtiofsd_command(directory_to_share: Path) -> list[str]:
    # A sandbox of namespaces would be a second process, and needs more than some containers have.
    program, directory = str(VIRTIOFSD), directory_to_share.absolute()
    if "--shared-dir" in ask_options(program):
        return [program, f"--shared-dir={directory}", "--sandbox=chroot"]
    return [program, "-o", f"source={directory}", "-o", "sandbox=chroot"]


@contextmanager
def dpdk_testpmd(*, socket_path: Path | None = None) -> Iterator[Daemon]:
    """DPDK's testpmd, a switch that answers ARP and ping; it keeps one CPU busy. Needs root."""
    with _socket_path(socket_path) as path:
        command = ["stdbuf", "--output=L", str(TESTPMD)]
        # Two threads on one CPU, and no memory or files but its own.
        command += ["--lcores=(0-1)@0", "--no-huge", "-m", "256", "--no-shconf"]
        command += ["--no-pci", "--no-telemetry", f"--vdev=net_vhost0,iface={path}", "--"]
        command += ["--forward-mode=icmpecho", "--auto-start", "--no-mlockall"]
        command += ["--total-num-mbufs=4096", "--mbuf-size=2176"]
        with _ending(Daemon(path, command, ready="Press enter to exit")) as daemon:
            yield daemon


@contextmanager
def vhost_user_backend(
    kind: str,
    image: Path | None = None,
    *,
    options: Sequence[str] = (),
    socket_path: Path | None = None,
) -> Iterator[Daemon]:
    """`python -m tests.support.vhost_user` as a process; see its `--help` for the options.

    `kind` is net, or scsi with an image. `--answers N` and `--hang-up` make it misbehave.
    """
    with _socket_path(socket_path) as path:
        command = [sys.executable, "-m", "tests.support.vhost_user", kind, *options, str(path)]
        if image is not None:
            command.append(str(image.absolute()))
        with _ending(Daemon(path, command, ready="listening on ")) as daemon:
            yield daemon


@contextmanager
def _socket_path(wanted: Path | None) -> Iterator[Path]:
    """The wanted path, or one in a short directory of its own."""
    if wanted is not None:
        yield wanted.absolute()
        return
    with tempfile.TemporaryDirectory("", "vmplug-", "/tmp") as directory:
        yield Path(directory) / "vu.sock"


@contextmanager
def _ending(daemon: Daemon) -> Iterator[Daemon]:
    """Ends a daemon whatever happens; a failure is told what it had printed."""
    try:
        yield daemon
    except BaseException as error:
        error.add_note(f"the daemon at {daemon.socket_path} has printed: {daemon.output}")
        raise
    finally:
        daemon.kill()
