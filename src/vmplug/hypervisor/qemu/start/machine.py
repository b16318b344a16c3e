"""Machines that vmplug starts: their command line, and the places that they offer.

User text goes to QEMU as JSON or as an argument of its own, never inside an option string.
"""

import json
from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any, assert_never

import msgspec
from msgspec import structs

from vmplug.address import Bdf, CcwDevNo, PciPath, PciSlot
from vmplug.arguments import check_fields
from vmplug.drivers.place import (
    FIRMWARE_WINDOWS,
    MmioPlace,
    Offer,
    PciPort,
    PlugMode,
    PortKind,
    ScsiController,
)

MAX_PORTS = 27
MAX_MEMORY_SLOTS = 256
_FIRST_PORT_SLOT = 0x4
_SCSI_SLOT, _DISK_SLOT = 0x2, 0x3
_SCSI_DEVNO, _DISK_DEVNO = CcwDevNo(0, 0xFFFE), CcwDevNo(0, 0xFFFF)
_MEMORY_ROOM_MIB = 64 << 10
"""The maximum memory of all NVDIMMs together."""

TCG_ADDRESS_BITS = 40
"""Of a guest's physical addresses without KVM. Source: QEMU target/i386/cpu.h; measured on 7.2."""


class Machine(StrEnum):
    """Machines that `vm start` supports, by QEMU's names."""

    Q35 = "q35"
    MICROVM = "microvm"
    S390 = "s390-ccw-virtio"


BINARY = {
    Machine.Q35: "qemu-system-x86_64",
    Machine.MICROVM: "qemu-system-x86_64",
    Machine.S390: "qemu-system-s390x",
}
_MACHINE_OPTIONS = {Machine.Q35: ",nvdimm=on", Machine.MICROVM: ",acpi=on", Machine.S390: ""}
PACKAGE = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-s390x": "qemu-system-s390x",
}
"""Debian packages; Debian 12 has the latter in qemu-system-misc, which provides that name."""


class VmSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A machine to start.

    `ports`, `bridges` and `memory_slots` are for a q35; `windows` are bytes of 64-bit prefetchable
    memory that its first ports have for devices with large BARs; `start_vm` computes them for the
    functions in `room_for`, to be plugged later. `disk` is a raw image to boot
    from and `kernel`, `initrd`, `append` a direct kernel boot; each may be None. `accel` is kvm,
    tcg, or auto: KVM where it runs a guest, else TCG, which `start_vm` finds out. `extra` goes to
    QEMU as it is.
    """

    name: str
    machine: Machine = Machine.Q35
    memory_mib: int = 512
    cpus: int = 1
    ports: int = 8
    bridges: int = 0
    windows: tuple[int, ...] = ()
    room_for: tuple[Bdf, ...] = ()
    memory_slots: int = 4
    accel: str = "auto"
    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None
    disk: str | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)


def cold_offer(spec: VmSpec) -> Offer:
    """The places that the machine offers before anything is plugged."""
    is_q35, is_s390 = spec.machine is Machine.Q35, spec.machine is Machine.S390
    ports = range(spec.ports if is_q35 else 0)
    bridges = range(spec.bridges if is_q35 else 0)
    mmio = range(0 if spec.disk is None else 1, _MMIO_TRANSPORTS)
    scsi_path = PciPath((PciSlot(_SCSI_SLOT),)) if is_q35 else None
    return Offer(
        machine=spec.machine,
        ports=tuple(
            PciPort(
                bus=f"rp{index}",
                path=PciPath((PciSlot(_FIRST_PORT_SLOT + index),)),
                free=(PciSlot(0),),
                windows=structs.replace(FIRMWARE_WINDOWS, prefetchable=_window(spec, index)),
            )
            for index in ports
        )
        + tuple(
            PciPort(
                bus=f"br{index}",
                path=PciPath((PciSlot(_FIRST_PORT_SLOT + spec.ports + index),)),
                free=tuple(PciSlot(slot) for slot in range(1, 32)),
                kind=PortKind.BRIDGE_PORT,
            )
            for index in bridges
        ),
        controllers=(ScsiController(bus="scsi0.0", path=scsi_path, used=frozenset()),)
        if is_q35 or is_s390
        else (),
        shared_memory=True,
        mode=PlugMode.COLD,
        kvm=spec.accel == "kvm",
        cpus=spec.cpus,
        ccw_used=frozenset({_SCSI_DEVNO, _DISK_DEVNO}) if is_s390 else None,
        mmio=tuple(
            MmioPlace(bus=_mmio_bus(index), index=index)
            for index in (mmio if spec.machine is Machine.MICROVM else ())
        ),
        nvdimm=is_q35,
        memory_slots=spec.memory_slots if is_q35 else 0,
        ap=is_s390 and spec.accel == "kvm",
        memory_bytes=spec.memory_mib << 20,
    )


_MMIO_TRANSPORTS = 23
"""A microvm with ACPI has 24; the interrupt of number 0 silences the serial port.

Source: QEMU hw/i386/microvm.c; measured on QEMU 7.2.
"""


def _mmio_bus(index: int) -> str:
    """The guest finds the highest number first: its ACPI table has this order."""
    return f"virtio-mmio-bus.{_MMIO_TRANSPORTS - index}"


def _window(spec: VmSpec, index: int) -> int:
    """Bytes of prefetchable memory behind a port."""
    asked = spec.windows[index] if index < len(spec.windows) else 0
    return max(asked, FIRMWARE_WINDOWS.prefetchable)


def _ports(spec: VmSpec) -> list[str]:
    """Root ports, and bridges after them."""
    arguments = []
    for index in range(spec.ports):
        slot, number = hex(_FIRST_PORT_SLOT + index), index + 1
        port = {"id": f"rp{index}", "bus": "pcie.0", "addr": slot}
        if (window := _window(spec, index)) > FIRMWARE_WINDOWS.prefetchable:
            port["pref64-reserve"] = str(window)
        arguments += _device("pcie-root-port", **port, chassis=number, slot=number)
    for index in range(spec.bridges):
        slot = hex(_FIRST_PORT_SLOT + spec.ports + index)
        arguments += _device("pcie-pci-bridge", id=f"br{index}", bus="pcie.0", addr=slot)
    return arguments


def command_line(spec: VmSpec, qmp_descriptor: int, console_descriptor: int) -> list[str]:
    """QEMU's arguments: places, shared memory, a QMP socket, the pipe for the guest's console."""
    arguments = [BINARY[spec.machine], "-name", spec.name]
    machine = f"{spec.machine}{_MACHINE_OPTIONS[spec.machine]},memory-backend=mem"
    arguments += ["-machine", machine, "-accel", spec.accel]
    arguments += ["-cpu", "host" if spec.accel == "kvm" else "max", "-smp", str(spec.cpus)]
    arguments += ["-m", _memory(spec), "-nodefaults", "-no-user-config", "-display", "none"]
    size = spec.memory_mib << 20
    arguments += _json("-object", qom_type="memory-backend-memfd", id="mem", size=size, share=True)
    arguments += ["-chardev", f"socket,id=qmp,fd={qmp_descriptor},server=on,wait=off"]
    arguments += ["-qmp", "chardev:qmp"]  # QEMU 11 warns that -mon will be removed
    arguments += _console(spec, console_descriptor)
    arguments += _ports(spec) if spec.machine is Machine.Q35 else []
    match spec.machine:
        case Machine.Q35:
            scsi = {"id": "scsi0", "bus": "pcie.0", "addr": hex(_SCSI_SLOT)}
            arguments += _device("virtio-scsi-pci", **scsi)
        case Machine.S390:
            scsi = {"id": "scsi0", "devno": _SCSI_DEVNO.qemu}
            arguments += _device("virtio-scsi-ccw", **scsi)
        case Machine.MICROVM:
            # The legacy transport is the default, and vhost-user backends cannot serve it.
            arguments += ["-global", "virtio-mmio.force-legacy=false"]
        case _:
            assert_never(spec.machine)
    return [*arguments, *_boot(spec)]


def _memory(spec: VmSpec) -> str:
    if spec.machine is not Machine.Q35 or not spec.memory_slots:
        return f"{spec.memory_mib}M"
    most = most_memory_mib(spec)
    return f"{spec.memory_mib}M,slots={spec.memory_slots},maxmem={most}M"


def most_memory_mib(spec: VmSpec) -> int:
    """The guest's memory with all NVDIMMs that it may get."""
    has_slots = spec.machine is Machine.Q35 and spec.memory_slots
    return spec.memory_mib + (_MEMORY_ROOM_MIB if has_slots else 0)


def has_option(words: Collection[str], option: str) -> bool:
    """Whether a command has an option, which QEMU takes with one dash or two."""
    return not {f"-{option}", f"--{option}"}.isdisjoint(words)


def _console(spec: VmSpec, descriptor: int) -> list[str]:
    """The guest's console goes to a pipe; a microvm's only serial port may have another use."""
    if spec.machine is Machine.MICROVM and has_option(spec.extra, "serial"):
        return []
    arguments = ["-chardev", f"file,id=console,path=/proc/self/fd/{descriptor}"]
    if spec.machine is Machine.S390:
        return [*arguments, "-device", "sclpconsole,chardev=console"]
    return [*arguments, "-serial", "chardev:console"]


def _boot(spec: VmSpec) -> list[str]:
    arguments = []
    for option, value in (
        ("-kernel", spec.kernel),
        ("-initrd", spec.initrd),
        ("-append", spec.append),
    ):
        arguments += [option, value] if value is not None else []
    if spec.disk is not None:
        file = {"driver": "file", "filename": spec.disk}
        arguments += _json("-blockdev", driver="raw", node_name="boot", file=file)
        arguments += _device(**_BOOT_DISK[spec.machine], id="boot", drive="boot")
    return arguments


_BOOT_DISK: Mapping[Machine, Mapping[str, Any]] = {
    Machine.Q35: {
        "driver": "virtio-blk-pci",
        "bus": "pcie.0",
        "addr": hex(_DISK_SLOT),
        "bootindex": 0,
    },
    Machine.MICROVM: {"driver": "virtio-blk-device", "bus": _mmio_bus(0)},
    Machine.S390: {"driver": "virtio-blk-ccw", "devno": _DISK_DEVNO.qemu, "bootindex": 0},
}


def _device(driver: str, **properties: str | int) -> list[str]:
    """A device of the machine itself, without user text.

    Not as JSON: QEMU 7.2 makes all JSON devices last, and those of `extra` would be first.
    """
    return ["-device", option_text(driver, properties)]


def option_text(what: str, options: Mapping[str, str | int]) -> str:
    """A QEMU option as `what,key=value,...`, only for vmplug's own words and numbers."""
    return ",".join([what, *(f"{key}={_word(value)}" for key, value in options.items())])


def _word(value: str | int) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _json(option: str, **properties: Any) -> list[str]:
    return [option, json.dumps({key.replace("_", "-"): v for key, v in properties.items()})]
