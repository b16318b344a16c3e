"""A client of the tiny guest: asks it what it sees, over the socket of its control serial port.

One line is one shell command, evaluated in the guest; its answer ends with `__END <status>`. See
guest/init for the functions it knows. From a terminal: `python guest/console.py SOCKET disks`.
"""

import argparse
import base64
import os
import re
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, cast
from urllib.parse import unquote

BOOT_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 20.0

LINE_BYTES_MAX = 32 << 10
"""Half of what the guest's tty buffers while the shell is busy; beyond it would drop bytes.

Source: Linux drivers/tty/tty_buffer.c, TTYB_DEFAULT_MEM_LIMIT.
"""

WRITE_CHUNK_BYTES = 16 << 10
"""Bytes per write, so that in base64 they fit into one line."""

PCI_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:([0-9a-f]{2})\.([0-7])")
SCSI_ADDRESS = re.compile(r"[0-9]+:[0-9]+:([0-9]+):([0-9]+)")

FLAT_LUN = 0x4000
"""Added to a LUN of 256 and above by the flat addressing of SAM-4, section 4.7.7.3."""

STATUS_TIMED_OUT = 110
"""What the guest's functions that wait fail with: ETIMEDOUT."""

Clock = Callable[[], float]
"""Seconds since any moment, for deadlines."""

WriteCache = Literal["write back", "write through"]


class GuestError(Exception):
    """A line failed in the guest with this status (`rc`) and output."""

    def __init__(self, line: str, rc: int, output: str) -> None:
        super().__init__(f"guest: {line!r} ended with status {rc}: {output}")
        self.line = line
        self.rc = rc
        self.output = output


class GuestTimeoutError(TimeoutError):
    """The guest did not answer, or did not see what was waited for, within the deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDisk:
    """One whole disk as the guest sees it.

    `serial` is empty when the disk has none. `marker` is the text at its start: up to the first
    dot or byte that is not printable ASCII, at most 32 bytes. `pci_path` has the slots from the
    root bus down to the disk, or to its SCSI controller: two hexadecimal digits each, and `.F` for
    a function other than 0; it is empty on a machine without PCI. `scsi_address` is `ID:LUN`; None
    for a disk that is not a SCSI disk.
    """

    name: str
    size_bytes: int
    read_only: bool
    serial: str
    write_cache: WriteCache
    discard_max_bytes: int
    marker: str
    pci_path: str
    scsi_address: str | None

    @classmethod
    def parse(cls, line: str) -> Self:
        """A disk from one line of the guest's `disks`."""
        words = _words(line)
        return cls(
            name=words["name"],
            size_bytes=int(words["size_bytes"]),
            read_only=words["ro"] == "1",
            serial=unquote(words["serial"]),
            write_cache=cast("WriteCache", f"write {words['write_cache']}"),
            discard_max_bytes=int(words["discard_max_bytes"]),
            marker=unquote(words["marker"]),
            pci_path=_pci_path(words["sysfs"]),
            scsi_address=_scsi_address(words["sysfs"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPmem:
    """One persistent memory as the guest sees it, an NVDIMM for example.

    `dax` is whether a file system on it can be mounted with `-o dax`. `marker` is as a disk's.
    """

    name: str
    size_bytes: int
    read_only: bool
    dax: bool
    marker: str

    @classmethod
    def parse(cls, line: str) -> Self:
        """One from one line of the guest's `pmems`."""
        words = _words(line)
        return cls(
            name=words["name"],
            size_bytes=int(words["size_bytes"]),
            read_only=words["ro"] == "1",
            dax=words["dax"] == "1",
            marker=unquote(words["marker"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestNic:
    """One network card as the guest sees it.

    `has_carrier` is whether it is up and connected. `pci_path` is as a disk's.
    """

    name: str
    mac: str
    mtu: int
    has_carrier: bool
    pci_path: str

    @classmethod
    def parse(cls, line: str) -> Self:
        """A network card from one line of the guest's `nics`."""
        words = _words(line)
        return cls(
            name=words["name"],
            mac=words["mac"],
            mtu=int(words["mtu"]),
            has_carrier=words["carrier"] == "1",
            pci_path=_pci_path(words["sysfs"]),
        )


def _words(line: str) -> dict[str, str]:
    """The words `key=value` of a line that describes a device."""
    return dict(word.split("=", 1) for word in line.split(" "))


def _pci_path(sysfs_path: str) -> str:
    """`01/00` for `/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/virtio0`."""
    matches = map(PCI_ADDRESS.fullmatch, sysfs_path.split("/"))
    slots = [match.groups() for match in matches if match]
    return "/".join(slot if function == "0" else f"{slot}.{function}" for slot, function in slots)


def _scsi_address(sysfs_path: str) -> str | None:
    """`0:3` for a path that ends in `2:0:0:3` (host, channel, id, LUN)."""
    match = SCSI_ADDRESS.fullmatch(sysfs_path.rsplit("/", 1)[1])
    if match is None:
        return None
    lun = int(match[2])
    return f"{match[1]}:{lun - FLAT_LUN if lun >= FLAT_LUN else lun}"


def running_time(pid: int) -> Clock:
    """A clock that goes as the guest of the QEMU with that pid does, however busy the host is.

    It goes with the CPU time that QEMU gets; for a guest that stands still, or has ended, at a
    quarter of the time of day; and not while QEMU waits for a CPU.
    Source: proc_pid_stat(5), fields 14 and 15; Linux Documentation/scheduler/sched-stats.rst.
    """
    ticks_per_s = os.sysconf("SC_CLK_TCK")

    def read_cpu_s() -> float:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / ticks_per_s
        return 0.0

    def read_waited_s() -> dict[str, float]:
        """How long each thread has waited for a CPU, without a wait that goes on."""
        found = dict[str, float]()
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                words = Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()
                found[thread] = int(words[1]) / 1e9
        return found

    begun_at, passed_s, still_s = time.monotonic(), 0.0, 0.0
    last_cpu_s, last_waited_s = read_cpu_s(), read_waited_s()

    def clock() -> float:
        nonlocal begun_at, passed_s, still_s, last_cpu_s, last_waited_s
        now, cpu_s, waited_s = time.monotonic(), read_cpu_s(), read_waited_s()
        waits = (waited_s[thread] - last_waited_s.get(thread, 0.0) for thread in waited_s)
        still_s = min(still_s, 0.0) + now - begun_at - max(waits, default=0.0)
        passed_s += max(cpu_s - last_cpu_s, still_s / 4)
        begun_at, last_cpu_s, last_waited_s = now, cpu_s, waited_s
        return passed_s

    return clock


class GuestConsole:
    """A connection to the guest, made by `connect`; a context manager.

    After a GuestTimeoutError it stays usable: the next line first waits for the late answer.
    """

    def __init__(self, connection: socket.socket, clock: Clock = time.monotonic) -> None:
        self._socket = connection
        self._clock = clock
        self._received = bytearray()
        self._in_step = False

    @classmethod
    def connect(
        cls,
        path: Path | str,
        timeout_s: float = BOOT_TIMEOUT_S,
        *,
        clock: Clock = time.monotonic,
    ) -> Self:
        """Connects to the serial port's socket and waits until the guest has booted.

        This and every later wait is as long as `clock` says: see `running_time`.
        Raises OSError when nobody listens, ConnectionError when QEMU ends, GuestTimeoutError.
        """
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            console = cls(connection, clock)
            console._synchronise(clock() + timeout_s)
        except BaseException:
            connection.close()
            raise
        return console

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; the guest runs on and waits for the next connection."""
        self._socket.close()

    def run(self, line: str, timeout_s: float = ANSWER_TIMEOUT_S) -> str:
        """What a shell line prints in the guest, without the newline at its end.

        Raises GuestError when its status is not 0, GuestTimeoutError, ConnectionError when QEMU
        ends, ValueError for a line the guest could not take.
        """
        if "\n" in line or len(line.encode()) > LINE_BYTES_MAX:
            raise ValueError(f"not one line of at most {LINE_BYTES_MAX} bytes: {line[:60]!r}...")
        deadline = self._clock() + timeout_s
        if not self._in_step:
            self._synchronise(deadline)
        self._in_step = False
        self._send(line, deadline)
        rc, output = self._read_answer(deadline)
        self._in_step = True
        if rc != 0:
            raise GuestError(line, rc, output)
        return output

    def load_modules(self, *names: str) -> None:
        """Loads kernel modules: a device whose driver was not loaded at boot needs that."""
        self.run(f"modprobe -a {shlex.join(names)}")

    def disks(self) -> list[GuestDisk]:
        """Every whole disk (vd*, sd*) that is there now."""
        return [GuestDisk.parse(line) for line in self.run("disks").splitlines()]

    def wait_for_disks(self, count: int, timeout_s: float = ANSWER_TIMEOUT_S) -> list[GuestDisk]:
        """The disks, as soon as there are exactly so many; the guest does the waiting.

        Raises GuestTimeoutError, whose text has the names of those that are there.
        """
        output = self._wait(f"wait_for_disks {count}", f"{count} disks", timeout_s)
        return [GuestDisk.parse(line) for line in output.splitlines()]

    def wait_for_pmems(self, count: int, timeout_s: float = ANSWER_TIMEOUT_S) -> list[GuestPmem]:
        """Every persistent memory, as soon as there are exactly so many.

        Needs the modules nfit and nd_pmem. Raises GuestTimeoutError, whose text has those that
        are there.
        """
        output = self._wait(f"wait_for_lines pmems {count}", f"{count} pmems", timeout_s)
        return [GuestPmem.parse(line) for line in output.splitlines()]

    def wait_for_nics(self, count: int, timeout_s: float = ANSWER_TIMEOUT_S) -> list[GuestNic]:
        """Every network card, as soon as there are exactly so many.

        Needs the module virtio_net. Raises GuestTimeoutError, whose text has those that are there.
        """
        output = self._wait(f"wait_for_lines nics {count}", f"{count} network cards", timeout_s)
        return [GuestNic.parse(line) for line in output.splitlines()]

    def wait_until(self, condition: str, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Returns as soon as a shell line has status 0. Raises GuestTimeoutError."""
        self._wait(f"wait_until {shlex.quote(condition)}", f"success of {condition!r}", timeout_s)

    def mount(self, filesystem: str, source: str, options: str = "") -> str:
        """Mount a device or tag (`ext4`, `virtiofs`, `9p`); return the directory.

        `options` are those of mount -o.
        """
        directory = f"/mnt/{source.rsplit('/', 1)[-1]}"
        words = ["mount", "-t", filesystem, *(["-o", options] if options else [])]
        self.run(f"mkdir -p {shlex.quote(directory)} && {shlex.join([*words, source, directory])}")
        return directory

    def unmount(self, directory: str) -> None:
        """Takes away what `mount` has made."""
        self.run(f"umount {shlex.quote(directory)} && rmdir {shlex.quote(directory)}")

    def read_file(self, path: str) -> bytes:
        """The bytes of a file."""
        return base64.b64decode(self.run(f"base64 -w 0 {shlex.quote(path)}"))

    def write_file(self, path: str, data: bytes) -> None:
        """Makes a file of these bytes; they have reached the device when this returns."""
        file = shlex.quote(path)
        self.run(f": >{file}")
        append = f"base64 -d | dd of={file} oflag=append conv=notrunc,fsync status=none"
        for start in range(0, len(data), WRITE_CHUNK_BYTES):
            chunk = base64.b64encode(data[start : start + WRITE_CHUNK_BYTES]).decode()
            self.run(f"printf %s {chunk} | {append}")

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a disk, read from the device and not from the guest's cache."""
        line = f"read_disk {shlex.quote(name)} {offset} {length}"
        data = base64.b64decode(self.run(line))
        if len(data) != length:
            raise GuestError(line, 0, f"only {len(data)} of {length} bytes")
        return data

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Writes bytes to a disk; they have reached the device when this returns."""
        for start in range(0, len(data), WRITE_CHUNK_BYTES):
            chunk = base64.b64encode(data[start : start + WRITE_CHUNK_BYTES]).decode()
            self.run(f"write_disk {shlex.quote(name)} {offset + start} {chunk}")

    def _wait(self, function: str, wanted: str, timeout_s: float) -> str:
        """The answer of a function that waits in the guest: its last argument is the time.

        The guest's own clock is that of the host, so it is asked again while there is time left.
        """
        deadline, left_s = self._clock() + timeout_s, timeout_s
        while True:
            try:
                line = f"{function} {round(left_s * 100)}"
                return self.run(line, timeout_s=left_s + ANSWER_TIMEOUT_S)
            except GuestError as error:
                if error.rc != STATUS_TIMED_OUT:
                    raise
                left_s = deadline - self._clock()
                if left_s > 0:
                    continue
                seen = error.output.split() or "none"
                text = f"no {wanted} in the guest after {timeout_s} s: {seen}"
                raise GuestTimeoutError(text) from error

    def _remaining(self, deadline: float) -> float:
        """Seconds left, as a socket's timeout; raises when none are (0 would mean "no wait")."""
        remaining_s = deadline - self._clock()
        if remaining_s <= 0:
            raise GuestTimeoutError("the guest does not answer")
        return remaining_s

    def _synchronise(self, deadline: float) -> None:
        """Sends a token and drops everything up to its answer.

        That covers a guest that boots (what it was sent may be lost: it is sent again when the
        guest says it is ready), one that has been up for long, and a late answer to somebody else.
        """
        token = self._send_token(deadline)
        while (line := self._read_line(deadline)) != token:
            if "__READY " in line:  # behind what the terminal still echoed, it may be
                token = self._send_token(deadline)
        self._read_answer(deadline)
        self._in_step = True

    def _send_token(self, deadline: float) -> str:
        token = secrets.token_hex(8)
        self._send(f"\necho {token}", deadline)  # the newline ends what was half-sent before
        return token

    def _send(self, line: str, deadline: float) -> None:
        self._socket.settimeout(self._remaining(deadline))
        try:
            self._socket.sendall(line.encode() + b"\n")
        except TimeoutError as error:
            raise GuestTimeoutError("the guest does not take a line") from error

    def _read_answer(self, deadline: float) -> tuple[int, str]:
        lines: list[str] = []
        while not (line := self._read_line(deadline)).startswith("__END "):
            lines.append(line)
        return int(line.removeprefix("__END ")), "\n".join(lines)

    def _read_line(self, deadline: float) -> str:
        while b"\n" not in self._received:
            self._socket.settimeout(self._remaining(deadline))
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue  # the clock may say that there is time left
            if not data:
                raise ConnectionError("the guest's serial port was closed")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line.decode(errors="replace").rstrip("\r")


def main() -> int:
    """Runs one line in the guest, prints the answer and returns the line's status."""
    parser = argparse.ArgumentParser(description="Run one shell line in the tiny guest.")
    parser.add_argument("socket", type=Path, help="the socket of the guest's control serial port")
    parser.add_argument("line", nargs="+", help="what to run, e.g. disks")
    parser.add_argument("--timeout", type=float, default=BOOT_TIMEOUT_S, metavar="SECONDS")
    arguments = parser.parse_args()
    try:
        with GuestConsole.connect(arguments.socket, arguments.timeout) as console:
            output = console.run(" ".join(arguments.line), timeout_s=arguments.timeout)
            status = 0
    except GuestError as error:
        output, status = error.output, error.rc
    except OSError as error:
        print(f"console: {arguments.socket}: {error}", file=sys.stderr)
        return 1
    if output:
        print(output)
    return status


if __name__ == "__main__":
    sys.exit(main())
