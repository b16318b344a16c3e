"""A node of Kubernetes, as far as namespaces can make one: containerd, and what else is started.

kubelet changes settings of the kernel, and its directory is a constant of its code. So each node
has mounts, processes and a network of its own: all of /proc/sys is read-only there but for the
files that kubelet writes, which are copies. Its cgroups are below one of its own. All of it ends
with the `with`, and when the test is killed.
"""

import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.engines import read_busybox
from tests.support.images import write_image

PROGRAMS = Path("/var/cache/vmplug/kubernetes")
"""What tools/build-kubernetes builds."""
IMAGE = "docker.io/vmplug/busybox:latest"
TIMEOUT_S = 120.0
POLL_S = 0.1
_CLONE_NEWNET = 0x40000000
_WRITTEN = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
"""Below /proc/sys. Source: Kubernetes 1.20 pkg/kubelet/cm/container_manager_linux.go."""

_SETUP = """
set -e
directory=$1
shift
mount -t proc proc /proc
ip link set lo up
ip address replace "$1" dev lo
shift
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs tmpfs /var/log
mkdir /run/lock /run/cdi /var/lib/kubelet /var/log/pods
mount --bind "$directory/kubelet" /var/lib/kubelet
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
for name; do
    mkdir -p "$directory/sys/${name%/*}"
    cat "/proc/sys/$name" >"$directory/sys/$name"
    mount --bind "$directory/sys/$name" "/proc/sys/$name"
done
cat
"""
_CONTAINERD = """
version = 2
root = "/run/containerd/root"
state = "/run/containerd/state"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
"""


class Node:
    """One that is named; what it has is below `directory`, whose path must be short.

    Each of several that are to meet has a `number` of its own, the last of its `address`: kubelet
    refuses one of the loop's own.
    """

    def __init__(self, directory: Path, name: str, number: int = 1) -> None:
        self.directory = directory
        self.name = name
        self.address = f"10.1.1.{number}"
        self.cgroup = f"vmplug-{name}-{os.getpid()}"
        self._holder = 0
        self._programs: list[Program] = []

    @contextmanager
    def running(self) -> Iterator["Node"]:
        """Make the node with its containerd, and end all that is in it."""
        (self.directory / "kubelet").mkdir(parents=True)
        words = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"]
        words += ["--propagation", "private", "sh", "-c", _SETUP, "sh"]
        holder = subprocess.Popen(
            [*words, self.directory, self.address, *_WRITTEN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert holder.stdin
            assert holder.stdout
            holder.stdin.write(b"ready\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == b"ready\n"
            self._holder = holder.pid
            self._start_containerd()
            yield self
        finally:
            holder.kill()
            holder.communicate()
            for program in self._programs:
                program.wait()
            self._remove_cgroups()

    def join(self, other: "Node") -> None:
        """Lay a cable to another node, by which each reaches the address of the other."""
        ends = f"to-{other.name}", f"to-{self.name}"
        cable = ["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]]
        network = f"--net=/proc/{self._holder}/ns/net"
        subprocess.run(["nsenter", network, *cable, "netns", str(other._holder)], check=True)
        for node, end, address in ((self, ends[0], other.address), (other, ends[1], self.address)):
            node.run("ip", "link", "set", end, "up")
            node.run("ip", "route", "add", address, "dev", end, "src", node.address)

    def start(self, name: str, *words: str | Path) -> "Program":
        """Start a program, whose log is `name`.log."""
        with (self.directory / f"{name}.log").open("ab") as log:
            program = Program(subprocess.Popen(self._inside(words), stdout=log, stderr=log))
        self._programs.append(program)
        return program

    def run(self, *words: str | Path) -> str:
        """Run a program to its end; what it has printed."""
        done = subprocess.run(
            self._inside(words), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def ctr(self, *words: str) -> str:
        """Ask containerd, in Kubernetes' namespace."""
        return self.run("ctr", "--namespace", "k8s.io", *words)

    def log(self, name: str) -> str:
        """All that a program has logged."""
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def connect(self, port: int) -> socket.socket:
        """A connection to a server of the node. Raises OSError when there is none."""
        with ThreadPoolExecutor(1) as pool:  # a thread that ends, as it stays in the namespace
            return pool.submit(self._connect, port).result()

    def _connect(self, port: int) -> socket.socket:
        libc = ctypes.CDLL(None, use_errno=True)
        namespace = os.open(f"/proc/{self._holder}/ns/net", os.O_RDONLY)
        try:
            assert libc.setns(namespace, _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        finally:
            os.close(namespace)
        return socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)

    def _inside(self, words: tuple[str | Path, ...]) -> list[str | Path]:
        of_holder = f"/proc/{self._holder}/ns"
        mounts, network = f"--mount={of_holder}/mnt", f"--net={of_holder}/net"
        return ["nsenter", mounts, network, f"--pid={of_holder}/pid_for_children", *words]

    def _start_containerd(self) -> None:
        config = self.directory / "containerd.toml"
        config.write_text(_CONTAINERD.format(image=IMAGE))
        image = self.directory / "image.tar"
        command = ["/bin/busybox", "sleep", "1000000"]
        write_image(image, IMAGE, {"bin/busybox": read_busybox()}, command)
        daemon = self.start("containerd", "containerd", "--config", config)
        wait_until(
            lambda: "containerd successfully booted" in self.log("containerd") or daemon.has_ended,
            lambda: self.log("containerd")[-4000:],
        )
        self.ctr("images", "import", "--snapshotter", "native", str(image))

    def _remove_cgroups(self) -> None:
        """They are empty as soon as the kernel has ended what was killed."""
        root = Path("/sys/fs/cgroup")
        found = [*root.glob(self.cgroup), *root.glob(f"*/{self.cgroup}")]
        deadline = time.monotonic() + TIMEOUT_S
        for top in found:
            for directory, _, _ in os.walk(top, topdown=False):
                while True:
                    try:
                        os.rmdir(directory)
                        break
                    except OSError:
                        assert time.monotonic() < deadline, f"{directory} is in use"
                        time.sleep(POLL_S)


class Program:
    """One that was started in a node."""

    def __init__(self, entering: subprocess.Popen[bytes]) -> None:
        self._entering = entering

    @property
    def has_ended(self) -> bool:
        """Whether it has."""
        return self._entering.poll() is not None

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it a signal, and wait until it has ended. nsenter(1) waits for it."""
        self.send(number)
        self.wait()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal. nsenter(1) stops as it stops, and must be told to go on."""
        if number == signal.SIGCONT:
            self._entering.send_signal(number)
        children = Path(f"/proc/{self._entering.pid}/task/{self._entering.pid}/children")
        for pid in children.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), number)

    def wait(self) -> None:
        """Wait until it has ended."""
        self._entering.wait(TIMEOUT_S)


def ask(
    connection: socket.socket, method: str, path: str, body: object = None, token: str = ""
) -> Any:
    """The JSON that a server answers. Raises OSError."""
    http_connection = http.client.HTTPConnection("localhost")
    http_connection.sock = connection
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        text = None if body is None else json.dumps(body)
        http_connection.request(method, path, text, headers)
        answer = http_connection.getresponse()
        said = answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{method} {path}: {error}") from error
    finally:
        http_connection.close()
    if answer.status >= http.HTTPStatus.BAD_REQUEST:
        raise ConnectionError(f"{method} {path}: {answer.status} {said.decode()}")
    return json.loads(said)


def find_missing(*programs: str, tools: Sequence[str] = ()) -> str | None:
    """What a test that runs these needs and this machine has not, in one line; None if nothing.

    `tools` are those of Debian, besides what each node needs.
    """
    if os.geteuid() != 0:
        return "needs root: namespaces, mounts, containers"
    if not all((PROGRAMS / name).exists() for name in programs):
        return f"no Kubernetes in {PROGRAMS}: make test-kubernetes builds it"
    if missing := [
        name for name in ("containerd", "runc", "ip", *tools) if not shutil.which(name)
    ]:
        return f"needs {' '.join(missing)}: tools/install-packages test"
    return None


def wait_until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """Wait until the condition holds. Raises AssertionError with what is instead."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(POLL_S)
