"""A QEMU that vmplug does not start has leased devices by `Lease.qemu_args`, and is adopted."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import vmplug
from tests.qemu.conftest import daemons_below
from tests.support.daemons import storage_daemon, vhost_user_backend, virtiofsd
from tests.support.disks import disk_image, qcow2_image
from tests.support.vm import GuestVm, scsi_controller, start_vm
from vmplug import (
    CannotPlug,
    DeviceInfo,
    DevNum,
    DevType,
    Lease,
    LeaseLock,
    LeaseTerms,
    NetInfo,
    NoFreePort,
    NoSuchDevice,
    Request,
    RngInfo,
    Setup,
    ShareInfo,
    SpecError,
    StateError,
    VhostUserStore,
)
from vmplug.host.file_id import file_id, has_open
from vmplug.host.vhost_user.store import VHOST_USER_BLK_MAJOR
from vmplug.journal.journal import Journal

pytestmark = [pytest.mark.root, pytest.mark.qemu]

MACHINES = ("q35", "pc", "microvm")
MEMORY = "256M"
HOT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Host:
    """What is there to lease, in a directory with a short path."""

    directory: Path
    setup: Setup

    def image(self, name: str) -> Path:
        """A raw disk that begins with its name."""
        return self.directory / f"{name}.img"

    def disk(self, name: str, **options: str) -> DeviceInfo:
        """A request for it."""
        said = {key.replace("_", "-"): value for key, value in options.items()}
        path = str(self.image(name))
        return DeviceInfo(
            container_path=f"/dev/{name}",
            dev_type=DevType.BLOCK,
            host_path=path,
            driver_options=said,
        )

    def requests(self, machine: str) -> Sequence[Request]:
        """One of each kind that the machine can have."""
        served = DeviceInfo(
            container_path="/dev/served",
            dev_type=DevType.BLOCK,
            devnum=DevNum(VHOST_USER_BLK_MAJOR, 1),
        )
        share = ShareInfo(tag="work", source=str(self.directory / "work"))
        asked: list[Request] = [self.disk("plain"), share, RngInfo(), served]
        asked.append(self.disk("image", format="qcow2"))
        if machine != "microvm":
            asked.append(self.disk("scsi", block_driver="virtio-scsi"))
            asked.append(self.disk("memory", block_driver="nvdimm"))
        return asked

    def rows(self) -> int:
        """How much the journal has."""
        with Journal.open(self.setup.state_dir) as journal:
            return len(journal.all_holders()) + len(journal.device_ids())


@pytest.fixture
def host() -> Iterator[Host]:
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp")
        directory = Path(stack.enter_context(temporary))
        for name in ("plain", "scsi", "memory", "served"):
            disk_image(directory / f"{name}.img", 2, name)
        qcow2_image(directory / "image.img", 2, "image")
        work = directory / "work"
        work.mkdir()
        (work / "ours").write_text("from the host")
        store = directory / "store/block"
        for name in ("devices", "sockets"):
            (store / name).mkdir(parents=True)
        os.mknod(store / "devices/one", 0o60600, os.makedev(VHOST_USER_BLK_MAJOR, 1))
        path = store / "sockets/one"
        stack.enter_context(storage_daemon(directory / "served.img", socket_path=path))
        setup = Setup(
            state_dir=directory / "state",
            vhost_user_store=VhostUserStore(str(directory / "store")),
        )
        yield Host(directory, setup)


@contextmanager
def running(
    host: Host, machine: str, words: Sequence[str], lease: Lease, **more: object
) -> Iterator[GuestVm]:
    """A QEMU with words of ours before and behind, which has the lease."""
    (host.directory / "logs").mkdir(exist_ok=True)
    with start_vm(
        host.directory / "logs",
        machine=machine,
        memory=MEMORY,
        extra=words,
        pass_fds=lease.descriptors,
        **more,  # type: ignore[arg-type]
    ) as vm:
        lease.give_to(vm.pid)
        yield vm


def is_open(vm: GuestVm, path: Path) -> bool:
    return bool(has_open(vm.pid, file_id(path.stat())))


def test_the_example_says_what_happens(host: Host) -> None:
    disks = [host.image("plain"), host.image("scsi")]
    example = Path(__file__).parents[2] / "examples/qemu_args.py"
    done = subprocess.run(
        [sys.executable, example, host.directory, *disks, "--", "-S"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == [
        f"leased: {disks[0]}, {disks[1]}, /dev/urandom",
        f"attached: {disks[0]} at PCI 01/00",
        f"attached: {disks[1]} at PCI 02/00",
        "attached: /dev/urandom at PCI 03/00",
        "leases left: 0",
        "attachments left: 0",
    ]


@pytest.mark.parametrize("machine", MACHINES)
def test_the_guest_reads_each_device_and_the_vm_is_adopted(host: Host, machine: str) -> None:
    requests = host.requests(machine)
    disks = {r.name.removeprefix("/dev/") for r in requests if isinstance(r, DeviceInfo)}
    disks -= {"memory"}
    with vmplug.lease(requests, owner="job", setup=host.setup) as lease:
        words = lease.qemu_args(machine, memory=MEMORY)
        assert all(device.descriptor is None for device in lease.devices)
        with running(host, machine, words, lease) as vm:
            assert lease.descriptors == ()
            console = vm.console
            console.load_modules("virtiofs", "virtio-rng")
            found = {disk.marker: disk for disk in console.wait_for_disks(len(disks))}
            assert found.keys() == disks
            assert console.read_file(f"{console.mount('virtiofs', 'work')}/ours") == (
                b"from the host"
            )
            assert console.run("head -c 32 /dev/hwrng | wc -c").strip() == "32"
            if machine != "microvm":
                console.load_modules("nfit", "nd_pmem")
                (memory,) = console.wait_for_pmems(1)
                assert memory.marker == "memory"
            _is_held_by(host, "lease job")
            adopt_and_detach(host, machine, vm, {name: d.pci_path for name, d in found.items()})
            assert lease.wait(0) is False
            vm.kill()
        assert lease.wait(60)
    vmplug.reconcile_host(setup=host.setup).require()
    assert host.rows() == 0
    assert daemons_below(host.directory) == []
    with vmplug.lease(host.requests(machine), owner="next", setup=host.setup):
        pass  # the disks, the socket and the memory are free
    assert host.rows() == 0


def _is_held_by(host: Host, holder: str) -> None:
    (checked,) = vmplug.check_requests([host.disk("plain")], setup=host.setup)
    assert any(holder in finding.message for finding in checked.findings), checked.findings


def adopt_and_detach(host: Host, machine: str, vm: GuestVm, seen: dict[str, str]) -> None:
    """The VM has at its places what the lease had, until it is detached."""
    held = {h.name: h for h in vmplug.list_attachments(setup=host.setup).attachments}
    adopted = vmplug.adopt_vm("sb", str(vm.qmp_path), setup=host.setup)
    assert vmplug.list_leases(setup=host.setup) == []
    _is_held_by(host, "VM 'sb'")
    now = {hold.name: hold for hold in adopted.attachments}
    assert {name: hold.id for name, hold in now.items()} == {n: h.id for n, h in held.items()}
    for name, path in seen.items():
        where = now[f"/dev/{name}"].guest_address
        assert where is not None
        assert path == str(where.pci_path or ""), name
    assert vmplug.reconcile_host(setup=host.setup).require().repairs == ()
    disk, image = now["/dev/plain"], host.image("plain")
    assert is_open(vm, image)
    (detached,) = vmplug.detach_attachments([disk.id], timeout_s=HOT_TIMEOUT_S, setup=host.setup)
    if machine == "microvm":
        assert detached.outcome == "retained"
        return
    assert detached.outcome == "detached"
    vm.console.wait_for_disks(len(seen) - 1)
    assert not is_open(vm, image)
    with vmplug.connect_vm("sb", setup=host.setup) as devices:
        again = devices.attach(host.disk("plain"), owner="job")
        assert again.guest_address is not None
        assert len(vm.console.wait_for_disks(len(seen))) == len(seen)
        devices.detach(again.id, timeout_s=HOT_TIMEOUT_S)
    shared = now["share:work"]
    vm.console.unmount("/mnt/work")
    vmplug.detach_attachments([shared.id], timeout_s=HOT_TIMEOUT_S, setup=host.setup)
    assert daemons_below(host.directory) == []


def test_kinds_that_other_processes_serve_and_a_9p_share(host: Host) -> None:
    """With a connection of vmplug's, by name where QEMU connects again, and without any."""
    plain, theirs = host.directory / "work", host.directory / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("theirs")
    with vhost_user_backend("net") as net, virtiofsd(theirs) as daemon:
        requests: list[Request] = [
            DeviceInfo(
                container_path="/dev/served",
                dev_type=DevType.BLOCK,
                devnum=DevNum(VHOST_USER_BLK_MAJOR, 1),
                driver_options={"reconnect": "0"},
            ),
            ShareInfo(tag="old", source=str(plain), driver_options={"filesystem": "virtio-9p"}),
            ShareInfo(tag="theirs", source=str(daemon.socket_path)),
            NetInfo(label="eth0", socket_path=str(net.socket_path)),
        ]
        with vmplug.lease(requests, owner="job", setup=host.setup) as lease:
            words = lease.qemu_args("q35", memory=MEMORY)
            with running(host, "q35", words, lease, flavour="full") as vm:
                vm.console.load_modules("virtio_net", "virtiofs", "9pnet_virtio", "9p")
                assert [disk.marker for disk in vm.console.wait_for_disks(1)] == ["served"]
                (nic,) = vm.console.wait_for_nics(1)
                assert nic.mac == lease.devices[3].mac_address
                for filesystem, tag, name in (
                    ("virtiofs", "theirs", "file"),
                    ("9p", "old", "ours"),
                ):
                    options = "trans=virtio,version=9p2000.L" if filesystem == "9p" else ""
                    mounted = vm.console.mount(filesystem, tag, options)
                    assert vm.console.read_file(f"{mounted}/{name}")
                    vm.console.unmount(mounted)
                vmplug.adopt_vm("sb", str(vm.qmp_path), setup=host.setup)
                released = vmplug.detach_owner("job", timeout_s=HOT_TIMEOUT_S, setup=host.setup)
                assert [one.outcome for one in released] == ["detached"] * 4


def test_a_disk_that_a_paused_vm_had_when_it_was_adopted_is_closed_with_its_device(
    host: Host,
) -> None:
    """QEMU 7.2 closes no file of a set while it is paused."""
    with vmplug.lease([host.disk("plain")], owner="job", setup=host.setup) as lease:
        words = lease.qemu_args("q35", memory=MEMORY)
        with running(host, "q35", words, lease, paused=True) as vm:
            (hold,) = vmplug.adopt_vm("sb", str(vm.qmp_path), setup=host.setup).attachments
            vm.oracle.execute("cont")
            vm.console.wait_for_disks(1)
            vmplug.detach_attachments([hold.id], timeout_s=HOT_TIMEOUT_S, setup=host.setup)
            assert not is_open(vm, host.image("plain"))


def test_words_fit_behind_a_command_that_has_ports_slots_and_shared_memory(host: Host) -> None:
    """Its legacy devices come first, and its objects stay as they are."""
    backend = "memory-backend-memfd,id=mem,size=256M,share=on"
    nvdimm = ["-object", "memory-backend-ram,id=own,size=2M", "-device", "nvdimm,memdev=own"]
    own = ["-object", backend, "-device", "pcie-root-port,id=rp0,chassis=1,slot=1", *nvdimm]
    requests = host.requests("q35")
    with vmplug.lease(requests, owner="job", setup=host.setup) as lease:
        said = ("q35,nvdimm=on,memory-backend=mem", f"{MEMORY},slots=1,maxmem=1G")
        words = lease.qemu_args(said[0], memory=said[1], shared_memory=True)
        with start_vm(
            host.directory,
            machine=said[0],
            memory=said[1],
            devices=scsi_controller(),
            extra=[*own, *words],
            pass_fds=lease.descriptors,
        ) as vm:
            lease.give_to(vm.pid)
            vm.console.load_modules("nfit", "nd_pmem")
            markers = {pmem.marker for pmem in vm.console.wait_for_pmems(2)}
            assert "memory" in markers
            assert len(vm.console.wait_for_disks(4)) == 4
            adopted = vmplug.adopt_vm("sb", str(vm.qmp_path), setup=host.setup)
            assert len(adopted.attachments) == len(requests)
            assert adopted.free_pci_places == 1


@pytest.mark.parametrize(
    ("machine", "memory", "names", "error", "words"),
    [
        ("virt", MEMORY, "plain", SpecError, "no words for this machine"),
        ("q35", "much", "plain", SpecError, "not a size"),
        ("q35,memory-backend=m", MEMORY, "work", CannotPlug, "is not shared"),
        ("microvm", MEMORY, "memory", CannotPlug, "does not support NVDIMMs"),
        ("q35", MEMORY, "null", CannotPlug, "character device"),
    ],
)
def test_what_the_machine_cannot_have_is_refused(
    host: Host, machine: str, memory: str, names: str, error: type[Exception], words: str
) -> None:
    null = DeviceInfo(container_path="/dev/null", dev_type=DevType.CHAR, devnum=DevNum(1, 3))
    asked: dict[str, Request] = {
        "plain": host.disk("plain"),
        "work": ShareInfo(tag="work", source=str(host.directory / "work")),
        "memory": host.disk("memory", block_driver="nvdimm"),
        "null": null,
    }
    with vmplug.lease([asked[names]], owner="job", setup=host.setup) as lease:
        before = lease.devices, lease.descriptors
        with pytest.raises(error, match=words):
            lease.qemu_args(machine, memory=memory)
        assert (lease.devices, lease.descriptors) == before
    assert host.rows() == 0
    assert daemons_below(host.directory) == []


@pytest.mark.parametrize("option", ["acpi", "ioapic2"])
def test_a_microvm_with_one_interrupt_controller_has_fewer_places(host: Host, option: str) -> None:
    """A device more than fit is refused before QEMU is started."""
    names = [f"disk{number}" for number in range(5)]
    for name in names:
        disk_image(host.image(name), 2, name)
    machine, disks = f"microvm,{option}=off", [host.disk(name) for name in names]
    with (
        vmplug.lease(disks, owner="job", setup=host.setup) as lease,
        pytest.raises(NoFreePort),
    ):
        lease.qemu_args(machine, memory=MEMORY)
    with vmplug.lease(disks[1:], owner="job", setup=host.setup) as lease:
        words = lease.qemu_args(machine, memory=MEMORY)
        with running(host, machine, words, lease, guest=False) as vm:
            adopted = vmplug.adopt_vm("sb", str(vm.qmp_path), setup=host.setup)
            assert len(adopted.attachments) == len(disks[1:])


def test_a_microvm_without_acpi_names_its_devices_to_the_kernel(host: Host) -> None:
    """Whether the kernel reads that is its own matter: Debian's does not."""
    with vmplug.lease([host.disk("plain")], owner="job", setup=host.setup) as lease:
        with pytest.raises(SpecError, match="its guest finds no device"):
            lease.qemu_args("microvm,acpi=off,auto-kernel-cmdline=off", memory=MEMORY)
        words = lease.qemu_args("microvm,acpi=off", memory=MEMORY)
        (transport,) = [json.loads(w)["bus"] for w in words if "virtio-blk-device" in w]
        base = 0xFEB00000 + 512 * int(transport.rpartition(".")[2])
        with running(host, "microvm,acpi=off", words, lease) as vm:
            told = vm.console.run("cat /proc/cmdline")
            assert f" virtio_mmio.device=512@{base:#x}:" in told
    assert host.rows() == 0


def test_words_that_cannot_be_made_leave_no_closed_files_to_pass(host: Host) -> None:
    """Another file may get the number of a closed one, and QEMU would inherit that."""
    requests = [host.disk("plain"), host.disk("memory", block_driver="nvdimm")]
    with vmplug.lease(requests, owner="job", setup=host.setup) as lease:
        before, kept = (lease.devices, lease.descriptors), host.image("kept")
        host.image("memory").rename(kept)
        disk_image(host.image("memory"), 2, "another")
        with pytest.raises(NoSuchDevice):
            lease.qemu_args("q35")
        assert (lease.devices, lease.descriptors) == before
        for descriptor in lease.descriptors:
            os.fstat(descriptor)
        kept.rename(host.image("memory"))
        lease.qemu_args("q35")
        assert len(lease.descriptors) == len(requests)
        with pytest.raises(CannotPlug):
            lease.qemu_args("microvm")
        assert lease.descriptors == ()
        lease.qemu_args("q35")
        assert len(lease.descriptors) == len(requests)
    assert host.rows() == 0


def test_a_lease_with_locks_has_no_words(host: Host) -> None:
    terms = LeaseTerms(lock=LeaseLock.FULL)
    with (
        vmplug.lease([host.disk("plain")], terms=terms, setup=host.setup) as lease,
        pytest.raises(SpecError, match="QEMU locks its disks itself"),
    ):
        lease.qemu_args("q35")
    assert host.rows() == 0


def test_a_lease_that_was_not_given_is_not_taken_over(host: Host) -> None:
    with vmplug.lease([host.disk("plain")], owner="job", setup=host.setup) as lease:
        words = lease.qemu_args("q35", memory=MEMORY)
        with start_vm(
            host.directory,
            memory=MEMORY,
            extra=words,
            pass_fds=lease.descriptors,
            guest=False,
            paused=True,
        ) as vm:
            with pytest.raises(StateError, match="was not given to it"):
                vmplug.adopt_vm("sb", str(vm.qmp_path), setup=host.setup)
            (status,) = vmplug.list_leases(setup=host.setup)
            assert (status.state, len(status.devices)) == ("made", 1)
            assert vmplug.list_vms(setup=host.setup) == []
            lease.give_to(vm.pid)
            with pytest.raises(StateError, match="has ended, or another process has it"):
                lease.qemu_args("q35", memory=MEMORY)
            vmplug.adopt_vm("sb", str(vm.qmp_path), setup=host.setup)
            assert vmplug.list_leases(setup=host.setup) == []
