"""The devices of the lab VM, which are the host's devices to what runs in it.

Every device has a root port of its own and is an IOMMU group by itself, unless it says otherwise.
Addresses are those that the lab's kernel gives; tests/lab/test_lab.py holds them to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Properties = Mapping[str, str | int | bool]
"""Properties of one `-device`, by QEMU's names and in its JSON types."""

NVME = "0000:01:00.0"
NIC = "0000:02:00.0"
EDU = "0000:03:00.0"
"""QEMU's device for learners: a small BAR, an interrupt, DMA, and no driver in Linux."""
VIRTIO_DISK = "0000:04:00.0"
"""A virtio device whose DMA goes through the IOMMU."""
MULTI_NVME, MULTI_EDU, MULTI_NIC = "0000:05:00.0", "0000:05:00.1", "0000:05:00.2"
"""One device of three functions, in one group."""
LARGE = "0000:06:00.0"
"""A BAR of 8 GiB."""
BRIDGE = "0000:07:00.0"
CONVENTIONAL = ("0000:08:01.0", "0000:08:02.0")
"""Two conventional PCI devices behind that bridge, in one group with it."""
SRIOV = "0000:09:00.0"
"""An NVMe controller that can have SRIOV_VFS virtual functions, 0000:09:00.1 and so on."""
NETWORK = "0000:0a:00.0"
"""A network card that the lab uses: its interface is up and has LAB_ADDRESS."""
VGA = "0000:0b:00.0"
"""The graphics card that the firmware uses: its boot_vga is 1."""
FAR = "0000:41:00.0"
"""On another NUMA node."""

SRIOV_VFS = 4
LAB_ADDRESS = "10.0.2.15/24"
LARGE_BAR_BYTES = 8 << 30

NVME_MARKER, VIRTIO_MARKER = "LAB-NVME", "LAB-VIRTIO"
MULTI_MARKER, SRIOV_MARKER = "LAB-MULTI", "LAB-SRIOV"
"""What the disks begin with."""
NVME_SERIAL, MULTI_SERIAL, SRIOV_SERIAL = "LABNVME0", "LABNVME1", "LABSRIOV"


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A root port: `bus` is the number that the firmware gives to what is behind it.

    `parent` is the bus that the port is on, `addr` its slot and function there.
    """

    qdev_id: str
    bus: int
    addr: str
    parent: str = "pcie.0"
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """An image that begins with the text `marker`; `node_name` is its block node."""

    node_name: str
    marker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device of the lab's QEMU, at `bdf` in the lab; `bus` is QEMU's name of what it sits on."""

    qdev_id: str
    driver: str
    bus: str
    bdf: str
    properties: Properties = field(default_factory=dict)


def device_behind(port: Port, driver: str, *, qdev_id: str) -> Device:
    """A device that is to come to a port."""
    bdf = f"0000:{port.bus:02x}:00.0"
    return Device(qdev_id=qdev_id, driver=driver, bus=port.qdev_id, bdf=bdf)


FAR_BUS = "far"
"""The root bus of the second NUMA node."""

FREE_PORT = Port(qdev_id="free0", bus=0x0C, addr="11.2")
OTHER_FREE_PORT = Port(qdev_id="free1", bus=0x0D, addr="11.3")
"""Nothing is behind these: they are for devices that come and go."""

PORTS = (
    Port(qdev_id="port1", bus=0x01, addr="10.0"),
    Port(qdev_id="port2", bus=0x02, addr="10.1"),
    Port(qdev_id="port3", bus=0x03, addr="10.2"),
    Port(qdev_id="port4", bus=0x04, addr="10.3"),
    Port(qdev_id="port5", bus=0x05, addr="10.4"),
    Port(qdev_id="port6", bus=0x06, addr="10.5", properties={"pref64-reserve": 16 << 30}),
    Port(qdev_id="port7", bus=0x07, addr="10.6"),
    Port(qdev_id="port9", bus=0x09, addr="10.7"),
    Port(qdev_id="port10", bus=0x0A, addr="11.0"),
    Port(qdev_id="port11", bus=0x0B, addr="11.1"),
    FREE_PORT,
    OTHER_FREE_PORT,
    Port(qdev_id="port65", bus=0x41, addr="0.0", parent=FAR_BUS),
)

DISKS = (
    Disk(node_name="disk-nvme", marker=NVME_MARKER),
    Disk(node_name="disk-virtio", marker=VIRTIO_MARKER),
    Disk(node_name="disk-multi", marker=MULTI_MARKER),
    Disk(node_name="disk-sriov", marker=SRIOV_MARKER),
)

NO_ROM: Properties = {"romfile": ""}
"""For a network card: the firmware would take its time to offer a boot from the network."""

DEVICES = (
    Device(
        qdev_id="nvme",
        driver="nvme",
        bus="port1",
        bdf=NVME,
        properties={"serial": NVME_SERIAL, "drive": "disk-nvme"},
    ),
    Device(qdev_id="nic", driver="e1000e", bus="port2", bdf=NIC, properties=NO_ROM),
    Device(qdev_id="edu", driver="edu", bus="port3", bdf=EDU),
    Device(
        qdev_id="virtio-disk",
        driver="virtio-blk-pci",
        bus="port4",
        bdf=VIRTIO_DISK,
        properties={"drive": "disk-virtio", "iommu_platform": True, "disable-legacy": "on"},
    ),
    Device(
        qdev_id="multi-nvme",
        driver="nvme",
        bus="port5",
        bdf=MULTI_NVME,
        properties={"serial": MULTI_SERIAL, "drive": "disk-multi", "multifunction": True},
    ),
    Device(qdev_id="multi-edu", driver="edu", bus="port5", bdf=MULTI_EDU),
    Device(qdev_id="multi-nic", driver="e1000e", bus="port5", bdf=MULTI_NIC, properties=NO_ROM),
    Device(
        qdev_id="large",
        driver="pci-testdev",
        bus="port6",
        bdf=LARGE,
        properties={"membar": LARGE_BAR_BYTES},
    ),
    Device(qdev_id="bridge", driver="pcie-pci-bridge", bus="port7", bdf=BRIDGE),
    Device(qdev_id="conventional0", driver="edu", bus="bridge", bdf=CONVENTIONAL[0]),
    Device(qdev_id="conventional1", driver="edu", bus="bridge", bdf=CONVENTIONAL[1]),
    Device(
        qdev_id="sriov",
        driver="nvme",
        bus="port9",
        bdf=SRIOV,
        # Queues and interrupts: what stays with the function itself is what its VFs do not get.
        # Source: QEMU docs/system/devices/nvme.rst, "SR-IOV and Virtualization Enhancements".
        properties={
            "serial": SRIOV_SERIAL,
            "subsys": "sriov-subsystem",
            "sriov_max_vfs": SRIOV_VFS,
            "sriov_vq_flexible": 2 * SRIOV_VFS,
            "sriov_vi_flexible": SRIOV_VFS,
            "max_ioqpairs": 14,
            "msix_qsize": 9,
        },
    ),
    Device(
        qdev_id="network",
        driver="virtio-net-pci",
        bus="port10",
        bdf=NETWORK,
        properties={"netdev": "network", "disable-legacy": "on", **NO_ROM},
    ),
    Device(qdev_id="vga", driver="VGA", bus="port11", bdf=VGA),
    Device(qdev_id="far-edu", driver="edu", bus="port65", bdf=FAR),
)
