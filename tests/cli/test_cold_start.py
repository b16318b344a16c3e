"""`vmplug vm start` with devices: the guest has each from the start; a failure leaves nothing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from guest.console import GuestConsole, GuestError, GuestPmem

from tests.cli.command import (
    PROGRAMS,
    VMPLUG,
    Result,
    Vmplug,
    device,
    ended,
    first_in_path,
    number_of,
)
from tests.cli.started import (
    StartedVm,
    booted,
    ending,
    no_qemu_left,
    sharers_of,
    start_words,
    started,
)
from tests.cli.world import processes_below, qemus_below
from tests.contract.world import journal_rows
from tests.support.daemons import storage_daemon, vhost_user_backend, virtiofsd
from tests.support.disks import disk_image, loop_device

pytestmark = [pytest.mark.root, pytest.mark.qemu]

MIB = 1 << 20
MAC = "52:54:00:0a:0b:0c"
PFN_OFFSET_BYTES = 4096
PFN_SIGNATURE = b"NVDIMM_PFN_INFO\0"
NET_ID, RNG_ID, P9_ID, FS_ID = 1, 4, 9, 26
"""Of virtio devices. Source: virtio specification, 5."""

BLK_NUMBER = "241:7"
MEMORIES = ("memory0", "memory1", "memory2")
ODD_NAME = "old, of=all\\ kinds"
"""What QEMU's and virtiofsd's option strings take apart."""


@dataclass(frozen=True, slots=True)
class Host:
    """Everything that the bundle asks for, on this host."""

    directory: Path
    bundle: Path
    store: Path
    disk: Path
    volume: Path
    scsi: Path
    blk: Path
    memories: tuple[Path, Path, Path]
    work: Path
    kept: Path
    old: Path
    fixed: Path

    def memory(self, index: int) -> str:
        """The word for one of the NVDIMMs."""
        return f"nvdimm:{self.memories[index]}:/dev/memory{index}"

    @property
    def words(self) -> tuple[str, ...]:
        """The words that ask for all of it, but for the last NVDIMM, which has a slot."""
        return (
            *("--bundle", str(self.bundle), "--vhost-user-store", str(self.store)),
            *("--device", self.memory(0), "--device", self.memory(1)),
            *("--ports", "9", "--memory-slots", "3"),
        )


@contextmanager
def prepared(directory: Path) -> Iterator[Host]:
    """Disks, directories and backends, and the bundle that asks for them."""
    with ExitStack() as stack:
        images = {
            name: disk_image(directory / f"{name}.img", 8, f"{name} of the host")
            for name in ("disk", "volume", "scsi", "blk", *MEMORIES)
        }
        loops = {
            name: stack.enter_context(loop_device(images[name]))
            for name in ("disk", "volume", "scsi")
        }
        for name in MEMORIES:
            write_signature(images[name])
        shares = {name: directory / name for name in ("work", "kept", ODD_NAME, "fixed")}
        for name, path in shares.items():
            path.mkdir()
            (path / "ours").write_text(f"{name} of the host")
        store = directory / "store"
        for name in ("devices", "sockets"):
            (store / "block" / name).mkdir(parents=True)
        major, minor = map(int, BLK_NUMBER.split(":"))
        os.mknod(store / "block/devices/one", 0o60600, os.makedev(major, minor))
        path = store / "block/sockets/one"
        stack.enter_context(storage_daemon(images["blk"], socket_path=path))
        net = stack.enter_context(vhost_user_backend("net"))
        host = Host(
            directory=directory,
            bundle=directory / "ctr1",
            store=store,
            disk=loops["disk"],
            volume=loops["volume"],
            scsi=loops["scsi"],
            blk=images["blk"],
            memories=(images["memory0"], images["memory1"], images["memory2"]),
            work=shares["work"],
            kept=shares["kept"],
            old=shares[ODD_NAME],
            fixed=shares["fixed"],
        )
        write_config(host, net.socket_path)
        yield host


def write_signature(image: Path) -> None:
    """Make it a file that the guest can mount without a page cache."""
    with image.open("r+b") as file:
        file.seek(PFN_OFFSET_BYTES)
        file.write(PFN_SIGNATURE)


def write_config(host: Host, net_socket: Path) -> None:
    virtio_9p = {"filesystem": "virtio-9p"}
    annotations: dict[str, Mapping[str, object]] = {
        "net.eth0": {"socket": str(net_socket), "mac": MAC},
        "share.work": {"source": str(host.work)},
        "share.kept": {"source": str(host.kept), "read-only": True, "cache": "never"},
        "share.old": {"source": str(host.old), **virtio_9p},
        "share.fixed": {"source": str(host.fixed), "read-only": True, **virtio_9p},
        "rng.rng0": {"max-bytes": 4096, "period": 100},
        "options./dev/xvdb": {"block-driver": "virtio-scsi", "serial": "S-1"},
        "options./data": {"serial": "VOLUME"},
    }
    config = {
        "ociVersion": "1.0.2",
        "annotations": {f"org.vmplug.{k}": json.dumps(v) for k, v in annotations.items()},
        "mounts": [
            {
                "destination": "/data",
                "type": "bind",
                "source": str(host.volume),
                "options": ["bind", "ro"],
            }
        ],
        "linux": {
            "devices": [
                device("/dev/xvda", number_of(host.disk)),
                device("/dev/xvdb", number_of(host.scsi)),
                device("/dev/blk", BLK_NUMBER),
                device("/dev/null", "1:3", "c"),
            ]
        },
    }
    host.bundle.mkdir()
    (host.bundle / "config.json").write_text(json.dumps(config))


@dataclass(frozen=True, slots=True)
class Cold:
    """A VM that was started with all of it, its guest, and the host's side."""

    vm: StartedVm
    host: Host
    console: GuestConsole

    def guest(self, name: str) -> dict[str, Any]:
        """Where the guest sees it, as the start said."""
        return dict(self.vm.attachments[name]["guest"])

    def virtio_id_at(self, pci_path: str) -> int:
        """The kind of virtio device that the guest has at that path; its bus numbers are its."""
        port, slot = pci_path.split("/")
        at = f"/sys/devices/pci0000:00/0000:00:{port}.0/0000:??:{slot}.0/virtio*/device"
        return int(self.console.run(f"cat {at}"), 16)

    def pmem_of(self, handle: int) -> GuestPmem:
        """The persistent memory on the module of that handle, through its region."""
        where = f"grep -lx {handle:#x} /sys/bus/nd/devices/nmem*/nfit/handle"
        module = self.console.run(where).split("/")[5]
        region = self.console.run(f"grep -l '^{module},' /sys/bus/nd/devices/region*/mapping0")
        at = f"/sys/bus/nd/devices/{region.split('/')[5]}/namespace*/block"
        name = self.console.run(f"ls {at}")
        return next(pmem for pmem in self.pmems() if pmem.name == name)

    def pmems(self) -> list[GuestPmem]:
        """Every persistent memory now."""
        return [GuestPmem.parse(line) for line in self.console.run("pmems").splitlines()]

    def mounted(self, name: str, *options: str) -> str:
        """The directory where a share is mounted as its agent is told to."""
        agent = self.guest(name)["agent"]
        said = ",".join([*agent["options"], *options])
        return self.console.mount(agent["fstype"], agent["id"], said)


@pytest.fixture(scope="module")
def cold() -> Iterator[Cold]:
    """One boot for all tests that only look; each leaves the VM as it was, but for the last."""
    with (
        tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp") as directory,
        prepared(Path(directory)) as host,
    ):
        vmplug = Vmplug(Path(directory) / "vmplug" / "state")
        vmplug.state_dir.parent.mkdir()
        with (
            started(vmplug, "cold1", *host.words, flavour="full") as vm,
            booted(vm) as console,
        ):
            console.load_modules("nfit", "nd_pmem", "virtio_net", "virtio-rng")
            yield Cold(vm, host, console)


def test_the_start_tells_where_the_guest_sees_each(cold: Cold) -> None:
    told = cold.vm.attachments
    assert {name: hold["kind"] for name, hold in told.items()} == {
        "/dev/xvda": "block",
        "/dev/xvdb": "block",
        "/dev/blk": "vhost-user-blk-pci",
        "/dev/null": "generic",
        "/data": "block",
        "net:eth0": "virtio-net-pci",
        "share:work": "vhost-user-fs-pci",
        "share:kept": "vhost-user-fs-pci",
        "share:old": "virtio-9p-pci",
        "share:fixed": "virtio-9p-pci",
        "rng:rng0": "virtio-rng-pci",
        "/dev/memory0": "block",
        "/dev/memory1": "block",
    }
    assert {hold["owner"] for hold in told.values()} == {"ctr1"}
    assert {hold["state"] for hold in told.values()} == {"attached"}
    assert told["/dev/null"]["guest"] is None
    listed = cold.vm.vmplug("list", "--vm", "cold1", "--json").json()["attachments"]
    present = {"host": {"state": "present", "detail": None}}
    assert listed == [hold | present for hold in cold.vm.told["attachments"]]
    assert len(cold.vm.vmplugs_devices()) == len(told) - 1
    reconciled = cold.vm.vmplug("reconcile", "--json").json()
    assert reconciled == {"repairs": [], "bindings": [], "errors": []}


def test_disks_are_where_they_are_said_to_be(cold: Cold) -> None:
    disks = {disk.marker: disk for disk in cold.console.wait_for_disks(4)}
    for name, marker in (
        ("/dev/xvda", "disk of the host"),
        ("/dev/blk", "blk of the host"),
        ("/data", "volume of the host"),
    ):
        assert disks[marker].pci_path == cold.guest(name)["pci_path"]
        assert cold.guest(name)["agent"]["id"] == disks[marker].pci_path
    scsi, guest = disks["scsi of the host"], cold.guest("/dev/xvdb")
    assert (scsi.pci_path, scsi.scsi_address) == (guest["pci_path"], guest["scsi_address"])
    assert (guest["agent"]["type"], guest["agent"]["id"]) == ("scsi", scsi.scsi_address)
    assert scsi.serial == "S-1"
    volume = disks["volume of the host"]
    assert (volume.read_only, volume.serial) == (True, "VOLUME")
    assert cold.guest("/data")["agent"]["options"] == ["ro"]
    for marker, path in (("disk of the host", cold.host.disk), ("blk of the host", cold.host.blk)):
        cold.console.write(disks[marker].name, MIB, b"from the guest")
        with path.open("rb") as file:
            file.seek(MIB)
            assert file.read(14) == b"from the guest"


def test_memory_has_the_handle_that_was_said(cold: Cold) -> None:
    """Of NVDIMMs that come at once nobody knows which the guest numbers first."""
    for index in (0, 1):
        guest = cold.guest(f"/dev/memory{index}")
        assert (guest["nvdimm_id"], guest["agent"]) == (None, None)
        pmem = cold.pmem_of(guest["nvdimm_handle"])
        assert pmem.marker == f"memory{index} of the host"
        assert not pmem.read_only
        cold.console.run(f"echo from the guest | dd of=/dev/{pmem.name} bs=1M seek=1 conv=fsync")
        with cold.host.memories[index].open("rb") as file:
            file.seek(MIB)
            assert file.read(14) == b"from the guest"


def test_the_network_answers(cold: Cold) -> None:
    (nic,) = cold.console.wait_for_nics(1)
    guest = cold.guest("net:eth0")
    assert (nic.mac, nic.mac) == (MAC, guest["mac_address"])
    assert nic.pci_path == guest["pci_path"]
    assert cold.virtio_id_at(guest["pci_path"]) == NET_ID
    address = f"ip link set {nic.name} up && ip addr add 192.0.2.2/24 dev {nic.name}"
    answer = cold.console.run(f"{address} && ping -c 1 -W 5 192.0.2.77")
    assert "1 packets received" in answer


def test_random_numbers_come(cold: Cold) -> None:
    assert cold.virtio_id_at(cold.guest("rng:rng0")["pci_path"]) == RNG_ID
    available = cold.console.run("cat /sys/class/misc/hw_random/rng_available")
    assert available.split()[0] == "virtio_rng.0"  # Linux 6.12 adds "none"
    assert cold.console.run("head -c 16 /dev/hwrng | wc -c") == "16"


@pytest.mark.parametrize(("name", "virtio_id"), [("share:work", FS_ID), ("share:old", P9_ID)])
def test_a_shared_directory_is_one_both_ways(cold: Cold, name: str, virtio_id: int) -> None:
    guest = cold.guest(name)
    assert guest["mount_tag"] == name.removeprefix("share:")
    assert cold.virtio_id_at(guest["pci_path"]) == virtio_id
    directory = Path(cold.vm.attachments[name]["host_path"])
    at = cold.mounted(name)
    assert cold.console.read_file(f"{at}/ours").decode() == (directory / "ours").read_text()
    cold.console.write_file(f"{at}/theirs", b"from the guest")
    assert (directory / "theirs").read_bytes() == b"from the guest"
    (directory / "theirs").unlink()
    cold.console.unmount(at)


@pytest.mark.parametrize("name", ["share:kept", "share:fixed"])
def test_a_share_is_read_only_even_when_the_guest_mounts_it_for_writing(
    cold: Cold, name: str
) -> None:
    assert cold.guest(name)["agent"]["options"][-1] == "ro"
    at = cold.mounted(name, "rw")  # the last one counts
    directory = Path(cold.vm.attachments[name]["host_path"])
    assert cold.console.read_file(f"{at}/ours").decode() == (directory / "ours").read_text()
    for line in (f"echo no >{at}/theirs", f"echo no >>{at}/ours", f"rm {at}/ours"):
        with pytest.raises(GuestError, match="Read-only file system"):
            cold.console.run(line)
    assert [path.name for path in directory.iterdir()] == ["ours"]
    cold.console.unmount(at)


def test_what_was_plugged_cold_leaves_hot_and_memory_stays(cold: Cold) -> None:
    """The last of the tests on this VM: it is stopped in the end."""
    vm, host = cold.vm, cold.host
    sharers = sharers_of(host.work) | sharers_of(host.kept)
    assert sharers
    with ending(sharers):
        detached = vm.vmplug("detach", "--owner", "ctr1", "--json").json()["detached"]
    memories = {"/dev/memory0", "/dev/memory1"}
    assert {hold["name"] for hold in detached if hold["retained"]} == memories
    assert not any(hold["still_held"] for hold in detached)
    assert vm.states() == dict.fromkeys(memories, "retained")
    assert cold.console.wait_for_disks(0) == []
    assert cold.console.wait_for_nics(0) == []
    assert len(cold.console.wait_for_pmems(2)) == 2
    assert len(vm.vmplugs_devices()) == 2
    left = {name for name in vm.names() if name.startswith("vmplug-")}
    assert len(left) == 4  # the modules and their memory
    assert vm.vmplug("reconcile", "--json").json() == {"repairs": [], "bindings": [], "errors": []}

    guest = vm.attached("--device", host.memory(2))["guest"]
    markers = {pmem.name: pmem.marker for pmem in cold.console.wait_for_pmems(3)}
    assert markers[f"pmem{guest['nvdimm_id']}"] == "memory2 of the host"
    assert cold.pmem_of(guest["nvdimm_handle"]).marker == "memory2 of the host"
    assert guest["agent"]["vm_path"] == f"/dev/pmem{guest['nvdimm_id']}"
    fourth = disk_image(host.directory / "fourth.img", 2, "fourth")
    full = vm.attach("--device", f"file:{fourth}", "-o", "block-driver=nvdimm")
    assert (full.status, full.error()["code"]) == (5, "no-free-port")
    again = vm.attached("--device", host.memory(0), owner="ctr2")
    assert again["guest"] == cold.guest("/dev/memory0")
    assert vm.states()["/dev/memory0"] == "attached"

    for name, share in (("again", host.work), ("kept", host.kept)):
        vm.attached("--device", f"share:{share}:{name}")
    at = cold.console.mount("virtiofs", "again")
    assert cold.console.read_file(f"{at}/ours") == b"work of the host"
    with ending(sharers_of(host.work) | sharers_of(host.kept) | {vm.pid}):
        assert vm.vmplug("vm", "stop", "cold1", "--timeout", "0").status == 0
    assert_nothing(vm.vmplug)
    assert sharers_of(host.directory) == set()


# what cannot be started

TAKEN = json.dumps({"driver": "virtio-rng-pci", "bus": "rp0", "addr": "0x0"})
"""QEMU 7.2 makes devices that are asked for as JSON after all others, whatever their order."""


@dataclass(frozen=True, slots=True)
class Small:
    """A disk, a source of random numbers and a share, without a guest."""

    vmplug: Vmplug
    directory: Path

    @property
    def words(self) -> tuple[str, ...]:
        """The words that ask for them."""
        return (
            *("--device", f"file:{self.directory}/disk.img", "--device", "rng"),
            *("--device", f"share:{self.directory}/work:work", "--owner", "ctr1"),
        )

    def start(self, *words: str, extra: tuple[str, ...] = (), machine: str = "q35") -> Result:
        """The verb."""
        said = start_words("sb1", self.vmplug.state_dir.parent, *words, machine=machine)
        return self.vmplug(*said, *extra)

    def assert_nothing(self) -> None:
        """Nothing is left of a start."""
        assert_nothing(self.vmplug)
        assert sharers_of(self.directory) == set()


def assert_nothing(vmplug: Vmplug) -> None:
    """No VM, no process, no file of one, nothing in the journal."""
    assert processes_below(vmplug.state_dir) == []
    assert list((vmplug.state_dir / "vm").glob("*")) == []
    if (vmplug.state_dir / "journal.db").exists():
        assert not any(journal_rows(vmplug.state_dir).values())


@pytest.fixture
def small(vmplug: Vmplug, tmp_path: Path) -> Iterator[Small]:
    disk_image(tmp_path / "disk.img", 1, "small")
    (tmp_path / "work").mkdir()
    with no_qemu_left(vmplug.state_dir.parent):
        yield Small(vmplug, tmp_path)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("-nonsense",), "-nonsense: invalid option"),
        (("-kernel", "/no/such/kernel"), "/no/such/kernel"),
        (("-device", "no-such-model"), "no-such-model"),
        (("-device", TAKEN), "slot 0 function 0 not available"),
    ],
    ids=["option", "kernel", "model", "place"],
)
def test_a_qemu_that_does_not_start_leaves_nothing(
    small: Small, extra: tuple[str, ...], words: str
) -> None:
    failed = small.start(*small.words, extra=extra)
    assert failed.status == 5
    error = failed.error()
    assert error["code"] == "hypervisor-error"
    assert error["message"].startswith("QEMU did not start: ")
    assert words in error["message"]
    small.assert_nothing()


def test_after_a_start_that_failed_the_same_can_be_started(small: Small) -> None:
    assert small.start(*small.words, extra=("-nonsense",)).status == 5
    small.start(*small.words).json()
    assert small.vmplug("vm", "stop", "sb1", "--timeout", "0").status == 0
    with ending(sharers_of(small.directory)):
        pass
    small.assert_nothing()


@pytest.mark.parametrize("option", ["--kernel", "--initrd", "--disk"])
def test_a_file_that_is_not_there_is_a_mistake_before_anything(small: Small, option: str) -> None:
    refused = small.start(option, "/no/such/file", *small.words)
    assert (refused.status, refused.error()["code"]) == (2, "usage")
    assert not small.vmplug.state_dir.exists()


@pytest.mark.parametrize("words", [("--bundle", "-"), ("--device", "rng")])
def test_somebody_must_own_the_devices(vmplug: Vmplug, words: tuple[str, str]) -> None:
    refused = vmplug("vm", "start", "sb1", *words, "--json", stdin='{"ociVersion": "1.0.2"}')
    assert (refused.status, refused.error()["code"]) == (2, "usage")
    assert "--owner" in refused.error()["message"]
    assert not vmplug.state_dir.exists()


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        (("--device", "file:{}/empty.img"), 4, "in-use"),
        (("--device", "file:{}/missing.img"), 4, "no-such-device"),
        (("--device", "net:{}/nobody.sock"), 4, "in-use"),
        (("--device", "rng:/etc"), 4, "no-such-device"),
        (("--device", "share:{}/work:other", "-o", "cache=sometimes"), 3, "bad-request"),
        (("--device", "share:{}/work:work2", "--ports", "1"), 5, "no-free-port"),
        (("--device", "share:{}/empty.img:file"), 4, "no-such-device"),
        (("--device", "share:{}/work/..:work"), 3, "bad-request"),
    ],
)
def test_a_device_that_cannot_be_had_keeps_the_vm_from_starting(
    small: Small, words: tuple[str, ...], status: int, code: str
) -> None:
    """Not the VM alone: the share that was first in the request has no daemon either."""
    (small.directory / "empty.img").touch()
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(small.directory / "nobody.sock"))
    named = (word.format(small.directory) for word in words)
    share = ("--device", f"share:{small.directory}/work:work", "--owner", "ctr1")
    refused = small.start(*share, *named)
    assert (refused.status, refused.error()["code"]) == (status, code)
    small.assert_nothing()


def test_memory_without_a_slot_keeps_the_vm_from_starting(small: Small) -> None:
    memory = disk_image(small.directory / "pmem.img", 2, "memory")
    said = ("--device", f"nvdimm:{memory}", "--memory-slots", "0")
    refused = small.start(*said, "--owner", "ctr1")
    assert (refused.status, refused.error()["code"]) == (5, "cannot-plug")
    small.assert_nothing()


def test_a_name_that_runs_is_left_alone(small: Small) -> None:
    started = small.start(*small.words).json()
    before = journal_rows(small.vmplug.state_dir)
    sharers = sharers_of(small.directory)
    other = ("--device", f"share:{small.directory}:other", "--owner", "ctr2")
    refused = small.start(*other)
    assert (refused.status, refused.error()["code"]) == (6, "wrong-state")
    assert journal_rows(small.vmplug.state_dir) == before
    assert sharers_of(small.directory) == sharers
    assert qemus_below(small.vmplug.state_dir) == [started["vm"]["pid"]]
    assert small.vmplug("vm", "list", "--json").json()["vms"][0]["state"] == "prelaunch"
    with ending(sharers):
        assert small.vmplug("vm", "stop", "sb1", "--timeout", "0").status == 0
    small.assert_nothing()


def test_a_qemu_that_is_not_installed_is_named(small: Small) -> None:
    path = small.directory / "bin"
    path.mkdir()
    for program in ("setsid", "unshare", "sh"):
        (path / program).symlink_to(shutil.which(program) or "")
    said = ("vm", "start", "sb1", "--machine", "s390-ccw-virtio", *small.words, "--json")
    refused = small.vmplug(*said, env={PROGRAMS: str(path)})
    assert refused.status == 5
    error = refused.error()
    assert error["message"] == "qemu-system-s390x is not installed"
    assert error["hint"] == "on Debian: apt install qemu-system-s390x"
    small.assert_nothing()


@pytest.mark.parametrize(
    ("version", "hint"),
    [
        ("5.2.0", "qemu-system-s390x is version 5.2, and vmplug needs 7.2 or later"),
        ("7.2.22", "vmplug vm start --help lists the options; --accel tcg does not need KVM"),
    ],
)
def test_a_qemu_that_is_too_old_is_named(small: Small, version: str, hint: str) -> None:
    path = small.directory / "bin"
    path.mkdir()
    qemu = path / "qemu-system-s390x"
    refusal = "echo \"'{' is not a valid device model name\" >&2; exit 1"
    answer = f'[ "$1" != --version ] || exec echo QEMU emulator version {version}'
    qemu.write_text(f"#!/bin/sh\n{answer}\n{refusal}\n")
    qemu.chmod(0o755)
    said = ("vm", "start", "sb1", "--machine", "s390-ccw-virtio", *small.words, "--json")
    refused = small.vmplug(*said, env=first_in_path(path))
    assert refused.status == 5
    error = refused.error()
    assert error["message"] == "QEMU did not start: '{' is not a valid device model name"
    assert error["hint"] == hint
    small.assert_nothing()


def test_a_directory_too_deep_for_a_socket_is_a_mistake(small: Small) -> None:
    deep = Vmplug(small.vmplug.state_dir / ("d" * 100))
    refused = Small(deep, small.directory).start(*small.words)
    assert (refused.status, refused.error()["code"]) == (3, "bad-request")
    assert_nothing(deep)
    assert sharers_of(small.directory) == set()


def test_a_start_that_was_killed_takes_its_daemon_along(small: Small) -> None:
    """QEMU is stood in for by a program that says when it runs, and then hangs."""
    ready = small.directory / "ready"
    os.mkfifo(ready)
    fake = small.directory / "bin" / "qemu-system-x86_64"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$$" >{ready}\nexec sleep 600\n')
    fake.chmod(0o755)
    path = first_in_path(fake.parent)
    said = ("vm", "start", "sb1", "--accel", "tcg", *small.words)
    starting = small.vmplug.begin(*said, env=path)
    qemu = int(ready.read_text())
    sharers = sharers_of(small.directory)
    assert sharers
    with ending({qemu, *sharers}):
        starting.kill()
        assert ended(starting).status == -signal.SIGKILL
        (repair, *_) = small.vmplug("reconcile", "--json").json()["repairs"]
        assert repair["reason"] == "the start of its VM was interrupted"
    small.assert_nothing()


def test_a_connection_of_the_callers_reaches_qemu(vmplug: Vmplug, tmp_path: Path) -> None:
    """The virtiofsd behind it is the caller's: it serves this QEMU, and ends with it."""
    with (
        no_qemu_left(vmplug.state_dir.parent),
        virtiofsd(tmp_path) as daemon,
    ):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(daemon.socket_path))
            number = connection.fileno()
            said = start_words(
                "sb1", vmplug.state_dir.parent, "--device", f"share:fd:{number}:mine"
            )
            said[3:3] = ["--owner", "ctr1"]
            done = subprocess.run(
                [VMPLUG, *said],
                env=vmplug.environment,
                pass_fds=[number],
                capture_output=True,
                check=True,
            )
        (hold,) = json.loads(done.stdout)["attachments"]
        assert (hold["kind"], hold["guest"]["mount_tag"]) == ("vhost-user-fs-pci", "mine")
        assert daemon.is_running
        assert vmplug("vm", "stop", "sb1", "--timeout", "0").status == 0
        assert daemon.wait_ended() == 0
    assert_nothing(vmplug)


def test_a_bundle_from_standard_input_needs_only_an_owner(vmplug: Vmplug) -> None:
    annotations = {"org.vmplug.rng.seed": "{}"}
    bundle = json.dumps({"ociVersion": "1.0.2", "annotations": annotations})
    directory = vmplug.state_dir.parent
    with no_qemu_left(directory):
        said = start_words("sb1", directory, "--bundle", "-", "--owner", "ctr1")
        (hold,) = vmplug(*said, stdin=bundle).json()["attachments"]
        assert (hold["name"], hold["owner"]) == ("rng:seed", "ctr1")
        text = vmplug("list").answer()
        assert "rng:seed" in text
        assert "PCI 04/00" in text
        assert vmplug("vm", "stop", "sb1", "--timeout", "0").status == 0
    assert_nothing(vmplug)


def test_the_text_tells_the_vm_and_its_devices(small: Small) -> None:
    said = start_words("sb1", small.vmplug.state_dir.parent, *small.words)
    said.remove("--json")
    first, heading, *holds = small.vmplug(*said).answer().splitlines()
    assert first.startswith("VM sb1 runs with TCG as process ")
    assert heading.split()[:2] == ["ATTACHMENT", "OWNER"]
    assert [line.split()[2] for line in holds] == ["/dev/disk.img", "rng:rng0", "share:work"]
    assert holds[2].endswith("PCI 06/00 tag work")
    with ending(sharers_of(small.directory)):
        assert small.vmplug("vm", "stop", "sb1", "--timeout", "0").status == 0
    small.assert_nothing()
