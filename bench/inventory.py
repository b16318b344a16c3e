"""The inventory of a large host, against lspci on the same tree."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.timing import Ratio, compare
from vmplug.host.inventory import read_inventory
from vmplug.host.root import HostRoot

FUNCTIONS = 10_000
_FIRST_BUS, _LAST_BUS = 1, 255
_DRIVER = "../../../bus/pci/drivers/nvme"


def rows() -> Iterator[Ratio]:
    """One row; unlike lspci it also reads BARs, virtual functions and whether it is PCIe."""
    with _tree(FUNCTIONS) as directory:
        root = HostRoot(directory)
        command = ["lspci", "-A", "linux-sysfs", "-O", f"sysfs.path={directory}/sys/bus/pci"]

        def ours() -> None:
            assert len(read_inventory(root).pci) == FUNCTIONS

        def lspci() -> None:
            done = subprocess.run([*command, "-vmmnk"], capture_output=True, check=True)
            assert done.stdout.count(b"Slot:") == FUNCTIONS

        name = "inventory of 10 000 PCI functions / lspci -vmmnk"
        yield compare(name, ours, lspci, target=0.35, rounds=7, repeat=1)


@contextmanager
def _tree(functions: int) -> Iterator[str]:
    """A host with that many NVMe functions, each in an IOMMU group of its own."""
    with TemporaryDirectory(prefix="vmplug-bench-") as directory:
        listed = Path(directory, "sys/bus/pci/devices")
        groups = Path(directory, "sys/kernel/iommu_groups")
        for path in (listed, groups, Path(directory, "sys/bus/pci/drivers/nvme")):
            path.mkdir(parents=True)
        for number in range(functions):
            address = _address(number)
            path = Path(directory, "sys/devices", f"pci{address[:7]}", address)
            path.mkdir(parents=True)
            for file, content in _files(number, address).items():
                (path / file).write_bytes(content)
            os.symlink(f"../../../devices/pci{address[:7]}/{address}", listed / address)
            os.symlink(_DRIVER, path / "driver")
            os.symlink("../../../bus/pci", path / "subsystem")
            os.symlink(f"../../../kernel/iommu_groups/{number}", path / "iommu_group")
            members = groups / str(number) / "devices"
            members.mkdir(parents=True)
            os.symlink(f"../../../../devices/pci{address[:7]}/{address}", members / address)
        yield directory


def _address(number: int) -> str:
    buses = _LAST_BUS - _FIRST_BUS + 1
    domain, rest = divmod(number, buses * 32)
    bus, slot = divmod(rest, 32)
    return f"{domain:04x}:{bus + _FIRST_BUS:02x}:{slot:02x}.0"


def _files(number: int, address: str) -> dict[str, bytes]:
    """What Linux shows of an NVMe drive, in its own spelling."""
    start = 0x4000000000 + number * 0x10000
    resource = [f"{start:#018x} {start + 0x3FFF:#018x} {0x140204:#018x}\n"]
    resource += [f"{0:#018x} {0:#018x} {0:#018x}\n"] * 12
    uevent = (
        "DRIVER=nvme\nPCI_CLASS=10802\nPCI_ID=144D:A80A\nPCI_SUBSYS_ID=144D:A801\n"
        f"PCI_SLOT_NAME={address}\n"
        "MODALIAS=pci:v0000144Dd0000A80Asv0000144Dsd0000A801bc01sc08i02\n"
    )
    config = bytearray(4096)
    config[:12] = bytes.fromhex("4d140aa8060010000002080100000000"[:24])
    config[0x34], config[0x40] = 0x40, 0x10
    return {
        "uevent": uevent.encode(),
        "resource": "".join(resource).encode(),
        "config": bytes(config),
        "class": b"0x010802\n",
        "vendor": b"0x144d\n",
        "device": b"0xa80a\n",
        "subsystem_vendor": b"0x144d\n",
        "subsystem_device": b"0xa801\n",
        "revision": b"0x00\n",
        "irq": b"0\n",
        "modalias": b"pci:v0000144Dd0000A80Asv0000144Dsd0000A801bc01sc08i02\n",
        "numa_node": b"0\n",
        "reset_method": b"flr bus\n",
        "current_link_speed": b"16.0 GT/s PCIe\n",
    }
