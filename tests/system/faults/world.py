"""One kind of device in one VM, things of other people's around it, and pictures of it all."""

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.contract.world import journal_rows
from tests.support.fake_kernel import FakeKernel
from tests.support.pci_tree import PciTree
from tests.system.faults.conductor import Conductor
from tests.system.faults.kinds import TAKES, THEIRS, Behind, Kind
from tests.system.faults.machine import Machine, MemoryMachine
from tests.system.faults.process import REFUSE, Hooks, trace
from tests.system.faults.steps import Fault, StepKind
from vmplug.drivers.plug import VirtiofsdSpec
from vmplug.drivers.ports import Endpoint
from vmplug.host.kind import DeviceType, Identity
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.process import find_marked, wait_for_end
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.hypervisor.fake.monitor import Guest
from vmplug.hypervisor.keeper import KEEPER_MARK
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner, VirtiofsdProcess
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, DeviceRecord, VmRecord, record_vm
from vmplug.journal.state import State
from vmplug.manager.binding.binder import Binder
from vmplug.manager.manager import DeviceManager

VM, OTHER_VM, OWN_VM, OWNER = "sandbox-1", "their-vm", "own", "ctr1"
FOREIGN = "vmplug-f0e1d2c3b4a59687"
SILENCE_S = 0.1
PATIENT_S = 3.0
"""The deadlines for answers of a silent QEMU, at first and when that was too short."""
UNPLUG_S = 5.0

Picture = list[str]


class WatchedKernel(FakeKernel):
    """The kernel that is a tree; each write to it is a step."""

    hooks: Hooks | None = None

    def write_attribute(self, path: str, text: str) -> int | None:
        """See HostRoot."""
        if self.hooks is None:
            return super().write_attribute(path, text)
        words = [path.rpartition("/")[2], *re.findall(r"\b[0-9a-f:]+\.[0-7]", f"{path} {text}")]
        with self.hooks.step(StepKind.KERNEL, " ".join(words)) as word:
            return 5 if word == REFUSE else super().write_attribute(path, text)


class WatchedDaemons(HostVirtiofsdRunner):
    """vmplug's own daemons; starting one is a step."""

    def __init__(self, vm: str, hooks: Hooks) -> None:
        super().__init__(vm)
        self._hooks = hooks

    def start(self, daemon: VirtiofsdSpec, device_id: str) -> VirtiofsdProcess:
        """See VirtiofsdRunner."""
        with self._hooks.step(StepKind.DAEMON, "start virtiofsd"):
            return super().start(daemon, device_id)


class Proxied(Qemu):
    """A QEMU whose process is not to be seen: its socket decides whether it has ended."""

    @property
    def endpoint(self) -> Endpoint | None:
        """See Hypervisor."""
        return self._endpoint


class World:
    """A VM, its journal and its host, for one kind of device."""

    def __init__(self, stack: ExitStack, directory: Path, kind: Kind, machine: Machine) -> None:
        self.kind = kind
        self.machine = machine
        self.directory = directory
        self.state_dir = directory / "state"
        self.words = directory / "words"
        self.state_dir.mkdir()
        size = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "faults", str(self.state_dir)]
        subprocess.run(size, check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", str(self.state_dir)], check=True)
        self.conductor = Conductor(directory / "qmp.sock", machine, self)
        stack.callback(self.conductor.close)
        behind = directory / "b"
        behind.mkdir()
        self.behind: Behind = stack.enter_context(kind.make(behind, self.conductor.path))
        self.tree: PciTree | None = getattr(self.behind, "tree", None)
        if self.tree and isinstance(machine, MemoryMachine):
            machine.show(self.tree.path / "sys/bus/pci/devices")
        self.behind.renew()
        self.holder = subprocess.Popen(["sleep", "infinity"])  # what a lease is given to
        stack.callback(self.holder.wait)
        stack.callback(self.holder.kill)
        self._add_strangers()

    # what happens to it

    def spoil(self, fault: Fault) -> None:
        """See Host."""
        match fault:
            case Fault.DISK_FULL:
                self._fill()
            case Fault.BACKEND_DIES:
                self.behind.kill()
            case Fault.OWN_DIES:
                for pid in self._signal_own(signal.SIGKILL):
                    assert wait_for_end(pid, 60)  # it still listens while it dies
            case Fault.OWN_HANGS:
                self._signal_own(signal.SIGSTOP)
            case Fault.NOTED_WRONG:
                with Journal.open(self.state_dir) as journal:
                    journal.set_process(VM, self.holder.pid, 1)  # which did not begin then
            case _:
                self.behind.take()

    def _fill(self) -> None:
        with suppress(OSError), (self.state_dir / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def _signal_own(self, number: signal.Signals) -> list[int]:
        """To the QEMU that vmplug has started; gives its pid."""
        directory = str(self.state_dir / "vm" / OWN_VM)
        there = [pid for pid, where in _working_below(self.state_dir) if where == directory]
        keepers = find_marked(KEEPER_MARK)  # looked for later: its dd is a new one now and then
        found = [pid for pid in there if pid not in keepers]
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return found

    def mend(self) -> None:
        """There is room on the disk again, and the guest and QEMU answer."""
        self.machine.guest(Guest.ANSWERS)
        self._signal_own(signal.SIGCONT)
        (self.state_dir / "ballast").unlink(missing_ok=True)

    def know_vm(self) -> None:
        """The journal has the VM, as after `vm adopt`."""
        with Journal.open(self.state_dir) as journal:
            if not journal.find_vm(VM):
                journal.add_vm(record_vm(VM, Endpoint(str(self.conductor.path), None)))

    def start_again(self) -> None:
        """A new VM in the place of one that died."""
        self._add_to_vm()
        self.conductor.listen()

    # the product, in a process under test

    def host(self, hooks: Hooks | None = None) -> HostRoot:
        """The host of this kind."""
        if self.tree is None:
            return HostRoot("/")
        kernel = WatchedKernel(self.tree, takes=TAKES)
        kernel.hooks = hooks
        return kernel

    @contextmanager
    def manager(self, hooks: Hooks, *, patience_s: float = 10.0) -> Iterator[DeviceManager]:
        """The manager, whose steps are told."""
        path = str(self.conductor.path)
        monitor = QmpMonitor.connect(path, timeout_s=patience_s, command_timeout_s=patience_s)
        endpoint, daemons = Endpoint(path, None), WatchedDaemons(path, hooks)
        hypervisor = Proxied(monitor, endpoint, daemons, self.host())
        with DeviceManager.open(
            vm=VM,
            host=self.host(hooks),
            hypervisor=hypervisor,
            state_dir=self.state_dir,
            vhost_user_store=VhostUserStore(str(self.directory / "b/store")),
        ) as devices:
            trace(devices._journal, hooks)
            yield devices

    # what belongs to others

    def _add_strangers(self) -> None:
        self._add_to_vm()
        self.know_vm()
        with Journal.open(self.state_dir) as journal:
            journal.add_vm(
                VmRecord(name=OTHER_VM, qmp_socket="/x", pid=None, started_at=None, is_ours=False)
            )
            record = DeviceRecord(
                id="their-own-device",
                vm=OTHER_VM,
                identity=Identity.parse("file:/theirs"),
                kind=DeviceType.BLOCK,
                host_path="/theirs",
                state=State.PLUGGING,
                read_only=False,
                share_rw=False,
                options={},
                place="rp0 0",
                guest_address=None,
            )
            hold = Attachment(
                id="their-attachment",
                vm=OTHER_VM,
                owner=OWNER,
                name="/dev/x",
                host_path="/theirs",
                kind=DeviceType.BLOCK,
                read_only=False,
                count=1,
                state=State.PLUGGING,
                guest_address=None,
                device_id=record.id,
                options={},
            )
            journal.add_devices([record], [hold])
            if self.tree:
                Binder(journal, self.host()).bind(find_vfio_device(THEIRS, self.host()))

    def _add_to_vm(self) -> None:
        """Things without an owner, and a disk that another journal has in this VM."""
        ask = self.machine.ask
        ask("object-add", qom_type="rng-random", id="their-source", filename="/dev/urandom")
        ask("blockdev-add", driver="null-co", node_name=FOREIGN, read_zeroes=True)
        place = {"bus": "rp0", "addr": "0x0"}
        ask("device_add", driver="virtio-blk-pci", id=FOREIGN, drive=FOREIGN, **place)

    # pictures

    def picture(self, *, of_vm: bool = True) -> Picture:
        """The journal, the VM and the host; ids that were drawn look all the same."""
        rows = journal_rows(self.state_dir)
        found = [f"{table} {row}" for table, many in rows.items() for row in many]
        if of_vm:
            found += self.machine.parts()
        mine = [
            mark
            for mark in find_marked("VMPLUG_DEVICE").values()
            if f"{self.conductor.path}" in mark and ".log " not in mark  # its keeper
        ]
        found += ["a virtiofsd"] * len(set(mine))
        found += [f"directory {path.name}" for path in (self.state_dir / "vm").glob("*")]
        # With the keepers of its logs, whose shells begin a process each, a moment after they do.
        found += {f"a QEMU in {where}" for _, where in _working_below(self.state_dir)}
        if self.tree:
            kernel = FakeKernel(self.tree)
            found += [f"{bdf}: {is_now}" for bdf, is_now in kernel.picture().items()]
            made = (self.tree.path / "sys/bus/mdev/devices").glob("*")
            found += [f"mediated device {path.name}" for path in made]
        here = str(self.directory)
        return sorted(_without_ids(line.replace(here, "DIR")) for line in found)


def _working_below(directory: Path) -> Iterator[tuple[int, str]]:
    """The processes whose working directory is below a directory, with that."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            where = os.readlink(link)
            if where.startswith(f"{directory}/"):
                yield int(link.parent.name), where


_PROCESS = re.compile(r"(qmp\.sock', |'lease:[^']+', )(?:[0-9]+, [0-9]+|None, None)")
_ID, _NODE = re.compile(r"\b[0-9a-f]{16}\b"), re.compile(r"#block[0-9]+")
_THING = re.compile(r"'(file|block|vfio) [^']+'")
"""What the journal says was plugged, which is another file or device in each world."""


def _without_ids(line: str) -> str:
    line = _PROCESS.sub(r"\1PROCESS", _THING.sub(r"'\1 THING'", line))
    return _NODE.sub("#block", _ID.sub("ID", line))


@contextmanager
def world(kind: Kind, machine: Machine | None = None) -> Iterator[World]:
    """A world in a directory with a short path; its VM is in memory if none is given."""
    with ExitStack() as stack:
        made = machine or MemoryMachine()
        directory = stack.enter_context(tempfile.TemporaryDirectory("", "vmplug-", "/tmp"))
        if machine is None:
            stack.callback(made.die)
        yield World(stack, Path(directory), kind, made)
