"""A QEMU that another program starts: what its command line says, and the words behind it.

The words bring their own ports, bridge, SCSI controller, iommufd and shared memory, and only those
that a device needs. None has an address: QEMU makes all -device with JSON after all others, and so
gives each a slot that is free. Disks and random numbers are descriptors in sets of their own; the
file of a memory is the inherited descriptor itself, as memory takes no set.
Source: QEMU softmmu/vl.c, hw/pci-bridge; measured on QEMU 7.2 and 10.0.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from enum import StrEnum
from fractions import Fraction
from itertools import pairwise
from typing import Any, Self

import msgspec

from vmplug.address import PciPath, PciSlot, qemu_id
from vmplug.drivers.free_places import virtio_place
from vmplug.drivers.place import (
    GroupPlace,
    MemorySlot,
    MmioPlace,
    Offer,
    PciPlace,
    PciPort,
    Place,
    PlugMode,
    PortKind,
    ScsiController,
    ScsiPlace,
)
from vmplug.drivers.plug import BlockDrive, Plug, VhostUserDevice
from vmplug.errors import CannotPlug, SpecError
from vmplug.host.pci.iommu import IOMMU_NODE
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.abilities import Abilities
from vmplug.hypervisor.qemu.handover import held_open
from vmplug.hypervisor.qemu.start.cold_devices import ColdDevices
from vmplug.hypervisor.qemu.start.machine import (
    MAX_MEMORY_SLOTS,
    MAX_PORTS,
    has_option,
    option_text,
)
from vmplug.hypervisor.qemu.steps.plug import opened_files, renamed
from vmplug.hypervisor.virtiofsd import VirtiofsdRunner

DEFAULT_PROGRAM, DEFAULT_MEMORY = "qemu-system-x86_64", "128M"
"""The second is QEMU's own choice for these machines."""
_OWN = "vmplug."
"""With this the ids of what is the VM's begin: no device has such a name (see `qemu_id`)."""
_PORT, _BRIDGE, _SCSI, _MEMORY = (_OWN + name for name in ("port", "bridge", "scsi", "memory"))
_LAST_CHASSIS = 0xFF
"""Numbers of chassis are taken from here down, as other programs take them from 0 up."""
_FIRST_SET = 1 << 20
"""QEMU itself takes the lowest number that is free, and people small ones."""
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)", re.ASCII | re.IGNORECASE)
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MIB = 1 << 20
_MEMORY_STEP = 8192
"""QEMU rounds -m up to a multiple of it. Source: QEMU softmmu/vl.c, hw/core/machine.c."""
_BACKEND = "memory-backend"
_SHARED = {
    "memory-backend-file": False,
    "memory-backend-memfd": True,
    "memory-backend-shm": True,
}
"""Backends with a file, which another process can map, and their default for `share`. The memory
of memory-backend-ram has none before QEMU 10.0, whatever it says. Source: QEMU qapi/qom.json."""


_NAMES_DEVICES = "auto-kernel-cmdline"
"""A microvm without ACPI names its devices on the command line of the guest's kernel, which reads
them where it has CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES; Debian's has not.
Source: QEMU hw/i386/microvm.c; Linux drivers/virtio/virtio_mmio.c."""
_OFF = {"off", "no", "false", "n"}


class ForeignMachine(StrEnum):
    """The machines that there are words for, by QEMU's names."""

    Q35 = "q35"
    PC = "pc"
    MICROVM = "microvm"


_MACHINES = (
    (ForeignMachine.Q35, re.compile(r"(pc-)?q35(-[0-9.]+)?")),
    (ForeignMachine.PC, re.compile(r"pc(-i440fx)?(-[0-9.]+)?")),
    (ForeignMachine.MICROVM, re.compile(r"microvm")),
)


class QemuCommand(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line of a QEMU says: its -machine and -m, and whether KVM runs it.

    `shared_memory`: it has memory of its own, which is shared. Raises SpecError for a machine that
    vmplug has no words for or whose guest finds no device, and for a text that is not a size.
    """

    machine: str
    memory: str = DEFAULT_MEMORY
    shared_memory: bool = False
    kvm: bool = False
    program: str = DEFAULT_PROGRAM

    def __post_init__(self) -> None:
        _ = self.kind, self.memory_bytes, self.memory_slots, self.most_bytes
        said = _options(self.machine, "type")
        if said.get("acpi") == "off" and said.get(_NAMES_DEVICES) in _OFF:
            raise SpecError(
                f"-machine {self.machine}",
                "its guest finds no device, by ACPI or on the command line of its kernel",
                hint=f"leave {_NAMES_DEVICES} or acpi=off out",
            )

    @classmethod
    def read(cls, words: Sequence[str]) -> Self:
        """From a whole command.

        Raises SpecError, also when no word of it says the machine, and for -daemonize.
        """
        machine = _said(words, "type", "machine", "M")
        if not machine:
            raise SpecError(
                "{qemu-args}",
                "the command does not say -machine, and the words depend on it",
                hint="write -machine q35, pc or microvm into the command",
            )
        if has_option(words, "daemonize"):
            raise SpecError(
                "-daemonize",
                "the lease would end with the process that is started, and QEMU would run on",
                hint="leave it out, and let the launcher run in the background",
            )
        nodes = (_options(value, "type").get("memdev") for value in _values(words, "numa"))
        files = _values(words, "mem-path")
        named = [name for name in (machine.get(_BACKEND), *nodes, *files) if name]
        machine |= {_BACKEND: named[0]} if named else {}
        shared = set(map(_shared_backend, _values(words, "object")))
        return cls(
            machine=_text(machine),
            memory=_text(_said(words, "size", "m")) or DEFAULT_MEMORY,
            shared_memory=bool(named) and shared.issuperset(named),
            kvm=any(value.startswith("kvm") for value in _values(words, "accel"))
            or has_option(words, "enable-kvm"),
            program=next(filter(_is_qemu, words), DEFAULT_PROGRAM),
        )

    @property
    def kind(self) -> ForeignMachine:
        """The machine, whatever its version."""
        return _machine(_options(self.machine, "type").get("type", ""))

    @property
    def has_kvm(self) -> bool:
        """Whether KVM runs the guest."""
        return self.kvm or _options(self.machine, "type").get("accel", "").startswith("kvm")

    @property
    def memory_bytes(self) -> int:
        """That the guest has at its start."""
        size = _size(_options(self.memory, "size").get("size", DEFAULT_MEMORY), _MIB)
        return -(-size // _MEMORY_STEP) * _MEMORY_STEP

    @property
    def memory_slots(self) -> int:
        """That the command itself has for memory devices."""
        return _size(_options(self.memory, "size").get("slots", "0"), 1)

    @property
    def most_bytes(self) -> int:
        """The memory with all devices, as the command says; 0 where it does not."""
        return _size(_options(self.memory, "size").get("maxmem", "0"), 1)

    @property
    def mmio_transports(self) -> int:
        """That a microvm has. Source: QEMU hw/i386/microvm.c; measured on QEMU 7.2."""
        said = _options(self.machine, "type")
        return 8 if "off" in {said.get("acpi"), said.get("ioapic2")} else 24

    @property
    def can_share(self) -> bool:
        """Whether the memory is shared, or can be an object of vmplug's."""
        return self.shared_memory or _BACKEND not in _options(self.machine, "type")


def _is_qemu(word: str) -> bool:
    return word.rpartition("/")[2].startswith("qemu-system-")


def _values(words: Sequence[str], *options: str) -> list[str]:
    """What a command says for an option, which QEMU takes with one dash or two."""
    names = {dash + option for option in options for dash in ("-", "--")}
    return [value for name, value in pairwise(words) if name in names]


def _said(words: Sequence[str], first: str, *options: str) -> dict[str, str]:
    """All that a command says for an option, which QEMU merges."""
    merged = dict[str, str]()
    for value in _values(words, *options):
        merged |= _options(value, first)
    return merged


def _options(text: str, first: str) -> dict[str, str]:
    """`q35,accel=kvm` by its keys; the first word has no key of its own, or has it."""
    found = dict[str, str]()
    for index, word in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = word.replace("\0", ",").partition("=")
        found |= {key: value} if equals else {first: key} if index == 0 else {key: "on"}
    return found


def _text(options: Mapping[str, str]) -> str:
    """What `_options` reads."""
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())


class _Backend(msgspec.Struct, frozen=True, rename="kebab"):
    """What of an -object matters here."""

    qom_type: str = ""
    id: str | None = None
    share: bool | str | None = None


def _shared_backend(text: str) -> str | None:
    """The id of an -object, also as JSON, if it is memory that another process can map."""
    try:
        if text.startswith("{"):
            said = msgspec.json.decode(text, type=_Backend)
        else:
            said = msgspec.convert(_options(text, "qom-type"), _Backend)
    except msgspec.DecodeError:  # QEMU itself will refuse it
        return None
    default = _SHARED.get(said.qom_type)
    if default is None:
        return None
    is_shared = default if said.share is None else said.share in {True, "on", "yes", "true", "y"}
    return said.id if is_shared else None


def _machine(name: str) -> ForeignMachine:
    for machine, names in _MACHINES:
        if names.fullmatch(name):
            return machine
    raise SpecError(
        f"-machine {name}",
        "vmplug has no words for this machine",
        hint="it has some for q35, pc and microvm; vmplug vm start knows others",
    )


def _size(text: str, unit: int) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise SpecError(f"-m {text}", "this is not a size", hint="write 512M or 4G")
    return int(Fraction(match[1]) * (_UNITS[match[2].upper()] if match[2] else unit))


class ForeignQemu(ColdDevices):
    """The devices for a QEMU that another program starts; see ColdDevices."""

    def __init__(
        self,
        command: QemuCommand,
        abilities: Abilities,
        daemons: VirtiofsdRunner,
        host: HostRoot,
    ) -> None:
        super().__init__(abilities, daemons, host)
        self._command = command
        self._sets: dict[tuple[str, str], tuple[int, int]] = {}

    def offer(self) -> Offer:
        """The places that it will have with the words that vmplug adds."""
        said, machine = self._command, self._command.kind
        has_pci, is_q35 = machine is not ForeignMachine.MICROVM, machine is ForeignMachine.Q35
        scsi = ScsiController(bus=f"{_SCSI}.0", path=None, used=frozenset())
        return Offer(
            machine=machine,
            ports=(*_root_ports(MAX_PORTS if is_q35 else 0), *([_bridge()] if has_pci else [])),
            controllers=(scsi,) if has_pci else (),
            shared_memory=said.can_share,
            mode=PlugMode.COLD,
            kvm=said.has_kvm,
            mmio=tuple(_transports(said.mmio_transports)) if not has_pci else (),
            nvdimm=has_pci,
            memory_slots=MAX_MEMORY_SLOTS if has_pci else 0,
            memory_slots_used=frozenset(range(said.memory_slots)),
            iommufd=self._host.stat_or_none(IOMMU_NODE) is not None and self.abilities.iommufd,
            memory_bytes=said.memory_bytes,
        )

    def plug(self, plug: Plug, place: Place) -> None:
        """Add it to the words, with its files open. Raises CannotPlug for one that cannot be."""
        super().plug(plug, place)
        if isinstance(place, MemorySlot) or not opened_files(plug):
            return
        with ExitStack() as stack:
            files = stack.enter_context(held_open(opened_files(plug)))
            for opened in files:
                if opened.descriptor is None:
                    raise CannotPlug(
                        "not-open",
                        f"{opened.file.path} cannot be opened here, so QEMU cannot get it",
                        hint="run vmplug as a user who may open it",
                    )
                number = _FIRST_SET + len(self._sets)
                self._sets[plug.id, opened.file.path] = opened.descriptor, number
            self._nodes[plug.id] = stack.pop_all()
        self._set(plug, place)

    def _named(self, plug: Plug) -> Plug:
        """By the numbers of its sets, or of the file of a memory."""
        if isinstance(plug, BlockDrive) and plug.lock is not None:
            return renamed(plug, {plug.file: f"/proc/self/fd/{plug.lock}"})
        sets = {
            file.path: f"/dev/fdset/{self._sets[key][1]}"
            for file in opened_files(plug)
            if (key := (plug.id, file.path)) in self._sets
        }
        return renamed(plug, sets)

    def descriptors(self) -> list[int]:
        """See ColdDevices."""
        return [*super().descriptors(), *(number for number, _ in self._sets.values())]

    def arguments(self) -> list[str]:
        """The words, with what the devices need besides."""
        return [*self._files(), *self._memory(), *self._ports(), *super().arguments()]

    def _files(self) -> Iterator[str]:
        for (device_id, _), (descriptor, number) in self._sets.items():
            mark = qemu_id(device_id)
            yield from (
                "-add-fd",
                option_text(f"fd={descriptor}", {"set": number, "opaque": mark}),
            )

    def _memory(self) -> Iterator[str]:
        """Shared memory for a backend of vhost-user; slots and room for persistent memory."""
        said, plugs = self._command, [plug for plug, _ in self._plugs.values()]
        if any(isinstance(plug, VhostUserDevice) for plug in plugs):
            if not said.shared_memory:
                memory = {"qom-type": "memory-backend-memfd", "id": _MEMORY, "share": True}
                yield from _json("-object", **memory, size=said.memory_bytes)
                yield from ("-machine", f"memory-backend={_MEMORY}")
            if said.kind is ForeignMachine.MICROVM:
                # The legacy transport is the default, and vhost-user backends cannot serve it.
                yield from ("-global", "virtio-mmio.force-legacy=false")
        sizes = [
            plug.size_bytes or 0
            for plug, place in self._plugs.values()
            if isinstance(plug, BlockDrive) and isinstance(place, MemorySlot)
        ]
        if sizes:
            room = sum(-(-size // _MIB) for size in sizes)
            most = max(said.memory_bytes, said.most_bytes) // _MIB + room
            slots = said.memory_slots + len(sizes)
            yield from ("-machine", "nvdimm=on", "-m", f"slots={slots},maxmem={most}M")

    def _ports(self) -> Iterator[str]:
        """The ports that have a device, and the controller if one has a disk."""
        used = [place for _, place in self._plugs.values()]
        scsi: PciPlace | None = None
        if any(isinstance(place, ScsiPlace) for place in used):
            taken = {word for place in used for word in str(place).split()}
            place = virtio_place(self.offer(), taken, "a SCSI controller")
            assert isinstance(place, PciPlace)
            scsi = place
            used.append(scsi)
        buses = {at.bus for place in used for at in _on_pci(place)}
        for index, port in enumerate(self.offer().ports):
            if port.bus in buses:
                yield from _json("-device", **_port(self._command.kind, port, index))
        if scsi:
            at = {"bus": scsi.bus, "addr": hex(scsi.slot.slot)}
            yield from _json("-device", driver="virtio-scsi-pci", id=_SCSI, **at)


def _on_pci(place: Place) -> Sequence[PciPlace]:
    match place:
        case PciPlace():
            return (place,)
        case GroupPlace(places=places):
            return places
        case _:
            return ()


_SOMEWHERE = PciPath((PciSlot(0),))
"""QEMU chooses the slot of a port: nobody reads its path before the VM is adopted."""


def _root_ports(count: int) -> Iterator[PciPort]:
    for index in range(count):
        yield PciPort(bus=f"{_PORT}{index}", path=_SOMEWHERE, free=(PciSlot(0),))


def _bridge() -> PciPort:
    free = tuple(PciSlot(slot) for slot in range(1, 32))
    return PciPort(bus=_BRIDGE, path=_SOMEWHERE, free=free, kind=PortKind.BRIDGE_PORT)


def _transports(count: int) -> Iterator[MmioPlace]:
    """Half of them: QEMU gives the caller's devices the others, from the highest down.

    Number 0 is left out: it silences the serial port.
    """
    for number in range(1, count // 2 + 1):
        yield MmioPlace(bus=f"virtio-mmio-bus.{number}", index=number)


def _port(machine: ForeignMachine, port: PciPort, index: int) -> dict[str, str | int]:
    if port.kind is not PortKind.BRIDGE_PORT:
        return {"driver": "pcie-root-port", "id": port.bus, "chassis": _LAST_CHASSIS - index}
    if machine is ForeignMachine.PC:
        return {"driver": "pci-bridge", "id": port.bus, "chassis_nr": _LAST_CHASSIS}
    return {"driver": "pcie-pci-bridge", "id": port.bus}


def _json(option: str, **properties: Any) -> list[str]:
    return [option, json.dumps(properties)]
