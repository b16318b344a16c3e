"""The devices of the lab VM, which are the host's devices for what runs in it.

Each stands behind a root port of its own and is an IOMMU group by itself, unless it says
otherwise. Addresses are those that the lab's kernel gives; `test_lab.py` holds them to it.
"""

from collections.abc import Sequence
from pathlib import Path

NVME = "0000:01:00.0"
NIC = "0000:02:00.0"
EDU = "0000:03:00.0"
VIRTIO_DISK = "0000:04:00.0"
MULTI_NVME, MULTI_EDU, MULTI_NIC = "0000:05:00.0", "0000:05:00.1", "0000:05:00.2"
"""One device of three functions, in one group."""
LARGE = "0000:06:00.0"
"""A BAR of 8 GiB."""
BRIDGE = "0000:07:00.0"
CONVENTIONAL = ("0000:08:01.0", "0000:08:02.0")
"""Two conventional devices behind that bridge, in one group with it."""
SRIOV = "0000:09:00.0"
"""An NVMe with up to four virtual functions."""
FREE_PORT = "rpfree"
"""A root port with nothing behind it, for devices that come and go."""
NETWORK = "0000:0d:00.0"
FAR = "0000:41:00.0"
"""On another NUMA node."""

NVME_MARKER, VIRTIO_MARKER, MULTI_MARKER, SRIOV_MARKER = (
    "LAB-NVME0",
    "LAB-VIRTIO",
    "LAB-NVME1",
    "LAB-SRIOV",
)
"""What the disks begin with."""

_DISKS = {
    "nvme0": NVME_MARKER,
    "virtio0": VIRTIO_MARKER,
    "nvme1": MULTI_MARKER,
    "sriov0": SRIOV_MARKER,
}
_DISK_BYTES = 16 << 20
_PORTS = ("rp1", "rp2", "rp3", "rp4", "rp5", "rp6", "rp7", "rp8", "rp9", FREE_PORT)
_PORT_OPTIONS = {"rp6": ",pref64-reserve=16G", "rp8": ",bus-reserve=2"}


def make_disks(directory: Path) -> None:
    """The disks' images, each with its marker and then zeros."""
    for name, marker in _DISKS.items():
        with (directory / name).open("wb") as file:
            file.write(marker.encode())
            file.truncate(_DISK_BYTES)


def qemu_arguments(directory: Path) -> Sequence[str]:
    """The devices, with their disks in `directory`."""
    arguments = []
    for name in _DISKS:
        arguments += ["-drive", f"if=none,id={name},file={directory / name},format=raw"]
    for number, port in enumerate(_PORTS):
        slot, function = divmod(number, 8)
        more = ",multifunction=on" if function == 0 else ""
        arguments += [
            "-device",
            (
                f"pcie-root-port,id={port},chassis={number + 1},slot={number + 1},bus=pcie.0,"
                f"addr={0x10 + slot:x}.{function}{more}{_PORT_OPTIONS.get(port, '')}"
            ),
        ]
    for device in (
        "nvme,id=nvme0,serial=LABNVME0,drive=nvme0,bus=rp1",
        "e1000e,id=nic0,bus=rp2,netdev=net0",
        "edu,id=edu0,bus=rp3",
        "virtio-blk-pci,id=vb0,drive=virtio0,bus=rp4,iommu_platform=on,disable-legacy=on",
        "nvme,id=nvme1,serial=LABNVME1,drive=nvme1,bus=rp5,addr=0.0,multifunction=on",
        "edu,id=edu1,bus=rp5,addr=0.1",
        "e1000e,id=nic1,bus=rp5,addr=0.2,netdev=net1",
        "pci-testdev,id=large0,bus=rp6,membar=8G",
        "pcie-pci-bridge,id=bridge0,bus=rp7",
        "edu,id=edu2,bus=bridge0,addr=1",
        "edu,id=edu3,bus=bridge0,addr=2",
        "nvme-subsys,id=subsys0",
        (
            "nvme,id=nvmesr,serial=LABSRIOV,subsys=subsys0,bus=rp8,sriov_max_vfs=4,"
            "sriov_vq_flexible=8,sriov_vi_flexible=4,max_ioqpairs=14,msix_qsize=9"
        ),
        "nvme-ns,drive=sriov0,bus=nvmesr,shared=on",
        "pxb-pcie,id=pxb1,bus=pcie.0,bus_nr=64,numa_node=1,addr=14",
        "pcie-root-port,id=rpfar,chassis=40,slot=40,bus=pxb1",
        "edu,id=edufar,bus=rpfar",
    ):
        arguments += ["-device", device]
    return [
        *arguments,
        *("-netdev", "user,id=net0,restrict=on", "-netdev", "user,id=net1,restrict=on"),
    ]
