"""An in-memory hypervisor for tests: Qemu on a monitor that needs no QEMU.

What it answers is held to real QEMU 7.2 by the contract tests. It knows the commands that vmplug
sends to plug disks, and no others.
"""

import io
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from vmplug.address import PERIPHERAL
from vmplug.drivers.base import Command, Daemon
from vmplug.errors import CommandError
from vmplug.hypervisor.daemon import Daemons, Started
from vmplug.hypervisor.monitor import EventReceiver, Monitor, command_error
from vmplug.hypervisor.qemu import Qemu

_ROOT_BUS = "/machine/q35/pcie.0"
_FIRST_PORT_SLOT = 0x10
_MAX_PORTS = 15


class Guest(StrEnum):
    """What the guest does when it is asked to release a device."""

    ANSWERS = "answers"
    SILENT = "silent"
    REFUSES = "refuses"


class MemoryHypervisor(Qemu):
    """A q35 machine in memory with up to 15 root ports and, if wanted, a virtio-scsi controller.

    It takes `memory_slots` NVDIMMs. No process is started for a shared directory. `monitor` may be
    told to fail (`fail_at`) and how the guest behaves (`guest`).
    """

    def __init__(self, *, root_ports: int = 4, scsi: bool = True, memory_slots: int = 4) -> None:
        self.monitor = MemoryMonitor(root_ports=root_ports, scsi=scsi, memory_slots=memory_slots)
        super().__init__(self.monitor, daemons=_NoDaemons())


class _NoDaemons(Daemons):
    """Connections that lead nowhere."""

    def start(self, daemon: Daemon, device_id: str) -> Started:
        """See Daemons."""
        ours, theirs = socket.socketpair()
        theirs.close()
        return Started(ours, io.BytesIO())

    def find(self, device_ids: Iterable[str] | None = None) -> Mapping[str, int]:
        """See Daemons: none ever runs."""
        return {}

    def end(self, device_ids: Iterable[str]) -> None:
        """See Daemons."""


_IN_USE = {"chardev": ": Device '{}' is in use", "netdev": ", it's in use"}


class _Refused(Exception):
    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.error_class = error_class


@dataclass(slots=True)
class _Device:
    driver: str
    bus: str
    properties: Mapping[str, Any]
    unplugging: bool = False


@dataclass(slots=True)
class MemoryMonitor(Monitor):
    """The answers of a small QEMU. `fail_at` names a command that is refused once."""

    root_ports: int = 4
    scsi: bool = True
    memory_slots: int = 4
    guest: Guest = Guest.ANSWERS
    fail_at: str | None = None
    sent: list[Command] = field(default_factory=list)
    devices: dict[str, _Device] = field(default_factory=dict)
    nodes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    objects: dict[str, str] = field(default_factory=dict)
    chardevs: dict[str, str] = field(default_factory=dict)
    netdevs: dict[str, str] = field(default_factory=dict)
    descriptors: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    _receivers: list[EventReceiver] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.root_ports > _MAX_PORTS:
            raise ValueError(f"{self.root_ports} root ports are more than {_MAX_PORTS}")
        for index in range(self.root_ports):
            self._add_cold(f"rp{index}", "pcie-root-port", _FIRST_PORT_SLOT + index)
        if self.scsi:
            self._add_cold("scsi0", "virtio-scsi-pci", 0x5)

    def _add_cold(self, name: str, driver: str, slot: int) -> None:
        self.devices[name] = _Device(driver, _ROOT_BUS, {"addr": slot << 3, "hotplug": True})

    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        """See Monitor."""
        answers: list[Any] = []
        for command in commands:
            try:
                answers.append(self._answer(command))
            except CommandError as refusal:
                return answers, refusal
        return answers, None

    def _answer(self, command: Command) -> Any:
        self.sent.append(command)
        answer = getattr(self, "_" + command.execute.replace("-", "_"), None)
        try:
            if answer is None:
                raise _Refused(
                    f"The command {command.execute} has not been found", "CommandNotFound"
                )
            if self.fail_at == command.execute:
                self.fail_at = None
                raise _Refused(f"{command.execute} was told to fail")
            return answer(**{k.replace("-", "_"): v for k, v in command.arguments.items()})
        except _Refused as error:
            raise command_error(command, error.error_class, str(error)) from None

    def listen(self, receive: EventReceiver) -> None:
        """See Monitor."""
        self._receivers.append(receive)

    def close(self) -> None:
        """See Monitor."""

    def wake_guest(self) -> None:
        """Let a silent guest answer everything that it was asked."""
        self.guest = Guest.ANSWERS
        for name in [name for name, device in self.devices.items() if device.unplugging]:
            self._delete(name)

    def _emit(self, event: str, **data: str) -> None:
        for receive in self._receivers:
            receive(event, data)

    def _delete(self, name: str) -> None:
        device = self.devices.pop(name)
        path = f"{PERIPHERAL}/{name}"
        if device.driver.endswith("-pci"):
            self._emit("DEVICE_DELETED", path=f"{path}/virtio-backend")
        self._emit("DEVICE_DELETED", path=path, device=name)

    # what each command answers

    def _qom_list(self, path: str) -> list[dict[str, str]]:
        if path == "/machine":
            return [_entry(name, "property") for name in ("type", "memory", "nvdimm")]
        if path == PERIPHERAL:
            return [_entry(name, f"child<{d.driver}>") for name, d in self.devices.items()]
        if path == "/machine/peripheral-anon":
            return []
        if path == "/objects":
            return [_entry(name, f"child<{kind}>") for name, kind in self.objects.items()]
        name, _, rest = path.removeprefix(PERIPHERAL + "/").partition("/")
        if name not in self.devices:
            raise _Refused(f"Device '{path}' not found", "DeviceNotFound")
        if not rest:
            return [_entry(name, "bool") for name in self.devices[name].properties]
        links = [_entry(link, "link<device>") for link, _ in self._occupants(path)]
        return [_entry("hotplug-handler", "link<hotplug-handler>"), *links]

    def _occupants(self, bus_path: str) -> Iterator[tuple[str, str]]:
        on_bus = (name for name, device in self.devices.items() if device.bus == bus_path)
        for index, name in enumerate(on_bus):
            yield f"child[{index}]", name

    def _qom_get(self, path: str, property: str) -> Any:
        if path == "/machine":
            memory = {"size": 256 << 20, "slots": self.memory_slots, "max-size": 1 << 33}
            machine = {"type": "pc-q35-7.2-machine", "nvdimm": True, "memory": memory}
            return machine[property]
        if property.startswith("child["):
            return f"{PERIPHERAL}/{dict(self._occupants(path))[property]}"
        device = self.devices.get(path.removeprefix(PERIPHERAL + "/"))
        if device is None:
            raise _Refused(f"Device '{path}' not found", "DeviceNotFound")
        found = {"parent_bus": device.bus, **device.properties}
        if property not in found:
            raise _Refused(f"Property '{device.driver}.{property}' not found")
        return found[property]

    def _query_memdev(self) -> list[dict[str, Any]]:
        return [{"id": "mem", "share": True}]

    def _query_memory_devices(self) -> list[dict[str, Any]]:
        return [
            {
                "type": "nvdimm",
                "data": {
                    "id": name,
                    "memdev": f"/objects/{device.properties['memdev']}",
                    "slot": device.properties["slot"],
                },
            }
            for name, device in self.devices.items()
            if device.driver == "nvdimm"
        ]

    def _query_kvm(self) -> dict[str, Any]:
        return {"enabled": False, "present": True}

    def _query_cpus_fast(self) -> list[dict[str, Any]]:
        return [{"cpu-index": 0}]

    def _query_chardev(self) -> list[dict[str, Any]]:
        return [
            {"label": name, "filename": connection, "frontend-open": True}
            for name, connection in self.chardevs.items()
        ]

    def _query_status(self) -> dict[str, Any]:
        running = self.guest is not Guest.SILENT
        return {"status": "running" if running else "paused", "running": running}

    def _query_named_block_nodes(self, *, flat: bool) -> list[dict[str, str]]:
        return [{"node-name": name} for name in self.nodes]

    def _blockdev_add(self, node_name: str, **options: Any) -> dict[str, Any]:
        group, file = options.get("throttle_group"), options.get("file")
        if group and group not in self.objects:
            raise _Refused(f"Throttle group '{group}' does not exist")
        if isinstance(file, str) and file not in self.nodes:
            raise _Refused(f"Cannot find device='{file}' nor node-name='{file}'")
        if node_name in self.nodes:
            raise _Refused(f"Duplicate nodes with node-name='{node_name}'")
        self.nodes[node_name] = options
        return {}

    def _blockdev_del(self, node_name: str) -> dict[str, Any]:
        if node_name not in self.nodes:
            raise _Refused(f"Failed to find node with node-name='{node_name}'")
        if node_name in self._used("drive"):
            raise _Refused(f"Node {node_name} is in use")
        if node_name in [node.get("file") for node in self.nodes.values()]:
            raise _Refused(f"Block device {node_name} is in use")
        del self.nodes[node_name]
        return {}

    def _object_add(self, qom_type: str, id: str, **properties: Any) -> dict[str, Any]:
        if id in self.objects:
            raise _Refused(
                f"attempt to add duplicate property '{id}' to object (type 'container')"
            )
        self.objects[id] = qom_type
        return {}

    def _object_del(self, id: str) -> dict[str, Any]:
        if id not in self.objects:
            raise _Refused(f"object '{id}' not found")
        groups = [node.get("throttle_group") for node in self.nodes.values()]
        if id in [*groups, *self._used("memdev")]:
            raise _Refused(f"object '{id}' is in use, can not be deleted")
        del self.objects[id]
        return {}

    def _getfd(self, fdname: str) -> dict[str, Any]:
        self.descriptors.add(fdname)
        return {}

    def _closefd(self, fdname: str) -> dict[str, Any]:
        if fdname not in self.descriptors:
            raise _Refused(f"File descriptor named '{fdname}' not found")
        self.descriptors.remove(fdname)
        return {}

    def _chardev_add(self, id: str, backend: Mapping[str, Any]) -> dict[str, Any]:
        if id in self.chardevs:
            raise _Refused(f"Chardev with id '{id}' already exists")
        name = backend["data"]["addr"]["data"].get("str")
        if name not in {None, *self.descriptors}:
            why = f"File descriptor named '{name}' has not been found"
            raise _Refused(f"Failed to add chardev '{id}': {why}")
        self.descriptors.discard(name)
        self.chardevs[id] = "unix:"
        return {}

    def _chardev_remove(self, id: str) -> dict[str, Any]:
        if id not in self.chardevs:
            raise _Refused(f"Chardev '{id}' not found")
        if id in self._used("chardev"):
            raise _Refused(f"Chardev '{id}' is busy")
        del self.chardevs[id]
        return {}

    def _netdev_add(self, type: str, id: str, chardev: str, queues: int = 1) -> dict[str, Any]:
        if id in self.netdevs:
            raise _Refused(f"Duplicate ID '{id}'")
        if chardev not in self.chardevs:
            raise _Refused(f'chardev "{chardev}" not found')
        self.netdevs[id] = chardev
        return {}

    def _netdev_del(self, id: str) -> dict[str, Any]:
        if id not in self.netdevs:
            raise _Refused(f"Device '{id}' not found", "DeviceNotFound")
        self.chardevs.pop(self.netdevs.pop(id), None)
        return {}

    def _device_add(self, driver: str, id: str, **rest: Any) -> dict[str, Any]:
        bus_path = "" if driver == "nvdimm" else self._bus_path(driver, rest["bus"])
        if id in self.devices:
            raise _Refused(f"Duplicate device ID '{id}'")
        self._check_parts(driver, rest)
        if driver == "nvdimm" and rest["slot"] >= self.memory_slots:
            valid = f"[0-{self.memory_slots - 1}]"
            raise _Refused(f"invalid slot number {rest['slot']}, valid range is {valid}")
        for _, other in self._occupants(bus_path):
            self._check_place(driver, other, rest)
        if driver == "nvdimm" and rest["memdev"] in self._used("memdev"):
            raise _Refused(f"can't use already busy memdev: {rest['memdev']}")
        properties = {key.replace("_", "-"): value for key, value in rest.items()}
        self.devices[id] = _Device(driver, bus_path, {**properties, "addr": 0})
        return {}

    def _used(self, key: str) -> set[Any]:
        """What devices, and for a chardev networks, have as that property."""
        used = {device.properties.get(key) for device in self.devices.values()} - {None}
        return used | set(self.netdevs.values()) if key == "chardev" else used

    def _bus_path(self, driver: str, bus: str) -> str:
        owner = bus.removesuffix(".0")
        if owner not in self.devices:
            raise _Refused(f"Bus '{bus}' not found")
        place = f"virtio-backend/{bus}" if driver == "scsi-hd" else bus
        return f"{PERIPHERAL}/{owner}/{place}"

    def _check_parts(self, driver: str, properties: Mapping[str, Any]) -> None:
        """What the device is made of must be there, by QEMU's words for each."""
        inner = driver.removesuffix("-pci")
        if driver.endswith("-pci") and inner not in {"vhost-user-blk", "vhost-user-scsi"}:
            inner += "-device"
        for key, known in (
            ("drive", self.nodes),
            ("chardev", self.chardevs),
            ("netdev", self.netdevs),
        ):
            if (name := properties.get(key)) not in {None, *known}:
                raise _Refused(f"Property '{inner}.{key}' can't find value '{name}'")
            if name in self._used(key) and key in _IN_USE:
                why = _IN_USE[key].format(name)
                raise _Refused(f"Property '{inner}.{key}' can't take value '{name}'{why}")
        for key in ("iothread", "memdev", "rng"):
            if (name := properties.get(key)) not in {None, *self.objects}:
                raise _Refused(f"Device '{name}' not found", "DeviceNotFound")

    def _check_place(self, driver: str, other: str, properties: Mapping[str, Any]) -> None:
        found = self.devices[other]
        if driver == "nvdimm":
            if found.driver == driver and found.properties["slot"] == properties["slot"]:
                raise _Refused(f"slot {properties['slot']} is busy")
        elif driver == "scsi-hd":
            where = (properties["scsi_id"], properties["lun"])
            if (found.properties["scsi-id"], found.properties["lun"]) == where:
                raise _Refused(f"lun already used by '{other}'")
        else:
            raise _Refused(
                f"PCI: slot 0 function 0 not available for {driver}, "
                f"in use by {found.driver},id={other}"
            )

    def _device_del(self, id: str) -> dict[str, Any]:
        device = self.devices.get(id)
        if device is None:
            raise _Refused(f"Device '{id}' not found", "DeviceNotFound")
        if device.driver == "nvdimm":
            raise _Refused("nvdimm device hot unplug is not supported yet.")
        if device.driver == "scsi-hd" or self.guest is Guest.ANSWERS:
            self._delete(id)
        elif self.guest is Guest.REFUSES:
            self._emit("DEVICE_UNPLUG_GUEST_ERROR", path=f"{PERIPHERAL}/{id}", device=id)
        else:
            device.unplugging = True
        return {}

    def _block_resize(self, node_name: str, size: int) -> dict[str, Any]:
        if node_name not in self.nodes:
            raise _Refused(f"Cannot find device='' nor node-name='{node_name}'")
        self.sizes[node_name] = size
        return {}


def _entry(name: str, kind: str) -> dict[str, str]:
    return {"name": name, "type": kind}
