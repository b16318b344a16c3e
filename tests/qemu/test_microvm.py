"""A microvm: everything is plugged before it starts, on virtio-mmio, and stays until it ends."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from guest.console import GuestConsole

from tests.cli.command import Vmplug
from tests.cli.started import StartedVm, booted, ending, sharers_of, started
from tests.contract.world import journal_rows
from tests.support.daemons import storage_daemon, vhost_user_backend
from tests.support.disks import disk_image
from vmplug.errors import CannotPlug
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.manager.manager import DeviceManager
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import Request, RngInfo

pytestmark = [pytest.mark.root, pytest.mark.qemu]

DISKS = ("one", "two", "three")
BLK_NUMBER = "241:7"
MAC = "52:54:00:0a:0b:0d"


@dataclass(frozen=True, slots=True)
class MicroVm:
    """A microvm with three disks and more, and its guest."""

    vm: StartedVm
    console: GuestConsole
    directory: Path

    def disk(self, name: str) -> str:
        """The word for a disk image."""
        return f"file:{self.directory}/{name}.img:/dev/{name}"

    def qemus(self) -> Qemu:
        """The product's side of the VM."""
        return Qemu.connect(self.vm.told["vm"]["qmp"])


@contextmanager
def microvm(directory: Path, *words: str) -> Iterator[MicroVm]:
    """Disks on both sides of what is no disk: only disks count."""
    for name in ("boot", "extra", *DISKS):
        disk_image(directory / f"{name}.img", 1, f"the {name} disk")
    (directory / "work").mkdir()
    (directory / "work" / "ours").write_text("from the host")
    vmplug = Vmplug(directory / "vmplug" / "state")
    vmplug.state_dir.parent.mkdir()
    one, two, three = (f"file:{directory}/{name}.img:/dev/{name}" for name in DISKS)
    first = ("--device", "rng", "--device", one, "--device", two, "--owner", "ctr1")
    asked = (*first, *words, "--device", three)
    with (
        started(vmplug, "micro1", *asked, machine="microvm", flavour="cloud") as vm,
        booted(vm) as console,
    ):
        yield MicroVm(vm, console, directory)


@pytest.fixture(scope="module")
def micro() -> Iterator[MicroVm]:
    """With devices of other processes too, one of them a disk; without a disk to boot from."""
    with (
        tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp") as directory,
        vhost_user_backend("net") as backend,
        served_disk(Path(directory)) as store,
    ):
        bundle = Path(directory) / "ctr1"
        bundle.mkdir()
        network = json.dumps({"socket": str(backend.socket_path), "mac": MAC})
        annotations = {"org.vmplug.net.eth0": network}
        config = {"ociVersion": "1.0.2", "annotations": annotations}
        (bundle / "config.json").write_text(json.dumps(config))
        more = (
            *("--bundle", str(bundle), "--device", f"share:{directory}/work:work"),
            *("--vhost-user-store", str(store), "--device", f"b:{BLK_NUMBER}:/dev/served"),
        )
        with microvm(Path(directory), *more) as vm:
            yield vm


@contextmanager
def served_disk(directory: Path) -> Iterator[Path]:
    """The vhost-user store with the number of a disk that a storage daemon serves."""
    store = directory / "store"
    for name in ("devices", "sockets"):
        (store / "block" / name).mkdir(parents=True)
    major, minor = map(int, BLK_NUMBER.split(":"))
    os.mknod(store / "block/devices/one", 0o60600, os.makedev(major, minor))
    image = disk_image(directory / "served.img", 1, "the served disk")
    with storage_daemon(image, socket_path=store / "block/sockets/one"):
        yield store


def assert_told(micro: MicroVm, names: list[str], first: str = "/dev/vda") -> None:
    """Each disk is at its path, one after the other, and holds what the host's has."""
    count = len(names) + ord(first[-1]) - ord("a")
    disks = {f"/dev/{disk.name}": disk for disk in micro.console.wait_for_disks(count)}
    guests = {name: micro.vm.attachments[f"/dev/{name}"]["guest"] for name in names}
    paths = [f"/dev/vd{chr(ord(first[-1]) + index)}" for index in range(len(names))]
    assert {name: guest["virt_path"] for name, guest in guests.items()} == dict(
        zip(names, paths, strict=True)
    )
    for name, guest in guests.items():
        assert disks[guest["virt_path"]].marker == f"the {name} disk"
        assert guest["agent"] == {
            "type": "mmioblk",
            "id": guest["virt_path"],
            "vm_path": guest["virt_path"],
            "options": [],
        }
        assert (guest["pci_path"], guest["scsi_address"], guest["ccw_devno"]) == (None,) * 3


def test_each_disk_is_at_its_path(micro: MicroVm) -> None:
    order = [hold["name"].removeprefix("/dev/") for hold in micro.vm.told["attachments"]]
    names = [name for name in order if name in {*DISKS, "served"}]
    assert len(names) == 4
    assert_told(micro, names)
    micro.console.write("vdb", 512, b"from the guest")
    with (micro.directory / "two.img").open("rb") as image:
        image.seek(512)
        assert image.read(14) == b"from the guest"


def test_a_disk_to_boot_from_is_the_first(tmp_path: Path) -> None:
    """Its number is given before the others'."""
    with tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp") as directory:
        boot = Path(directory) / "boot.img"
        boot.touch()
        with microvm(Path(directory), "--disk", str(boot)) as micro:
            assert_told(micro, [*DISKS], first="/dev/vdb")
            assert micro.console.disks()[0].marker == "the boot disk"
            assert micro.vm.vmplug("vm", "stop", "micro1", "--timeout", "0").status == 0


def test_other_devices_are_there_too(micro: MicroVm) -> None:
    console = micro.console
    console.load_modules("virtio-rng", "virtio_net", "virtiofs")
    assert console.run("cat /sys/class/misc/hw_random/rng_available").split()[0] == "virtio_rng.0"
    guests = {name: hold["guest"] for name, hold in micro.vm.attachments.items()}
    assert guests["rng:rng0"]["virt_path"] is None
    (nic,) = console.wait_for_nics(1)
    assert nic.mac == guests["net:eth0"]["mac_address"] == MAC
    at = console.mount("virtiofs", guests["share:work"]["mount_tag"])
    assert console.read_file(f"{at}/ours") == b"from the host"
    console.write_file(f"{at}/theirs", b"from the guest")
    assert (micro.directory / "work" / "theirs").read_bytes() == b"from the guest"
    console.unmount(at)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--device", "file:{}/extra.img"), "a virtio-mmio disk"),
        (
            ("--device", "file:{}/extra.img", "-o", "block-driver=virtio-mmio"),
            "a virtio-mmio disk",
        ),
        (("--device", "rng:/dev/random"), "a random number device"),
        (("--device", "share:{}/work:more"), "a virtio-fs share"),
        (("--device", "share:{}/work:more", "-o", "filesystem=virtio-9p"), "a virtio-9p share"),
    ],
)
def test_nothing_is_plugged_into_a_running_one(
    micro: MicroVm, words: tuple[str, ...], what: str
) -> None:
    named = [word.format(micro.directory) for word in words]
    names = micro.vm.names()
    sharers = sharers_of(micro.directory)
    rows = journal_rows(micro.vm.vmplug.state_dir)
    refused = micro.vm.attach(*named)
    assert refused.status == 5
    error = refused.error()
    assert error["code"] == "cannot-plug"
    assert error["message"] == f"{what} can only be plugged before the VM starts"
    assert error["facts"] == {"reason": "cold-plug-only"}
    assert error["hint"].endswith("vmplug vm start NAME --bundle BUNDLE")
    planned = micro.vm.vmplug("plan", *named, "--vm", "micro1", "--json")
    assert (planned.status, planned.error()) == (5, error)
    assert micro.vm.names() == names
    assert sharers_of(micro.directory) == sharers
    assert journal_rows(micro.vm.vmplug.state_dir) == rows


@pytest.mark.parametrize("driver", ["virtio-blk", "virtio-blk-ccw", "virtio-scsi", "nvdimm"])
def test_drivers_of_other_machines_are_refused(micro: MicroVm, driver: str) -> None:
    words = ("--device", f"file:{micro.directory}/extra.img", "-o", f"block-driver={driver}")
    names = micro.vm.names()
    refused = micro.vm.attach(*words, "--allow", "nvdimm-size")
    assert refused.status == 5
    assert refused.error()["code"] in {"cannot-plug", "no-free-port"}
    assert refused.error()["hint"]
    assert micro.vm.names() == names


def test_the_library_raises_the_same(micro: MicroVm) -> None:
    extra = DeviceInfo(
        container_path="/dev/extra",
        dev_type=DevType.BLOCK,
        host_path=str(micro.directory / "extra.img"),
    )
    requests: list[Request] = [extra, RngInfo(source="/dev/random")]
    with DeviceManager.open(
        vm="micro1",
        host=HostRoot("/"),
        hypervisor=micro.qemus(),
        state_dir=micro.vm.vmplug.state_dir,
    ) as devices:
        for request in requests:
            with pytest.raises(CannotPlug) as refused:
                devices.attach(request, owner="ctr1")
            assert refused.value.reason == "cold-plug-only"


def test_what_is_let_go_stays_until_the_end(micro: MicroVm) -> None:
    """The last of the tests on this VM: it is stopped in the end."""
    vm = micro.vm
    held = vm.vmplugs_devices()
    first = vm.attachments["/dev/one"]
    told = vm.vmplug("detach", first["id"]).answer()
    assert told.startswith(f"released {first['id']} ")
    assert vm.states()["/dev/one"] == "retained"
    detached = vm.vmplug("detach", "--owner", "ctr1", "--json").json()["detached"]
    assert len(detached) == len(held) - 1
    assert all(hold["retained"] for hold in detached)
    assert set(vm.states().values()) == {"retained"}
    assert vm.vmplugs_devices() == held
    assert len(micro.console.wait_for_disks(4)) == 4
    assert vm.vmplug("reconcile", "--json").json() == {"repairs": [], "bindings": [], "errors": []}

    again = vm.attached("--device", micro.disk("one"), owner="ctr2")
    assert again["guest"] == first["guest"]
    assert vm.states()["/dev/one"] == "attached"
    assert vm.vmplugs_devices() == held

    with ending({*sharers_of(micro.directory), vm.pid}):
        assert vm.vmplug("vm", "stop", "micro1", "--timeout", "0").status == 0
    assert not any(journal_rows(vm.vmplug.state_dir).values())
