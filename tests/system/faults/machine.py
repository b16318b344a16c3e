"""The VMs behind the conductor: in memory, with real connections to backends, and real QEMUs."""

import io
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tests.cli.monitors import Messages
from tests.contract.world import Parts, qemu_parts
from tests.support.vm import GuestVm
from vmplug.drivers.ports import Command
from vmplug.hypervisor.fake.backends import Refused
from vmplug.hypervisor.fake.monitor import FakeMonitor, Guest

Message = Mapping[str, Any]

_GREETING = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}
}
_TIMEOUT_S = 20.0
_SETTLE_S, _LOOK_AGAIN_S = 5.0, 0.01


class Closable(Protocol):
    """A socket or another file."""

    def close(self) -> None:
        """Close it."""


class Link(Protocol):
    """One conversation of the conductor with a VM."""

    @property
    def connection(self) -> socket.socket:
        """What becomes readable when the VM says something."""

    def send(self, request: Message, descriptors: Sequence[int]) -> None:
        """Let the VM have a command; the descriptors are closed here."""

    def close(self) -> None:
        """Hang up."""


class Machine(Protocol):
    """A VM that can be talked to, looked at, and ended."""

    def link(self) -> Link:
        """A new conversation; the greeting comes first."""

    def ask(self, execute: str, **arguments: object) -> None:
        """A command of the tests' own, which must succeed."""

    def parts(self) -> list[str]:
        """Everything that it holds, by name."""

    def count_files(self, most: int, timeout_s: float = _SETTLE_S) -> int:
        """How many files it has open, once those are no more than `most` or that takes long."""

    def guest(self, guest: Guest) -> None:
        """From now on the guest answers like that; what it was asked meanwhile when it answers."""

    def die(self) -> None:
        """End as a crash would."""


def names_of(parts: Parts, memories: Sequence[Message]) -> list[str]:
    """Everything that has a name, with what it is."""
    found = [f"device {name}: {driver}" for name, driver in parts.devices.items()]
    found += [f"object {name}: {kind}" for name, kind in parts.objects.items()]
    found += [f"node {name}" for name in parts.nodes]
    found += [f"chardev {name}" for name in parts.chardevs]
    found += [f"netdev {name}" for name in parts.netdevs]
    return found + [
        f"memory {memory['data']['id']} {memory['data']['memdev']}" for memory in memories
    ]


class WiredMonitor(FakeMonitor):
    """The machine in memory, whose files must be there and whose connections lead somewhere.

    `open` are the sockets that it holds, by the names of their chardevs and descriptors.
    """

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self.open: dict[str, Closable] = {}
        self.received: list[int] = []
        self.functions: Path | None = None

    def close_all(self) -> None:
        """Hang up on every backend."""
        for connection in self.open.values():
            connection.close()
        self.open.clear()

    def _blockdev_add(self, node_name: str, **options: Any) -> dict[str, Any]:
        file = options.get("file")
        if isinstance(file, dict):
            set_name = file["filename"].partition("/dev/fdset/")[2]
            is_there = os.path.exists(file["filename"]) or f"set {set_name}" in self.open
            if not is_there:
                raise Refused(f"Could not open '{file['filename']}': No such file or directory")
        return super()._blockdev_add(node_name, **options)

    def _add_fd(self, opaque: str) -> dict[str, Any]:
        """A name is enough: a loop device that is open does not go when it is taken."""
        answer = super()._add_fd(opaque)
        os.close(self.received.pop())
        self.open[f"set {answer['fdset-id']}"] = io.BytesIO()
        return answer

    def _remove_fd(self, fdset_id: int) -> dict[str, Any]:
        answer = super()._remove_fd(fdset_id)
        self.open.pop(f"set {fdset_id}").close()
        return answer

    def _object_add(self, qom_type: str, id: str, **properties: Any) -> dict[str, Any]:
        """QEMU makes the file of a memory that is not there."""
        if "mem_path" in properties and not os.path.exists(properties["mem_path"]):
            with open(properties["mem_path"], "wb") as file:
                file.truncate(properties["size"])
        return super()._object_add(qom_type, id, **properties)

    def _getfd(self, fdname: str) -> dict[str, Any]:
        number = self.received.pop()
        is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
        if before := self.open.get(fdname):
            before.close()
        self.open[fdname] = socket.socket(fileno=number) if is_socket else os.fdopen(number, "rb")
        return super()._getfd(fdname)

    def _closefd(self, fdname: str) -> dict[str, Any]:
        answer = super()._closefd(fdname)
        self.open.pop(fdname).close()
        return answer

    def _chardev_add(self, id: str, backend: Mapping[str, Any]) -> dict[str, Any]:
        address = backend["data"]["addr"]["data"]
        if "path" in address and id not in self.chardevs:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(_TIMEOUT_S)
            try:
                connection.connect(address["path"])
            except OSError as error:
                connection.close()
                why = f"Failed to connect to '{address['path']}': {error.strerror}"
                raise Refused(f"Failed to add chardev '{id}': {why}") from None
            self.open[id] = connection
        return super()._chardev_add(id, backend)

    def _chardev_remove(self, id: str) -> dict[str, Any]:
        answer = super()._chardev_remove(id)
        self.open.pop(id).close()
        return answer

    def _netdev_del(self, id: str) -> dict[str, Any]:
        chardev = self.netdevs.get(id)
        answer = super()._netdev_del(id)
        self.open.pop(str(chardev)).close()
        return answer

    def _query_chardev(self) -> list[dict[str, Any]]:
        return [
            {
                **found,
                "filename": "disconnected:unix:" if self._is_lost(found["label"]) else "unix:",
            }
            for found in super()._query_chardev()
        ]

    def _device_add(self, driver: str, id: str, **rest: Any) -> dict[str, Any]:
        if "host" in rest and self.functions and not (self.functions / rest["host"]).exists():
            raise Refused(f"vfio {rest['host']}: no such host device")
        if "sysfsdev" in rest and "fd" not in rest and self.functions:
            path = self.functions.parents[3] / rest["sysfsdev"].lstrip("/")
            if not path.exists():
                raise Refused(f"vfio {rest['sysfsdev']}: no such host device")
        chardev = rest.get("chardev") or self.netdevs.get(rest.get("netdev", ""))
        if isinstance(connection := self.open.get(str(chardev)), socket.socket):
            self._greet(connection)
        if "fd" not in rest:
            return super()._device_add(driver, id, **rest)
        return self._add_by_node(driver, id, **rest)

    def _add_by_node(self, driver: str, id: str, **rest: Any) -> dict[str, Any]:
        """QEMU has the node open for as long as it has the device, or keeps it."""
        gone = self.functions and not (self.functions / Path(rest["sysfsdev"]).name).exists()
        try:
            answer = super()._device_add(driver, id, **rest)
            if gone:
                self.devices.pop(id)
                raise Refused("vfio VFIO_FD9: error bind device fd=9 to iommufd=8: No such device")
        except Refused:
            if rest["fd"] not in {*self.descriptors, *self.kept}:
                self.open.pop(rest["fd"]).close()
            raise
        self.open[f"of {id}"] = self.open.pop(rest["fd"])
        return answer

    def _delete(self, name: str) -> None:
        super()._delete(name)
        if node := self.open.pop(f"of {name}", None):
            node.close()

    @staticmethod
    def _greet(connection: socket.socket) -> None:
        """Wait for the backend's features, as QEMU does. Source: docs/interop/vhost-user.rst."""
        connection.settimeout(_TIMEOUT_S)
        try:
            connection.sendall(struct.pack("<III", 1, 1, 0))
            if not connection.recv(20):
                raise BrokenPipeError
        except OSError:
            raise Refused("vhost_backend_init failed: Protocol error") from None

    def _is_lost(self, chardev: str) -> bool:
        """Whether the backend has hung up."""
        connection = self.open.get(chardev)
        if not isinstance(connection, socket.socket):
            return False
        connection.settimeout(0)
        try:
            return connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True


class MemoryLink:
    """A conversation with a machine in memory, which answers at once."""

    def __init__(self, machine: "MemoryMachine") -> None:
        self.connection, self._theirs = socket.socketpair()
        self._machine = machine
        self._say(_GREETING)

    def send(self, request: Message, descriptors: Sequence[int]) -> None:
        """See Link. Events of a command come after its answer."""
        monitor = self._machine.monitor
        monitor.received = list(descriptors)
        same = {key: request[key] for key in request.keys() & {"id"}}
        if request["execute"] == "qmp_capabilities":
            self._say({"return": {}, **same})
            return
        command = Command(request["execute"], request.get("arguments", {}))
        answers, refusal = monitor.attempt([command])
        if refusal:
            self._say({"error": {"class": refusal.error_class, "desc": refusal.desc}, **same})
        else:
            self._say({"return": answers[0], **same})
        for event in self._machine.take_events():
            self._say(event)

    def close(self) -> None:
        """See Link."""
        self.connection.close()
        self._theirs.close()

    def _say(self, message: Message) -> None:
        self._theirs.sendall(json.dumps(message).encode() + b"\r\n")


class MemoryMachine:
    """A VM in memory."""

    def __init__(self) -> None:
        self._functions: Path | None = None
        self._start()

    def show(self, functions: Path) -> None:
        """Let it see the PCI functions of a host, by their directory."""
        self._functions = self.monitor.functions = functions

    def _start(self) -> None:
        self.monitor = WiredMonitor(root_ports=3, scsi=True, memory_slots=8, iommufd=True)
        self.monitor.functions = self._functions
        self._events: list[Message] = []
        self.monitor.listen(self._note)

    def _note(self, event: str, data: Mapping[str, Any]) -> None:
        timestamp = {"seconds": 0, "microseconds": 0}
        self._events.append({"event": event, "data": dict(data), "timestamp": timestamp})

    def take_events(self) -> list[Message]:
        """What has happened since it was last asked."""
        events, self._events = self._events, []
        return events

    def link(self) -> Link:
        """See Machine."""
        self.take_events()  # QEMU tells nobody what happened before
        return MemoryLink(self)

    def ask(self, execute: str, **arguments: object) -> None:
        """See Machine."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.monitor.execute(Command(execute, named))

    def parts(self) -> list[str]:
        """See Machine."""
        m = self.monitor
        parts = Parts(
            devices={name: device.driver for name, device in m.devices.items()},
            nodes=frozenset(m.nodes),
            objects=dict(m.objects),
            chardevs=frozenset(m.chardevs),
            netdevs=frozenset(m.netdevs),
        )
        opened = [f"descriptor {name}" for name in [*m.open, *m.descriptors]]
        opened += [f"size {size} of {name}" for name, size in m.sizes.items() if name in m.nodes]
        return names_of(parts, m._query_memory_devices()) + opened

    def count_files(self, most: int, timeout_s: float = _SETTLE_S) -> int:  # noqa: ARG002
        """See Machine; what it has open is among its parts."""
        return 0

    def guest(self, guest: Guest) -> None:
        """See Machine."""
        self.monitor.guest = guest
        if guest is Guest.ANSWERS:
            self.monitor.wake_guest()

    def die(self) -> None:
        """See Machine; another one is in its place at once, empty."""
        self.monitor.close_all()
        self._start()


class QemuLink:
    """A conversation with a real QEMU."""

    def __init__(self, path: str) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(_TIMEOUT_S)
        self.connection.connect(path)

    def send(self, request: Message, descriptors: Sequence[int]) -> None:
        """See Link."""
        data = json.dumps(request).encode() + b"\n"
        if descriptors:
            socket.send_fds(self.connection, [data], list(descriptors))
        else:
            self.connection.sendall(data)
        for number in descriptors:
            os.close(number)

    def close(self) -> None:
        """See Link."""
        self.connection.close()


class QemuMachine:
    """A real QEMU."""

    def __init__(self, vm: GuestVm) -> None:
        self._vm = vm

    def link(self) -> Link:
        """See Machine."""
        return QemuLink(str(self._vm.qmp_path))

    def ask(self, execute: str, **arguments: object) -> None:
        """See Machine."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._vm.oracle.execute(execute, named)

    def parts(self) -> list[str]:
        """See Machine."""
        self._vm.oracle.events.clear()
        memories = self._vm.oracle.execute("query-memory-devices")
        return names_of(qemu_parts(self._vm), memories)

    def count_files(self, most: int, timeout_s: float = _SETTLE_S) -> int:
        """See Machine. /proc gives no event for a closed file."""
        deadline = time.monotonic() + timeout_s
        while (count := len(os.listdir(f"/proc/{self._vm.pid}/fd"))) > most:
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOK_AGAIN_S)
        return count

    def guest(self, guest: Guest) -> None:
        """See Machine; its guest always answers."""
        assert guest is Guest.ANSWERS, "the contract has the others with a real guest"

    def die(self) -> None:
        """See Machine."""
        raise AssertionError("a QEMU serves many cases")


class Reader:
    """The messages that come from a socket, and the descriptors with them."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._messages = Messages()
        self.descriptors: list[int] = []

    def read(self) -> list[Message] | None:
        """What has come; None when the other end has hung up."""
        with suppress(ConnectionResetError):
            data, descriptors, _, _ = socket.recv_fds(self.connection, 1 << 16, 8)
            self.descriptors += descriptors
            if data:
                return list(self._messages.take(data))
        return None

    def close_descriptors(self) -> None:
        """Close what was not passed on."""
        for number in self.descriptors:
            os.close(number)
        self.descriptors.clear()
