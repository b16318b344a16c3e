"""The command line of the lab's QEMU."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.kernel import Kernel
from lab.topology import DEVICES, DISKS, FAR_BUS, PORTS, Device, Port, Properties

QEMU = "qemu-system-x86_64"
NODE_MIB = (1920, 128)
"""Memory of the two NUMA nodes."""
DISK_BYTES = 16 << 20

ROOT_TAG = "root"
"""The tag of the 9p file system that is this machine's; those that are shared are share0, ..."""

KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 intel_iommu=on "
    # The kernel measures the frequency of the TSC as it boots. Where the host is busy it may get a
    # sixth of it, and the TSC's clock then runs six times too fast. Nobody measures the HPET's.
    # Source: pit_calibrate_tsc in Linux arch/x86/kernel/tsc.c.
    "clocksource=hpet "
    # These save time on an emulated CPU.
    "mitigations=off nokaslr no_timer_check tsc=reliable random.trust_cpu=on"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What differs between one lab VM and another.

    `directory` holds what QEMU reads and writes: the `initrd`, the disks; `output` with what the
    command says, `console` with what the kernel says, `status` with the command's exit status.
    `shares` may be written to, at the same path in the lab. `monitor` has the two ends of a socket
    pair: QEMU answers QMP on the first, and gives the second to the lab as a serial port.
    """

    kernel: Kernel
    directory: Path
    shares: tuple[Path, ...]
    monitor: tuple[int, int]
    remapping: bool


def make_disks(directory: Path) -> None:
    """Makes the images of all disks: each its marker, then zeros."""
    for disk in DISKS:
        with (directory / disk.node_name).open("wb") as image:
            image.write(disk.marker.encode())
            image.truncate(DISK_BYTES)


def command_line(machine: Machine) -> list[str]:
    """QEMU with its arguments.

    Output goes to files: QEMU would make a stdout non-blocking, for every process that has it.
    """
    return [
        QEMU,
        *("-machine", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-no-reboot"),
        *_memory(),
        *("-kernel", str(machine.kernel.vmlinux), "-initrd", str(machine.directory / "initrd")),
        *("-append", KERNEL_COMMAND_LINE),
        *_device("intel-iommu", {"intremap": "on" if machine.remapping else "off"}),
        *_channels(machine),
        *_filesystems(machine.shares),
        *_topology(machine.directory),
    ]


def _memory() -> Iterator[str]:
    yield from ("-smp", "1", "-m", f"{sum(NODE_MIB)}M")
    for node, size_mib in enumerate(NODE_MIB):
        memory = f"ram{node}"
        yield from _object("memory-backend-ram", {"id": memory, "size": size_mib << 20})
        yield from ("-numa", f"node,nodeid={node},memdev={memory}")
    yield from ("-numa", "cpu,node-id=0,socket-id=0")


def _channels(machine: Machine) -> Iterator[str]:
    """Serial ports of both kinds: the older need no driver, the virtio ones lose no byte."""
    for name in ("console", "status", "output"):
        path = str(machine.directory / name).replace(",", ",,")
        yield from ("-chardev", f"file,id={name},path={path}")
    for name, fd in zip(("monitor", "monitor-port"), machine.monitor, strict=True):
        yield from ("-chardev", f"socket,id={name},fd={fd}")
    yield from ("-serial", "chardev:console", "-serial", "chardev:status")
    yield from ("-qmp", "chardev:monitor")
    yield from _device("virtio-serial-pci", {"addr": "1e.0"})
    yield from _device("virtserialport", {"name": "lab.output", "chardev": "output"})
    yield from _device("virtserialport", {"name": "lab.monitor", "chardev": "monitor-port"})


def _filesystems(shares: tuple[Path, ...]) -> Iterator[str]:
    yield from _filesystem(ROOT_TAG, Path("/"), "readonly=on", "1d.0")
    for number, share in enumerate(shares):
        yield from _filesystem(f"share{number}", share, "readonly=off", f"1c.{number}")


def _filesystem(tag: str, path: Path, access: str, addr: str) -> Iterator[str]:
    source = str(path).replace(",", ",,")
    options = f"security_model=none,multidevs=remap,{access}"
    yield from ("-fsdev", f"local,id={tag},path={source},{options}")
    names = {"fsdev": tag, "mount_tag": tag}
    is_first = addr.endswith(".0")
    yield from _device("virtio-9p-pci", {**names, "addr": addr, "multifunction": is_first})


def _topology(directory: Path) -> Iterator[str]:
    for disk in DISKS:
        image = {"driver": "file", "filename": str(directory / disk.node_name)}
        node = {"driver": "raw", "node-name": disk.node_name, "file": image}
        yield from ("-blockdev", json.dumps(node))
    yield from ("-netdev", "user,id=network,restrict=on")
    far_place = {"id": FAR_BUS, "bus": "pcie.0", "addr": "12.0"}
    yield from _device("pxb-pcie", {**far_place, "numa_node": 1, "bus_nr": 0x40})
    for port in PORTS:
        yield from _device("pcie-root-port", port_properties(port))
    yield from _device("nvme-subsys", {"id": "sriov-subsystem"})
    for device in DEVICES:
        yield from _device(device.driver, device_properties(device))
    yield from _device("nvme-ns", {"drive": "disk-sriov", "bus": "sriov"})


def port_properties(port: Port) -> Properties:
    """A root port's properties; its chassis and slot numbers are its bus number."""
    return {
        "id": port.qdev_id,
        "bus": port.parent,
        "addr": port.addr,
        "multifunction": port.addr.endswith(".0"),
        "chassis": port.bus,
        "slot": port.bus,
        **port.properties,
    }


def device_properties(device: Device) -> Properties:
    """A device's properties; slot and function are those of its address in the lab."""
    addr = device.bdf.rpartition(":")[2]
    return {"id": device.qdev_id, "bus": device.bus, "addr": addr, **device.properties}


def _device(driver: str, properties: Properties) -> tuple[str, str]:
    return "-device", json.dumps({"driver": driver, **properties})


def _object(kind: str, properties: Mapping[str, str | int]) -> tuple[str, str]:
    return "-object", json.dumps({"qom-type": kind, **properties})
