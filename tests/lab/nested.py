"""VMs in the lab, which the lab's devices are handed to.

Their QEMU is an emulated CPU's: a guest would take it half a minute to boot. It boots once outside
the lab, when that is built, and is restored from then on: `python -m tests.lab.nested DIRECTORY`.
With `--run` it is restored for a shell script: `qmp` and `console` in DIRECTORY are links to its
sockets then, until it is ended.
"""

import hashlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from guest.console import STATUS_TIMED_OUT, GuestConsole
from lab.kernel import BUILT

from tests.support.vm import BUILT_GUEST, QEMU, Device, GuestVm, root_ports, start_vm

SAVED = BUILT / "nested"
SOURCES = (Path(__file__), Path(__file__).parents[1] / "support" / "vm.py")
"""They have the command line."""

MEMORY = "128M"
PLAIN_PORTS = ("rp0", "rp1", "rp2")
LARGE_PORT = "rp3"
"""A root port whose window holds a BAR of 8 GiB."""
BRIDGE = "br0"
"""A bridge to conventional PCI, at the root bus."""

CPU = ("-cpu", "qemu64")
"""Without what newer CPUs have, the guest is a quarter faster in an emulated CPU."""

RESTORE_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 60.0
POLL_S = 0.2

SILENT_PIPE = "/tmp/silent"
"""In the guest: nobody writes to it, so that its shell can wait without starting a process."""
NAMESPACE = "/dev/nvme0n1"
PCI_DEVICES = "/sys/bus/pci/devices"


def devices() -> list[Device]:
    """What is in such a VM from the start."""
    *plain, large = root_ports(len(PLAIN_PORTS) + 1)
    bridge = {"driver": "pcie-pci-bridge", "id": BRIDGE, "bus": "pcie.0", "addr": "0x18"}
    return [*plain, {**large, "pref64-reserve": 16 << 30}, bridge]


class NestedGuest:
    """A guest that runs in the lab. Every wait has a deadline: GuestError, GuestTimeoutError.

    Its shell lines start no process where they can do without: each takes it a second.
    """

    def __init__(self, vm: GuestVm, console: GuestConsole) -> None:
        self.vm = vm
        self.console = console

    def wait_until(self, condition: str) -> None:
        """Returns as soon as a shell line has status 0. GuestError with STATUS_TIMED_OUT."""
        tries = round(ANSWER_TIMEOUT_S / POLL_S)
        count = f"[ $((n += 1)) -le {tries} ] || exit {STATUS_TIMED_OUT}"
        wait = f"read -t {POLL_S} nothing <>{SILENT_PIPE}"
        self._run(f"n=0; until {condition}; do {count}; {wait}; done; true")

    def read_nvme(self, length: int) -> bytes:
        """The first bytes of the first NVMe namespace, once that is there: a line of text."""
        self.wait_until(f"[ -b {NAMESPACE} ]")
        return self._run(f'read -r -n {length} text <{NAMESPACE}; echo "$text"').encode()

    def pci_ids(self) -> dict[str, str]:
        """`8086:10d3` for every PCI function that the guest sees, by its address there."""
        ids = "read -r vendor <$path/vendor; read -r device <$path/device"
        line = f"for path in {PCI_DEVICES}/*; do {ids}; echo ${{path##*/}} $vendor $device; done"
        words = (line.split() for line in self._run(line).splitlines())
        return {bdf: f"{vendor[2:]}:{device[2:]}" for bdf, vendor, device in words}

    def wait_for_pci(self, bdf: str) -> None:
        """Until the guest sees a PCI function at this address."""
        self.wait_until(f"[ -e {PCI_DEVICES}/{bdf} ]")

    def _run(self, line: str) -> str:
        return self.console.run(line, timeout_s=2 * ANSWER_TIMEOUT_S)


@contextmanager
def paused_vm(directory: Path) -> Iterator[GuestVm]:
    """A VM without a guest, which stands still: it takes and gives back devices at once."""
    with start_vm(directory, devices=devices(), memory=MEMORY, guest=False, paused=True) as vm:
        yield vm


@contextmanager
def running_guest(directory: Path) -> Iterator[NestedGuest]:
    """A VM whose guest runs, and answers."""
    state = SAVED / "state"
    if not state.exists():
        raise FileNotFoundError(f"{state}: the guest has not been saved; run: make lab")
    extra = [*CPU, "-serial", "chardev:kernel", "-serial", "chardev:console"]
    extra += ["-incoming", f"exec:cat {shlex.quote(str(state))}"]
    with start_vm(directory, devices=devices(), memory=MEMORY, guest=False, extra=extra) as vm:
        vm.oracle.wait_event("RESUME", RESTORE_TIMEOUT_S)
        with GuestConsole.connect(vm.console_path, RESTORE_TIMEOUT_S) as console:
            yield NestedGuest(vm, console)


def save_guest(directory: Path) -> None:
    """Boots the guest and saves its state, unless that has been done for the same of all."""
    recipe = _recipe()
    state, made_by = directory / "state", directory / "made-by"
    if state.exists() and made_by.exists() and made_by.read_text() == recipe:
        return
    print("lab: booting the guest whose state is saved")  # noqa: T201  a build's progress
    directory.mkdir(parents=True, exist_ok=True)
    made_by.unlink(missing_ok=True)
    with TemporaryDirectory(dir=directory) as work:
        saved = Path(work) / "state"
        with start_vm(Path(work), devices=devices(), memory=MEMORY, extra=CPU) as vm:
            vm.console.run(f"mkfifo {SILENT_PIPE}")
            _migrate(vm, saved)
        saved.rename(state)
    made_by.write_text(recipe)
    print(f"lab: ready: {directory}")  # noqa: T201  the same


def _migrate(vm: GuestVm, saved: Path) -> None:
    events = [{"capability": "events", "state": True}]
    vm.oracle.execute("migrate-set-capabilities", capabilities=events)
    vm.oracle.execute("migrate", uri=f"exec:cat >{shlex.quote(str(saved))}")
    vm.oracle.wait_event("MIGRATION", RESTORE_TIMEOUT_S, status="completed")


def _recipe() -> str:
    """All that the state depends on: it is of this QEMU, with these devices and this guest."""
    version = subprocess.run([QEMU, "--version"], check=True, capture_output=True, text=True)
    digest = hashlib.sha256()
    for path in (BUILT_GUEST / "vmlinuz", BUILT_GUEST / "initrd.img", *SOURCES):
        digest.update(path.read_bytes())
    return f"{version.stdout}{digest.hexdigest()}\n"


def run_guest(directory: Path) -> None:
    """Restores the guest, and serves it until a signal ends this process."""
    with running_guest(directory) as guest:
        (directory / "console").symlink_to(guest.vm.console_path)
        guest.console.close()  # the socket serves one client
        (directory / "qmp").symlink_to(guest.vm.qmp_path)
        signal.pause()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # QEMU ends too
    match sys.argv[1:]:
        case ["--run", directory]:
            run_guest(Path(directory))
        case [directory]:
            save_guest(Path(directory))
        case _:
            sys.exit("usage: python -m tests.lab.nested [--run] DIRECTORY")
