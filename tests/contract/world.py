"""VMs in memory and in QEMU behind one face, and a second reader of everything they hold.

A `Side` is a VM as the tests see it: it can be connected to, asked by the tests themselves, made
silent and woken. What it holds is read beside the product: from the attributes of the machine in
memory, and from QEMU on its second monitor. The backends of vhost-user devices are real processes
for QEMU; the machine in memory never connects to one.
"""

import json
import re
import socket
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.support.daemons import storage_daemon, vhost_user_backend, virtiofsd
from tests.support.disks import disk_image
from tests.support.raw_qmp import QmpError
from tests.support.vm import Device, GuestVm, root_ports, start_vm
from vmplug.drivers.ports import Command
from vmplug.errors import CommandError
from vmplug.host.kind import DeviceType
from vmplug.hypervisor.fake.monitor import FakeHypervisor, FakeMonitor, Guest
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.hypervisor.qmp.monitor import EventReceiver, Monitor

SHARED_MACHINE = "q35,memory-backend=mem"
SHARED_MEMORY = (
    "-object",
    json.dumps(
        {"qom-type": "memory-backend-memfd", "id": "mem", "size": 256 << 20, "share": True}
    ),
)
MEMORY_SIDE_DEVICES: list[Device] = [
    *root_ports(4),
    {"driver": "virtio-scsi-pci", "id": "scsi0", "bus": "pcie.0", "addr": "0x5"},
]
"""The devices that FakeHypervisor has from the start, for a QEMU."""

MEMORY_SIDE_MACHINE = "q35,nvdimm=on,memory-backend=mem"
MEMORY_SIDE_MEMORY = "256M,slots=4,maxmem=8G"

END_TIMEOUT_S = 60.0

Rows = Mapping[str, list[tuple[object, ...]]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a VM holds by name; devices and objects with their types."""

    devices: Mapping[str, str]
    nodes: frozenset[str]
    objects: Mapping[str, str]
    chardevs: Collection[str]
    netdevs: frozenset[str]

    def vmplugs(self) -> set[str]:
        """Everything that bears vmplug's name."""
        names = {*self.devices, *self.nodes, *self.objects, *self.chardevs, *self.netdevs}
        return {name for name in names if name.startswith("vmplug-")}


@dataclass(frozen=True, slots=True)
class Refusal:
    """QEMU's no to a command."""

    error_class: str
    desc: str


_NEWER_WORDS = (
    (r"chardev '(.*)' is already in use", r"Device '\1' is in use"),  # QEMU 10
    (
        r"Cannot delete host memory backend '(.*)' which is mapped",  # QEMU 11
        r"object '\1' is in use, can not be deleted",
    ),
    (
        r"Cannot delete throttle group '(.*)' with active references",  # QEMU 11
        r"object '\1' is in use, can not be deleted",
    ),
    (r"Could not parse object fd", "Could not parse remote object fd"),  # QEMU 11
)
"""What later QEMUs say in the place of QEMU 7.2's words, which the machine in memory speaks."""


def in_old_words(answer: object) -> object:
    """A refusal as QEMU 7.2 words it; any other answer as it is."""
    if not isinstance(answer, Refusal):
        return answer
    return Refusal(answer.error_class, old_words(answer.desc))


def old_words(desc: str) -> str:
    """QEMU's words as those before worded them."""
    for newer, older in _NEWER_WORDS:
        desc = re.sub(newer, older, desc)
    return desc


class Backend(Protocol):
    """The process at the other end of a vhost-user device."""

    @property
    def socket_path(self) -> Path:
        """Where it listens."""

    def kill(self) -> None:
        """End it as a crash would."""

    def restart(self) -> None:
        """Start it again at the same place."""


class Side(Protocol):
    """A VM as the tests see it."""

    def monitor(self) -> Monitor:
        """A new conversation, for the product."""

    def ask(self, command: Command) -> object:
        """The tests' own command: its answer, or the Refusal."""

    def parts(self) -> Parts:
        """What the VM holds, read beside the product."""

    def size_of(self, node_name: str) -> int:
        """The size in bytes that a block node was given."""

    def wait_gone(self, name: str) -> None:
        """Wait until a device that was asked to go has gone."""

    def deletions(self, name: str) -> list[Mapping[str, Any]]:
        """What DEVICE_DELETED has said since the last time, up to that of the device itself."""

    def wait_disk(self) -> None:
        """Wait until the guest has its only disk in use, and nothing more to ask of it."""

    def silence(self) -> None:
        """From now on the guest answers nothing."""

    def wake(self) -> None:
        """The guest answers again, also what it was asked meanwhile."""

    def backend(self, kind: DeviceType, directory: Path) -> AbstractContextManager[Backend]:
        """A backend for that kind of device; its files are below `directory`."""

    def connection(self, backend: Backend) -> socket.socket:
        """A connection to it."""


class MemoryBackend:
    """Nobody, at a path that a machine in memory takes for a backend's."""

    def __init__(self, machine: FakeMonitor, socket_path: Path) -> None:
        self.socket_path = socket_path
        self._machine = machine

    def kill(self) -> None:
        """See Backend. Every connection of the machine breaks off."""
        for name in self._machine.chardevs:
            self._machine.chardevs[name] = f"disconnected:unix:{self.socket_path}"

    def restart(self) -> None:
        """See Backend."""
        for name in self._machine.chardevs:
            self._machine.chardevs[name] = "unix:"


class MemorySide:
    """FakeHypervisor's machine."""

    def __init__(self, *, root_ports: int = 4, scsi: bool = True) -> None:
        self.machine: FakeMonitor = FakeHypervisor(root_ports=root_ports, scsi=scsi).monitor
        self._deleted: list[Mapping[str, Any]] = []
        self.machine.listen(self._receive)

    def _receive(self, event: str, data: Mapping[str, Any]) -> None:
        if event == "DEVICE_DELETED":
            self._deleted.append(data)

    def monitor(self) -> Monitor:
        """See Side."""
        return self.machine

    def ask(self, command: Command) -> object:
        """See Side."""
        try:
            return self.machine.execute(command)
        except CommandError as error:
            return Refusal(error.error_class, error.desc)

    def parts(self) -> Parts:
        """See Side."""
        return Parts(
            devices={name: device.driver for name, device in self.machine.devices.items()},
            nodes=frozenset(self.machine.nodes),
            objects=dict(self.machine.objects),
            chardevs=frozenset(self.machine.chardevs),
            netdevs=frozenset(self.machine.netdevs),
        )

    def size_of(self, node_name: str) -> int:
        """See Side."""
        return self.machine.sizes[node_name]

    def wait_gone(self, name: str) -> None:
        """See Side; nothing takes time in memory."""
        assert name not in self.machine.devices

    def deletions(self, name: str) -> list[Mapping[str, Any]]:
        """See Side."""
        told, self._deleted = self._deleted, []
        assert told[-1]["device"] == name
        return told

    def wait_disk(self) -> None:
        """See Side; nothing takes time in memory."""

    def silence(self) -> None:
        """See Side."""
        self.machine.guest = Guest.SILENT

    def wake(self) -> None:
        """See Side."""
        self.machine.wake_guest()

    @contextmanager
    def backend(self, kind: DeviceType, directory: Path) -> Iterator[Backend]:
        """See Side."""
        yield MemoryBackend(self.machine, directory / f"{kind}.sock")

    def connection(self, backend: Backend) -> socket.socket:  # noqa: ARG002
        """See Side; it leads nowhere."""
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours


class QemuSide:
    """A real QEMU; whatever was plugged goes away with `clean`."""

    def __init__(self, vm: GuestVm) -> None:
        self._vm = vm
        self._vm.oracle.events.clear()
        self._first = self.parts()

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._vm.pid

    def monitor(self) -> Monitor:
        """See Side."""
        return QmpMonitor.connect(str(self._vm.qmp_path))

    def ask(self, command: Command) -> object:
        """See Side."""
        try:
            return self._vm.oracle.execute(command.execute, command.arguments)
        except QmpError as error:
            return Refusal(error.error_class, error.desc)

    def parts(self) -> Parts:
        """See Side."""
        return qemu_parts(self._vm)

    def size_of(self, node_name: str) -> int:
        """See Side."""
        nodes = self._vm.oracle.execute("query-named-block-nodes", flat=True)
        (image,) = [node["image"] for node in nodes if node["node-name"] == node_name]
        return int(image["virtual-size"])

    def wait_gone(self, name: str) -> None:
        """See Side. The tree forgets a device before its node is free; the event comes after.

        The first event may be late news of a device that had the name before.
        """
        self._vm.oracle.wait_event("DEVICE_DELETED", device=name)
        while name in self.parts().devices:
            self._vm.oracle.wait_event("DEVICE_DELETED", device=name)

    def deletions(self, name: str) -> list[Mapping[str, Any]]:
        """See Side. The tests' own conversation lasts; the product's is over after its turn."""
        told = [self._vm.oracle.wait_event("DEVICE_DELETED")]
        while told[-1].get("device") != name:
            told.append(self._vm.oracle.wait_event("DEVICE_DELETED"))
        return [*told]

    def wait_disk(self) -> None:
        """See Side."""
        (disk,) = self._vm.console.wait_for_disks(1)
        self._vm.console.read(disk.name, 0, 512)

    def silence(self) -> None:
        """See Side."""
        if self._vm.oracle.execute("query-status")["running"]:
            self._vm.oracle.execute("stop")

    def wake(self) -> None:
        """See Side."""
        self._vm.oracle.execute("cont")

    @contextmanager
    def backend(self, kind: DeviceType, directory: Path) -> Iterator[Backend]:
        """See Side. One for a shared directory serves a single connection and needs root."""
        image = disk_image(directory / f"{kind}.img", 2, "served")
        with ExitStack() as stack:
            match kind:
                case DeviceType.VHOST_USER_BLK:
                    yield stack.enter_context(storage_daemon(image))
                case DeviceType.VHOST_USER_SCSI:
                    yield stack.enter_context(vhost_user_backend("scsi", image))
                case DeviceType.VHOST_USER_NET:
                    yield stack.enter_context(vhost_user_backend("net"))
                case DeviceType.VHOST_USER_FS:
                    yield stack.enter_context(virtiofsd(directory))
                case _:
                    raise AssertionError(f"nothing serves {kind}")

    def connection(self, backend: Backend) -> socket.socket:
        """See Side."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(backend.socket_path))
        return connection

    def clean(self) -> None:
        """Make the VM what it was, whatever a test left there; needs the guest."""
        oracle = self._vm.oracle
        is_running = oracle.execute("query-status")["running"]
        oracle.events.clear()
        left = self.parts().devices.keys() - self._first.devices.keys()
        for name in left:
            self.ask(Command("device_del", {"id": name}))
        if not is_running:
            oracle.execute("cont")
        for name in left:
            self.wait_gone(name)
        for name in sorted(self._nodes_left(), key=len, reverse=True):
            while isinstance(self.ask(Command("blockdev-del", {"node-name": name})), Refusal):
                oracle.wait_event("DEVICE_DELETED", END_TIMEOUT_S)  # its device is on its way out
        for name in self.parts().netdevs - self._first.netdevs:
            self.ask(Command("netdev_del", {"id": name}))
        for name in set(self.parts().chardevs).difference(self._first.chardevs):
            self.ask(Command("chardev-remove", {"id": name}))
        for name in self.parts().objects.keys() - self._first.objects.keys():
            self.ask(Command("object-del", {"id": name}))
        assert self.parts() == self._first

    def _nodes_left(self) -> set[str]:
        """Nodes with a name of somebody's; those without go with them."""
        return {n for n in self.parts().nodes - self._first.nodes if not n.startswith("#")}


def qemu_parts(vm: GuestVm) -> Parts:
    """What a QEMU holds, as it says on its second monitor."""
    nodes = vm.oracle.execute("query-named-block-nodes", flat=True)
    return Parts(
        devices=_children(vm, "/machine/peripheral"),
        nodes=frozenset(node["node-name"] for node in nodes),
        objects=_children(vm, "/objects"),
        chardevs=frozenset(found["label"] for found in vm.oracle.execute("query-chardev")),
        netdevs=_netdevs(vm),
    )


_NETDEV = re.compile(r"^(?: \\ )?([^ :]+): index=[0-9]+,type=(?!nic)", re.MULTILINE)
"""Source: QEMU net/net.c, print_net_client and hmp_info_network."""


def _netdevs(vm: GuestVm) -> frozenset[str]:
    """The halves of networks that are not the guest's; QMP has no question for them."""
    text = vm.oracle.execute("human-monitor-command", {"command-line": "info network"})
    return frozenset(_NETDEV.findall(text))


@contextmanager
def memory_side_vm(
    directory: Path, *, guest: bool = True, paused: bool = False
) -> Iterator[GuestVm]:
    """A real QEMU that offers what FakeHypervisor does."""
    with start_vm(
        directory,
        machine=MEMORY_SIDE_MACHINE,
        memory=MEMORY_SIDE_MEMORY,
        devices=MEMORY_SIDE_DEVICES,
        extra=SHARED_MEMORY,
        guest=guest,
        paused=paused,
    ) as vm:
        yield vm


def _children(vm: GuestVm, path: str) -> dict[str, str]:
    entries = vm.oracle.execute("qom-list", path=path)
    children = [entry for entry in entries if entry["type"].startswith("child<")]
    return {entry["name"]: entry["type"][len("child<") : -1] for entry in children}


class Recorder(Monitor):
    """A monitor that writes down what passes."""

    def __init__(self, inner: Monitor) -> None:
        self._inner = inner
        self.sent: list[Command] = []

    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        """See Monitor."""
        answers, refusal = self._inner.attempt(commands)
        self.sent += commands[: len(answers) + bool(refusal)]
        return answers, refusal

    def keep_turn(self) -> AbstractContextManager[None]:
        """See Monitor."""
        return self._inner.keep_turn()

    def hear_events(self) -> AbstractContextManager[None]:
        """See Monitor."""
        return self._inner.hear_events()

    def listen(self, receive: EventReceiver) -> None:
        """See Monitor."""
        self._inner.listen(receive)

    def close(self) -> None:
        """See Monitor."""
        self._inner.close()


def recorded(side: Side) -> tuple[Qemu, Recorder]:
    """A hypervisor on a new conversation, and what it sends."""
    recorder = Recorder(side.monitor())
    return Qemu(recorder), recorder


def journal_rows(state_dir: Path) -> Rows:
    """Every row of every table of the journal but its own id, read with plain SQLite."""
    path = state_dir / "journal.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        names = "SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'journal'"
        tables = db.execute(f"{names} ORDER BY name")
        return {
            name: db.execute(f'SELECT * FROM "{name}" ORDER BY rowid').fetchall()
            for (name,) in tables.fetchall()
        }
