"""Cold plug against a real QEMU: the offer that is made before the start is the one after it, and
a device is the same whether it was plugged before the start or after it.
"""

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.cli.started import ending, sharers_of
from tests.support.daemons import VIRTIOFSD, storage_daemon, vhost_user_backend, virtiofsd
from tests.support.disks import disk_image
from tests.support.no_aio import without_aio
from tests.support.raw_qmp import QmpError, RawQmp
from tests.support.vm import START_TIMEOUT_S
from vmplug.address import CcwDevNo, PciPath, PciSlot, ScsiAddress
from vmplug.drivers.place import (
    CcwPlace,
    MemorySlot,
    MmioPlace,
    Offer,
    PciPlace,
    Place,
    PlugMode,
    ScsiPlace,
)
from vmplug.drivers.plug import (
    Aio,
    BlockDrive,
    Cache,
    DiskFrontend,
    Plug,
    RNGDevice,
    SharedFS,
    Throttle,
    VhostUserDevice,
    VirtiofsdSpec,
)
from vmplug.errors import HypervisorError
from vmplug.host.kind import DeviceType
from vmplug.host.vhost_user.virtiofsd import ask_options
from vmplug.hypervisor.keeper import end_keepers
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.start.cold import ColdQemu
from vmplug.hypervisor.qemu.start.launch import launch
from vmplug.hypervisor.qemu.start.machine import Machine, VmSpec, cold_offer

pytestmark = pytest.mark.qemu

ID = "0123456789abcdef"
MAC = "52:54:00:0a:0b:0f"
PCI = PciPlace(bus="rp1", slot=PciSlot(0), path=PciPath.parse("05/00"))
SCSI = ScsiPlace(bus="scsi0.0", address=ScsiAddress(0, 3), path=PciPath.parse("02"))
MEMORY = MemorySlot(slot=1, index=0)
CCW = CcwPlace(devno=CcwDevNo(0, 5))
MMIO = MmioPlace(bus="virtio-mmio-bus.23", index=0)
ODD_SOCKET = 'a, server=on "b".sock'


@dataclass(frozen=True, slots=True)
class Paused:
    """A QEMU that vmplug started, and that runs nothing."""

    qemu: Qemu
    oracle: RawQmp


@contextmanager
def paused(
    spec: VmSpec, plugs: Iterable[tuple[Plug, Place]] = (), *, timeout_s: float = START_TIMEOUT_S
) -> Iterator[Paused]:
    """The machine with what is plugged from the start."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp"))
        oracle_path = Path(directory) / "oracle.sock"
        channel = f"socket,id=oracle,path={oracle_path},server=on,wait=off"
        extra = ("-S", "-chardev", channel, "-qmp", "chardev:oracle")
        spec = replace(spec, extra=extra)
        cold = stack.enter_context(ColdQemu(spec, Path(directory)))
        for plug, place in plugs:
            cold.plug(plug, place)
        pid = launch(cold, lambda _: None, timeout_s=timeout_s)
        stack.callback(end_keepers, str(cold.qmp_socket))  # they write into the directory
        stack.callback(os.waitpid, pid, 0)
        stack.callback(os.kill, pid, signal.SIGKILL)
        cold.started()
        oracle = stack.enter_context(RawQmp.connect(oracle_path))
        yield Paused(stack.enter_context(closing(Qemu.connect(str(cold.qmp_socket)))), oracle)


# what is offered


def agreeing(spec: VmSpec) -> tuple[Offer, Offer]:
    """The offer before the start, and what a running VM cannot have of it; and the one after."""
    with paused(spec) as vm:
        hot = vm.qemu.offer()
    cold = cold_offer(spec)
    assert (cold.mode, hot.mode) == (PlugMode.COLD, PlugMode.HOT)
    assert hot.mmio == ()
    cold = replace(cold, machine=hot.machine, iommufd=hot.iommufd)
    return replace(cold, mode=PlugMode.HOT, mmio=()), hot


@pytest.mark.parametrize(
    "spec",
    [
        VmSpec(name="sb1", accel="tcg"),
        VmSpec(name="sb1", accel="tcg", ports=27, memory_slots=256, cpus=2),
        VmSpec(name="sb1", accel="tcg", ports=0, memory_slots=0),
        VmSpec(name="sb1", accel="tcg", machine=Machine.MICROVM, cpus=2),
        VmSpec(name="sb1", accel="tcg", machine=Machine.S390, cpus=2),
    ],
    ids=["q35", "large q35", "q35 without", "microvm", "s390x"],
)
@pytest.mark.parametrize("has_disk", [False, True], ids=["no disk", "disk"])
def test_what_is_offered_before_the_start_is_offered_after_it(
    spec: VmSpec, tmp_path: Path, *, has_disk: bool
) -> None:
    disk = str(disk_image(tmp_path / "boot, with=comma.img", 1, "boot"))
    spec = replace(spec, disk=disk if has_disk else None)
    cold, hot = agreeing(spec)
    if spec.machine is Machine.S390:
        assert cold.ccw_used is not None
        assert hot.ccw_used is not None
        assert hot.ccw_used <= cold.ccw_used  # the boot disk's number is kept for it
        assert not has_disk or hot.ccw_used == cold.ccw_used
        cold = replace(cold, ccw_used=hot.ccw_used)
    assert cold == hot
    assert hot.machine.startswith({"q35": "pc-q35"}.get(spec.machine, spec.machine))


def test_what_was_plugged_is_not_offered_any_more(tmp_path: Path) -> None:
    spec = VmSpec(name="sb1", accel="tcg", memory_slots=3)
    images = [disk_image(tmp_path / f"{name}.img", 2, name) for name in "abc"]
    plugs: list[tuple[Plug, Place]] = [
        (replace(drive(images[0]), id="a" * 16), PCI),
        (replace(drive(images[1]), id="b" * 16, driver=DiskFrontend.VIRTIO_SCSI), SCSI),
        (replace(memory(images[2]), id="c" * 16), MEMORY),
    ]
    with paused(spec, plugs) as vm:
        offer = vm.qemu.offer()
        assert vm.qemu.find_devices() == dict.fromkeys(("a" * 16, "b" * 16, "c" * 16), True)
    assert [port.bus for port in offer.ports if not port.free] == ["rp1"]
    assert offer.controllers[0].used == {ScsiAddress(0, 3)}
    assert (offer.memory_slots_used, offer.nvdimms) == (frozenset({1}), 1)
    assert offer.shared_memory


def test_the_transports_of_a_microvm_are_all_there() -> None:
    """The one that is never offered is there too: the serial port's interrupt is its."""
    spec = VmSpec(name="sb1", accel="tcg", machine=Machine.MICROVM)
    plugs: list[tuple[Plug, Place]] = [
        (RNGDevice(id=f"{place.index:016x}", filename="/dev/urandom"), place)
        for place in cold_offer(spec).mmio
    ]
    with paused(spec, plugs) as vm:
        assert len(vm.qemu.find_devices()) == 23
        for plug, place in plugs:
            (bus,) = values(vm.oracle, f"/machine/peripheral/vmplug-{plug.id}", ["parent_bus"])
            assert str(bus).rpartition("/")[2] == str(place)


# hot and cold


def drive(image: Path, **more: Any) -> BlockDrive:
    options = {"driver": DiskFrontend.VIRTIO_BLOCK, **more}
    return BlockDrive(id=ID, file=str(image), is_device=False, **options)


def memory(image: Path, **more: Any) -> BlockDrive:
    size = image.stat().st_size
    return drive(image, driver=DiskFrontend.NVDIMM, size_bytes=size, **more)


def vhost_user(kind: DeviceType, path: Path, **more: Any) -> VhostUserDevice:
    return VhostUserDevice(id=ID, type=kind, socket_path=str(path), **more)


NOT_COMPARED = frozenset({"hotplugged"})
"""Of a device: how it came. All the rest is compared, what the guest sees and what it does not."""


def values(oracle: RawQmp, path: str, names: Sequence[str]) -> list[object]:
    return [oracle.execute("qom-get", path=path, property=name) for name in names]


def tree(oracle: RawQmp, path: str) -> dict[str, object]:
    """Every property of an object and of what is below it, by its path."""
    found: dict[str, object] = {}
    for entry in oracle.execute("qom-list", path=path):
        name, kind = entry["name"], entry["type"]
        if kind.startswith("child<"):
            found[f"{path}/{name}"] = kind
            found |= tree(oracle, f"{path}/{name}")
        elif name not in NOT_COMPARED:
            try:
                found[f"{path}:{name}"] = oracle.execute("qom-get", path=path, property=name)
            except QmpError:  # it can only be written
                found[f"{path}:{name}"] = None
    return found


def described(oracle: RawQmp) -> dict[str, object]:
    """Everything of the device and its parts that QEMU tells."""
    found = tree(oracle, f"/machine/peripheral/vmplug-{ID}")
    for entry in oracle.execute("qom-list", path="/objects"):
        if entry["name"].startswith("vmplug-"):
            found |= tree(oracle, f"/objects/{entry['name']}")
    nodes = oracle.execute("query-named-block-nodes", flat=True)
    found["nodes"] = [with_names(node) for node in nodes]
    chardevs = oracle.execute("query-chardev")
    found["chardevs"] = [with_names(c) for c in chardevs if c["label"].startswith("vmplug-")]
    return found


def with_names(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What QEMU tells of a node or chardev, without names that are never the same twice.

    QEMU 10 tells the children of a node, and of a connection that it was given the path of its
    other end: for a daemon of vmplug's own in a directory that has gone.
    """
    found = dict(entry)
    if "node-name" in found:
        found["node-name"] = named(found["node-name"])
    if "filename" in found:
        found["filename"] = re.sub(r"/tmp/vmplug-\w+/s\b", "#", found["filename"])
    if "children" in found:
        found["children"] = [with_names(child) for child in found["children"]]
    return found


def named(node_name: str) -> str:
    """The name of a node; QEMU makes up others, and never the same twice."""
    return node_name if node_name.startswith("vmplug-") else "#"


def kinds(tmp_path: Path, stack: ExitStack) -> Mapping[str, tuple[Plug, Place]]:
    """A plug of each kind with options that are not the default, and its place on a q35."""
    image = disk_image(tmp_path / "disk, of=all kinds.img", 4, "disk")
    (tmp_path / "work").mkdir()
    served = disk_image(tmp_path / "served.img", 4, "served")
    sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp"))
    blk = stack.enter_context(storage_daemon(served, socket_path=Path(sockets) / ODD_SOCKET))
    net = stack.enter_context(vhost_user_backend("net"))
    scsi = stack.enter_context(vhost_user_backend("scsi", served))
    return {
        "virtio-blk": (
            drive(
                image,
                cache=Cache.WRITETHROUGH,
                aio=Aio.IO_URING,
                discard=True,
                serial='S, "1"',
                iothread=True,
                throttle=Throttle(bps_total=1 << 30, iops_read=100),
            ),
            PCI,
        ),
        "virtio-scsi": (drive(image, driver=DiskFrontend.VIRTIO_SCSI, read_only=True), SCSI),
        "nvdimm": (memory(image, read_only=True), MEMORY),
        "rng": (RNGDevice(id=ID, filename="/dev/urandom", max_bytes=512, period_ms=7), PCI),
        "vhost-user-blk": (
            vhost_user(DeviceType.VHOST_USER_BLK, blk.socket_path, reconnect_s=1),
            PCI,
        ),
        "vhost-user-scsi": (vhost_user(DeviceType.VHOST_USER_SCSI, scsi.socket_path), PCI),
        "vhost-user-net": (
            vhost_user(DeviceType.VHOST_USER_NET, net.socket_path, mac_address=MAC, msix=False),
            PCI,
        ),
    }


KINDS = (
    "virtio-blk",
    "virtio-scsi",
    "nvdimm",
    "rng",
    "vhost-user-blk",
    "vhost-user-scsi",
    "vhost-user-net",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_is_the_same_hot_and_cold(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        plug, place = kinds(tmp_path, stack)[kind]
        assert_same(VmSpec(name="sb1", accel="tcg", ports=2), plug, place)


@pytest.mark.parametrize("kind", ["virtio-blk", "rng", "vhost-user-net"])
def test_a_device_of_an_s390x_is_the_same_hot_and_cold(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        plug, _ = kinds(tmp_path, stack)[kind]
        assert_same(VmSpec(name="sb1", accel="tcg", machine=Machine.S390), plug, CCW)


@pytest.mark.root
@pytest.mark.parametrize(
    ("machine", "place"), [(Machine.Q35, PCI), (Machine.S390, CCW)], ids=["q35", "s390x"]
)
@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_a_share_of_vmplugs_own_is_the_same_hot_and_cold(
    machine: Machine, place: Place, tmp_path: Path, *, read_only: bool
) -> None:
    plug = share(tmp_path, read_only=read_only)
    assert_same(VmSpec(name="sb1", accel="tcg", machine=machine), plug, place)
    with ending(sharers_of(tmp_path)):
        pass


@pytest.mark.root
def test_a_share_of_somebody_elses_is_the_same_hot_and_cold(tmp_path: Path) -> None:
    """A virtiofsd serves one QEMU: each has its own, at the same socket."""
    with tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp") as directory:
        path = Path(directory) / ODD_SOCKET
        plug = vhost_user(DeviceType.VHOST_USER_FS, path, tag="a, b", queue_size=128)

        @contextmanager
        def served() -> Iterator[None]:
            with virtiofsd(tmp_path, socket_path=path):
                yield
            path.unlink()

        assert_same(VmSpec(name="sb1", accel="tcg", ports=2), plug, PCI, served)


def assert_same(
    spec: VmSpec,
    plug: Plug,
    place: Place,
    served: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Whether it is plugged before the start or after it, QEMU tells the same of it."""
    with served(), paused(spec, [(plug, place)]) as vm:
        cold = described(vm.oracle)
    with served(), paused(spec) as vm:
        vm.qemu.plug(plug, place)
        hot = described(vm.oracle)
    different = {key for key in cold.keys() | hot.keys() if cold.get(key) != hot.get(key)}
    assert {key: (cold.get(key), hot.get(key)) for key in different} == {}
    assert f"/machine/peripheral/vmplug-{ID}:type" in cold


def share(directory: Path, *, read_only: bool) -> VhostUserDevice:
    program = str(VIRTIOFSD)
    daemon = VirtiofsdSpec(
        program=program,
        options=ask_options(program),
        directory=str(directory),
        cache="auto",
        read_only=read_only,
    )
    return VhostUserDevice(
        id=ID, type=DeviceType.VHOST_USER_FS, daemon=daemon, tag="work", queue_size=256
    )


# what only a start can have


@pytest.mark.parametrize(
    ("machine", "place", "model"),
    [
        (Machine.Q35, PCI, "virtio-9p-pci"),
        (Machine.MICROVM, MMIO, "virtio-9p-device"),
        (Machine.S390, CCW, "virtio-9p-ccw"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_9p_is_plugged_before_the_start(
    machine: Machine, place: Place, model: str, tmp_path: Path, *, read_only: bool
) -> None:
    directory = tmp_path / 'a, readonly=on "b"'
    directory.mkdir()
    plug = SharedFS(id=ID, directory=str(directory), tag="a, b", read_only=read_only)
    with paused(VmSpec(name="sb1", accel="tcg", machine=machine), [(plug, place)]) as vm:
        path = f"/machine/peripheral/vmplug-{ID}"
        assert values(vm.oracle, path, ["type", "realized"]) == [model, True]
        backend = path if isinstance(place, MmioPlace) else f"{path}/virtio-backend"
        assert values(vm.oracle, backend, ["mount_tag"]) == ["a, b"]
        assert vm.qemu.find_devices() == {ID: True}


@pytest.mark.root
def test_a_backend_that_falls_silent_at_the_start_ends_qemu(tmp_path: Path) -> None:
    """QEMU waits for it and answers nobody. The daemon of the share beside it ends too."""
    other = PciPlace(bus="rp0", slot=PciSlot(0), path=PciPath.parse("04/00"))
    with vhost_user_backend("net", options=["--answers", "0"]) as backend:
        network = vhost_user(DeviceType.VHOST_USER_NET, backend.socket_path, mac_address=MAC)
        shared = replace(share(tmp_path, read_only=False), id="f" * 16)
        plugs: list[tuple[Plug, Place]] = [(shared, other), (network, PCI)]
        with pytest.raises(HypervisorError, match="QEMU did not start"):
            start(VmSpec(name="sb1", accel="tcg"), plugs)
        assert backend.is_running
    assert sharers_of(tmp_path) == set()


def start(spec: VmSpec, plugs: Iterable[tuple[Plug, Place]]) -> None:
    """Start a QEMU that hangs; it has a second to answer."""
    with paused(spec, plugs, timeout_s=1.0):
        pass


# what vmplug chose and cannot be had


def test_a_vm_starts_with_threads_where_native_aio_was_only_vmplugs_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: BufferingHandler
) -> None:
    program = shutil.which("qemu-system-x86_64")
    assert program
    Path(without_aio(program, tmp_path)).rename(tmp_path / "qemu-system-x86_64")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    image = disk_image(tmp_path / "a.img", 1, "a")
    native = drive(image, cache=Cache.NONE, aio=Aio.NATIVE)
    try:  # QEMU 10 uses threads by itself
        with paused(VmSpec(name="vm0", accel="tcg"), [(native, PCI)]):
            pass
    except HypervisorError as error:
        assert "Unable to use native AIO" in error.message  # noqa: PT017
        with paused(
            VmSpec(name="vm0", accel="tcg"), [(replace(native, aio_is_choice=True), PCI)]
        ) as vm:
            nodes = vm.oracle.execute("query-named-block-nodes")
            assert str(image) in {node["file"] for node in nodes}
        said = [record.getMessage() for record in logged.buffer]
        assert [text for text in said if "VM vm0: vmplug uses aio=threads for 1 of" in text]
