"""The files of a directory, on a file system whose server can stop answering, as that of NFS.

The server is a process of its own, which SIGSTOP silences. It lets the kernel remember nothing, so
that each look at a file asks it. It speaks only what files need.
Source: include/uapi/linux/fuse.h.
"""

import ctypes
import errno
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_HEADER, _ANSWER = struct.Struct("=IIQQIIII"), struct.Struct("=IiQ")
_ATTRIBUTES = struct.Struct("=6Q10I")
_ROOT_ID = 1
_BUFFER_BYTES = (1 << 20) + 4096
_NO_ANSWER = frozenset({2, 36, 42})
"""FORGET, INTERRUPT, BATCH_FORGET."""
_INIT = 26


class SilentFiles:
    """The mounted files; `directory` has the same ones without the server between."""

    def __init__(self, process: "subprocess.Popen[bytes]", directory: Path, mounted: Path) -> None:
        self._process = process
        self.directory = directory
        self.mounted = mounted

    def stop(self) -> None:
        """From now on nobody gets an answer. It has stopped when this comes back."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        """Answer again, also what was asked meanwhile."""
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def silent_files(directory: Path, mounted: Path) -> Iterator[SilentFiles]:
    """Show the files of a directory at another one, until this ends: then no call waits."""
    command = [sys.executable, "-m", __name__, str(directory), str(mounted)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            yield SilentFiles(process, directory, mounted)
        finally:
            process.kill()  # the kernel ends every request of a server that is gone
            process.wait()
            subprocess.run(["umount", "--lazy", str(mounted)], check=False)


def _serve(directory: Path, mounted: Path) -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"silent-files", os.fsencode(mounted), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    files = _Files(directory)
    while True:
        request = os.read(device, _BUFFER_BYTES)
        _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
        if opcode in _NO_ANSWER:
            continue
        try:
            data, number = files.answer(opcode, node, request[_HEADER.size :]), 0
        except OSError as error:
            data, number = b"", error.errno or errno.EIO
        os.write(device, _ANSWER.pack(_ANSWER.size + len(data), -number, unique) + data)
        if opcode == _INIT:
            os.write(sys.stdout.fileno(), b"ready\n")


class _Files:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers: dict[int, Path] = {_ROOT_ID: directory}
        self._open: dict[int, int] = {}
        self._answers: Mapping[int, Callable[[int, bytes], bytes]] = {
            1: self._look_up,
            **dict.fromkeys((3, 4), self._read_attributes),  # GETATTR, SETATTR
            **dict.fromkeys((14, 27), lambda *_: bytes(16)),  # OPEN, OPENDIR
            15: self._read,
            16: self._write,
            17: lambda *_: struct.pack("=5Q4I24x", *[1 << 20] * 3, 99, 50, 4096, 255, 4096, 0),
            **dict.fromkeys((18, 20, 29, 38), lambda *_: b""),  # RELEASE, FSYNC, ..DIR, DESTROY
            _INIT: lambda *_: struct.pack("=4IHH2I36x", 7, 31, 1 << 17, 32, 8, 8, 1 << 17, 1),
        }

    def answer(self, opcode: int, node: int, asked: bytes) -> bytes:
        """OSError for what it cannot do. Not FLUSH: closing a file would wait for it."""
        if opcode not in self._answers:
            raise OSError(errno.ENOSYS, "not needed")
        return self._answers[opcode](node, asked)

    def _look_up(self, _: int, asked: bytes) -> bytes:
        path = self._directory / os.fsdecode(asked.rstrip(b"\0"))
        number = path.stat().st_ino
        self._numbers[number] = path
        return struct.pack("=4Q2I", number, 0, 0, 0, 0, 0) + self._attributes(number)

    def _read_attributes(self, node: int, _: bytes) -> bytes:
        return bytes(16) + self._attributes(node)

    def _read(self, node: int, asked: bytes) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", asked)
        return os.pread(self._file(node), size, offset)

    def _write(self, node: int, asked: bytes) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", asked)
        os.pwrite(self._file(node), asked[40 : 40 + size], offset)
        return struct.pack("=II", size, 0)

    def _file(self, node: int) -> int:
        if node not in self._open:
            self._open[node] = os.open(self._numbers[node], os.O_RDWR)
        return self._open[node]

    def _attributes(self, node: int) -> bytes:
        found = self._numbers[node].stat()
        blocks = 0 if stat.S_ISDIR(found.st_mode) else found.st_blocks
        times = (int(found.st_atime), int(found.st_mtime), int(found.st_ctime))
        about = (found.st_mode, found.st_nlink, 0, 0, 0, 4096, 0)
        return _ATTRIBUTES.pack(node, found.st_size, blocks, *times, 0, 0, 0, *about)


if __name__ == "__main__":
    _serve(*map(Path, sys.argv[1:]))
