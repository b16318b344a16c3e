"""VMs with a guest, started once for all tests, and what a test may do with one."""

import os
import re
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from guest.console import PCI_ADDRESS, GuestDisk

from tests.contract.sandbox import Sandbox
from tests.contract.world import Parts, QemuSide, Refusal, Rows, journal_rows
from tests.support.vm import (
    Device,
    GuestVm,
    pci_bridge,
    root_ports,
    scsi_controller,
    shared_memory,
    start_vm,
)
from vmplug.address import device_id_of, qemu_id
from vmplug.devnum import DevNum
from vmplug.drivers.ports import Command, Endpoint
from vmplug.host.finding import Code
from vmplug.host.process import wait_for_end
from vmplug.host.vhost_user.store import VHOST_USER_BLK_MAJOR, VhostUserStore
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.records import Attachment
from vmplug.journal.state import State
from vmplug.manager.manager import DeviceManager
from vmplug.oci.info import DeviceInfo, DevType

PORTS = 9
MEMORY_SLOTS = 48


class Lab(Sandbox):
    """A VM with a guest below a manager, and whatever reads beside the product."""

    def __init__(
        self,
        vm: GuestVm,
        directory: Path,
        *,
        name: str = "lab-1",
        side: QemuSide | None = None,
        is_restored: bool = False,
    ) -> None:
        self.guest_vm = vm
        self.qemu_side = side or QemuSide(vm)
        super().__init__(directory, side=self.qemu_side, vm=name, is_restored=is_restored)

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


@dataclass(frozen=True, slots=True)
class AllParts(Parts):
    """What a VM holds, and the processes that vmplug started for it."""

    daemons: frozenset[int]


class OpenSide(QemuSide):
    """A QEMU that other processes serve; `directory` is above whatever those share with it."""

    def __init__(self, vm: GuestVm, directory: Path) -> None:
        self.vm = vm
        self.directory = directory
        super().__init__(vm)

    def parts(self) -> AllParts:
        """See Side."""
        parts = super().parts()
        return AllParts(
            devices=parts.devices,
            nodes=parts.nodes,
            objects=parts.objects,
            chardevs=parts.chardevs,
            netdevs=parts.netdevs,
            daemons=frozenset(daemons_below(self.directory)),
        )

    def clean(self) -> None:
        """See QemuSide; NVDIMMs stay, as nothing takes them out."""
        self.vm.oracle.events.clear()
        for name in self.parts().devices.keys() - self._first.devices.keys():
            if not isinstance(self.ask(Command("device_del", {"id": name})), Refusal):
                self.wait_gone(name)
        parts = self.parts()
        kept = {n for n, driver in parts.devices.items() if driver == "nvdimm"}
        memories = {qemu_id(device_id_of(name) or "", "memory") for name in kept}
        self._first = replace(
            self._first,
            devices={**self._first.devices, **dict.fromkeys(kept, "nvdimm")},
            objects={
                **self._first.objects,
                **{n: kind for n, kind in parts.objects.items() if n in memories},
            },
        )
        super().clean()


_DIRECTORY = re.compile(rb"\0VMPLUG_DIRECTORY=[^\0]*")


def daemons_below(directory: Path) -> list[int]:
    """Processes that were started on something in the directory, but not by the tests."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = process.joinpath("cmdline").read_bytes()
            words += b"".join(_DIRECTORY.findall(process.joinpath("environ").read_bytes()))
            parent = int(process.joinpath("stat").read_text().rpartition(") ")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if str(directory).encode() in words and parent != os.getpid():
            found.append(int(process.name))
    return found


def kill_daemons(directory: Path) -> None:
    """Kill what `daemons_below` finds, and wait for the ends."""
    for pid in daemons_below(directory):
        with suppress(ProcessLookupError):  # the first one takes its sandbox along
            os.kill(pid, signal.SIGKILL)
        wait_for_end(pid, timeout_s=60)


class OpenLab(Lab):
    """A VM that other processes may serve: its memory is shared, it takes NVDIMMs.

    NVDIMMs stay in the VM from test to test, and so does the journal. `sockets` is a directory
    with a short path, as paths of sockets may have 107 bytes only; the host's vhost-user store is
    in it.
    """

    def __init__(
        self,
        vm: GuestVm,
        directory: Path,
        journal: Path,
        sockets: Path,
        *,
        is_restored: bool = False,
    ) -> None:
        self.sockets = sockets
        self._minor = 0
        side = OpenSide(vm, directory)
        super().__init__(vm, directory, name="open", side=side, is_restored=is_restored)
        self.state_dir = journal
        for name in ("devices", "sockets"):
            sockets.joinpath("store/block", name).mkdir(parents=True)

    @property
    def devices(self) -> DeviceManager:
        """See Sandbox; the manager knows the store, and where the VM is found."""
        if self._is_restored:
            self.close()
        if self._manager is None:
            endpoint = Endpoint(os.path.realpath(self.guest_vm.qmp_path), self.guest_vm.pid)
            self._manager = DeviceManager.open(
                vm=self.vm,
                host=self.root,
                hypervisor=Qemu(self._wrap(self.side.monitor()), endpoint),
                state_dir=self.state_dir,
                vhost_user_store=VhostUserStore(str(self.sockets / "store")),
            )
        return self._manager

    def stored(
        self,
        backend: Path,
        options: Mapping[str, str] | None = None,
        *,
        major: int = VHOST_USER_BLK_MAJOR,
        name: str | None = None,
        ro: bool = False,
    ) -> DeviceInfo:
        """A request for a node that is put into the store for a backend's socket."""
        self._minor += 1
        name = name or f"disk{self._minor}"
        store = self.sockets / "store" / "block"
        os.mknod(store / "devices" / name, 0o600 | stat.S_IFBLK, os.makedev(major, self._minor))
        if backend != store / "sockets" / name:
            (store / "sockets" / name).symlink_to(backend)
        return DeviceInfo(
            container_path=f"/dev/{name}",
            dev_type=DevType.BLOCK,
            devnum=DevNum(major, self._minor),
            read_only=ro,
            driver_options=options or {},
        )

    def parts(self) -> AllParts:
        """What the VM holds, and which processes serve it."""
        assert isinstance(self.qemu_side, OpenSide)
        return self.qemu_side.parts()

    def holds(self) -> list[Attachment]:
        """The attachments, without those that only stay until the VM ends."""
        return [a for a in self.devices.attachments() if a.state is not State.RETAINED]

    def guest(self, line: str) -> str:
        """What a line prints in the guest."""
        return self.guest_vm.console.run(line)

    def pci_path_of_driver(self, driver: str) -> str:
        """Slots down to the only device of a virtio driver, as the guest says."""
        line = f"cd -P /sys/bus/virtio/drivers/{driver}/virtio* && echo $PWD"
        self.guest_vm.console.wait_until(line)
        matches = map(PCI_ADDRESS.fullmatch, self.guest(line).split("/"))
        return "/".join(match[1] for match in matches if match)

    def rows(self) -> Rows:
        """The journal."""
        return journal_rows(self.state_dir)

    def clean(self) -> None:
        """See Lab; whatever a failed test left in the journal is forgotten too."""
        self.close()
        self.qemu_side.clean()
        self.devices.reconcile()
        left = [hold.id for hold in self.holds()]
        self.devices.detach_all(left, whole=True)
        self.close()


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


def leave_missing(path: Path) -> None:
    """What makes nothing at a path, beside mkdir and touch."""


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


@contextmanager
def started_open_vm(directory: Path) -> Iterator[GuestVm]:
    """Two CPUs, eight root ports, memory slots, and memory that other processes may map."""
    with start_vm(
        directory,
        machine="q35,nvdimm=on",
        memory=f"256M,slots={MEMORY_SLOTS},maxmem=16G",
        devices=root_ports(8),
        extra=shared_memory(256),
        smp=2,
    ) as vm:
        vm.console.load_modules("nfit", "nd_pmem", "virtio_net", "virtiofs", "virtio-rng")
        yield vm


@contextmanager
def opened(vm: GuestVm, directory: Path, journal: Path, *, restored: bool) -> Iterator[OpenLab]:
    """A lab of its own directories on a VM, whose journal knows the VM."""
    with tempfile.TemporaryDirectory("", "vmplug-", "/tmp") as sockets:
        made = OpenLab(vm, directory, journal, Path(sockets), is_restored=restored)
        try:
            made.devices.attachments()
            yield made
        finally:
            made.close()


@pytest.fixture(scope="session")
def open_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    with started_open_vm(tmp_path_factory.mktemp("open")) as vm:
        yield vm


@pytest.fixture(scope="session")
def open_journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("open-journal")


@pytest.fixture
def open_lab(open_vm: GuestVm, tmp_path: Path, open_journal: Path) -> Iterator[OpenLab]:
    """A VM that other processes may serve."""
    with opened(open_vm, tmp_path, open_journal, restored=False) as made:
        yield made
        made.clean()


@pytest.fixture(params=[False, True], ids=["live", "restored"])
def life(
    request: pytest.FixtureRequest, open_vm: GuestVm, tmp_path: Path, open_journal: Path
) -> Iterator[OpenLab]:
    """The same, twice: with one manager, and with another one for every step."""
    with opened(open_vm, tmp_path, open_journal, restored=request.param) as made:
        yield made
        made.clean()


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
