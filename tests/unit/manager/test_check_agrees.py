"""What `check` answers is what `plan`, `attach` and `bind` do, for every code that there is.

Each row makes one finding on a host that is a tree, or in a VM in memory, and is tried twice: with
the fault, and without. A code that needs a live kernel, a process or a QEMU names its test.
"""

import fcntl
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import tests
from tests.support.fake_kernel import FakeKernel
from tests.support.pci_tree import PciTree
from tests.support.tree import MIB
from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError, DeviceError, InUse, PolicyError
from vmplug.host.finding import NEVER_ALLOWED, Code, Severity
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.hypervisor.fake.monitor import FakeHypervisor
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder
from vmplug.manager.examine import CheckedRequest
from vmplug.manager.manager import DeviceManager
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import Request, ShareInfo, VfioInfo
from vmplug.policy.rules import Policy

GPU, SOUND, VF = "0000:3b:00.0", "0000:3b:00.1", "0000:3b:10.0"
REMAPPING = "  0:  122  IR-IO-APIC   2-edge      timer\n"
IMAGE, COW, ODD = "/srv/a.img", "/srv/a.qcow2", "/srv/odd.img"
F_OFD_SETLK = 37


class World:
    """A host with a disk, images and a graphics card that VFIO has, and a VM in memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tree = PciTree(directory / "host")
        self.ports = 4
        self.policy: Policy | None = None
        self.before: list[Request] = []
        self.afterwards: Callable[[], object] = lambda: None
        self.files: list[int] = []
        self.tree.file("/proc/interrupts", REMAPPING)
        self.tree.file("/proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555555\n")
        self.tree.file(IMAGE, bytes(4 * MIB)).file(ODD, bytes(3 * MIB))
        self.tree.file(COW, qcow2()).file("/srv/work/file").file(
            "/usr/libexec/virtiofsd", "#!/bin/sh\n"
        )
        (self.tree.path / "usr/libexec/virtiofsd").chmod(0o755)

    def build(self, gpu: Mapping[str, object], disk: Mapping[str, object]) -> None:
        """The card and the disk, with what is wrong with them."""
        card = {"driver": "vfio-pci", "group": 26, "class_code": 0x030000, **gpu}
        self.tree.pci_function(GPU, **card)  # type: ignore[arg-type]
        sda = {"partitions": {"8:1": "sda1"}, **disk}
        self.tree.block_device("8:0", "sda", **sda)  # type: ignore[arg-type]

    def manager(self, journal: Journal) -> DeviceManager:
        return DeviceManager(
            vm="sb1",
            host=self.tree.root,
            hypervisor=FakeHypervisor(root_ports=self.ports),
            journal=journal,
            policy=self.policy,
        )


def qcow2(backing: bytes = b"") -> bytes:
    """A header of version 3, and after it the name of a backing file."""
    offset = 512 if backing else 0
    head = struct.pack(">4sIQIIQ", b"QFI\xfb", 3, offset, len(backing), 16, MIB)
    head += struct.pack(">IIQQIIQ", 0, 1, 1 << 16, 2 << 16, 1, 0, 0)  # L1 and refcount tables
    head += struct.pack(">QQQII", 0, 0, 0, 4, 104)
    return (head.ljust(512, b"\0") + backing).ljust(MIB, b"\0")


def disk(number: str = "8:0", *, ro: bool = False, **options: str) -> DeviceInfo:
    return DeviceInfo(
        container_path=f"/dev/disk{number}",
        dev_type=DevType.BLOCK,
        devnum=DevNum.parse(number),
        read_only=ro,
        driver_options={key.replace("_", "-"): value for key, value in options.items()},
    )


def image(path: str = IMAGE, *, ro: bool = False, **options: str) -> DeviceInfo:
    return DeviceInfo(
        container_path="/dev/image",
        dev_type=DevType.BLOCK,
        host_path=path,
        read_only=ro,
        driver_options={key.replace("_", "-"): value for key, value in options.items()},
    )


def share(tag: str = "work", source: str = "/srv/work", *, ro: bool = False) -> ShareInfo:
    return ShareInfo(tag=tag, source=source, read_only=ro)


CARD = VfioInfo(label="card", device=GPU)


def nothing(world: World) -> None:
    """No fault: it is in the request."""


@dataclass(frozen=True)
class Row:
    """One fault; `without` is the request that is fine, where the fault is in the request.

    `gpu` and `disk` are faults of what the host has anyway. `binds`: the function is with its own
    driver, the request is --managed, and `bind` refuses it too.
    """

    code: Code
    what: str
    asked: Sequence[Request]
    fault: Callable[[World], object] = nothing
    without: Sequence[Request] = ()
    warns: bool = False
    binds: bool = False
    gpu: Mapping[str, object] = field(default_factory=dict)
    disk: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.code} {self.what}"


def lock(world: World) -> None:
    """The byte by which QEMU says that it writes."""
    world.files.append(fd := os.open(world.tree.path / IMAGE[1:], os.O_RDWR))
    fcntl.fcntl(fd, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 201, 1, 0))


def has(*requests: Request) -> Callable[[World], object]:
    """What the VM has already."""
    return lambda world: world.before.extend(requests)


def take(path: str) -> Callable[[World], object]:
    return lambda world: (world.tree.path / path.lstrip("/")).unlink()


def replaced_image(world: World) -> None:
    """The VM has a file, and another one has its name now."""
    world.before.append(image())
    path = world.tree.path / IMAGE[1:]
    (path.parent / "new").write_bytes(bytes(4 * MIB))
    world.afterwards = lambda: os.replace(path.parent / "new", path)


def odd_size(world: World) -> None:
    world.tree.block_device("8:16", "sdb")
    (world.tree.path / "sys/block/sdb/size").write_text("x\n")


def no_size(world: World) -> None:
    world.tree.block_device("8:16", "sdb")
    (world.tree.path / "sys/block/sdb/size").unlink()


def no_policy(world: World) -> None:
    world.policy = Policy(name="/etc/vmplug/policy.toml", rules=())


def mounted_part(world: World) -> None:
    world.tree.pci_disk(GPU, "259:0", "nvme0n1", way="nvme/nvme0")
    world.tree.mount("/dev/nvme0n1", "/data", "259:0")


NIC = {"class_code": 0x020000}
SDB, DISK, PART = disk("8:16"), disk(), disk("8:1")


ROWS = [
    Row(Code.MOUNTED_ON_HOST, "disk", [DISK], lambda w: w.tree.mount("/dev/sda", "/m", "8:0")),
    Row(Code.MOUNTED_ON_HOST, "part", [DISK], lambda w: w.tree.mount("/dev/sda1", "/m", "8:1")),
    Row(Code.MOUNTED_ON_HOST, "vfio", [CARD], mounted_part, binds=True),
    Row(Code.HAS_HOLDERS, "disk", [DISK], disk={"holders": ("dm-0",)}),
    Row(
        Code.HAS_HOLDERS,
        "file",
        [image()],
        lambda w: w.tree.block_device(
            "7:0", "loop0", holders=("dm-0",), loop={"backing_file": f"{IMAGE}\n"}
        ),
    ),
    Row(Code.IS_SWAP, "disk", [DISK], lambda w: w.tree.swap("/dev/sda1")),
    Row(Code.IS_SWAP, "file", [image()], lambda w: w.tree.swap(IMAGE)),
    Row(Code.IMAGE_LOCKED, "file", [image()], lock),
    Row(Code.IN_USE_BY_VM, "part", [DISK, PART], without=[DISK]),
    Row(Code.IN_USE_BY_VM, "vfio", [CARD, disk("259:0")], mounted_part, without=[CARD]),
    Row(Code.READ_ONLY_DEVICE, "disk", [DISK], disk={"ro": True}),
    Row(Code.NO_MEDIUM, "disk", [DISK], disk={"removable": True, "size_bytes": 0}),
    Row(Code.SIZE_ZERO, "disk", [DISK], disk={"size_bytes": 0}),
    Row(Code.SIZE_ZERO, "file", [image("/srv/0")], lambda w: w.tree.file("/srv/0"), [image()]),
    Row(Code.NOT_IN_SYSFS, "disk", [SDB], no_size, without=[DISK]),
    Row(Code.WRONG_NODE, "disk", [DISK], lambda w: w.tree.file("/dev/sda")),
    Row(
        Code.HAS_BACKING_FILE,
        "file",
        [image(COW, format="qcow2")],
        lambda w: w.tree.file(COW, qcow2(b"/etc/shadow")),
    ),
    Row(Code.FORMAT_NOT_STATED, "file", [image(COW)], without=[image(COW, format="raw")]),
    Row(Code.NOT_THAT_FORMAT, "file", [image(format="qcow2")], without=[image()]),
    Row(Code.NOT_THAT_FORMAT, "disk", [disk(format="qcow2")], without=[DISK]),
    Row(Code.NO_PFN_SIGNATURE, "file", [image(block_driver="nvdimm")], warns=True),
    Row(Code.NVDIMM_SIZE, "file", [image(ODD, block_driver="nvdimm")], without=[image(ODD)]),
    Row(Code.NO_BACKEND, "share", [share()], take("/usr/libexec/virtiofsd")),
    Row(
        Code.CANNOT_BE_READ_ONLY,
        "share",
        [share(source="/run/fs.sock", ro=True)],
        lambda w: w.tree.node("/run/fs.sock", "s"),
        [share()],
    ),
    Row(Code.NO_IOMMU, "vfio", [CARD], gpu={"group": None}),
    Row(
        Code.NO_INTERRUPT_REMAPPING,
        "vfio",
        [CARD],
        lambda w: w.tree.file("/proc/interrupts", REMAPPING.replace("IR-", "")),
    ),
    Row(
        Code.GROUP_NOT_VIABLE,
        "vfio",
        [CARD],
        lambda w: w.tree.pci_function(SOUND, driver="snd_hda_intel", group=26),
    ),
    Row(Code.NOT_BOUND, "vfio", [CARD], gpu={"driver": "nouveau"}),
    Row(
        Code.NETWORK_IN_USE,
        "vfio",
        [CARD],
        lambda w: w.tree.network(GPU, "eth0").route("eth0"),
        binds=True,
    ),
    Row(Code.BOOT_CONSOLE, "vfio", [CARD], gpu={"boot_vga": "1\n"}, binds=True),
    Row(Code.HAS_VIRTUAL_FUNCTIONS, "vfio", [CARD], lambda w: w.tree.sriov(GPU, VF), binds=True),
    Row(
        Code.OPEN_BY_PROCESS,
        "vfio",
        [CARD],
        lambda w: w.tree.process(42, "qemu", "/dev/vfio/26"),
    ),
    Row(Code.OPEN_BY_PROCESS, "disk", [DISK], lambda w: w.tree.process(42, "mysqld", "/dev/sda")),
    Row(Code.OPEN_BY_PROCESS, "file", [image()], lambda w: w.tree.process(42, "dd", IMAGE)),
    Row(Code.NO_RESET, "vfio", [CARD], gpu={"reset_methods": ()}, warns=True),
    Row(Code.NO_PORT, "vm", [disk(block_driver="virtio-blk")], lambda w: setattr(w, "ports", 0)),
    Row(Code.CANNOT_PLUG, "vm", [disk(block_driver="virtio-mmio")], without=[DISK]),
    Row(Code.PLUGGED_OTHERWISE, "reader", [disk(ro=True)], has(DISK), [DISK]),
    Row(Code.PLUGGED_OTHERWISE, "writer", [DISK], has(disk(ro=True)), [disk(ro=True)]),
    Row(Code.PLUGGED_OTHERWISE, "options", [disk(discard="unmap")], has(DISK), [DISK]),
    Row(Code.PLUGGED_OTHERWISE, "share", [share(ro=True)], has(share()), [share()]),
    Row(Code.REPLACED, "file", [image()], replaced_image),
    Row(Code.TAG_TAKEN, "share", [share("work", "/srv")], has(share()), [share()]),
    Row(Code.NO_SUCH_DEVICE, "disk", [disk("8:99")], without=[DISK]),
    Row(Code.NO_SUCH_DEVICE, "file", [image("/srv/none")], without=[image()]),
    Row(Code.NO_SUCH_DEVICE, "vfio", [VfioInfo(label="x", device="/dev/vfio/99")], without=[CARD]),
    Row(Code.NO_SUCH_DEVICE, "share", [share("x", "/srv/none")], without=[share()]),
    Row(Code.UNREADABLE, "disk", [SDB], odd_size, without=[DISK]),
    Row(Code.NOT_ALLOWED, "disk", [DISK], no_policy),
]

_LIVE = "unit/host/check/test_device_live.py::"
_LIMITS = "unit/drivers/test_disk_limits.py::"
_VHOST_USER = "qemu/test_vhost_user.py::"
_STATE = "unit/host/check/test_function_state.py::"
ELSEWHERE = {
    Code.MEMBER_IN_USE: "unit/host/check/test_group_members.py::"
    "test_managed_does_not_hide_what_it_cannot_mend",
    Code.MACHINE_PART: "unit/host/check/test_machine_part.py::"
    "test_the_chipsets_slot_is_named_whole_and_stays_unless_it_is_allowed",
    Code.NO_NODE: "unit/host/check/test_vfio_node.py::"
    "test_a_node_that_is_missing_or_renamed_is_found_and_the_remedy_makes_it",
    Code.NO_RESPONSE: f"{_STATE}test_bind_leaves_a_card_that_does_not_answer_to_its_driver",
    Code.BAR_UNASSIGNED: f"{_STATE}test_a_bar_without_an_address_is_found_and_can_be_allowed",
    Code.VFIO_REFUSES: f"{_STATE}"
    "test_a_bridge_by_its_header_is_refused_before_it_leaves_its_driver",
    Code.RESERVED_MEMORY: f"{_STATE}test_memory_that_the_firmware_keeps_holds_the_group",
    Code.PHYSFN_WITH_VFIO: "unit/manager/binding/test_vf_tokens.py::"
    "test_a_vm_that_takes_no_token_gets_no_virtual_function",
    Code.NOT_RANDOM: "qemu/test_rng.py::test_a_device_that_gives_no_random_numbers_is_refused",
    Code.NO_ADDRESS_SPACE: "unit/drivers/test_vfio.py::"
    "test_windows_that_exceed_the_guests_addresses_are_found",
    Code.OPEN_EXCLUSIVELY: f"{_LIVE}test_a_device_opened_exclusively_by_anybody_is_found",
    Code.NOT_A_DISK: f"{_LIMITS}test_what_a_guests_disk_cannot_carry_is_a_finding",
    Code.ZONED: f"{_LIMITS}test_what_a_guests_disk_cannot_carry_is_a_finding",
    Code.HAS_INTEGRITY: f"{_LIMITS}test_what_a_guests_disk_cannot_carry_is_a_finding",
    Code.SECTOR_SIZE: f"{_LIMITS}test_what_a_guests_disk_cannot_carry_is_a_finding",
    Code.UNUSABLE_IMAGE: "qemu/test_disks.py::"
    "test_an_image_that_qemu_cannot_use_is_refused_by_what_is_wrong",
    Code.ODD_SIZE: "unit/drivers/test_block.py::test_a_disk_is_checked_against_its_options",
    Code.NO_AIO_CONTEXT: "unit/drivers/test_block.py::test_a_disk_is_checked_against_its_options",
    Code.SPARSE_NVDIMM: "unit/drivers/test_pmem.py::test_a_sparse_file_may_end_the_vm",
    Code.NO_DIRECT_IO: "unit/drivers/test_block.py::test_a_disk_is_checked_against_its_options",
    Code.BACKEND_BUSY: f"{_VHOST_USER}test_a_backend_of_another_qemu_is_told",
    Code.BACKEND_SILENT: f"{_VHOST_USER}test_a_silent_backend_is_told",
    Code.WRONG_BACKEND: f"{_VHOST_USER}test_a_backend_of_another_kind_is_told",
    Code.TOO_MANY_QUEUES: f"{_VHOST_USER}test_more_queues_than_the_backend_serves_are_refused",
    Code.NO_IOMMUFD: "unit/host/check/test_vfio_group.py::"
    "test_a_qemu_without_iommufd_is_told_of_where_a_device_was_named_by_its_node",
    Code.MEMLOCK_LIMIT: "unit/host/check/test_vfio_group.py::"
    "test_qemu_must_be_allowed_to_lock_the_guests_memory",
    Code.UNKNOWN_USE: "unit/host/check/test_vfio_group.py::"
    "test_a_process_whose_files_cannot_be_read_may_have_the_group",
    Code.SPLIT_GROUP: "unit/drivers/test_vfio.py::"
    "test_a_guest_iommu_wants_a_group_behind_one_bridge",
}
"""Codes that need a live kernel, a process at the other end, or a QEMU: where they are tested."""


def test_every_code_has_a_row_or_a_test() -> None:
    in_rows = {row.code for row in ROWS}
    assert in_rows | ELSEWHERE.keys() == set(Code)
    assert not in_rows & ELSEWHERE.keys()
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        text = (Path(tests.__file__).parent / file).read_text()
        assert f"def {name}(" in text, place


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    for descriptor in made.files:
        os.close(descriptor)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(tmp_path / "state") as store:
        yield store


def refusals(checked: Sequence[CheckedRequest]) -> dict[Code, str]:
    return {
        finding.code: finding.message
        for request in checked
        for finding in request.findings
        if finding.severity is Severity.ERROR
    }


def attempt(
    act: Callable[..., object], asked: Sequence[Request], *, managed: bool
) -> DeviceError | None:
    try:
        act(asked, owner="c1", managed=managed)
    except DeviceError as error:
        return error
    return None


def prepared(row: Row, world: World, journal: Journal, *, with_fault: bool) -> DeviceManager:
    own = {"driver": "nouveau"} if row.binds else {}
    world.tree.pci_driver("vfio-pci")
    world.build({**own, **row.gpu} if with_fault else own, row.disk if with_fault else {})
    if with_fault:
        row.fault(world)
    manager = world.manager(journal)
    if world.before:
        manager.attach_all(world.before, owner="c0")
    world.afterwards()
    return manager


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_check_refuses_plan_and_attach_refuse(
    row: Row, world: World, journal: Journal
) -> None:
    manager = prepared(row, world, journal, with_fault=True)
    checked = manager.check_places(row.asked, owner="c1", managed=row.binds)
    found = refusals(checked)
    if row.warns:
        assert row.code in {f.code for request in checked for f in request.findings}
        assert not found
        assert attempt(manager.plan, row.asked, managed=row.binds) is None
        return
    assert row.code in found
    held = manager.attachments()
    for act in (manager.plan, manager.attach_all):
        error = attempt(act, row.asked, managed=row.binds)
        assert error
        assert error.hint or isinstance(error, AttributeReadError)
        assert found[row.code] in error.message or isinstance(error, PolicyError)
        if isinstance(error, InUse):
            assert set(error.codes) == found.keys()
    assert manager.attachments() == held


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_without_the_fault_nothing_is_refused(row: Row, world: World, journal: Journal) -> None:
    manager = prepared(row, world, journal, with_fault=False)
    asked = row.without or row.asked
    assert refusals(manager.check_places(asked, owner="c1", managed=row.binds)) == {}
    assert attempt(manager.plan, asked, managed=row.binds) is None
    if not any(_opens_files(request) for request in asked):
        assert attempt(manager.attach_all, asked, managed=row.binds) is None


def _opens_files(request: Request) -> bool:
    """Whether a plug opens files of this machine, which the tree's are not."""
    return isinstance(request, VfioInfo) or "nvdimm" in request.driver_options.values()


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not row.warns and row.code not in NEVER_ALLOWED], ids=str
)
def test_what_is_allowed_to_check_is_allowed_to_plan(
    row: Row, world: World, journal: Journal
) -> None:
    manager = prepared(row, world, journal, with_fault=True)
    checked = manager.check_places(row.asked, owner="c1", allow=[row.code], managed=row.binds)
    refused = refusals(checked)
    assert row.code not in refused
    error: DeviceError | None = None
    try:
        manager.plan(row.asked, owner="c1", allow=[row.code], managed=row.binds)
    except DeviceError as raised:
        error = raised
    assert (error is not None) is bool(refused), error


@pytest.mark.parametrize("row", [row for row in ROWS if row.binds], ids=str)
@pytest.mark.parametrize("with_fault", [True, False], ids=["with", "without"])
def test_what_check_refuses_of_a_managed_function_bind_refuses(
    row: Row, world: World, journal: Journal, *, with_fault: bool
) -> None:
    manager = prepared(row, world, journal, with_fault=with_fault)
    found = refusals(manager.check_places(row.asked, owner="c1", managed=True))
    kernel = FakeKernel(world.tree, takes={"nouveau": [GPU]})
    group = find_vfio_device(GPU, kernel)
    if not with_fault:
        assert not found
        assert Binder(journal, kernel).bind(group)
        return
    assert found.keys() == {row.code}
    with pytest.raises(InUse) as caught:
        Binder(journal, kernel).bind(group)
    assert set(caught.value.codes) == {row.code}
    assert not kernel.writes
