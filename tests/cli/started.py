"""VMs of any machine that `vmplug vm start` starts, with the tests' own ways to look into them."""

import os
import select
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guest.console import GuestConsole, running_time

from tests.cli.command import Result, Vmplug
from tests.cli.world import names_in_qemu, processes_below
from tests.support.raw_qmp import RawQmp
from tests.support.vm import BUILT_GUESTS, BUSY_HOST, MICROVM_TSC_KHZ, Flavour

END_S = 60.0
START_S = 60.0

_APPEND = {
    "q35": f"console=ttyS0 quiet panic=-1 {BUSY_HOST}",
    "microvm": "ctl=ttyS0 modules=virtio_mmio quiet loglevel=0 panic=-1 "
    f"tsc_early_khz={MICROVM_TSC_KHZ} {BUSY_HOST}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedVm:
    """A VM of the command line; `told` is what `vm start --json` said of it and its devices."""

    vmplug: Vmplug
    name: str
    oracle: RawQmp
    told: Mapping[str, Any]
    guest_socket: Path

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return int(self.told["vm"]["pid"])

    @property
    def attachments(self) -> dict[str, dict[str, Any]]:
        """What was plugged from the start, by the name that it was asked for."""
        return {hold["name"]: hold for hold in self.told["attachments"]}

    def attach(self, *words: str, owner: str = "ctr1") -> Result:
        """The verb, for this VM."""
        return self.vmplug("attach", *words, "--vm", self.name, "--owner", owner, "--json")

    def attached(self, *words: str, owner: str = "ctr1") -> dict[str, Any]:
        """The one attachment that was asked for."""
        (attachment,) = self.attach(*words, owner=owner).json()["attachments"]
        return dict(attachment)

    def states(self) -> dict[str, str]:
        """What another process says is in the VM: its state by its name."""
        listed = self.vmplug("list", "--vm", self.name, "--json").json()["attachments"]
        return {hold["name"]: hold["state"] for hold in listed}

    def vmplugs_devices(self) -> set[str]:
        """The ids of the devices of vmplug that QEMU has."""
        entries = self.oracle.execute("qom-list", path="/machine/peripheral")
        names = [entry["name"] for entry in entries]
        return {name.removeprefix("vmplug-") for name in names if name.startswith("vmplug-")}

    def names(self) -> frozenset[str]:
        """Everything in QEMU that has a name, connections too."""
        chardevs = {chardev["label"] for chardev in self.oracle.execute("query-chardev")}
        return names_in_qemu(self.oracle) | chardevs

    def properties_of(self, device_id: str, *names: str) -> tuple[Any, ...]:
        """Properties of a device in QEMU."""
        path = f"/machine/peripheral/vmplug-{device_id}"
        return tuple(self.oracle.execute("qom-get", path=path, property=name) for name in names)


def start_words(
    name: str,
    directory: Path,
    *words: str,
    machine: str = "q35",
    flavour: Flavour | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """The words that start a VM with a second monitor; with a `flavour` a guest boots in it.

    Its control port is a socket in `directory`. Without a guest the VM stays paused.
    """
    said = ["vm", "start", name, "--machine", machine, "--accel", "tcg", "--memory", "256"]
    channels = ["oracle"]
    if flavour:
        built = BUILT_GUESTS[flavour]
        said += ["--kernel", str(built / "vmlinuz"), "--initrd", str(built / "initrd.img")]
        said += ["--append", _APPEND[machine]]
        channels.append("guest")
    said += [*words, "--json", "--"]
    for channel in channels:
        path = directory / f"{name}-{channel}.sock"
        said += ["-chardev", f"socket,id={channel},path={path},server=on,wait=off"]
    said += ["-qmp", "chardev:oracle"]
    return [*said, *(["-serial", "chardev:guest"] if flavour else ["-S"]), *extra]


@contextmanager
def started(
    vmplug: Vmplug,
    name: str,
    *words: str,
    machine: str = "q35",
    flavour: Flavour | None = None,
    extra: Sequence[str] = (),
) -> Iterator[StartedVm]:
    """A VM of the test's own; without a `flavour` it is paused and has no guest."""
    directory = vmplug.state_dir.parent
    with ExitStack() as stack:
        stack.enter_context(no_qemu_left(directory))
        said = start_words(name, directory, *words, machine=machine, flavour=flavour, extra=extra)
        told = vmplug(*said).json()
        oracle = stack.enter_context(RawQmp.connect(directory / f"{name}-oracle.sock"))
        yield StartedVm(
            vmplug=vmplug,
            name=name,
            oracle=oracle,
            told=told,
            guest_socket=directory / f"{name}-guest.sock",
        )


def booted(vm: StartedVm) -> GuestConsole:
    """The guest's console, once it has booted; a context manager."""
    return GuestConsole.connect(vm.guest_socket, START_S, clock=running_time(vm.pid))


@contextmanager
def no_qemu_left(directory: Path) -> Iterator[None]:
    """Ends the QEMUs that a test left to work below `directory`; their shares' daemons follow."""
    try:
        yield
    finally:
        pids = set(processes_below(directory))
        with ending(pids):
            for pid in pids:
                with suppress(ProcessLookupError):  # one may take another along
                    os.kill(pid, signal.SIGKILL)


def sharers_of(directory: Path) -> set[int]:
    """The processes that were started to share a directory or what is below it.

    A daemon of vmplug's knows the directory by its environment. A corpse has no words any more.
    """
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            said = (Path(f"/proc/{pid}", name).read_bytes() for name in ("cmdline", "environ"))
            words = b"\0".join(said).split(b"\0")
        except OSError:  # it has ended
            continue
        names = (b"source=", b"--shared-dir=", b"VMPLUG_DIRECTORY=")
        told = tuple(name + os.fsencode(directory) for name in names)
        if any(word.startswith(told) for word in words):
            found.add(int(pid))
    return found


@contextmanager
def ending(pids: set[int]) -> Iterator[None]:
    """All these processes end in the `with`, or soon after it. Source: pidfd_open(2)."""
    descriptors = []
    for pid in pids:
        with suppress(ProcessLookupError):  # it has ended already
            descriptors.append(os.pidfd_open(pid))
    try:
        yield
        for descriptor in descriptors:
            assert select.select([descriptor], [], [], END_S)[0], f"one of {pids} goes on"
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
