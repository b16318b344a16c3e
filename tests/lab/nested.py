"""VMs in the lab, which the lab's devices are handed to.

Their QEMU is an emulated CPU's: a guest would take it half a minute to boot. It boots once outside
the lab, when that is built, and is restored from then on: `python -m tests.lab.nested DIRECTORY`.
"""

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from guest.console import GuestConsole
from lab.kernel import BUILT

from tests.support.vm import BUILT_GUEST, QEMU, Device, GuestVm, root_ports, start_vm

SAVED = BUILT / "nested"
MEMORY = "128M"
PLAIN_PORTS = ("rp0", "rp1", "rp2")
LARGE_PORT = "rp3"
"""A root port whose window holds a BAR of 8 GiB."""
BRIDGE = "br0"
"""A bridge to conventional PCI, at the root bus."""

RESTORE_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 60.0


def devices() -> list[Device]:
    """What is in such a VM from the start."""
    *plain, large = root_ports(len(PLAIN_PORTS) + 1)
    bridge = {"driver": "pcie-pci-bridge", "id": BRIDGE, "bus": "pcie.0", "addr": "0x18"}
    return [*plain, {**large, "pref64-reserve": 16 << 30}, bridge]


class NestedGuest:
    """A guest that runs in the lab. Every wait has a deadline: GuestTimeoutError."""

    def __init__(self, vm: GuestVm, console: GuestConsole) -> None:
        self.vm = vm
        self.console = console

    def read_nvme(self, length: int) -> bytes:
        """Bytes from the start of the first NVMe namespace, once it is there."""
        self.console.wait_until("[ -b /dev/nvme0n1 ]", timeout_s=ANSWER_TIMEOUT_S)
        return self.console.read("nvme0n1", 0, length)

    def pci_ids(self) -> dict[str, str]:
        """`8086:10d3` for every PCI function that the guest sees, by its address there."""
        line = "for d in /sys/bus/pci/devices/*; do echo ${d##*/} $(cat $d/vendor $d/device); done"
        words = (line.split() for line in self._run(line).splitlines())
        return {bdf: f"{vendor[2:]}:{device[2:]}" for bdf, vendor, device in words}

    def wait_for_pci(self, vendor_and_device: str) -> None:
        """Until the guest sees a function with these numbers, such as `1234:11e8`."""
        vendor, device = (f"0x{number}" for number in vendor_and_device.split(":"))
        self.console.wait_until(
            f"grep -lx {device} $(grep -lx {vendor} /sys/bus/pci/devices/*/vendor | "
            "sed s/vendor/device/)",
            timeout_s=ANSWER_TIMEOUT_S,
        )

    def _run(self, line: str) -> str:
        return self.console.run(line, timeout_s=ANSWER_TIMEOUT_S)


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
    extra = ["-serial", "chardev:kernel", "-serial", "chardev:console"]
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
        with start_vm(Path(work), devices=devices(), memory=MEMORY) as vm:
            vm.console.run("true")
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
    """All that the state depends on: it is QEMU's own, of this machine and this guest."""
    version = subprocess.run([QEMU, "--version"], check=True, capture_output=True, text=True)
    digest = hashlib.sha256(json.dumps(devices()).encode())
    for name in ("vmlinuz", "initrd.img"):
        digest.update((BUILT_GUEST / name).read_bytes())
    return f"{version.stdout}{MEMORY} {digest.hexdigest()}\n"


if __name__ == "__main__":
    save_guest(Path(sys.argv[1]))
