"""VMs with a guest, started once for all tests, and what a test may do with one."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from guest.console import GuestDisk

from tests.contract.sandbox import Sandbox
from tests.contract.world import QemuSide
from tests.support.vm import Device, GuestVm, pci_bridge, root_ports, scsi_controller, start_vm
from vmplug.devnum import DevNum
from vmplug.host.safety import Code
from vmplug.manager.records import Attachment
from vmplug.oci.info import DeviceInfo, DevType

PORTS = 9


class Lab(Sandbox):
    """A VM with a guest below a manager, and whatever reads beside the product."""

    def __init__(self, vm: GuestVm, directory: Path, *, name: str = "lab-1") -> None:
        self.guest_vm = vm
        self.qemu_side = QemuSide(vm)
        super().__init__(directory, side=self.qemu_side, vm=name)

    def attach(
        self,
        disk: Path,
        options: Mapping[str, str] | None = None,
        *,
        ro: bool = False,
        allow: tuple[Code, ...] = (),
    ) -> Attachment:
        """Attach an image file or a block device node."""
        return self.devices.attach(request(disk, options, ro=ro), allow=allow)

    def seen(self, attachment: Attachment, *, of: int = 1) -> GuestDisk:
        """The disk in the guest, once the guest sees `of` disks; it is known by its serial."""
        disks = self.guest_vm.console.wait_for_disks(of)
        (disk,) = [disk for disk in disks if disk.serial == attachment.device_id]
        return disk

    def query(self, command: str, **arguments: object) -> Any:
        """What QEMU answers on its second monitor."""
        return self.guest_vm.oracle.execute(command, arguments)

    def nodes_of(self, attachment: Attachment) -> list[Mapping[str, Any]]:
        """The block nodes of a disk, from the top down; the last has opened the file."""
        nodes = self.query("query-named-block-nodes", flat=True)
        mine = [node for node in nodes if attachment.device_id in node["node-name"]]
        protocol = [
            node
            for node in nodes
            if node["drv"] in {"file", "host_device"} and node["file"] == attachment.host_path
        ]
        return sorted(mine, key=lambda node: -len(node["node-name"])) + protocol

    def property_of(self, attachment: Attachment, name: str) -> Any:
        """A property of the device that the guest sees."""
        path = f"/machine/peripheral/vmplug-{attachment.device_id}"
        return self.query("qom-get", path=path, property=name)

    def pci_path_in_qemu(self, qdev_id: str) -> str:
        """Slots from the root bus down to a device, out of QEMU's own tree of buses."""

        def find(devices: list[dict[str, Any]]) -> list[int]:
            for device in devices:
                below = find(device.get("pci_bridge", {}).get("devices", []))
                if below or device["qdev_id"] == qdev_id:
                    return [device["slot"], *below]
            return []

        (root_bus,) = self.query("query-pci")
        return "/".join(f"{slot:02x}" for slot in find(root_bus["devices"]))

    def wait_for_size(self, disk: GuestDisk, size_bytes: int) -> None:
        """Until the guest knows the size; the guest does the waiting."""
        wanted = f'[ "$(cat /sys/block/{disk.name}/size)" = {size_bytes // 512} ]'
        self.guest_vm.console.run(f"until {wanted}; do usleep 10000; done")

    def clean(self) -> None:
        """Leave the VM as it was, whatever the test did; tells when the test left something."""
        self.close()
        self.qemu_side.clean()
        self.guest_vm.console.wait_for_disks(0)


def request(
    disk: Path, options: Mapping[str, str] | None = None, *, ro: bool = False, at: str = "/dev/x"
) -> DeviceInfo:
    """A request for an image file or a block device node."""
    status = disk.stat()
    number = status.st_rdev
    return DeviceInfo(
        container_path=at,
        dev_type=DevType.BLOCK,
        devnum=DevNum(os.major(number), os.minor(number)) if number else None,
        host_path=None if number else str(disk),
        read_only=ro,
        driver_options=options or {},
    )


def losetup(*arguments: str) -> str:
    """What losetup(8) prints."""
    done = subprocess.run(["losetup", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@contextmanager
def opened_by_another_qemu(image: Path, directory: Path) -> Iterator[None]:
    """A QEMU of its own has the image open for writing, and with it QEMU's lock."""
    logs = directory / "another-qemu"
    logs.mkdir()
    with start_vm(logs, devices=root_ports(1), guest=False, paused=True) as vm:
        file = {"driver": "file", "filename": str(image)}
        vm.oracle.execute("blockdev-add", {"node-name": "n", "driver": "raw", "file": file})
        place = {"bus": "rp0", "addr": "0x0"}
        vm.oracle.execute("device_add", driver="virtio-blk-pci", id="d", drive="n", **place)
        yield


@contextmanager
def booted_vm(directory: Path, devices: list[Device], machine: str = "q35") -> Iterator[GuestVm]:
    """A VM whose guest has booted: plugging into one that boots is a test of the firmware."""
    with start_vm(directory, machine=machine, devices=devices) as vm:
        vm.console.run("true")
        yield vm


@pytest.fixture(scope="session")
def q35_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    devices = [*root_ports(PORTS), *scsi_controller()]
    with booted_vm(tmp_path_factory.mktemp("q35"), devices) as vm:
        yield vm


@pytest.fixture(scope="session")
def second_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    with booted_vm(tmp_path_factory.mktemp("second"), root_ports(2)) as vm:
        yield vm


@pytest.fixture(scope="session")
def pc_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    with booted_vm(tmp_path_factory.mktemp("pc"), pci_bridge(), "pc") as vm:
        yield vm


@pytest.fixture
def lab(q35_vm: GuestVm, tmp_path: Path) -> Iterator[Lab]:
    """A q35 with root ports rp0.. at slots 0x10.. and a SCSI controller at slot 8."""
    made = Lab(q35_vm, tmp_path)
    yield made
    made.clean()


@pytest.fixture
def second_lab(second_vm: GuestVm, tmp_path: Path) -> Iterator[Lab]:
    """Another q35 below the same journal."""
    made = Lab(second_vm, tmp_path, name="lab-2")
    yield made
    made.clean()


@pytest.fixture
def pc_lab(pc_vm: GuestVm, tmp_path: Path) -> Iterator[Lab]:
    """Machine pc with a PCI bridge at slot 0x10."""
    made = Lab(pc_vm, tmp_path)
    yield made
    made.clean()
