"""An s390x machine: devices of the channel subsystem go by numbers that vmplug gives.

There is no guest for it here. QEMU itself realizes the devices, and lets go of them without one.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Vmplug
from tests.cli.started import StartedVm, ending, sharers_of, started
from tests.contract.sandbox import Hooked, Through
from tests.contract.world import Rows, journal_rows
from tests.support.daemons import storage_daemon, vhost_user_backend
from tests.support.disks import disk_image
from tests.support.raw_qmp import QmpError
from vmplug.address import CcwDevNo
from vmplug.devnum import DevNum
from vmplug.drivers.place import CcwPlace
from vmplug.drivers.plug import BlockDrive, DiskFrontend
from vmplug.drivers.ports import Command
from vmplug.errors import CannotPlug, CommandError, DeviceError, UnplugTimeout
from vmplug.host.finding import Code
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.hypervisor.qmp.monitor import Monitor
from vmplug.journal.records import Attachment
from vmplug.manager.manager import DeviceManager
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import NetInfo, RngInfo, ShareInfo

pytestmark = pytest.mark.qemu

MACHINE = "s390-ccw-virtio"
CONTROLLER = CcwDevNo(0, 0xFFFE)
BLK_NUMBER = "241:7"
MAC = "52:54:00:0a:0b:0e"


class Channels:
    """A paused s390x below a manager; a restored one is a new manager for every step."""

    def __init__(self, vm: StartedVm, directory: Path, *, is_restored: bool) -> None:
        self.vm = vm
        self.directory = directory
        self._is_restored = is_restored
        self._manager: DeviceManager | None = None
        self.talk_plainly()

    @property
    def devices(self) -> DeviceManager:
        """The manager."""
        if self._is_restored:
            self.close()
        if self._manager is None:
            self._manager = DeviceManager.open(
                vm=self.vm.name,
                host=HostRoot("/"),
                hypervisor=self.qemu(),
                state_dir=self.vm.vmplug.state_dir,
                vhost_user_store=VhostUserStore(str(self.directory / "store")),
            )
        return self._manager

    def close(self) -> None:
        """End the manager."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def talk_through(self, wrap: Callable[[Monitor], Monitor]) -> None:
        """From the next step on the manager talks through what `wrap` gives."""
        self.close()
        self._wrap = wrap

    def talk_plainly(self) -> None:
        """Nothing is between the manager and the VM any more."""
        self.talk_through(lambda monitor: monitor)

    def qemu(self) -> Qemu:
        """A conversation of the product with it."""
        return Qemu(self._wrap(QmpMonitor.connect(self.vm.told["vm"]["qmp"])))

    def disk(self, name: str, **options: str) -> DeviceInfo:
        """A request for an image file of that name."""
        path = self.directory / f"{name}.img"
        if not path.exists():
            disk_image(path, 1, name)
        return DeviceInfo(
            container_path=f"/dev/{name}",
            dev_type=DevType.BLOCK,
            host_path=str(path),
            driver_options={key.replace("_", "-"): value for key, value in options.items()},
        )

    def number_of(self, attachment: Attachment) -> str:
        """The number that QEMU says it has; the guest's and QEMU's css differ."""
        number, realized = self.vm.properties_of(attachment.device_id, "dev_id", "realized")
        assert realized is True
        return str(number)

    def type_of(self, attachment: Attachment) -> str:
        """The model that QEMU made."""
        (kind,) = self.vm.properties_of(attachment.device_id, "type")
        return str(kind)

    def picture(self) -> tuple[frozenset[str], Rows, set[int]]:
        """Everything that a refused request must leave as it was."""
        rows = journal_rows(self.vm.vmplug.state_dir)
        return self.vm.names(), rows, sharers_of(self.directory)


@contextmanager
def nothing_changes(channels: Channels) -> Iterator[None]:
    """What is done in the `with` leaves the VM, the journal and the host as they were."""
    before = channels.picture()
    yield
    assert channels.picture() == before


@pytest.fixture(scope="module")
def machine() -> Iterator[StartedVm]:
    with (
        tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp") as directory,
        started(Vmplug(Path(directory) / "state"), "mf1", machine=MACHINE) as vm,
    ):
        yield vm


@pytest.fixture
def vmplug() -> Iterator[Vmplug]:
    """A command line whose journal is not there yet; sockets below it need a short path."""
    with tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp") as directory:
        yield Vmplug(Path(directory) / "state")


@pytest.fixture(params=["live", "restored"])
def channels(
    request: pytest.FixtureRequest, machine: StartedVm, tmp_path: Path
) -> Iterator[Channels]:
    """The machine, as every test finds and leaves it."""
    names = machine.names()
    made = Channels(machine, tmp_path, is_restored=request.param == "restored")
    yield made
    made.close()
    machine.vmplug("detach", "--owner", "mf1")  # what is left by a test that failed
    assert machine.names() == names


def detach(channels: Channels, *attachments: Attachment) -> None:
    channels.devices.detach_all([attachment.id for attachment in attachments])
    assert not {hold.device_id for hold in attachments} & channels.vm.vmplugs_devices()


def test_a_disk_is_plugged_at_its_number_and_leaves(channels: Channels) -> None:
    names = channels.vm.names()
    disk = channels.devices.attach(channels.disk("a"))
    assert disk.guest_address is not None
    assert disk.guest_address.ccw_devno == CcwDevNo(0, 1)
    assert channels.number_of(disk) == "fe.0.0001"
    assert channels.type_of(disk) == "virtio-blk-ccw"
    (node,) = channels.vm.properties_of(disk.device_id, "drive")
    assert node in channels.vm.names() - names
    detach(channels, disk)
    assert channels.vm.names() == names
    assert channels.devices.attachments() == []


def test_numbers_are_the_lowest_free_and_never_given_twice(channels: Channels) -> None:
    three = channels.devices.attach_all([channels.disk(name) for name in "abc"])
    assert [channels.number_of(disk) for disk in three] == ["fe.0.0001", "fe.0.0002", "fe.0.0003"]
    fourth = channels.devices.attach(channels.disk("d"))
    assert channels.number_of(fourth) == "fe.0.0004"
    detach(channels, three[1])
    again = channels.devices.attach(channels.disk("e"))
    assert channels.number_of(again) == "fe.0.0002"
    fifth = channels.devices.attach(channels.disk("f"))
    assert channels.number_of(fifth) == "fe.0.0005"
    held = [hold for hold in channels.devices.attachments() if hold.guest_address]
    numbers = [str(hold.guest_address and hold.guest_address.ccw_devno) for hold in held]
    assert len({*numbers}) == len(numbers) == 5
    detach(channels, three[0], three[2], fourth, again, fifth)


def test_the_number_of_a_stranger_is_left_out(channels: Channels) -> None:
    oracle = channels.vm.oracle
    source = {"qom-type": "rng-builtin", "id": "strangers"}
    oracle.execute("object-add", source)
    place = {"devno": "fe.0.0002", "rng": "strangers"}
    oracle.execute("device_add", driver="virtio-rng-ccw", id="stranger", **place)
    try:
        both = channels.devices.attach_all([channels.disk("a"), channels.disk("b")])
        assert [channels.number_of(disk) for disk in both] == ["fe.0.0001", "fe.0.0003"]
        detach(channels, *both)
    finally:
        oracle.execute("device_del", id="stranger")
        oracle.wait_event("DEVICE_DELETED", device="stranger")
        oracle.execute("object-del", id="strangers")


class Deaf(Through):
    """The VM never hears that a device is to go."""

    def answer(self, command: Command) -> Any:
        """See Through."""
        return {} if command.execute == "device_del" else super().answer(command)


def test_a_number_is_free_only_after_the_unplug(channels: Channels) -> None:
    disk = channels.devices.attach(channels.disk("a"))
    channels.talk_through(Deaf)
    with pytest.raises(UnplugTimeout):
        channels.devices.detach(disk.id, timeout_s=0.01)
    assert channels.number_of(disk) == "fe.0.0001"
    other = channels.devices.attach(channels.disk("b"))
    assert channels.number_of(other) == "fe.0.0002"
    channels.talk_plainly()
    detach(channels, disk)
    third = channels.devices.attach(channels.disk("c"))
    assert channels.number_of(third) == "fe.0.0001"
    detach(channels, other, third)


def test_a_number_that_is_given_is_in_the_journal_before_the_device_is_there(
    channels: Channels,
) -> None:
    """So that a crash in between loses no number."""
    seen: list[str] = []

    def look(command: Command) -> None:
        if command.execute == "device_add":
            (row,) = journal_rows(channels.vm.vmplug.state_dir)["device"]
            seen.extend(str(value) for value in row if str(value).startswith("ccw/"))

    channels.talk_through(lambda monitor: Hooked(monitor, look))
    disk = channels.devices.attach(channels.disk("a"))
    channels.talk_plainly()
    assert seen == [f"ccw/{CcwDevNo(0, 1)}"]
    detach(channels, disk)


def test_a_number_that_is_taken_meanwhile_is_a_refusal(channels: Channels) -> None:
    """A plan that is out of date, as of somebody who plugs by hand."""
    disk = channels.devices.attach(channels.disk("a"))
    drive = BlockDrive(
        id="0123456789abcdef",
        file=channels.disk("b").host_path or "",
        is_device=False,
        driver=DiskFrontend.VIRTIO_BLOCK_CCW,
    )
    channels.close()
    with nothing_changes(channels):
        qemu = channels.qemu()
        with pytest.raises(CommandError, match=r"fe\.0\.0001 already exists"):
            qemu.plug(drive, CcwPlace(devno=CcwDevNo(0, 1)))
        qemu.close()
    detach(channels, disk)


def test_random_numbers(channels: Channels) -> None:
    rng = channels.devices.attach(RngInfo(), owner="mf1")
    assert (channels.number_of(rng), channels.type_of(rng)) == ("fe.0.0001", "virtio-rng-ccw")
    assert str(rng.guest_address) == "CCW 0.0.0001"
    detach(channels, rng)


def test_a_scsi_disk_sits_on_the_controller(channels: Channels) -> None:
    disk = channels.devices.attach(channels.disk("a", block_driver="virtio-scsi"))
    assert str(disk.guest_address) == "SCSI 0:0"
    assert channels.type_of(disk) == "scsi-hd"
    bus, scsi_id, lun = channels.vm.properties_of(disk.device_id, "parent_bus", "scsi-id", "lun")
    assert (bus.rpartition("/")[2], scsi_id, lun) == ("scsi0.0", 0, 0)
    path = "/machine/peripheral/scsi0"
    number = channels.vm.oracle.execute("qom-get", path=path, property="dev_id")
    assert CcwDevNo.parse(number) == CONTROLLER
    detach(channels, disk)


@pytest.mark.root
def test_a_shared_directory(channels: Channels) -> None:
    shared = channels.directory / "work"
    shared.mkdir()
    share = channels.devices.attach(ShareInfo(tag="work", source=str(shared)))
    assert (channels.number_of(share), channels.type_of(share)) == (
        "fe.0.0001",
        "vhost-user-fs-ccw",
    )
    assert channels.vm.properties_of(share.device_id, "tag") == ("work",)
    assert str(share.guest_address) == "CCW 0.0.0001 tag work"
    sharers = sharers_of(shared)
    assert sharers
    with ending(sharers):
        detach(channels, share)


def test_a_network(channels: Channels) -> None:
    with vhost_user_backend("net") as backend:
        path = str(backend.socket_path)
        wanted = NetInfo(label="eth0", socket_path=path, driver_options={"mac": MAC})
        net = channels.devices.attach(wanted)
        assert (channels.number_of(net), channels.type_of(net)) == (
            "fe.0.0001",
            "virtio-net-ccw",
        )
        assert channels.vm.properties_of(net.device_id, "mac") == (MAC,)
        assert str(net.guest_address) == f"CCW 0.0.0001 {MAC}"
        detach(channels, net)


@pytest.mark.root
def test_a_vhost_user_disk_has_no_model_and_nothing_is_sent(channels: Channels) -> None:
    """QEMU 7.2 has no vhost-user-blk-ccw. The disk beside it is not plugged either."""
    store = channels.directory / "store"
    for name in ("devices", "sockets"):
        (store / "block" / name).mkdir(parents=True)
    major, minor = map(int, BLK_NUMBER.split(":"))
    os.mknod(store / "block/devices/one", 0o60600, os.makedev(major, minor))
    image = disk_image(channels.directory / "served.img", 1, "served")
    wanted = DeviceInfo(
        container_path="/dev/served", dev_type=DevType.BLOCK, devnum=DevNum(major, minor)
    )
    with (
        storage_daemon(image, socket_path=store / "block/sockets/one"),
        nothing_changes(channels),
    ):
        with pytest.raises(CannotPlug, match="no vhost-user-blk device for a channel") as refused:
            channels.devices.attach_all([channels.disk("a"), wanted])
        assert refused.value.reason == "no-such-model"


@pytest.mark.parametrize("model", ["vhost-user-blk-ccw", "vhost-user-scsi-ccw"])
def test_qemu_itself_has_no_such_model(channels: Channels, model: str) -> None:
    with pytest.raises(QmpError, match=model):
        channels.vm.oracle.execute("device-list-properties", typename=model)


@pytest.mark.parametrize(
    ("driver", "error", "words"),
    [
        ("virtio-blk", DeviceError, "PCI"),
        ("virtio-mmio", CannotPlug, "virtio-mmio"),
        ("nvdimm", CannotPlug, "does not support NVDIMMs"),
    ],
)
def test_drivers_of_other_machines_are_refused(
    channels: Channels, driver: str, error: type[DeviceError], words: str
) -> None:
    wanted = channels.disk("a", block_driver=driver)
    with nothing_changes(channels):
        with pytest.raises(error, match=words) as refused:
            channels.devices.attach(wanted, allow=[Code.NVDIMM_SIZE])
        assert refused.value.hint


def test_a_ccw_disk_is_refused_by_other_machines(vmplug: Vmplug, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "a")
    with started(vmplug, "sb1", "--ports", "1") as vm:
        names = vm.names()
        words = ("--device", f"file:{image}", "-o", "block-driver=virtio-blk-ccw")
        refused = vm.attach(*words)
        assert refused.status == 5
        error = refused.error()
        assert (error["code"], error["facts"]["reason"]) == (
            "cannot-plug",
            "no-channel-subsystem",
        )
        assert "channel subsystem" in error["message"]
        assert vm.names() == names
        assert vm.states() == {}


@pytest.mark.root
def test_everything_can_be_plugged_before_it_starts(vmplug: Vmplug, tmp_path: Path) -> None:
    for name in ("boot", "a", "b", "c"):
        disk_image(tmp_path / f"{name}.img", 1, name)
    for name in ("work", "old"):
        (tmp_path / name).mkdir()
    annotations = {
        "share.old": {"source": str(tmp_path / "old"), "filesystem": "virtio-9p"},
        "share.work": {"source": str(tmp_path / "work")},
        "rng.rng0": {},
    }
    config = {"org.vmplug." + key: json.dumps(value) for key, value in annotations.items()}
    bundle = tmp_path / "ctr1"
    bundle.mkdir()
    (bundle / "config.json").write_text(json.dumps({"ociVersion": "1.0.2", "annotations": config}))
    disks = [f"file:{tmp_path}/{name}.img:/dev/{name}" for name in ("a", "b")]
    words = ["--bundle", str(bundle), "--disk", str(tmp_path / "boot.img")]
    words += [word for disk in disks for word in ("--device", disk)]
    with started(vmplug, "mf2", *words, machine=MACHINE) as vm:
        numbers = {name: hold["guest"]["ccw_devno"] for name, hold in vm.attachments.items()}
        assert numbers == {
            "share:old": "0.0.0001",
            "share:work": "0.0.0002",
            "rng:rng0": "0.0.0003",
            "/dev/a": "0.0.0004",
            "/dev/b": "0.0.0005",
        }
        assert vm.attachments["/dev/a"]["guest"]["agent"] == {
            "type": "blk-ccw",
            "id": "0.0.0004",
            "vm_path": "",
            "options": [],
        }
        kinds = {
            CcwDevNo.parse(number): kind
            for number, kind in (
                vm.properties_of(device_id, "dev_id", "type") for device_id in vm.vmplugs_devices()
            )
        }
        assert kinds == {
            CcwDevNo(0, 1): "virtio-9p-ccw",
            CcwDevNo(0, 2): "vhost-user-fs-ccw",
            CcwDevNo(0, 3): "virtio-rng-ccw",
            CcwDevNo(0, 4): "virtio-blk-ccw",
            CcwDevNo(0, 5): "virtio-blk-ccw",
        }
        hot = vm.attached("--device", f"file:{tmp_path}/c.img:/dev/c")
        assert hot["guest"]["ccw_devno"] == "0.0.0006"
        assert vm.vmplug("reconcile", "--json").json() == {
            "repairs": [],
            "bindings": [],
            "errors": [],
        }
        with ending(sharers_of(tmp_path)):
            vm.vmplug("detach", "--owner", "ctr1").answer()
        assert vm.states() == {}
        assert vm.vmplugs_devices() == set()
        with ending({vm.pid}):
            assert vm.vmplug("vm", "stop", "mf2", "--timeout", "0").status == 0
    assert not any(journal_rows(vmplug.state_dir).values())


def test_9p_is_refused_while_it_runs(channels: Channels) -> None:
    (channels.directory / "work").mkdir()
    wanted = ShareInfo(
        tag="work",
        source=str(channels.directory / "work"),
        driver_options={"filesystem": "virtio-9p"},
    )
    with nothing_changes(channels):
        with pytest.raises(CannotPlug) as refused:
            channels.devices.attach(wanted)
        assert refused.value.reason == "cold-plug-only"
