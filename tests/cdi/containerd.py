"""containerd, as far as the config.json that it makes for a container of Kubernetes.

It runs in mount and PID namespaces of its own, which end all that it has started. Its OCI runtime
only keeps a process for each container, so it needs no cgroups and no network. It is asked by its
CRI, which is gRPC: one message to and one back, over HTTP/2 without compression.
Source: cri-api pkg/apis/runtime/v1/api.proto; RFC 9113, RFC 7541; gRPC over HTTP2.
"""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.images import write_image

Fields = Mapping[int, Any]
"""A message by the numbers of its fields: texts, messages, numbers, or lists of these."""

IMAGE = "docker.io/vmplug/test:latest"
VERSION_WITH_CDI = (1, 7)
_RUNTIME = """#!/bin/sh
for argument; do
    [ "$previous" != --pid-file ] || { sleep 1000 >/dev/null 2>&1 & printf %s $! >"$argument"; }
    previous=$argument
done
"""
_CONFIG = """
version = 2
root = "/run/containerd/root"
state = "/run/containerd/state"
[grpc]
address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
enable_cdi = true
cdi_spec_dirs = ["{specs}"]
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "{runtime}"
"""
_ALONE = """
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
exec containerd --config "$1"
"""
_POD = {1: {1: "pod", 2: "uid", 3: "default"}, 8: {2: {1: {1: 2}}}}
"""It has the network of the host."""
_TIMEOUT_S = 120.0
_DATA, _HEADERS, _SETTINGS, _PING = 0, 1, 4, 6
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4


def find_version() -> tuple[int, ...] | None:
    """That of the containerd that is installed, `(1, 7, 24)`; None without one."""
    if not shutil.which("containerd"):
        return None
    said = subprocess.run(["containerd", "--version"], check=True, capture_output=True, text=True)
    found = re.search(r"\b(\d+)\.(\d+)\.(\d+)", said.stdout)
    assert found, said.stdout
    return tuple(map(int, found.groups()))


class Containerd:
    """One that runs; everything it has is below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "sock"
        self._containers = 0
        self._pod = ""

    def make_config(self, annotations: Mapping[str, str]) -> dict[str, Any]:
        """The config that it makes for a container with these annotations."""
        self._containers += 1
        self._pod = self._pod or self._ask("RuntimeService/RunPodSandbox", {1: _POD})
        marks = [{1: key, 2: value} for key, value in annotations.items()]
        name = {1: f"c{self._containers}"}
        container = {1: name, 2: {1: IMAGE}, 3: ["/true"], 10: marks}
        asked = {1: self._pod, 2: container, 3: _POD}
        made = self._ask("RuntimeService/CreateContainer", asked)
        text = json.dumps(json.loads(self._ctr("containers", "info", made))["Spec"])
        config: dict[str, Any] = json.loads(text.replace(made, "ID"))
        return config

    def wait(self) -> None:
        """Until it knows the image."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not self._socket.exists():
            assert time.monotonic() < deadline, self._log()
            time.sleep(0.05)
        image = write_image(self._folder / "image.tar", IMAGE, {"true": b""}, ["/true"])
        self._ctr("images", "import", "--snapshotter", "native", str(image))
        while not self._ask("ImageService/ImageStatus", {1: {1: IMAGE}}):
            assert time.monotonic() < deadline, self._log()
            time.sleep(0.05)

    def _ctr(self, *words: str) -> str:
        words = ("--address", str(self._socket), "--namespace", "k8s.io", *words)
        done = subprocess.run(
            ["ctr", *words], check=False, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _ask(self, method: str, message: Fields) -> str:
        """The first field of the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(str(self._socket))
            answer = _call(connection, f"/runtime.v1.{method}", _encode(message))
        assert answer is not None, self._log()
        return _first_field(answer)

    def _log(self) -> str:
        return (self._folder / "log").read_text()[-4000:]


@contextmanager
def containerd(folder: Path, specs: Path) -> Iterator[Containerd]:
    """It runs inside the `with`. Paths of sockets are short: so must `folder` be."""
    runtime = folder / "runtime"
    runtime.write_text(_RUNTIME)
    runtime.chmod(0o755)
    config = folder / "config.toml"
    words = {"socket": folder / "sock", "image": IMAGE, "specs": specs, "runtime": runtime}
    config.write_text(_CONFIG.format(**words))
    alone = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*alone, "sh", "-c", _ALONE, "sh", config], stdout=log, stderr=log
        )
        try:
            engine = Containerd(folder)
            engine.wait()
            yield engine
        finally:
            process.kill()
            process.wait()


def _encode(message: Fields) -> bytes:
    """Protocol buffers: numbers are varints, all else has its length before it."""
    encoded = b""
    for number, value in message.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int):
                encoded += _varint(number << 3) + _varint(each)
                continue
            data = each.encode() if isinstance(each, str) else _encode(each)
            encoded += _varint(number << 3 | 2) + _varint(len(data)) + data
    return encoded


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + _varint(value >> 7)


def _first_field(message: bytes) -> str:
    """The text of field 1; empty where it is not there."""
    if not message.startswith(b"\x0a"):
        return ""
    size, at, shift = 0, 1, 0
    while True:
        size |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 0x80:
            return message[at : at + size].decode(errors="replace")


def _call(connection: socket.socket, path: str, message: bytes) -> bytes | None:
    """The message that answers this one; None for an error, of which the log says more."""
    headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost"}
    headers |= {"content-type": "application/grpc", "te": "trailers"}
    block = b"".join(
        b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in header)
        for header in headers.items()
    )
    body = b"\0" + len(message).to_bytes(4, "big") + message
    connection.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, 1, block)
        + _frame(_DATA, _END_STREAM, 1, body)
    )
    received = b""
    with connection.makefile("rb") as reader:
        while True:
            head = reader.read(9)
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:9], "big")
            data = reader.read(int.from_bytes(head[:3], "big"))
            if kind in {_SETTINGS, _PING} and not flags & _ACK:
                connection.sendall(_frame(kind, _ACK, 0, data if kind == _PING else b""))
            if stream == 1 and kind == _DATA:
                received += data
            if stream == 1 and kind in {_DATA, _HEADERS} and flags & _END_STREAM:
                return received[5:] if received else None


def _frame(kind: int, flags: int, stream: int, data: bytes) -> bytes:
    return len(data).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + data
