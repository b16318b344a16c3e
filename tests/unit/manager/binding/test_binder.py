"""Binding on a kernel that is a tree: the contract, every failure, and death at every step."""

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from logging.handlers import BufferingHandler
from pathlib import Path
from threading import Timer

import pytest
from msgspec import structs
from msgspec.structs import replace

from tests.contract.binding import BindingContract, Side, held_by_vm
from tests.support.fake_kernel import DIED, FakeKernel, Fault, fake_modprobe
from tests.support.pci_tree import PciTree
from vmplug.address import Bdf
from vmplug.errors import BindError, DeviceError, InUse, NoSuchDevice, StoreError
from vmplug.host import program
from vmplug.host.finding import Code
from vmplug.host.kind import FoundBy
from vmplug.host.pci.bind import FormerBinding, bind_function, read_former, restore
from vmplug.host.pci.function import read_function
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.vfio import find_vfio_device, find_vfio_group
from vmplug.host.pci.vfio_driver import choose_driver, load_driver
from vmplug.journal.bindings import Binding, BindingState
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder, BindOutcome

DISK, NET, SOUND, BRIDGE = "0000:01:00.0", "0000:02:00.0", "0000:02:00.1", "0000:00:1c.0"
PHYSFN, VIRTFN = "0000:03:00.0", "0000:03:10.0"
BOOT_ID = "11111111-2222-3333-4444-555555555555\n"
IN_TIME_S, AT_ONCE_S = 30.0, 0.2


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    tree = PciTree(tmp_path / "host")
    tree.pci_function(BRIDGE, class_code=0x060400, driver="pcieport", group=1)
    tree.pci_function(DISK, driver="nvme", group=2)
    tree.pci_function(NET, class_code=0x020000, driver="e1000e", group=3, below=BRIDGE)
    tree.pci_function(SOUND, class_code=0x040300, driver="snd_hda_intel", group=3, below=BRIDGE)
    tree.pci_function(PHYSFN, class_code=0x020000, driver="igb", group=4)
    tree.sriov(PHYSFN, VIRTFN, driver="igbvf", group=5, reset="")
    return tree.pci_driver("vfio-pci").file("/proc/sys/kernel/random/boot_id", BOOT_ID)


@pytest.fixture
def kernel(tree: PciTree) -> FakeKernel:
    return boot(tree)


def boot(tree: PciTree) -> FakeKernel:
    """A kernel without faults."""
    takes = {"nvme": [DISK], "e1000e": [NET], "snd_hda_intel": [SOUND], "igb": [PHYSFN]}
    return FakeKernel(tree, takes={**takes, "igbvf": [VIRTFN]})


@pytest.fixture
def binder(journal: Journal, kernel: FakeKernel) -> Binder:
    return Binder(journal, kernel, timeout_s=IN_TIME_S)


def group_of(kernel: FakeKernel, bdf: str) -> VfioGroup:
    return find_vfio_device(bdf, kernel)


class TestOnTheFakeKernel(BindingContract):
    @pytest.fixture
    def side(self, kernel: FakeKernel) -> Side:
        return Side(host=kernel, single=DISK, multi=(NET, SOUND))


# one function


def test_a_bind_is_an_override_an_unbind_and_a_probe(kernel: FakeKernel) -> None:
    bind_function(Bdf.parse(DISK), "vfio-pci", kernel)
    assert [(write.step, write.text) for write in kernel.writes] == [
        ("driver_override", "vfio-pci"),
        ("unbind", DISK),
        ("drivers_probe", DISK),
    ]
    assert kernel.driver_of(DISK) == "vfio-pci"


def test_an_unchanged_attribute_is_not_written(kernel: FakeKernel) -> None:
    restore(read_former(Bdf.parse(DISK), kernel), kernel)
    assert kernel.writes == []


def test_only_the_override_is_put_back_when_the_driver_is_right(kernel: FakeKernel) -> None:
    kernel.write_attribute(f"/sys/bus/pci/devices/{DISK}/driver_override", "nvme")
    restore(FormerBinding(bdf=Bdf.parse(DISK), driver="nvme", driver_override=None), kernel)
    assert [write.step for write in kernel.writes] == ["driver_override"] * 2
    assert kernel.override_of(DISK) is None


def test_no_driver_is_offered_a_function_that_had_none(kernel: FakeKernel) -> None:
    bind_function(Bdf.parse(DISK), "vfio-pci", kernel)
    kernel.writes.clear()
    restore(FormerBinding(bdf=Bdf.parse(DISK), driver=None, driver_override=None), kernel)
    assert [write.step for write in kernel.writes] == ["unbind", "driver_override"]
    assert kernel.driver_of(DISK) is None


@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("driver_override", errno.EPERM),
        ("driver_override", errno.EROFS),
        ("unbind", errno.EBUSY),
        ("unbind", errno.ENODEV),
        ("drivers_probe", errno.ENODEV),
        ("drivers_probe", errno.EINVAL),
    ],
)
def test_a_step_that_the_kernel_refuses_is_named_with_a_remedy(
    kernel: FakeKernel, step: str, number: int
) -> None:
    kernel.fail(step, number)
    with pytest.raises(BindError) as caught:
        bind_function(Bdf.parse(DISK), "vfio-pci", kernel)
    error = caught.value
    assert (error.device, error.step, error.errno) == (DISK, step, number)
    assert os.strerror(number) in error.message
    assert error.hint


def test_a_probe_that_does_nothing_is_noticed(kernel: FakeKernel) -> None:
    kernel.refuse("vfio-pci", DISK)
    with pytest.raises(BindError, match=f"vfio-pci did not take {DISK}") as caught:
        bind_function(Bdf.parse(DISK), "vfio-pci", kernel)
    assert (caught.value.step, caught.value.errno) == ("drivers_probe", None)
    assert caught.value.hint
    assert "denylist" in caught.value.hint


def test_a_former_driver_that_is_no_longer_loaded_is_told(
    kernel: FakeKernel, tree: PciTree
) -> None:
    bind_function(Bdf.parse(DISK), "vfio-pci", kernel)
    (tree.path / "sys/bus/pci/drivers/nvme").rmdir()
    with pytest.raises(BindError, match="nvme did not take") as caught:
        restore(FormerBinding(bdf=Bdf.parse(DISK), driver="nvme", driver_override=None), kernel)
    assert caught.value.hint
    assert "modprobe nvme" in caught.value.hint


def test_a_function_that_is_not_there_is_no_such_device(kernel: FakeKernel) -> None:
    with pytest.raises(NoSuchDevice):
        read_former(Bdf.parse("0000:7f:00.0"), kernel)


def test_a_virtual_function_is_reset_on_its_way_back(kernel: FakeKernel) -> None:
    bind_function(Bdf.parse(VIRTFN), "vfio-pci", kernel)
    kernel.writes.clear()
    restore(FormerBinding(bdf=Bdf.parse(VIRTFN), driver="igbvf", driver_override=None), kernel)
    steps = [write.step for write in kernel.writes]
    assert steps == ["driver_override", "unbind", "reset", "drivers_probe", "driver_override"]
    assert kernel.driver_of(VIRTFN) == "igbvf"


def test_a_virtual_function_that_cannot_be_reset_is_given_back_all_the_same(
    kernel: FakeKernel, logged: BufferingHandler
) -> None:
    bind_function(Bdf.parse(VIRTFN), "vfio-pci", kernel)
    kernel.fail("reset", errno.ENOTTY)
    restore(FormerBinding(bdf=Bdf.parse(VIRTFN), driver="igbvf", driver_override=None), kernel)
    assert kernel.driver_of(VIRTFN) == "igbvf"
    (record,) = logged.buffer
    assert "ignored: " in record.getMessage()


# which driver

ALIASES = """\
# Aliases extracted from modules themselves.
alias pci:v00008086d00000953sv*sd*bc*sc*i* nvme
alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias vfio_pci:v00008086d*sv*sd*bc*sc*i* loose_vfio_pci
alias vfio_pci:v00008086d00000953sv*sd*bc*sc*i* exact_vfio_pci
alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci
"""


def with_aliases(tree: PciTree, text: str) -> PciTree:
    tree.file("/proc/sys/kernel/osrelease", "6.1.0-test\n")
    return tree.file("/lib/modules/6.1.0-test/modules.alias", text)


@pytest.mark.parametrize(
    ("aliases", "driver"),
    [
        (ALIASES, "exact_vfio_pci"),
        (ALIASES.replace("00000953sv", "00000954sv"), "loose_vfio_pci"),
        (ALIASES.replace("v00008086", "v00008087"), "vfio-pci"),
        ("", "vfio-pci"),
        ("alias vfio_pci:v00008086d00000953sv*sd*bc*sc*i*\n", "vfio-pci"),
        ("alias vfio_pci\nalias vfio_pci: x y\n\0\n", "vfio-pci"),
    ],
)
def test_the_driver_is_the_most_specific_one(tree: PciTree, aliases: str, driver: str) -> None:
    with_aliases(tree, aliases)
    assert choose_driver(read_function(Bdf.parse(DISK), tree.root), tree.root) == driver


def test_without_modules_the_driver_is_vfio_pci(tree: PciTree) -> None:
    function = read_function(Bdf.parse(DISK), tree.root)
    assert choose_driver(function, tree.root) == "vfio-pci"
    nameless = structs.replace(function, modalias=None)
    with_aliases(tree, ALIASES)
    assert choose_driver(nameless, tree.root) == "vfio-pci"


@pytest.mark.parametrize("name", ["vfio-pci", "vfio_pci"])
def test_a_loaded_driver_is_found_by_either_spelling(tree: PciTree, name: str) -> None:
    assert load_driver(name, tree.root, device=DISK) == "vfio-pci"


@pytest.mark.parametrize("driver", ["exact-vfio-pci", "exact_vfio_pci"])
def test_a_variant_driver_is_loaded_and_used(
    tree: PciTree,
    kernel: FakeKernel,
    binder: Binder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
) -> None:
    with_aliases(tree, ALIASES)
    programs = fake_modprobe(tmp_path / "bin", tree, exact_vfio_pci=driver)
    monkeypatch.setattr(program, "PROGRAM_PATH", f"{programs}:{program.PROGRAM_PATH}")
    before = kernel.picture()
    binder.bind(group_of(kernel, DISK))
    assert kernel.driver_of(DISK) == driver
    binder.unbind(group_of(kernel, DISK))
    assert kernel.picture() == before


def test_a_driver_that_cannot_be_loaded_changes_nothing(
    tree: PciTree, kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    """With the modprobe of this machine, if it has one: it finds no modules in the tree."""
    (tree.path / "sys/bus/pci/drivers/vfio-pci").rmdir()
    with pytest.raises(BindError) as caught:
        binder.bind(group_of(kernel, NET))
    assert caught.value.step == "modprobe"
    assert caught.value.hint
    assert "CONFIG_VFIO_PCI" in caught.value.hint
    assert kernel.writes == []
    assert journal.bindings.all() == []


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        ("igb", "igb is not a known VFIO driver"),
        ("../igb", "not a known"),
        ("mlx5-vfio-pci", f"mlx5-vfio-pci is for other devices than {DISK}"),
    ],
)
def test_a_driver_that_was_not_made_for_it_is_not_tried(
    tree: PciTree, kernel: FakeKernel, binder: Binder, journal: Journal, driver: str, says: str
) -> None:
    """The kernel would let it try, and may not survive that."""
    with_aliases(tree, ALIASES).pci_driver("mlx5_vfio_pci")
    with pytest.raises(BindError, match=says) as caught:
        binder.bind(group_of(kernel, DISK), driver=driver)
    assert caught.value.hint == "without --driver vmplug chooses exact_vfio_pci"
    assert kernel.writes == []
    assert journal.bindings.all() == []


def test_a_driver_that_is_not_a_vfio_driver_is_not_kept(
    tree: PciTree, kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    with_aliases(tree, "alias vfio_pci:v*d*sv*sd*bc*sc*i* odd\n").pci_driver("odd")
    before = kernel.picture()
    with pytest.raises(BindError, match="not a VFIO driver"):
        binder.bind(group_of(kernel, DISK))
    assert kernel.picture() == before
    assert journal.bindings.all() == []


def test_another_driver_of_vfio_can_be_named_later(
    tree: PciTree, kernel: FakeKernel, binder: Binder
) -> None:
    tree.pci_driver("mlx5_vfio_pci")
    before = kernel.picture()
    binder.bind(group_of(kernel, DISK))
    (bound,) = binder.bind(group_of(kernel, DISK), driver="mlx5-vfio-pci")
    assert (kernel.driver_of(DISK), bound.former.driver) == ("mlx5_vfio_pci", "nvme")
    binder.unbind(group_of(kernel, DISK))
    assert kernel.picture() == before


def test_a_second_driver_that_fails_leaves_the_first(
    tree: PciTree, kernel: FakeKernel, binder: Binder
) -> None:
    tree.pci_driver("mlx5_vfio_pci")
    bound = binder.bind(group_of(kernel, DISK))
    between = kernel.picture()
    kernel.refuse("mlx5_vfio_pci", DISK)
    with pytest.raises(BindError):
        binder.bind(group_of(kernel, DISK), driver="mlx5_vfio_pci")
    assert kernel.picture() == between
    assert binder.bindings() == bound


# what speaks against it


def refused(binder: Binder, group: VfioGroup, *codes: Code, allow: tuple[Code, ...] = ()) -> str:
    with pytest.raises(InUse) as caught:
        binder.bind(group, allow=allow)
    assert caught.value.codes == codes
    assert caught.value.hint
    return caught.value.hint


def test_a_disk_that_is_mounted_is_not_bound_unless_that_is_allowed(
    tree: PciTree, kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    tree.pci_disk(DISK, "259:0", "nvme0n1").mount("/dev/nvme0n1", "/data", "259:0")
    hint = refused(binder, group_of(kernel, DISK), Code.MOUNTED_ON_HOST)
    assert "umount /data" in hint
    assert "--allow mounted-on-host" in hint
    assert (kernel.writes, journal.bindings.all()) == ([], [])
    binder.bind(group_of(kernel, DISK), allow=[Code.MOUNTED_ON_HOST])
    assert kernel.driver_of(DISK) == "vfio-pci"


def test_every_reason_is_told_at_once(tree: PciTree, kernel: FakeKernel, binder: Binder) -> None:
    tree.network(NET, "eth0").route("eth0")
    tree.file("/proc/interrupts", "1: IO-APIC\n")
    hint = refused(binder, group_of(kernel, NET), Code.NO_INTERRUPT_REMAPPING, Code.NETWORK_IN_USE)
    assert "--allow" not in hint
    allow = (Code.NETWORK_IN_USE,)
    refused(binder, group_of(kernel, NET), Code.NO_INTERRUPT_REMAPPING, allow=allow)
    assert kernel.writes == []


def test_a_function_with_virtual_ones_is_not_bound(kernel: FakeKernel, binder: Binder) -> None:
    refused(binder, group_of(kernel, PHYSFN), Code.HAS_VIRTUAL_FUNCTIONS)
    assert kernel.writes == []


def test_a_group_is_bound_for_a_device_that_was_examined_without_asking_again(
    tree: PciTree, kernel: FakeKernel, binder: Binder
) -> None:
    tree.network(NET, "eth0").route("eth0")
    assert len(binder.bind(group_of(kernel, NET), device_id="d1")) == 2


def test_a_function_in_no_group_is_not_bound(tree: PciTree, binder: Binder) -> None:
    tree.pci_function("0000:09:00.0", driver="nvme")
    refused(binder, find_vfio_device("0000:09:00.0", tree.root), Code.NO_IOMMU)


def test_a_bridge_stays_with_the_host(tree: PciTree, kernel: FakeKernel, binder: Binder) -> None:
    tree.pci_function("0000:00:1d.0", class_code=0x060400, driver="pcieport")
    for bridge in (BRIDGE, "0000:00:1d.0"):
        with pytest.raises(BindError, match="bridge"):
            binder.bind(group_of(kernel, bridge))
    assert kernel.writes == []


def test_a_node_without_a_group_is_no_such_device(kernel: FakeKernel, binder: Binder) -> None:
    group = find_vfio_group("/dev/vfio/99", kernel, devnum=None, found_by=FoundBy.FILE)
    with pytest.raises(NoSuchDevice):
        binder.bind(group)
    with pytest.raises(NoSuchDevice):
        binder.unbind(group)


def test_a_mediated_device_needs_no_binding(
    tree: PciTree, kernel: FakeKernel, binder: Binder
) -> None:
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    tree.mdev_type(DISK, "i915-1").mdev(uuid, DISK, "i915-1", group=9)
    assert binder.bind(group_of(kernel, uuid), device_id="d1") == []
    assert binder.bind(group_of(kernel, uuid)) == []
    assert kernel.writes == []


@pytest.mark.parametrize("identity", [f"vfio:{NET}", f"vfio:{SOUND}"])
def test_what_a_vm_has_is_not_given_back(
    kernel: FakeKernel, binder: Binder, journal: Journal, identity: str
) -> None:
    bound = binder.bind(group_of(kernel, NET))
    before = kernel.picture()
    held_by_vm(journal, identity)
    with pytest.raises(InUse) as caught:
        binder.unbind(group_of(kernel, SOUND))
    assert caught.value.codes == (Code.IN_USE_BY_VM,)
    assert kernel.picture() == before
    assert binder.bindings() == bound


def test_a_partition_that_a_vm_has_keeps_its_controller(
    tree: PciTree, kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    tree.pci_disk(DISK, "259:0", "nvme0n1", partitions={"259:1": "p1", "259:2": "p2"})
    held_by_vm(journal, "block:259:2")
    with pytest.raises(InUse) as caught:
        binder.bind(group_of(kernel, DISK))
    assert caught.value.codes == (Code.IN_USE_BY_VM,)
    assert "block device 259:2 is already handed to VM 'sb1'" in caught.value.message
    assert kernel.writes == []
    journal.forget_vm("sb1")
    assert binder.bind(group_of(kernel, DISK))


@pytest.mark.parametrize("identity", ["block:7:0", "block:259:8", "block:8:0", "block:8:1"])
def test_whoever_has_bytes_of_a_disk_by_another_name_keeps_its_controller(
    tree: PciTree, kernel: FakeKernel, binder: Binder, journal: Journal, identity: str
) -> None:
    """A loop device on a partition, its own partition, and another path to the LUN."""
    tree.pci_disk(DISK, "259:0", "nvme0n1", partitions={"259:1": "nvme0n1p1"})
    files = {"backing_file": "/dev/nvme0n1p1\n"}
    tree.block_device("7:0", "loop0", partitions={"259:8": "loop0p1"}, loop=files)
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"})
    for disk in ("nvme0n1", "sda"):
        tree.file(f"/sys/class/block/{disk}/wwid", "naa.600\n")
    held_by_vm(journal, identity)
    with pytest.raises(InUse, match="is already handed to VM 'sb1'") as caught:
        binder.bind(group_of(kernel, DISK))
    assert caught.value.codes == (Code.IN_USE_BY_VM,)
    assert kernel.writes == []
    journal.forget_vm("sb1")
    assert binder.bind(group_of(kernel, DISK))


def test_whoever_has_a_loop_device_on_a_disk_open_keeps_its_controller(
    tree: PciTree, kernel: FakeKernel, binder: Binder
) -> None:
    tree.pci_disk(DISK, "259:0", "nvme0n1")
    tree.block_device("7:0", "loop0", loop={"backing_file": "/dev/nvme0n1\n"})
    tree.process(77, "mysqld", "/dev/loop0")
    with pytest.raises(InUse, match=r"/dev/loop0 is open for writing in process 77") as caught:
        binder.bind(group_of(kernel, DISK))
    assert caught.value.codes == (Code.OPEN_BY_PROCESS,)
    assert kernel.writes == []
    (tree.path / "proc/77/fd/3").unlink()  # the remedy
    assert binder.bind(group_of(kernel, DISK))


UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@pytest.fixture
def parent(tree: PciTree) -> PciTree:
    """A disk controller with a mediated device in a group of its own."""
    return tree.mdev_type(DISK, "i915-1").mdev(UUID, DISK, "i915-1", group=9)


def test_a_mediated_device_that_a_vm_has_keeps_its_parent(
    parent: PciTree, kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    held_by_vm(journal, f"vfio:{UUID}")
    with pytest.raises(InUse, match=f"{UUID} is already handed to VM 'sb1'") as caught:
        binder.bind(group_of(kernel, DISK))
    assert caught.value.codes == (Code.IN_USE_BY_VM,)
    assert kernel.writes == []
    journal.forget_vm("sb1")
    assert binder.bind(group_of(kernel, DISK))
    assert parent.root.list_dir("/sys/bus/mdev/devices") == [UUID]  # the tree has no driver


def test_a_mediated_device_that_a_process_has_open_keeps_its_parent(
    parent: PciTree, kernel: FakeKernel, binder: Binder
) -> None:
    parent.process(77, "qemu", "/dev/vfio/9")
    with pytest.raises(InUse, match="is open in process 77") as caught:
        binder.bind(group_of(kernel, DISK))
    assert caught.value.codes == (Code.OPEN_BY_PROCESS,)
    assert f"/dev/vfio/9, a node of {UUID}, a mediated device of {DISK}," in caught.value.message
    assert kernel.writes == []
    (parent.path / "proc/77/fd/3").unlink()  # the remedy
    assert binder.bind(group_of(kernel, DISK))


def test_a_mediated_device_keeps_a_parent_that_vmplug_bound(
    tree: PciTree, kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    """Drivers of VFIO may make mediated devices too."""
    bound = binder.bind(group_of(kernel, DISK))
    tree.mdev_type(DISK, "i915-1").mdev(UUID, DISK, "i915-1", group=9)
    held_by_vm(journal, f"vfio:{UUID}")
    with pytest.raises(InUse, match=f"{UUID} is already handed to VM 'sb1'"):
        binder.unbind(group_of(kernel, DISK))
    assert binder.bindings() == bound
    journal.forget_vm("sb1")
    assert binder.unbind(group_of(kernel, DISK))


def test_what_a_process_uses_through_its_driver_is_not_bound(
    tree: PciTree, kernel: FakeKernel, binder: Binder
) -> None:
    tree.class_device(f"{SOUND}/sound/card0/pcmC0D0p", "char", "116:2", "snd/pcmC0D0p")
    tree.process(77, "pipewire", "/dev/snd/pcmC0D0p")
    with pytest.raises(InUse, match=r"/dev/snd/pcmC0D0p.* is open in process 77") as caught:
        binder.bind(group_of(kernel, NET))
    assert caught.value.codes == (Code.OPEN_BY_PROCESS,)
    assert kernel.writes == []
    (tree.path / "proc/77/fd/3").unlink()  # the remedy: it has let go
    assert binder.bind(group_of(kernel, NET))


@pytest.mark.parametrize("node", ["/dev/vfio/3", "/dev/vfio/devices/vfio1"])
def test_what_a_process_has_open_is_not_given_back(
    tree: PciTree, kernel: FakeKernel, binder: Binder, node: str
) -> None:
    bound = binder.bind(group_of(kernel, NET))
    before = kernel.picture()
    tree.file("/dev/vfio/devices/vfio0").file("/dev/vfio/devices/vfio1")
    tree.process(77, "qemu", node)
    with pytest.raises(InUse) as caught:
        binder.unbind(group_of(kernel, NET))
    assert caught.value.codes == (Code.OPEN_BY_PROCESS,)
    assert "qemu" in caught.value.message
    assert kernel.picture() == before
    assert binder.bindings() == bound


def test_recovery_leaves_what_a_process_has_open(
    tree: PciTree, kernel: FakeKernel, binder: Binder
) -> None:
    before = kernel.picture()
    binder.bind(group_of(kernel, DISK), device_id="gone")
    tree.process(77, "qemu", "/dev/vfio/2")
    (told,) = binder.recover()
    assert told.outcome is BindOutcome.STILL_OPEN
    assert kernel.driver_of(DISK) == "vfio-pci"
    (tree.path / "proc/77/fd/3").unlink()
    (told,) = binder.recover()
    assert told.outcome is BindOutcome.GIVEN_BACK
    assert kernel.picture() == before


# failures

STEPS = ("driver_override", "unbind", "drivers_probe")


@pytest.mark.parametrize("device", [NET, SOUND])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("what", [errno.EBUSY, Fault.NOTHING_HAPPENS])
def test_any_failure_of_a_group_puts_all_of_it_back(
    kernel: FakeKernel,
    binder: Binder,
    journal: Journal,
    device: str,
    step: str,
    what: int | Fault,
) -> None:
    before = kernel.picture()
    kernel.fail(step, what, device)
    with pytest.raises(BindError) as caught:
        binder.bind(group_of(kernel, NET))
    assert caught.value.device == device
    assert kernel.picture() == before
    assert journal.bindings.all() == []
    assert len(binder.bind(group_of(kernel, NET))) == 2


def test_a_failed_restore_stays_in_the_journal_and_is_tried_again(
    kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    before = kernel.picture()
    kernel.refuse("vfio-pci", SOUND)
    kernel.fail("drivers_probe", errno.EBUSY, NET, times=0)
    kernel.refuse("e1000e", NET)
    with pytest.raises(BindError, match=f"vfio-pci did not take {SOUND}") as caught:
        binder.bind(group_of(kernel, NET))
    assert caught.value.hint
    assert f"{NET} could not be restored" in caught.value.hint
    assert [str(row.bdf) for row in journal.bindings.all()] == [NET]
    (told,) = binder.recover()
    assert told.outcome is BindOutcome.FAILED
    (told,) = Binder(journal, boot(kernel.tree)).recover()
    assert told.outcome is BindOutcome.GIVEN_BACK
    assert kernel.picture() == before
    assert journal.bindings.all() == []


@pytest.mark.parametrize("step", ["driver_override", "unbind", "drivers_probe"])
def test_giving_back_that_fails_can_be_repeated(
    kernel: FakeKernel, binder: Binder, journal: Journal, step: str
) -> None:
    before = kernel.picture()
    binder.bind(group_of(kernel, NET))
    kernel.fail(step, errno.EBUSY, SOUND)
    with pytest.raises(BindError) as caught:
        binder.unbind(group_of(kernel, NET))
    assert caught.value.device == SOUND
    (left,) = journal.bindings.all()
    assert (str(left.bdf), left.state) == (SOUND, BindingState.UNBINDING)
    binder.unbind(group_of(kernel, SOUND))
    assert kernel.picture() == before
    assert journal.bindings.all() == []


def test_what_failed_to_be_given_back_can_be_bound_again(
    kernel: FakeKernel, binder: Binder
) -> None:
    before = kernel.picture()
    binder.bind(group_of(kernel, DISK), device_id="d1")
    kernel.fail("drivers_probe", Fault.NOTHING_HAPPENS, DISK)
    (told,) = binder.give_back("d1")
    assert told.error
    assert (told.outcome, told.error.step) == (BindOutcome.FAILED, "drivers_probe")
    assert kernel.driver_of(DISK) is None
    (bound,) = binder.bind(group_of(kernel, DISK), device_id="d2")
    assert (bound.former.driver, bound.device_id) == ("nvme", "d2")
    binder.give_back("d2")
    assert kernel.picture() == before


def test_a_function_that_was_left_with_vfio_is_taken_over(
    kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    before = kernel.picture()
    binder.bind(group_of(kernel, DISK), device_id="d1")
    held_by_vm(journal, f"vfio:{DISK}", "d2")
    (bound,) = binder.bind(group_of(kernel, DISK), device_id="d2")
    assert bound.device_id == "d2"
    assert binder.give_back("d1") == []
    assert binder.recover() == []
    binder.give_back("d2")
    assert kernel.picture() == before


def test_a_function_that_goes_while_it_is_bound_is_forgotten(
    kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    (bound,) = binder.bind(group_of(kernel, VIRTFN), device_id="d1")
    kernel.write_attribute(f"/sys/bus/pci/devices/{PHYSFN}/sriov_numvfs", "0")
    (told,) = binder.give_back("d1")
    assert (told.former, told.outcome) == (bound.former, BindOutcome.FORGOTTEN)
    assert journal.bindings.all() == []


@pytest.mark.parametrize("ask", [lambda b: b.give_back("d1"), lambda b: b.recover()])
def test_the_function_in_the_place_of_one_that_was_bound_is_not_touched(
    kernel: FakeKernel, binder: Binder, journal: Journal, ask: Callable[[Binder], object]
) -> None:
    """A card was swapped: its driver and its override are those that somebody chose for it."""
    binder.bind(group_of(kernel, DISK), device_id="d1")
    kernel.tree.swap_function(DISK)
    before, kernel.writes[:] = kernel.picture(), []
    ask(binder)
    assert (kernel.writes, kernel.picture(), journal.bindings.all()) == ([], before, [])


def test_a_swapped_function_is_reported(kernel: FakeKernel, binder: Binder) -> None:
    binder.bind(group_of(kernel, DISK))
    kernel.tree.swap_function(DISK)
    (told,) = binder.recover()
    assert told.outcome is BindOutcome.FORGOTTEN
    assert told.reason == "another function has its address now"


def test_a_function_that_an_older_vmplug_bound_is_given_back(
    kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    before = kernel.picture()
    (bound,) = binder.bind(group_of(kernel, DISK), device_id="d1")
    journal.bindings.put([replace(bound, thing=None)])
    (told,) = binder.give_back("d1")
    assert (told.outcome, kernel.picture()) == (BindOutcome.GIVEN_BACK, before)


def test_a_function_with_another_driver_is_forgotten(kernel: FakeKernel, binder: Binder) -> None:
    binder.bind(group_of(kernel, DISK))
    restore(FormerBinding(bdf=Bdf.parse(DISK), driver="nvme", driver_override=None), kernel)
    before = kernel.picture()
    (told,) = binder.recover()
    assert told.outcome is BindOutcome.FORGOTTEN
    assert kernel.picture() == before


def test_the_kernel_that_does_not_answer_has_a_deadline(
    kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    before = kernel.picture()
    kernel.fail("unbind", Fault.HANGS, SOUND)
    with pytest.raises(BindError, match="has not answered within") as caught:
        Binder(journal, kernel, timeout_s=AT_ONCE_S).bind(group_of(kernel, NET))
    assert (caught.value.step, caught.value.errno) == ("unbind", errno.ETIMEDOUT)
    assert [str(row.bdf) for row in journal.bindings.all()] == [SOUND]
    assert kernel.driver_of(NET) == "e1000e"
    kernel.release.set()
    assert kernel.answered.wait(IN_TIME_S)
    binder.recover()
    assert kernel.picture() == before


def test_one_binds_while_the_others_wait(journal: Journal, tmp_path: Path) -> None:
    with Journal.open(tmp_path / "state") as other:
        with (
            journal.bindings.alone(),
            pytest.raises(StoreError, match="locked"),
            other.bindings.alone(timeout_s=0.05),
        ):
            pass
        with other.bindings.alone():
            pass


# death


def in_a_process_that_dies(act: Callable[[], object]) -> bool:
    """Whether a fault ended the process that acts; it shares no connection with this one."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with suppress(DeviceError):
                act()
            status = 0
        finally:
            os._exit(status)  # it must never go on with the tests
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DIED


def bind_in(state_dir: Path, kernel: FakeKernel, device_id: str | None) -> None:
    with Journal.open(state_dir) as journal:
        Binder(journal, kernel).bind(group_of(kernel, NET), device_id=device_id)


def unbind_in(state_dir: Path, kernel: FakeKernel) -> None:
    with Journal.open(state_dir) as journal:
        Binder(journal, kernel).unbind(group_of(kernel, NET))


WRITES_TO_BIND, WRITES_TO_UNBIND = 6, 8
DEATHS = (pytest.param(Fault.DIE_BEFORE, marks=pytest.mark.slow), Fault.DIE_AFTER)
"""Most deaths before a write leave what one after the last did."""


@pytest.mark.slow
@pytest.mark.parametrize("device_id", [None, "d1"])
@pytest.mark.parametrize("when", DEATHS)
@pytest.mark.parametrize("number", range(WRITES_TO_BIND))
def test_death_at_any_step_of_a_bind_is_undone(
    tree: PciTree, tmp_path: Path, number: int, when: Fault, device_id: str | None
) -> None:
    kernel = boot(tree)
    before = kernel.picture()
    kernel.fail_at(number, when)
    assert in_a_process_that_dies(lambda: bind_in(tmp_path / "state", kernel, device_id))
    with Journal.open(tmp_path / "state") as journal:
        assert len(journal.bindings.all()) == 2
        told = Binder(journal, boot(tree)).recover()
        assert [str(returned.former.bdf) for returned in told] == [NET, SOUND]
        assert journal.bindings.all() == []
    assert kernel.picture() == before


@pytest.mark.slow
@pytest.mark.parametrize("when", DEATHS)
@pytest.mark.parametrize("number", range(WRITES_TO_UNBIND))
@pytest.mark.parametrize("override", ["", "snd_hda_intel"])
def test_death_at_any_step_of_an_unbind_is_finished(
    tree: PciTree, tmp_path: Path, number: int, when: Fault, override: str
) -> None:
    """An override that is the former driver's own saves the last step."""
    kernel = boot(tree)
    kernel.write_attribute(f"/sys/bus/pci/devices/{SOUND}/driver_override", override)
    before = kernel.picture()
    bind_in(tmp_path / "state", kernel, None)
    dying = boot(tree)
    dying.fail_at(number, when)
    steps = WRITES_TO_UNBIND - bool(override)
    died = in_a_process_that_dies(lambda: unbind_in(tmp_path / "state", dying))
    assert died is (number < steps)
    with Journal.open(tmp_path / "state") as journal:
        Binder(journal, boot(tree)).recover()
        assert journal.bindings.all() == []
    assert kernel.picture() == before


@pytest.mark.parametrize("when", DEATHS)
def test_death_in_recovery_is_recovered_from(tree: PciTree, tmp_path: Path, when: Fault) -> None:
    kernel = boot(tree)
    before = kernel.picture()
    kernel.fail_at(WRITES_TO_BIND - 1, Fault.DIE_AFTER)
    assert in_a_process_that_dies(lambda: bind_in(tmp_path / "state", kernel, None))
    for number in range(WRITES_TO_UNBIND):
        dying = boot(tree)
        dying.fail_at(number, when)
        in_a_process_that_dies(partial(recover_in, tmp_path / "state", dying))
    recover_in(tmp_path / "state", boot(tree))
    assert kernel.picture() == before


def recover_in(state_dir: Path, kernel: FakeKernel) -> None:
    with Journal.open(state_dir) as journal:
        Binder(journal, kernel).recover()


def test_the_tests_of_death_know_the_number_of_steps(kernel: FakeKernel, binder: Binder) -> None:
    binder.bind(group_of(kernel, NET))
    assert len(kernel.writes) == WRITES_TO_BIND
    binder.unbind(group_of(kernel, NET))
    assert len(kernel.writes) - WRITES_TO_BIND == WRITES_TO_UNBIND


def test_a_row_outlives_the_process(journal: Journal) -> None:
    former = FormerBinding(bdf=Bdf.parse(DISK), driver=None, driver_override="nvme")
    row = Binding(former=former, state=BindingState.UNBINDING, device_id=None, boot_id="b")
    journal.bindings.put([row])
    with Journal.open(Path(journal.path).parent) as again:
        assert again.bindings.all() == [row]
        again.bindings.forget([former.bdf])
    assert journal.bindings.all() == []


def test_a_function_that_another_process_gives_back_is_left_to_it(
    kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    binder.bind(group_of(kernel, DISK))
    (row,) = journal.bindings.all()
    journal.bindings.put([replace(row, state=BindingState.UNBINDING)])
    before = kernel.picture()
    with (
        Journal.open(Path(journal.path).parent) as other,
        other.bindings.alone(),
    ):
        (told,) = binder.recover(lock_timeout_s=0.05)
    assert (told.outcome, told.error) == (BindOutcome.IN_PROGRESS, None)
    assert kernel.picture() == before
    assert [row.state for row in journal.bindings.all()] == [BindingState.UNBINDING]
    (told,) = binder.recover()
    assert told.outcome is BindOutcome.GIVEN_BACK


def test_giving_back_waits_until_the_last_process_has_closed_it(
    tree: PciTree, kernel: FakeKernel, journal: Journal
) -> None:
    """QEMU closes a device a moment after it has said that it is gone."""
    before = kernel.picture()
    binder = Binder(journal, kernel, timeout_s=10)
    binder.bind(group_of(kernel, DISK), device_id="d1")
    tree.process(77, "qemu", "/dev/vfio/2")
    closing = Timer(0.1, (tree.path / "proc/77/fd/3").unlink)
    closing.start()
    (told,) = binder.give_back("d1")
    closing.join()
    assert told.outcome is BindOutcome.GIVEN_BACK
    assert kernel.picture() == before


def test_what_a_process_keeps_open_is_not_taken_from_it(
    tree: PciTree, kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    binder.bind(group_of(kernel, DISK), device_id="d1")
    tree.process(77, "qemu", "/dev/vfio/2")
    kernel.writes.clear()
    (told,) = Binder(journal, kernel, timeout_s=AT_ONCE_S).give_back("d1")
    assert told.error
    assert (told.error.step, told.error.errno) == ("unbind", errno.EBUSY)
    assert "77 (qemu)" in told.reason
    assert kernel.writes == []
    assert len(journal.bindings.all()) == 1


def test_recovery_leaves_what_a_vm_was_given_meanwhile(
    kernel: FakeKernel, binder: Binder, journal: Journal
) -> None:
    """Somebody's unbind was interrupted before it did anything, and a VM has the group since."""
    (bound,) = binder.bind(group_of(kernel, DISK))
    journal.bindings.put([replace(bound, state=BindingState.UNBINDING)])
    held_by_vm(journal, f"vfio:{DISK}")
    (told,) = binder.recover()
    assert (told.outcome, kernel.driver_of(DISK)) == (BindOutcome.STILL_OPEN, "vfio-pci")
    assert "'sb1'" in told.reason


def test_concurrent_binds_and_returns_take_turns(tree: PciTree, tmp_path: Path) -> None:
    kernel = boot(tree)
    before = kernel.picture()

    def bind_and_give_back(number: int) -> None:
        with Journal.open(tmp_path / "state") as journal:
            binder = Binder(journal, boot(tree))
            held_by_vm(journal, f"vfio:{number}", f"d{number}")
            bound = binder.bind(group_of(kernel, NET), device_id=f"d{number}")
            assert len({row.device_id for row in bound}) == 1
            binder.give_back(f"d{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bind_and_give_back, range(8)))
    assert kernel.picture() == before
    with Journal.open(tmp_path / "state") as journal:
        assert journal.bindings.all() == []
