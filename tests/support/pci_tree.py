"""PciTree: another host's PCI functions, IOMMU groups, mediated devices and network interfaces.

The shapes are the kernel's: a function's directory lies below its bridge's in /sys/devices, every
other way to it is a relative link; PCI_CLASS has no leading zero and `class` has one; a virtual
function's own configuration space begins with FFFF.
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

from tests.support.tree import GIB, HostTree

FLAGS_MEM64 = 0x14220C
"""A 64-bit prefetchable memory BAR, as `resource` shows its flags."""
FLAGS_MEM32 = 0x40200
FLAGS_IO = 0x40101

CONFIG_PCIE = 4096
CONFIG_PCI = 256
CONFIG_CUT = 64
"""What whoever is not root reads."""

_CDEV_MAJOR, _GROUP_MAJOR = 511, 243
_EXPRESS, _POWER = b"\x10\x00", b"\x01\x60"


class PciTree(HostTree):
    """Builds PCI functions below `path`; every method may be chained."""

    def pci_function(
        self,
        bdf: str,
        *,
        class_code: int = 0x010802,
        vendor: int = 0x8086,
        device: int = 0x0953,
        subsystem: tuple[int, int] = (0x8086, 0x370D),
        driver: str | None = None,
        group: int | None = None,
        numa_node: int = -1,
        bars: Mapping[int, tuple[int, int, int]] | None = None,
        config: int | bytes = CONFIG_PCIE,
        below: str | None = None,
        reset_methods: Sequence[str] | None = ("flr", "bus"),
        cdev: int | None = None,
        **attributes: str | bytes,
    ) -> Self:
        """A function; `below` is the BDF of the bridge it is behind.

        `bars` are (start, size, flags) by number; `config` is the length or the content of the
        configuration space; `reset_methods` None leaves the file out. Other keywords are files.
        """
        path = self._pci_path(bdf, below)
        ids = f"{vendor:04X}:{device:04X}"
        modalias = (
            f"pci:v{vendor:08X}d{device:08X}sv{subsystem[0]:08X}sd{subsystem[1]:08X}"
            f"bc{class_code >> 16:02X}sc{class_code >> 8 & 0xFF:02X}i{class_code & 0xFF:02X}"
        )
        lines = {
            "PCI_CLASS": f"{class_code:X}",
            "PCI_ID": ids,
            "PCI_SUBSYS_ID": f"{subsystem[0]:04X}:{subsystem[1]:04X}",
            "PCI_SLOT_NAME": bdf,
            "MODALIAS": modalias,
        }
        files: dict[str, str | bytes] = {
            "uevent": "".join(f"{key}={value}\n" for key, value in lines.items()),
            "class": f"{class_code:#08x}\n",
            "vendor": f"{vendor:#06x}\n",
            "device": f"{device:#06x}\n",
            "subsystem_vendor": f"{subsystem[0]:#06x}\n",
            "subsystem_device": f"{subsystem[1]:#06x}\n",
            "revision": "0x01\n",
            "modalias": f"{modalias}\n",
            "numa_node": f"{numa_node}\n",
            "driver_override": "(null)\n",
            "resource": resource_text(bars or {}),
            "config": config_space(vendor, device, config) if isinstance(config, int) else config,
            **({} if reset_methods is None else {"reset_method": f"{' '.join(reset_methods)}\n"}),
            **attributes,
        }
        for name, content in files.items():
            self.file(f"{path}/{name}", content)
        self.link(f"/sys/bus/pci/devices/{bdf}", f"../../..{path.removeprefix('/sys')}")
        self.link(f"{path}/subsystem", up(path) + "bus/pci")
        if driver:
            self.take(bdf, driver)
        if group is not None:
            self.iommu_group(group, bdf)
        if cdev is not None:
            self.vfio_cdev(bdf, cdev)
        return self

    def take(self, bdf: str, driver: str) -> Self:
        """Another driver takes a function that is there."""
        path = self.real(bdf)
        with suppress(FileNotFoundError):
            former = os.path.basename(os.readlink(f"{self._base}{path}/driver"))
            os.unlink(f"{self._base}{path}/driver")
            os.unlink(f"{self._base}/sys/bus/pci/drivers/{former}/{bdf}")
        uevent = self.path / path[1:] / "uevent"
        kept = [line for line in uevent.read_bytes().splitlines() if b"DRIVER=" not in line]
        uevent.write_bytes(b"\n".join([os.fsencode(f"DRIVER={driver}"), *kept, b""]))
        self.pci_driver(driver)
        self.link(f"{path}/driver", up(path) + f"bus/pci/drivers/{driver}")
        return self.link(f"/sys/bus/pci/drivers/{driver}/{bdf}", up("/sys/bus/pci/x/x") + path[5:])

    def pci_driver(self, name: str) -> Self:
        """A driver without functions, if there is none of the name yet."""
        os.makedirs(f"{self._base}/sys/bus/pci/drivers/{name}", exist_ok=True)
        return self

    def iommu_group(self, number: int, *members: str, type_: str = "DMA-FQ") -> Self:
        """Puts functions by their BDF, mediated devices by their UUID, into a group."""
        group = f"/sys/kernel/iommu_groups/{number}"
        if not os.path.isdir(f"{self._base}{group}"):
            self.file(f"{group}/type", f"{type_}\n").file(f"{group}/reserved_regions")
        for member in members:
            path = self.real(member)
            self.link(f"{group}/devices/{member}", up(f"{group}/devices") + path[5:])
            self.link(f"{path}/iommu_group", up(path) + group[5:])
        return self

    def sriov(
        self, physfn: str, *virtfns: str, total: int = 8, device: int = 0x10CA, **more: Any
    ) -> Self:
        """Virtual functions of a function that is there; their vendor is its own."""
        base = self.real(physfn)
        vendor = int((self.path / base.lstrip("/") / "vendor").read_text(), 16)
        self.file(f"{base}/sriov_totalvfs", f"{total}\n")
        self.file(f"{base}/sriov_numvfs", f"{len(virtfns)}\n")
        self.file(f"{base}/sriov_drivers_autoprobe", "1\n")
        for number, virtfn in enumerate(virtfns):
            config = b"\xff" * 4 + config_space(vendor, device, CONFIG_PCIE)[4:]
            made = {"class_code": 0x020000, "vendor": vendor, "device": device, "config": config}
            self.pci_function(virtfn, **{**made, **more})
            path = self.real(virtfn)
            self.link(f"{path}/physfn", f"../{physfn}")
            self.link(f"{base}/virtfn{number}", f"../{virtfn}")
        return self

    def vfio_cdev(self, member: str, number: int, *, devnum: str | None = None) -> Self:
        """The directory that a member has while VFIO holds it, Linux 6.1; the node is apart.

        `devnum` is that of a device that can really be opened, where the node is to be.
        """
        path = f"{self.real(member)}/vfio-dev/vfio{number}"
        name = f"vfio/devices/vfio{number}"
        devnum = devnum or f"{_CDEV_MAJOR}:{number}"
        self._device_files(path, devnum, name)
        self.link(f"/sys/class/vfio-dev/vfio{number}", f"../..{path.removeprefix('/sys')}")
        return self.link(f"/sys/dev/char/{devnum}", f"../..{path[4:]}")

    def vfio_group(self, number: int) -> Self:
        """What the kernel shows of a group that VFIO holds; its node in /dev is apart."""
        path = f"/sys/devices/virtual/vfio/{number}"
        self._device_files(path, f"{_GROUP_MAJOR}:{number}", f"vfio/{number}")
        self.link(f"/sys/class/vfio/{number}", f"../..{path[4:]}")
        return self.link(f"/sys/dev/char/{_GROUP_MAJOR}:{number}", f"../..{path[4:]}")

    def network(
        self,
        bdf: str,
        name: str,
        *,
        bus_device: str = "",
        master: str | None = None,
        uppers: Sequence[str] = (),
    ) -> Self:
        """A network interface of a function, directly or by way of `virtio0`."""
        path = "/".join(filter(None, (self.real(bdf), bus_device, "net", name)))
        self.file(f"{path}/address", "52:54:00:12:34:56\n")
        self.link(f"{path}/device", f"../../../{path.split('/')[-3]}")
        self.link(f"/sys/class/net/{name}", f"../..{path.removeprefix('/sys')}")
        for table in ("route", "if_inet6"):
            open(self._below(f"/proc/net/{table}"), "a").close()
        if master:
            self.link(f"{path}/master", f"{up(path)}devices/virtual/net/{master}")
        for upper in uppers:
            self.link(f"{path}/upper_{upper}", f"{up(path)}devices/virtual/net/{upper}")
        return self

    def route(self, name: str, *, target: str = "00000000", mask: str | None = None) -> Self:
        """One more IPv4 route, by default the default one; words as /proc/net/route has them."""
        mask = mask or ("00000000" if target == "00000000" else "00FFFFFF")
        head = (
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT"
        )
        by = "0102A8C0\t0003" if target == "00000000" else "00000000\t0001"
        line = f"{name}\t{target}\t{by}\t0\t0\t100\t{mask}\t0\t0\t0"
        return self._append("/proc/net/route", head, line)

    def route6(self, name: str, *, target: str = "0" * 32, length: int = 0) -> Self:
        """One more IPv6 route, by default the default one."""
        flags = 0x200200 if name == "lo" else 0x450003
        words = (target, f"{length:02x}", "0" * 32, "00", "0" * 32, "00000400", "00000001")
        line = " ".join((*words, "00000000", f"{flags:08x}", f"{name:>8}"))
        return self._append("/proc/net/ipv6_route", None, line)

    def address6(self, name: str, address: str, *, scope: int) -> Self:
        """One more IPv6 address; scope 0x20 is link-local, 0 global."""
        line = f"{address} 02 40 {scope:02x} 80 {name:>8}"
        return self._append("/proc/net/if_inet6", None, line)

    def pci_disk(
        self,
        bdf: str,
        number: str,
        name: str,
        *,
        size_bytes: int = GIB,
        partitions: Mapping[str, str] | None = None,
        way: str = "nvme/nvme0",
    ) -> Self:
        """A disk of a function; `way` is what lies between the two directories."""
        disk = f"{self.real(bdf)}/{way}/{name}"
        self._block_directory(disk, number, size_bytes, (), ro=False)
        self.file(f"{disk}/removable", "0\n").file(f"{disk}/queue/logical_block_size", "512\n")
        self.link(f"/sys/block/{name}", f"../{disk[5:]}")
        for index, (part_number, part) in enumerate((partitions or {}).items(), start=1):
            self._block_directory(f"{disk}/{part}", part_number, size_bytes // 2, (), ro=False)
            self.file(f"{disk}/{part}/partition", f"{index}\n")
        return self

    def class_device(self, place: str, kind: str, number: str, name: str) -> Self:
        """A device with a node that a driver has made; `kind` is block or char.

        `place` is its directory below /sys, or below a function: `0000:3b:00.0/drm/card1`.
        """
        bdf, slash, way = place.partition("/")
        directory = place if place.startswith("/sys/") else f"{self.real(bdf)}{slash}{way}"
        self._device_files(directory, number, name)
        return self.link(f"/sys/dev/{kind}/{number}", f"../..{directory.removeprefix('/sys')}")

    def moved_network(self, bdf: str, *, bus_device: str = "") -> Self:
        """A network interface of a function, as seen from outside of its network namespace."""
        os.makedirs(self._base + "/".join(filter(None, (self.real(bdf), bus_device, "net"))))
        return self

    def mdev_type(
        self,
        parent: str,
        name: str,
        *,
        title: str | None = None,
        available: int | str = 1,
        api: str = "vfio-pci",
    ) -> Self:
        """A type that `parent`, a BDF or a path below /sys, can be divided into."""
        path = self.real(parent)
        bus, base = "/sys/class/mdev_bus", f"{path}/mdev_supported_types/{name}"
        if not (self.path / bus[1:] / path.rpartition("/")[2]).is_symlink():
            self.link(f"{bus}/{path.rpartition('/')[2]}", f"../..{path[4:]}")
        if title is not None:
            self.file(f"{base}/name", f"{title}\n")
        self.file(f"{base}/device_api", f"{api}\n").file(f"{base}/create")
        return self.file(f"{base}/available_instances", f"{available}\n")

    def mdev(
        self,
        uuid: str,
        parent: str,
        name: str,
        *,
        group: int | None = None,
        matrix: Sequence[str] | None = None,
    ) -> Self:
        """A mediated device of a type that is there."""
        above = self.real(parent)
        path = f"{above}/{uuid}"
        self.file(f"{path}/uevent", "")
        self.link(f"{path}/mdev_type", f"../mdev_supported_types/{name}")
        self.link(f"{above}/mdev_supported_types/{name}/devices/{uuid}", f"../../../{uuid}")
        self.link(f"/sys/bus/mdev/devices/{uuid}", f"../../..{path[4:]}")
        if matrix is not None:
            self.file(f"{path}/matrix", "".join(f"{queue}\n" for queue in matrix))
        if group is None:
            return self
        self.file(f"/sys/kernel/iommu_groups/{group}/name", "vfio-noiommu\n")
        return self.iommu_group(group, uuid)

    def pmem(self, name: str, *, mode: str = "fsdax", size_bytes: int = GIB) -> Self:
        """A namespace of persistent memory, `namespace0.0`, with its block device pmem0."""
        path = f"/sys/devices/platform/e820_pmem/ndbus0/region0/{name}"
        number = name.removeprefix("namespace").partition(".")[0]
        self.file(f"{path}/devtype", "nd_namespace_io\n").file(f"{path}/size", f"{size_bytes}\n")
        self.file(f"{path}/mode", f"{mode}\n").file(f"{path}/numa_node", "0\n")
        disk = f"{path}/block/pmem{number}"
        self._block_directory(disk, f"259:{64 + int(number)}", size_bytes, (), ro=False)
        self.link(f"/sys/block/pmem{number}", f"../{disk[5:]}")
        return self.link(f"/sys/bus/nd/devices/{name}", f"../../..{path[4:]}")

    def swap_function(self, bdf: str) -> Self:
        """Another function at that address, which is like the one before in all it says."""
        directory = self.path / self.real(bdf)[1:]
        kept = directory.rename(directory.with_name("kept"))
        directory.mkdir()
        for file in kept.iterdir():
            file.rename(directory / file.name)
        return self

    def real(self, device: str) -> str:
        """The directory of a BDF, a UUID or a path, without links."""
        if device.startswith("/"):
            return device
        devices = f"/sys/bus/{'mdev' if len(device) == 36 else 'pci'}/devices"
        try:
            target = os.readlink(f"{self._base}{devices}/{device}")
        except OSError:
            return f"{devices}/{device}"
        return os.path.normpath(f"{devices}/{target}")

    def _pci_path(self, bdf: str, below: str | None) -> str:
        if below:
            return f"{self.real(below)}/{bdf}"
        domain, bus, _ = bdf.split(":")
        return f"/sys/devices/pci{domain}:{bus}/{bdf}"

    def _append(self, path: str, head: str | None, line: str) -> Self:
        with open(self._below(path), "a") as file:
            if head and not file.tell():
                file.write(f"{head}\n")
            file.write(f"{line}\n")
        return self


def up(path: str) -> str:
    """The way from a link in the directory `path` below /sys up to /sys, with a slash."""
    return "../" * (len(re.findall("/", path)) - 1)


def resource_text(bars: Mapping[int, tuple[int, int, int]]) -> str:
    """The file `resource`: 13 lines of start, end and flags."""
    lines = []
    for number in range(13):
        start, size, flags = bars.get(number, (0, 1, 0))
        end = start + size - 1
        lines.append(f"{start:#018x} {end:#018x} {flags:#018x}\n")
    return "".join(lines)


def config_space(vendor: int, device: int, length: int, *, is_pcie: bool = True) -> bytes:
    """A configuration space of that many bytes, with the capabilities of power and of PCIe."""
    space = bytearray(CONFIG_PCIE)
    space[:4] = vendor.to_bytes(2, "little") + device.to_bytes(2, "little")
    space[0x06] = 0x10
    space[0x34] = 0x40
    space[0x40:0x42] = _POWER
    if is_pcie:
        space[0x60:0x62] = _EXPRESS
    else:
        space[0x41] = 0
    return bytes(space[:length])
