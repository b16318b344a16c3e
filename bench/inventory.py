"""The inventory of a large host, against lspci on the same tree."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.timing import IS_QUICK, Ratio, compare
from vmplug.host.inventory import read_inventory
from vmplug.host.root import HostRoot

_PER_PORT = 250
"""Functions of one slot: its root port, a drive, and the virtual functions of the drive."""
FUNCTIONS = _PER_PORT if IS_QUICK else 10_000

_BRIDGE, _DRIVE = ("10400", "8086:347A", "pcieport"), ("10802", "144D:A824", "nvme")


def rows() -> Iterator[Ratio]:
    """Unlike lspci, vmplug also reads BARs, virtual functions and whether it is PCIe."""
    with _tree() as directory:
        root = HostRoot(directory)
        command = ["lspci", "-A", "linux-sysfs", "-O", f"sysfs.path={directory}/sys/bus/pci"]

        def ours() -> int:
            return len(read_inventory(root).pci)

        def lspci() -> int:
            done = subprocess.run([*command, "-vmmnk"], capture_output=True, check=True)
            return done.stdout.count(b"\nSlot:") + 1

        name = "inventory of 10 000 PCI functions / lspci -vmmnk"
        yield compare(name, ours, lspci, _saw_all, target=0.35, size=(9, 1))
        yield from _records(Path(directory))


def _saw_all(ours: int, other: int) -> bool:
    return ours == other == FUNCTIONS


def _records(host: Path) -> Iterator[Ratio]:
    """A record of that host, written and read."""
    vmplug = str(Path(sys.executable).with_name("vmplug"))
    with TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as directory:
        ours, other = Path(directory, "ours.tar"), Path(directory, "other.tar")

        def record() -> int:
            command = [vmplug, "record", str(ours), "--force", "--root", str(host)]
            subprocess.run(command, capture_output=True, check=True)
            return _functions_in(ours)

        def tar() -> int:
            subprocess.run(["tar", "-cf", str(other), "-C", str(host), "sys"], check=True)
            return _functions_in(other)

        name = "vmplug record of 10 000 functions / tar -c"
        yield compare(name, record, tar, _saw_all, target=2.0, size=(3, 1))

        def listed(root: Path) -> int:
            command = [vmplug, "host", "--root", str(root), "--json"]
            done = subprocess.run(command, capture_output=True, check=True)
            return len(json.loads(done.stdout)["pci"])

        name = "vmplug host --root FILE.tar / --root DIRECTORY"
        from_record, from_directory = partial(listed, ours), partial(listed, host)
        yield compare(name, from_record, from_directory, _saw_all, target=1.5, size=(3, 1))


def _functions_in(path: Path) -> int:
    """Read beside vmplug and tar, in a millisecond a megabyte: both sides do it."""
    return path.read_bytes().count(b"PCI_SLOT_NAME=")


@contextmanager
def _tree() -> Iterator[str]:
    """A host of many drives that are shared by SR-IOV, each function in a group of its own.

    In memory, as sysfs is.
    """
    with TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as directory:
        host = Path(directory)
        for path in ("bus/pci/devices", "bus/pci/drivers/nvme", "kernel/iommu_groups"):
            (host / "sys" / path).mkdir(parents=True)
        for slot in range(FUNCTIONS // _PER_PORT):
            port = f"0000:{slot:02x}:01.0"
            bus = f"pci0000:{slot:02x}"
            _add(host, f"{bus}/{port}", _BRIDGE)
            physfn = f"{0x1000 + slot:04x}:01:00.0"
            _add(host, f"{bus}/{port}/{physfn}", _DRIVE)
            for number in range(1, _PER_PORT - 1):
                virtfn = f"{physfn[:8]}{number >> 3:02x}.{number & 7}"
                _add(host, f"{bus}/{port}/{virtfn}", _DRIVE)
                below = host / "sys/devices" / bus / port
                os.symlink(f"../{physfn}", below / virtfn / "physfn")
                os.symlink(f"../{virtfn}", below / physfn / f"virtfn{number - 1}")
        yield directory


def _add(host: Path, path: str, kind: tuple[str, str, str]) -> None:
    """One function, in the directory `path` of /sys/devices."""
    directory = host / "sys/devices" / path
    directory.mkdir(parents=True, exist_ok=True)
    address = directory.name
    for file, content in _files(address, *kind).items():
        (directory / file).write_bytes(content)
    up = "../" * (path.count("/") + 2)
    listed = host / "sys/bus/pci/devices"
    group = len(os.listdir(host / "sys/kernel/iommu_groups"))
    os.symlink(f"../../../devices/{path}", listed / address)
    os.symlink(f"{up}bus/pci/drivers/{kind[2]}", directory / "driver")
    os.symlink(f"{up}bus/pci", directory / "subsystem")
    os.symlink(f"{up}kernel/iommu_groups/{group}", directory / "iommu_group")
    members = host / f"sys/kernel/iommu_groups/{group}/devices"
    members.mkdir(parents=True)
    os.symlink(f"../../../../devices/{path}", members / address)


def _files(address: str, class_code: str, ids: str, driver: str) -> dict[str, bytes]:
    """What Linux shows of a function, in its own spelling."""
    vendor, device = ids.lower().split(":")
    start = 0x4000000000 + int(address.replace(":", "").replace(".", ""), 16)
    resource = [f"{start:#018x} {start + 0x7FFF:#018x} {0x140204:#018x}\n"]
    resource += [f"{0:#018x} {0:#018x} {0:#018x}\n"] * 12
    modalias = f"pci:v0000{ids[:4]}d0000{ids[5:]}sv0000144Dsd0000A801bc01sc08i02\n"
    uevent = (
        f"DRIVER={driver}\nPCI_CLASS={class_code}\nPCI_ID={ids}\nPCI_SUBSYS_ID=144D:A801\n"
        f"PCI_SLOT_NAME={address}\nMODALIAS={modalias}"
    )
    config = bytearray(4096)
    config[0x06], config[0x34], config[0x40] = 0x10, 0x40, 0x10
    texts = {
        "uevent": uevent,
        "resource": "".join(resource),
        "class": f"0x{class_code:>06}\n",
        "vendor": f"0x{vendor}\n",
        "device": f"0x{device}\n",
        "subsystem_vendor": "0x144d\n",
        "subsystem_device": "0xa801\n",
        "revision": "0x00\n",
        "irq": "0\n",
        "modalias": modalias,
        "numa_node": "0\n",
        "reset_method": "flr bus\n",
    }
    return {**{name: text.encode() for name, text in texts.items()}, "config": bytes(config)}
