"""A QEMU of the test's own, with the tiny guest in it, and ready-made sets of devices for it."""

import json
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from guest.console import GuestConsole, running_time

from tests.support.raw_qmp import RawQmp

Device = Mapping[str, str | int | bool]
"""Properties of one `-device`, by QEMU's names and in its JSON types."""

Flavour = Literal["cloud", "full"]
"""Of the guest, as guest/build.sh makes them: the fast one, and the one that has 9p."""

QEMU = "qemu-system-x86_64"
BUILT_GUEST = Path(__file__).parents[2] / "build" / "guest"
BUILT_GUESTS: Mapping[Flavour, Path] = {"cloud": BUILT_GUEST, "full": BUILT_GUEST / "full"}
START_TIMEOUT_S = 60.0
TERM_TIMEOUT_S, END_TIMEOUT_S = 5.0, 60.0
"""After SIGTERM, which a QEMU may be deaf to, and after SIGKILL."""

MICROVM_TSC_KHZ = 2_500_000
"""About what the host's counter does, so that the guest need not find out.

A microvm has no other clock to compare it with but one that fails on a busy host without KVM: the
kernel says "Unable to calibrate against PIT" and hangs. Measured with QEMU 7.2 and Linux 6.1.
"""

BUSY_HOST = "no_timer_check"
"""For a guest's kernel, which counts ticks of its timer as it boots. Where the host is busy, QEMU
without KVM makes them late, and it panics: "IO-APIC + timer doesn't work!". Measured with QEMU 7.2
and Linux 6.1.
"""

FIRST_PORT_SLOT = 0x10
PORT_SLOTS = 15
"""Slots 0x10..0x1e of a q35's root bus are free; 0x1f has the chipset."""


class GuestVm:
    """A running QEMU; made by `start_vm`.

    `qmp_path` is for the product, `oracle` the tests' own session on a second monitor, connected
    from the start so that it has every event. `console_path` is the socket `console` connects to.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], logs: Path, sockets: Path, *, guest: bool
    ) -> None:
        self._process = process
        self._logs = logs
        self._guest = guest
        self._console: GuestConsole | None = None
        self.pid = process.pid
        self.qmp_path = sockets / "qmp.sock"
        self.console_path = sockets / "console.sock"
        self.oracle = self._connect_oracle(sockets / "oracle.sock")

    def _connect_oracle(self, path: Path) -> RawQmp:
        try:
            return RawQmp.connect(path, START_TIMEOUT_S)
        except OSError as error:
            raise RuntimeError(f"QEMU did not start: {self.stderr or error}") from error

    @property
    def console(self) -> GuestConsole:
        """The guest's console; the first use waits until the guest has booted."""
        if not self._guest:
            raise RuntimeError("this VM was started without a guest")
        if self._console is None:
            clock = running_time(self._process.pid)
            try:
                self._console = GuestConsole.connect(self.console_path, clock=clock)
            except ConnectionError as error:
                words = f"{self.stderr}\n{self.kernel_log[-2000:]}"
                raise RuntimeError(f"QEMU ended before the guest listened: {words}") from error
        return self._console

    def release_console(self) -> None:
        """Leaves the console to somebody else; `console` connects again when it is next used."""
        if self._console is not None:
            self._console.close()
            self._console = None

    @property
    def stderr(self) -> str:
        """What QEMU has complained about so far."""
        return _stderr_file(self._logs).read_text(errors="replace").strip()

    @property
    def kernel_log(self) -> str:
        """What the guest's kernel has printed so far."""
        return _kernel_log(self._logs).read_text(errors="replace")

    def kill(self) -> None:
        """Ends QEMU as a crash would."""
        self._process.kill()
        self._process.wait(END_TIMEOUT_S)

    def wait_ended(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """Waits until QEMU has ended by itself; its exit status, minus the signal's number."""
        return self._process.wait(timeout_s)

    def disconnect(self) -> None:
        """Closes the tests' own connections."""
        self.release_console()
        self.oracle.close()


@contextmanager
def start_vm(
    directory: Path,
    *,
    machine: str = "q35",
    devices: Iterable[Device] = (),
    extra: Sequence[str] = (),
    guest: bool = True,
    flavour: Flavour = "cloud",
    paused: bool = False,
    memory: str = "256M",
    smp: int = 1,
    qemu: str = QEMU,
    pass_fds: Sequence[int] = (),
) -> Iterator[GuestVm]:
    """Starts QEMU without KVM, and ends and reaps it whatever happens; logs go to `directory`.

    The sockets have a short directory of their own, as their paths may have 107 bytes only. They
    listen before QEMU starts: connecting needs no second try. `memory` is QEMU's -m, and may go on
    as in `256M,slots=2,maxmem=1G`. QEMU inherits `pass_fds`. A microvm has one serial port only:
    its guest's kernel is not heard. Raises RuntimeError with QEMU's words when it does not start,
    FileNotFoundError when the guest has not been built.
    """
    arguments = [qemu, "-accel", "tcg", "-machine", machine, "-cpu", "max"]
    arguments += ["-m", memory, "-smp", str(smp), "-nodefaults", "-no-user-config"]
    arguments += ["-display", "none", "-no-reboot"]
    if guest:
        arguments += _guest_arguments(machine, flavour)
    if paused:
        arguments.append("-S")
    for device in devices:
        arguments += ["-device", json.dumps(device)]
    with ExitStack() as stack:
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory("", "vmplug-", "/tmp")))
        process = stack.enter_context(_running([*arguments, *extra], directory, sockets, pass_fds))
        vm = GuestVm(process, directory, sockets, guest=guest)
        stack.callback(vm.disconnect)
        yield vm


def guest_files(flavour: Flavour = "cloud") -> tuple[Path, Path]:
    """The kernel and the initrd of the guest."""
    built = BUILT_GUESTS[flavour]
    kernel, initrd = built / "vmlinuz", built / "initrd.img"
    if not (kernel.exists() and initrd.exists()):
        raise FileNotFoundError(f"{built} has no guest; build it with: guest/build.sh")
    return kernel, initrd


def _guest_arguments(machine: str, flavour: Flavour) -> list[str]:
    """The guest, with the chardevs `kernel` and `console` as its serial ports.

    It runs on one CPU, however many it has: on QEMU 10 with TCG the timer of the second one
    stops for ever now and then, and so does the guest.
    """
    kernel, initrd = guest_files(flavour)
    if machine.partition(",")[0] == "microvm":
        serial = ["-serial", "chardev:console"]  # it has one port only
        append = "ctl=ttyS0 modules=virtio_mmio quiet loglevel=0 maxcpus=1 panic=-1"
        append += f" tsc_early_khz={MICROVM_TSC_KHZ} {BUSY_HOST}"
        serial += ["-bios", "qboot.rom"]  # SeaBIOS, Debian 13's choice, reads from every disk
    else:
        serial = ["-serial", "chardev:kernel", "-serial", "chardev:console"]
        append = f"console=ttyS0 quiet maxcpus=1 panic=-1 {BUSY_HOST}"
    return ["-kernel", str(kernel), "-initrd", str(initrd), "-append", append, *serial]


@contextmanager
def _running(
    arguments: list[str], logs: Path, sockets: Path, pass_fds: Sequence[int]
) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU with two monitors, and a chardev for each serial port; ended and reaped at the end."""
    with ExitStack() as started:
        fds = {
            name: started.enter_context(_listening(sockets / f"{name}.sock")).fileno()
            for name in ("qmp", "oracle", "console")
        }
        stderr = started.enter_context(_stderr_file(logs).open("wb"))
        process = subprocess.Popen(
            [*arguments, *_channel_arguments(fds, _kernel_log(logs))],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=(*fds.values(), *pass_fds),
        )
    try:
        yield process
    finally:
        _end(process)


def _channel_arguments(fds: Mapping[str, int], kernel_log: Path) -> list[str]:
    arguments = ["-chardev", f"file,id=kernel,path={str(kernel_log).replace(',', ',,')}"]
    for name, fd in fds.items():
        arguments += ["-chardev", f"socket,id={name},fd={fd},server=on,wait=off"]
    for name in ("qmp", "oracle"):
        arguments += ["-qmp", f"chardev:{name}"]
    return arguments


def _listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def _end(process: subprocess.Popen[bytes]) -> None:
    endings = {signal.SIGTERM: TERM_TIMEOUT_S, signal.SIGKILL: END_TIMEOUT_S}
    for ending, timeout_s in endings.items():
        process.send_signal(ending)  # does nothing once it has been reaped
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            continue
        return
    raise RuntimeError(f"QEMU (pid {process.pid}) does not even end when killed")


def _stderr_file(logs: Path) -> Path:
    return logs / "qemu-stderr.log"


def _kernel_log(logs: Path) -> Path:
    return logs / "guest-kernel.log"


def shared_memory(size_mib: int = 256) -> list[str]:
    """For `extra`: the guest's memory is a file that vhost-user backends map. `memory` is as much.

    Source: QEMU docs/system/devices/vhost-user.rst, "Shared memory object".
    """
    memory = {"qom-type": "memory-backend-memfd", "id": "mem", "share": True}
    backend = json.dumps({**memory, "size": size_mib << 20})
    return ["-object", backend, "-machine", "memory-backend=mem"]


def root_ports(count: int) -> list[Device]:
    """Empty PCIe root ports rp0, rp1, ... for a q35, each taking one device at slot 0.

    Up to 15 have a slot each, from 0x10; more are functions, eight to a slot: 0x10.0, 0x10.1, ...
    """
    functions = 1 if count <= PORT_SLOTS else 8
    if count > PORT_SLOTS * functions:
        raise ValueError(f"no room for {count} root ports on one bus")
    return [
        {
            "driver": "pcie-root-port",
            "id": f"rp{index}",
            "bus": "pcie.0",
            "chassis": index + 1,
            "slot": index + 1,
            "addr": f"{FIRST_PORT_SLOT + index // functions:x}.{index % functions}",
            "multifunction": functions > 1,
        }
        for index in range(count)
    ]


def pci_bridge() -> list[Device]:
    """One PCI bridge br0 for machine pc, at slot 0x10, taking devices at its slots 1..0x1f."""
    bridge = {"driver": "pci-bridge", "id": "br0", "bus": "pci.0", "addr": "0x10"}
    return [{**bridge, "chassis_nr": 1, "shpc": True}]


def scsi_controller(bus: str = "pcie.0") -> list[Device]:
    """One virtio SCSI controller scsi0, whose bus is scsi0.0, at slot 8 of the root bus.

    `bus` is `pcie.0` for a q35, `pci.0` for machine pc.
    """
    return [{"driver": "virtio-scsi-pci", "id": "scsi0", "bus": bus, "addr": "0x8"}]
