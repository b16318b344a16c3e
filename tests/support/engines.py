"""podman and containerd, with examples/oci-wrapper in front of runc.

Each is in a mount namespace of its own, in which /run is empty but for the CDI specs. Whatever it
starts ends with it. A container has no image and no network, and its root has the guest's busybox.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import vmplug
from tests.cli.result import Result
from tests.support.vm import BUILT_GUEST
from vmplug.host.process import wait_for_end

WRAPPER = Path(__file__).parents[2] / "examples/oci-wrapper"
TIMEOUT_S = 120

_NAMESPACE = """
set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/lock /run/cdi
mount --bind "$1" /run/cdi
exec cat
"""
_LAUNCHER = """#!/bin/sh
export PYTHONPATH='{modules}' VMPLUG_STATE_DIR='{state_dir}' VMPLUG_RUNTIME='{runtime}'
exec '{python}' '{wrapper}' "$@"
"""
_CONTAINERD = """
version = 2
root = "/run/containerd/root"
state = "/run/containerd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
"""


def write_launcher(path: Path, *, state_dir: Path, runtime: str | Path) -> Path:
    """Write the program that an engine runs, as it passes no variables on."""
    words = {"state_dir": state_dir, "runtime": runtime, "wrapper": WRAPPER}
    modules = Path(vmplug.__file__).parents[1]
    path.write_text(_LAUNCHER.format(modules=modules, python=sys.executable, **words))
    path.chmod(0o755)
    return path


class Engine(ABC):
    """One below `directory`, for VMs of a journal. `specs` is where it looks for CDI."""

    program: str
    knows_cdi = True

    def __init__(self, directory: Path, state_dir: Path) -> None:
        self.directory = directory
        self.specs = directory / "specs"
        self.specs.mkdir()
        self.rootfs = _make_rootfs(directory / "rootfs")
        runc = shutil.which("runc") or ""
        launcher = directory / "vmplug-runc"
        self.runtime = write_launcher(launcher, state_dir=state_dir, runtime=runc)
        self.holder = 0

    @abstractmethod
    def start(self, name: str, device: str, command: str, *, vm: str) -> Result:
        """Start a container with a device: a path, or a CDI name."""

    @abstractmethod
    def remove(self, name: str) -> Result:
        """Remove a container, whatever it does."""

    def run(self, *words: str | Path) -> Result:
        """Run a program in the namespace to its end."""
        done = subprocess.run(
            self._inside(words), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        return Result(done.stdout, done.stderr, done.returncode)

    def _inside(self, words: tuple[str | Path, ...]) -> list[str | Path]:
        return ["nsenter", f"--mount=/proc/{self.holder}/ns/mnt", *words]

    @contextmanager
    def running(self) -> Iterator["Engine"]:
        """Make the namespace, and end all that is in it."""
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _NAMESPACE, "sh"]
        with ExitStack() as processes:
            holder = processes.enter_context(
                subprocess.Popen(
                    [*words, self.specs], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
            assert holder.stdin
            assert holder.stdout
            holder.stdin.write(b"ready\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == b"ready\n"
            self.holder = holder.pid
            processes.callback(_kill_all, os.readlink(f"/proc/{holder.pid}/ns/mnt"))
            yield self


class Podman(Engine):
    """`podman run --rootfs`, with a store of its own."""

    program = "podman"

    def start(self, name: str, device: str, command: str, *, vm: str) -> Result:
        """See Engine."""
        options = ["--network", "none", "--annotation", f"org.vmplug.vm={vm}"]
        options += ["--ulimit", "nofile=1000:1000", "--ulimit", "nproc=1000:1000"]
        options += ["--device", device, "--name", name]
        words = ["--rootfs", str(self.rootfs), *command.split()]
        return self._podman("run", "--detach", *options, *words)

    def remove(self, name: str) -> Result:
        """See Engine."""
        return self._podman("rm", "--force", "--time", "0", name)

    def _podman(self, *words: str) -> Result:
        stores = ["--root", f"{self.directory}/store", "--runroot", "/run/pod"]
        stores += ["--tmpdir", "/run/pod-tmp", "--storage-driver", "vfs"]
        host = ["--cgroup-manager", "cgroupfs", "--events-backend", "none"]
        words = (*stores, *host, "--runtime", str(self.runtime), *words)
        return self.run("env", "PODMAN_IGNORE_CGROUPSV1_WARNING=1", "podman", *words)


class Containerd(Engine):
    """`ctr run --rootfs`, and its daemon. `ctr` knows CDI from 2.0 on; Debian 13 has 1.7."""

    program = "containerd"
    knows_cdi = False

    @contextmanager
    def running(self) -> Iterator["Engine"]:
        """See Engine; the daemon's log is below `directory`.

        The daemon says when it serves, as to systemd: `ctr` 2 does not wait for its socket.
        """
        config, ready = self.directory / "containerd.toml", self.directory / "ready"
        config.write_text(_CONTAINERD)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told,
            (self.directory / "containerd.log").open("wb") as log,
            super().running(),
        ):
            told.bind(str(ready))
            told.settimeout(TIMEOUT_S)
            words = self._inside(("env", f"NOTIFY_SOCKET={ready}", "containerd"))
            daemon = subprocess.Popen([*words, "--config", config], stdout=log, stderr=log)
            try:
                assert told.recv(64) == b"READY=1"
                yield self
            finally:
                daemon.terminate()
                daemon.wait()

    def start(self, name: str, device: str, command: str, *, vm: str) -> Result:
        """See Engine."""
        options = ["--runc-binary", str(self.runtime), "--annotation", f"org.vmplug.vm={vm}"]
        words = ["--rootfs", str(self.rootfs), name, *command.split()]
        return self._ctr("run", "--detach", *options, "--device", device, *words)

    def remove(self, name: str) -> Result:
        """See Engine."""
        removed = self._ctr("task", "rm", "--force", name)
        self._ctr("container", "rm", name)
        return removed

    def _ctr(self, *words: str) -> Result:
        return self.run("ctr", *words)


ENGINES: Mapping[str, type[Engine]] = {"podman": Podman, "containerd": Containerd}


def _make_rootfs(directory: Path) -> Path:
    (directory / "bin").mkdir(parents=True)
    busybox = directory / "bin/busybox"
    busybox.write_bytes(read_busybox())
    busybox.chmod(0o755)
    return directory


def read_busybox() -> bytes:
    """The program that has them all, and needs no library: the guest's."""
    with (BUILT_GUEST / "initrd.img").open("rb") as initrd:
        words = ["cpio", "--quiet", "--extract", "--to-stdout", "bin/busybox"]
        return subprocess.run(words, stdin=initrd, stdout=subprocess.PIPE, check=True).stdout


def _kill_all(namespace: str) -> None:
    """Kill what is in a mount namespace, and what is started there meanwhile."""
    while inside := _find_inside(namespace):
        for pid in inside:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_for_end(pid, timeout_s=TIMEOUT_S)


def _find_inside(namespace: str) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.readlink(process / "ns/mnt") == namespace:
                found.append(int(process.name))
    return found
