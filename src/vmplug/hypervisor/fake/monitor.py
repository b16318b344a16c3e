"""An in-memory hypervisor for tests: Qemu on a monitor without a QEMU.

The contract tests compare its answers with those of a real QEMU. It supports only the commands
that vmplug sends.
"""

import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from vmplug.address import PERIPHERAL
from vmplug.drivers.plug import VirtiofsdSpec
from vmplug.drivers.ports import VF_UUID, Command
from vmplug.errors import CommandError
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.hypervisor.fake.backends import FakeBackends, Refused
from vmplug.hypervisor.qemu.abilities import IOMMUFD
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.monitor import EventReceiver, Monitor, Talk, command_error
from vmplug.hypervisor.virtiofsd import VirtiofsdProcess, VirtiofsdRunner

MACHINE = "pc-q35-10.0"
"""The name of the machine in memory; QEMU adds its version to the name."""
_ROOT_BUS = "/machine/q35/pcie.0"
_FIRST_PORT_SLOT = 0x10
_MAX_PORTS = 15


class Guest(StrEnum):
    """The guest's reaction to a request to release a device."""

    ANSWERS = "answers"
    SILENT = "silent"
    REFUSES = "refuses"


class FakeHypervisor(Qemu):
    """A q35 machine in memory with up to 15 root ports and, if wanted, a virtio-scsi controller.

    It has room for `memory_slots` NVDIMMs, and has `iommufd` and `vf_token` or not. It starts no
    process for a shared directory. On `monitor`, `fail_at` sets a command that fails, and `guest`
    the guest's behaviour. `host` is as for Qemu.
    """

    def __init__(
        self,
        *,
        root_ports: int = 4,
        scsi: bool = True,
        memory_slots: int = 4,
        iommufd: bool = False,
        vf_token: bool = False,
        host: HostRoot = THIS_HOST,
    ) -> None:
        self.monitor = FakeMonitor(
            root_ports=root_ports,
            scsi=scsi,
            memory_slots=memory_slots,
            iommufd=iommufd,
            vf_token=vf_token,
        )
        super().__init__(self.monitor, daemons=_NoVirtiofsdRunner(), host=host)


class _NoVirtiofsdRunner(VirtiofsdRunner):
    """Connections without a peer."""

    def start(self, daemon: VirtiofsdSpec, device_id: str) -> VirtiofsdProcess:
        """See VirtiofsdRunner."""
        ours, theirs = socket.socketpair()
        theirs.close()
        return VirtiofsdProcess(ours)

    def find(self, device_ids: Iterable[str] | None = None) -> Mapping[str, int]:
        """See VirtiofsdRunner: there are none."""
        return {}

    def end(self, device_ids: Iterable[str]) -> None:
        """See VirtiofsdRunner."""


_IN_USE = {"chardev": ": Device '{}' is in use", "netdev": ", it's in use"}


@dataclass(slots=True)
class _Device:
    driver: str
    bus: str
    properties: Mapping[str, Any]
    unplugging: bool = False


@dataclass(slots=True)
class FakeMonitor(FakeBackends, Monitor):
    """The answers of a small QEMU. `fail_at` names a command that is refused once."""

    root_ports: int = 4
    scsi: bool = True
    memory_slots: int = 4
    guest: Guest = Guest.ANSWERS
    fail_at: str | None = None
    sent: list[Command] = field(default_factory=list)
    devices: dict[str, _Device] = field(default_factory=dict)
    _disks: dict[tuple[str, int, int], str] = field(default_factory=dict)
    _receivers: list[EventReceiver] = field(default_factory=list)
    _alone: threading.RLock = field(default_factory=threading.RLock)

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
        with self._alone:  # as QEMU does one thing after the other
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
                raise Refused(
                    f"The command {command.execute} has not been found", "CommandNotFound"
                )
            if self.fail_at == command.execute:
                self.fail_at = None
                raise Refused(f"{command.execute} fails as set by fail_at")
            return answer(**{k.replace("-", "_"): v for k, v in command.arguments.items()})
        except Refused as error:
            raise command_error(command, error.error_class, str(error)) from None

    def converse(self, talk: Talk) -> None:
        """See Monitor."""
        with self._alone:
            Monitor.converse(self, talk)

    def listen(self, receive: EventReceiver) -> None:
        """See Monitor."""
        self._receivers.append(receive)

    def close(self) -> None:
        """See Monitor."""

    def wake_guest(self) -> None:
        """Let a silent guest answer everything that it was asked."""
        self.guest = Guest.ANSWERS
        for name in [name for name, device in self.devices.items() if device.unplugging]:
            for sharing in self._sharing_slot(name) if name in self.devices else ():
                self._delete(sharing)

    def _emit(self, event: str, **data: str) -> None:
        for receive in self._receivers:
            receive(event, data)

    def _delete(self, name: str) -> None:
        device = self.devices.pop(name)
        path = f"{PERIPHERAL}/{name}"
        if device.driver.endswith("-pci"):
            self._emit("DEVICE_DELETED", path=f"{path}/virtio-backend")
        self._emit("DEVICE_DELETED", path=path, device=name)

    # the answer of each command

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
            raise Refused(f"Device '{path}' not found", "DeviceNotFound")
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
            machine = {"type": f"{MACHINE}-machine", "nvdimm": True, "memory": memory}
            return machine[property]
        if property.startswith("child["):
            name = dict(self._occupants(path)).get(property)
            if name is None:
                bus = "SCSI" if "/virtio-backend/" in path else "PCIE"
                raise Refused(f"Property '{bus}.{property}' not found")
            return f"{PERIPHERAL}/{name}"
        device = self.devices.get(path.removeprefix(PERIPHERAL + "/"))
        if device is None:
            raise Refused(f"Device '{path}' not found", "DeviceNotFound")
        found = {"parent_bus": device.bus, **device.properties}
        if property not in found:
            raise Refused(f"Property '{device.driver}.{property}' not found")
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

    def _query_memory_size_summary(self) -> dict[str, int]:
        plugged = sum(self.memory[name] for name in self._used("memdev"))
        return {"base-memory": 256 << 20, "plugged-memory": plugged}

    def _query_status(self) -> dict[str, Any]:
        running = self.guest is not Guest.SILENT
        return {"status": "running" if running else "paused", "running": running}

    def _device_add(self, driver: str, id: str, **rest: Any) -> dict[str, Any]:
        bus_path = "" if driver == "nvdimm" else self._bus_path(driver, rest["bus"])
        if id in self.devices:
            raise Refused(f"Duplicate device ID '{id}'")
        self._check_parts(driver, rest)
        if "fd" in rest:
            self._take_file(rest["fd"])
            self.kept.append(rest["fd"])  # until its device takes it, or closes it
        if driver == "nvdimm" and rest["slot"] >= self.memory_slots:
            valid = f"[0-{self.memory_slots - 1}]"
            raise Refused(f"invalid slot number {rest['slot']}, valid range is {valid}")
        for other in self._rivals(driver, bus_path, rest):
            self._check_place(driver, other, rest)
        if driver == "nvdimm" and rest["memdev"] in self._used("memdev"):
            raise Refused(f"can't use already busy memdev: {rest['memdev']}")
        properties = {key.replace("_", "-"): value for key, value in rest.items()}
        if "fd" in rest:
            self.kept.remove(rest["fd"])
        self._check_vfio(rest)
        devfn = _devfn(rest.get("addr", "0x0"))
        self.devices[id] = _Device(driver, bus_path, {**properties, "addr": devfn})
        if driver == "scsi-hd":
            self._disks[_scsi_place(bus_path, rest)] = id
        return {}

    def _rivals(self, driver: str, bus_path: str, properties: Mapping[str, Any]) -> list[str]:
        """Devices that may be where that one shall be; a SCSI bus may have thousands."""
        if driver != "scsi-hd":
            return [name for _, name in self._occupants(bus_path)]
        name = self._disks.get(_scsi_place(bus_path, properties))
        return [name] if name and name in self.devices else []

    def _used(self, key: str) -> set[Any]:
        """What devices, and for a chardev networks, have as that property."""
        used = {device.properties.get(key) for device in self.devices.values()} - {None}
        return used | set(self.netdevs.values()) if key == "chardev" else used

    def _bus_path(self, driver: str, bus: str) -> str:
        owner = bus.removesuffix(".0")
        if owner not in self.devices:
            raise Refused(f"Bus '{bus}' not found")
        place = f"virtio-backend/{bus}" if driver == "scsi-hd" else bus
        return f"{PERIPHERAL}/{owner}/{place}"

    def _check_parts(self, driver: str, properties: Mapping[str, Any]) -> None:
        """The parts of the device must exist; the errors are QEMU's words."""
        inner = driver.removesuffix("-pci")
        if driver.endswith("-pci") and inner not in {"vhost-user-blk", "vhost-user-scsi"}:
            inner += "-device"
        for key, known in (
            ("drive", self.nodes),
            ("chardev", self.chardevs),
            ("netdev", self.netdevs),
        ):
            if (name := properties.get(key)) is None:
                continue
            if name not in known:
                raise Refused(f"Property '{inner}.{key}' can't find value '{name}'")
            if key in _IN_USE and name in self._used(key):
                why = _IN_USE[key].format(name)
                raise Refused(f"Property '{inner}.{key}' can't take value '{name}'{why}")
        if IOMMUFD in properties and not self.iommufd:
            raise Refused(f"Property '{driver}.{IOMMUFD}' not found")
        if "vf_token" in properties and not self.vf_token:
            raise Refused(f"Property '{driver}.{VF_UUID}' not found")
        for key in ("iothread", "memdev", "rng", IOMMUFD):
            if (name := properties.get(key)) not in {None, *self.objects}:
                raise Refused(f"Device '{name}' not found", "DeviceNotFound")

    def _check_place(self, driver: str, other: str, properties: Mapping[str, Any]) -> None:
        found = self.devices[other]
        if driver == "nvdimm":
            if found.driver == driver and found.properties["slot"] == properties["slot"]:
                raise Refused(f"slot {properties['slot']} is busy")
        elif driver == "scsi-hd":
            raise Refused(f"lun already used by '{other}'")
        else:
            self._check_function(driver, other, properties)

    def _check_function(self, driver: str, other: str, properties: Mapping[str, Any]) -> None:
        """A slot has eight functions, and function 0 says whether there are others."""
        found, devfn = self.devices[other], _devfn(properties["addr"])
        slot, function = devfn >> 3, devfn & 7
        if found.properties["addr"] == devfn:
            raise Refused(
                f"PCI: slot {slot} function {function} not available for {driver}, "
                f"in use by {found.driver},id={other}"
            )
        is_neighbour = found.properties["addr"] >> 3 == slot
        if is_neighbour and not function and not properties.get("multifunction"):
            raise Refused(
                f"PCI: {slot:x}.0 indicates single function, but {slot:x}."
                f"{found.properties['addr'] & 7:x} is already populated."
            )

    def _check_vfio(self, properties: Mapping[str, Any]) -> None:
        """A function of the host is in one place at a time."""
        host, path = properties.get("host"), properties.get("sysfsdev")
        if host and host in self._used("host"):
            raise Refused(f"vfio {host}: device is already attached")
        if path and path in self._used("sysfsdev"):
            raise Refused(f"vfio {path}: device is already attached")

    def _device_del(self, id: str) -> dict[str, Any]:
        device = self.devices.get(id)
        if device is None:
            raise Refused(f"Device '{id}' not found", "DeviceNotFound")
        if device.driver == "nvdimm":
            raise Refused("nvdimm device hot unplug is not supported yet.")
        if device.unplugging:
            raise Refused(f"Device {id} is already in the process of unplug")
        if device.driver == "scsi-hd":
            self._delete(id)
        elif self.guest is Guest.ANSWERS:
            for name in self._sharing_slot(id):
                self._delete(name)
        elif self.guest is Guest.REFUSES:
            self._emit("DEVICE_UNPLUG_GUEST_ERROR", path=f"{PERIPHERAL}/{id}", device=id)
        else:
            device.unplugging = True
        return {}

    def _sharing_slot(self, name: str) -> list[str]:
        """All functions of a device's slot: they leave together."""
        own = self.devices[name]
        slot = own.properties["addr"] >> 3
        return [
            other
            for other, device in self.devices.items()
            if device.bus == own.bus and device.properties["addr"] >> 3 == slot
        ]


def _entry(name: str, kind: str) -> dict[str, str]:
    return {"name": name, "type": kind}


def _scsi_place(bus_path: str, properties: Mapping[str, Any]) -> tuple[str, int, int]:
    return bus_path, properties["scsi_id"], properties["lun"]


def _devfn(addr: str) -> int:
    """QEMU's `addr`, `0x1f.7`, as `slot << 3 | function`."""
    slot, _, function = addr.partition(".")
    return int(slot, 16) << 3 | int(function or "0")
