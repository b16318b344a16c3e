"""Which device an ID means, who uses it, and what a crash leaves."""

import os
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from tests.support.fake_kernel import DIED, Fault
from tests.support.journal import attach_row, device_record, vm_record
from tests.unit.kubernetes.world import (
    DISK_LINES,
    DISKS,
    GPU,
    GPUS,
    MANAGED_LINES,
    NET,
    NIC_LINES,
    NICS,
    OTHER_NET,
    SOUND,
    Node,
)
from vmplug.errors import InUse, NoSuchDevice, PolicyError, StateError
from vmplug.host.kind import DeviceType
from vmplug.kubernetes.health import UnitState
from vmplug.kubernetes.keeper import Keeper
from vmplug.manager.binding.binder import Binder


def states(keeper: Keeper) -> dict[str, str]:
    return {offer.id: str(offer.health.state) for offer in keeper.look().offers}


def reason(keeper: Keeper, id_: str) -> str:
    (offer,) = (offer for offer in keeper.look().offers if offer.id == id_)
    assert not offer.health.state.is_healthy
    return offer.health.reason


def forget_pods(keeper: Keeper) -> None:
    """Kubelet says twice that no pod has anything of it."""
    for _ in range(2):
        keeper.note_pods({}, has_any=True, is_settled=True)


def test_a_pod_that_is_being_made_is_not_yet_missed(node: Node) -> None:
    """Kubelet names its device a moment after Allocate."""
    with node.journal() as journal:
        keeper = node.keeper(journal=journal)
        keeper.note_pods({}, has_any=True, is_settled=True)
        keeper.allocate(NICS, ["27"])
        for missed in ("", "kubelet names no pod that has it"):
            health = {offer.id: offer.health for offer in keeper.look().offers}["27"]
            assert (health.state, health.reason) == (UnitState.ASSIGNED, missed)
            keeper.note_pods({}, has_any=True, is_settled=True)


# the same ID is the same device


def test_another_card_at_the_address_is_refused(node: Node) -> None:
    with node.journal() as journal:
        keeper = node.keeper(journal=journal)
        keeper.allocate(NICS, ["27"])
        node.tree.swap_function(NET)
        with pytest.raises(StateError, match="is not the device that this pod was given"):
            keeper.prepare(NICS, ["27"])
        assert node.states() == {"27": "allocated"}
        assert not node.kernel.writes


def test_a_group_number_that_means_another_card_is_refused(node: Node) -> None:
    with node.journal() as journal:
        keeper = node.keeper(journal=journal)
        keeper.allocate(NICS, ["27"])
        (row,) = journal.pod_devices.all()
        other = keeper.allocate(NICS, ["28"])[0]
        journal.pod_devices.put([replace(row, thing=other.identify(node.kernel))])
        with pytest.raises(StateError, match="another device has its place now"):
            keeper.prepare(NICS, ["27"])


def test_after_a_boot_only_a_serial_number_proves_that_it_is_the_same(node: Node) -> None:
    node.function("0000:3e:00.0", 29, serial="1122334455667788")
    with node.journal() as journal:
        keeper = node.keeper(journal=journal)
        keeper.allocate(NICS, ["27", "29"])
    node.boot()
    with node.journal() as journal:
        keeper = node.keeper(journal=journal)
        with pytest.raises(StateError, match="no serial number proves that it is the same"):
            keeper.prepare(NICS, ["27"])
        keeper.prepare(NICS, ["29"])
        assert node.states() == {"27": "allocated", "29": "started"}


def test_after_a_boot_a_card_of_another_serial_number_is_refused(node: Node) -> None:
    node.function("0000:3e:00.0", 29, serial="1122334455667788")
    with node.journal() as journal:
        node.keeper(journal=journal).allocate(NICS, ["29"])
    node.boot()
    config = node.tree.path / node.tree.real("0000:3e:00.0")[1:] / "config"
    space = bytearray(config.read_bytes())
    space[0x104] ^= 0xFF
    config.write_bytes(space)
    with node.journal() as journal, pytest.raises(StateError, match="no serial number proves"):
        node.keeper(journal=journal).prepare(NICS, ["29"])


def test_a_disk_is_known_by_its_name_after_a_boot(node: Node) -> None:
    with node.journal() as journal:
        node.keeper(DISK_LINES, journal=journal).allocate(DISKS, ["nvme-disk_S1"])
    node.boot()
    with node.journal() as journal:
        node.keeper(DISK_LINES, journal=journal).prepare(DISKS, ["nvme-disk_S1"])
    assert node.states() == {"nvme-disk_S1": "started"}


def test_a_container_cannot_start_without_an_allocate(node: Node) -> None:
    with node.journal() as journal:
        keeper = node.keeper(journal=journal)
        with pytest.raises(StateError, match="it was not allocated") as caught:
            keeper.prepare(NICS, ["27"])
        assert caught.value.hint == "delete the pod, so that it gets another one"
    assert node.states() == {}


def test_a_device_that_has_gone_is_broken_while_a_pod_has_it(node: Node) -> None:
    with node.journal() as journal:
        keeper = node.keeper(journal=journal)
        keeper.allocate(NICS, ["27"])
        node.kernel._remove_function(NET)
        assert reason(keeper, "27") == "it has gone, or is not selected any more"
        with pytest.raises(StateError, match="it has gone"):
            keeper.prepare(NICS, ["27"])
        forget_pods(keeper)
        keeper.give_back_unused()
        assert states(keeper) == {"28": "free"}


# who uses it


@pytest.mark.parametrize(
    ("holder", "named"), [("sb1", "VM 'sb1'"), ("lease:job-17", "lease job-17")]
)
def test_a_vm_or_a_lease_is_named_even_while_a_pod_has_it(
    node: Node, holder: str, named: str
) -> None:
    with node.journal() as journal:
        keeper = node.keeper(journal=journal)
        keeper.allocate(NICS, ["28"])
        socket = "lease:4026531836:1" if holder.startswith("lease:") else "/run/sb1/qmp.sock"
        journal.add_vm(replace(vm_record(holder), qmp_socket=socket))
        for bdf, path in ((NET, "/dev/vfio/27"), (OTHER_NET, "/dev/vfio/28")):
            record = device_record(f"vfio:{bdf}", path, DeviceType.VFIO, vm=holder)
            attach_row(journal, record)
        assert named in reason(keeper, "27")
        assert named in reason(keeper, "28")
        with pytest.raises(InUse, match=named):
            keeper.allocate(NICS, ["27"])
    assert node.states() == {"28": "allocated"}


def test_a_mount_is_named(node: Node) -> None:
    node.tree.mount("/dev/nvme0n1p1", "/srv", "259:1")
    with node.journal() as journal:
        keeper = node.keeper(DISK_LINES, journal=journal)
        assert states(keeper) == {"nvme-disk_S1": "used", "nvme-disk_S2": "free"}
        assert "/srv" in reason(keeper, "nvme-disk_S1")
        with pytest.raises(InUse, match="/srv"):
            keeper.allocate(DISKS, ["nvme-disk_S1"])


def test_a_mount_is_nobodys_pod_even_while_kubelet_names_one(node: Node) -> None:
    with node.journal() as journal:
        keeper = node.keeper(DISK_LINES, journal=journal)
        keeper.allocate(DISKS, ["nvme-disk_S1"])
        keeper.note_pods({(DISKS, "nvme-disk_S1"): ("a/b",)}, has_any=True, is_settled=True)
        assert states(keeper)["nvme-disk_S1"] == "assigned"
        node.tree.mount("/dev/nvme0n1p1", "/srv", "259:1")
        assert "/srv" in reason(keeper, "nvme-disk_S1")


def test_a_device_that_nobody_bound_is_broken_and_recovers(node: Node) -> None:
    node.tree.take(NET, "e1000e")
    with node.journal() as journal:
        keeper = node.keeper(journal=journal)
        assert states(keeper) == {"27": "broken", "28": "free"}
        assert NET in reason(keeper, "27")
        node.tree.take(NET, "vfio-pci")
        assert states(keeper) == {"27": "free", "28": "free"}


def test_a_managed_group_with_a_member_that_was_not_selected_is_not_touched(node: Node) -> None:
    lines = MANAGED_LINES + 'classes = ["0x03"]\n'
    with node.journal() as journal:
        keeper = node.keeper(lines, journal=journal)
        assert SOUND in reason(keeper, "26")
        with pytest.raises(InUse, match="select it too"):
            keeper.allocate(GPUS, ["26"])
    assert not node.kernel.writes


def test_one_pods_devices_are_given_all_or_none(node: Node) -> None:
    with node.journal() as journal:
        keeper = node.keeper(journal=journal)
        node.open("/dev/vfio/28")
        with pytest.raises(InUse):
            keeper.allocate(NICS, ["27", "28"])
        with pytest.raises(NoSuchDevice):
            keeper.allocate(NICS, ["27", "nonsense"])
    assert node.states() == {}


# one device, one resource


VIDEO = '[[resource]]\nname = "a.com/video"\nclasses = ["0x03"]\n'
SOUNDS = '[[resource]]\nname = "a.com/sound"\nclasses = ["0x04"]\n'
ALL_OF_INTEL = '[[resource]]\nname = "example.com/net"\npci = ["8086:*"]\n'


@pytest.mark.parametrize(
    "lines", [NIC_LINES + ALL_OF_INTEL, VIDEO + SOUNDS], ids=["one device", "one group"]
)
def test_what_two_resources_select_is_refused(node: Node, lines: str) -> None:
    with node.journal() as journal:
        keeper = node.keeper(lines, journal=journal)
        with pytest.raises(PolicyError, match="selects a device twice") as caught:
            keeper.check()
        assert "belongs to one resource" in str(caught.value.hint)
        broken = [o for o in keeper.look().offers if o.health.state is UnitState.BROKEN]
        assert len(broken) in {2, 4}
        with pytest.raises(InUse, match="twice"):
            keeper.allocate(broken[0].resource, [broken[0].id])
    assert node.states() == {}


def test_a_disk_and_its_controller_are_one_device(node: Node) -> None:
    node.function("0000:3e:00.0", 29, class_code=0x010802, driver="nvme")
    node.tree.pci_disk("0000:3e:00.0", "259:7", "nvme7n1")
    node.tree.file("/run/udev/data/b259:7", "S:disk/by-id/nvme-disk_S7\n")
    lines = DISK_LINES + '[[resource]]\nname = "a.com/nvme"\nclasses = ["0x0108"]\n'
    with node.journal() as journal, pytest.raises(PolicyError, match=r"0000:3e:00\.0"):
        node.keeper(lines, journal=journal).check()


# managed devices, and crashes


def test_give_back_returns_what_no_pod_has(node: Node) -> None:
    before = node.kernel.picture()
    with node.journal() as journal:
        keeper = node.keeper(MANAGED_LINES.replace("pre-start", "start"), journal=journal)
        assert keeper.bind_offered()
        assert node.states() == {"26": "offered"}
        returned, kept = keeper.give_back_all()
        assert ([row.id for row in returned], kept) == (["26"], [])
    assert node.kernel.picture() == before
    assert node.states() == {}


def test_give_back_leaves_what_pods_have(node: Node) -> None:
    with node.journal() as journal:
        keeper = node.keeper(MANAGED_LINES, journal=journal)
        keeper.allocate(GPUS, ["26"])
        keeper.prepare(GPUS, ["26"])
        returned, kept = keeper.give_back_all()
        assert (returned, [row.id for row in kept]) == ([], ["26"])
        keeper.note_pods({(GPUS, "26"): ("a/b",)}, has_any=True, is_settled=True)
        assert keeper.give_back_all()[0] == []
    assert node.drivers()[GPU] == node.drivers()[SOUND] == "vfio-pci"


def test_what_vmplug_reconcile_recovers_leaves_pods_alone(node: Node) -> None:
    with node.journal() as journal:
        keeper = node.keeper(MANAGED_LINES, journal=journal)
        keeper.allocate(GPUS, ["26"])
        keeper.prepare(GPUS, ["26"])
        assert Binder(journal, node.kernel).recover() == []
    assert node.drivers()[GPU] == "vfio-pci"


def test_a_device_that_its_driver_does_not_take_back_is_broken_until_it_does(node: Node) -> None:
    with node.journal() as journal:
        keeper = node.keeper(MANAGED_LINES, journal=journal)
        keeper.allocate(GPUS, ["26"])
        keeper.prepare(GPUS, ["26"])
        forget_pods(keeper)
        node.kernel.refuse("nouveau", GPU)
        keeper.give_back_unused()
        assert "vmplug cannot give it back" in reason(keeper, "26")
        assert node.states() == {"26": "returning"}
        with pytest.raises(InUse, match="giving it back"):
            keeper.allocate(GPUS, ["26"])
        node.kernel._drivers.refuse.clear()
        keeper.give_back_unused()
        assert states(keeper) == {"26": "bindable"}


def test_a_list_that_came_before_kubelet_was_settled_frees_nothing(node: Node) -> None:
    with node.journal() as journal:
        keeper = node.keeper(journal=journal)
        keeper.allocate(NICS, ["27"])
        for _ in range(5):
            keeper.note_pods({}, has_any=True, is_settled=False)
        keeper.give_back_unused()
    assert node.states() == {"27": "allocated"}


def in_child(work: Callable[[], None]) -> int:
    """Do it in a process that may be killed; its exit status."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
    finally:
        os._exit(0)


def killed_at_each_write(
    node: Node, fault: Fault, life: Callable[[], None], *, more_than: int
) -> Iterator[None]:
    """After each write at which `life` was killed, of which there are so many; and once whole."""
    number, status = -1, DIED
    while status == DIED:
        number += 1
        node.kernel.writes.clear()
        node.kernel._at_number = {number: fault}
        status = in_child(life)
        node.kernel._at_number = {}
        yield
    assert number > more_than


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_AFTER])
@pytest.mark.parametrize("pod_lives", [True, False], ids=["pod lives", "pod has gone"])
def test_killed_at_each_write_the_device_ends_up_where_it_belongs(
    node: Node, fault: Fault, *, pod_lives: bool
) -> None:
    """From Allocate to the return, at each write to sysfs: then a new plugin takes over."""
    before = node.kernel.picture()

    def life() -> None:
        with node.journal() as journal:
            keeper = node.keeper(MANAGED_LINES, journal=journal)
            keeper.allocate(GPUS, ["26"])
            keeper.prepare(GPUS, ["26"])
            if not pod_lives:
                forget_pods(keeper)
                keeper.give_back_unused()

    for _ in killed_at_each_write(node, fault, life, more_than=4):
        with node.journal() as journal:
            keeper = node.keeper(MANAGED_LINES, journal=journal)
            keeper.recover()
            if pod_lives:
                keeper.note_pods({(GPUS, "26"): ("a/b",)}, has_any=True, is_settled=True)
                keeper.prepare(GPUS, ["26"])
                assert node.drivers()[GPU] == node.drivers()[SOUND] == "vfio-pci"
                assert states(keeper) == {"26": "assigned"}
            forget_pods(keeper)
            keeper.give_back_unused()
            assert states(keeper) == {"26": "bindable"}
        assert node.kernel.picture() == before
        assert node.states() == {}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_AFTER])
def test_killed_at_each_write_a_device_that_is_bound_from_the_start_comes_back(
    node: Node, fault: Fault
) -> None:
    """From the binding at the start to `give-back`: then another plugin, and its `give-back`."""
    before, lines = node.kernel.picture(), MANAGED_LINES.replace("pre-start", "start")

    def life() -> None:
        with node.journal() as journal:
            keeper = node.keeper(lines, journal=journal)
            keeper.bind_offered()
            keeper.allocate(GPUS, ["26"])
            keeper.prepare(GPUS, ["26"])
            forget_pods(keeper)
            keeper.give_back_unused()
            keeper.give_back_all()

    for _ in killed_at_each_write(node, fault, life, more_than=8):
        with node.journal() as journal:
            keeper = node.keeper(lines, journal=journal)
            keeper.recover()
            keeper.look()
            keeper.bind_offered()
            forget_pods(keeper)
            keeper.give_back_unused()
            assert node.states() == {"26": "offered"}
            assert states(keeper) == {"26": "free"}
            assert node.drivers()[GPU] == node.drivers()[SOUND] == "vfio-pci"
            keeper.give_back_all()
        assert node.kernel.picture() == before
        assert node.states() == {}


def test_after_a_boot_what_no_pod_has_any_more_is_forgotten_and_not_touched(node: Node) -> None:
    with node.journal() as journal:
        keeper = node.keeper(MANAGED_LINES, journal=journal)
        keeper.allocate(GPUS, ["26"])
        keeper.prepare(GPUS, ["26"])
    node.boot({GPU: "nouveau", SOUND: "snd_hda_intel"})
    node.kernel.writes.clear()
    with node.journal() as journal:
        keeper = node.keeper(MANAGED_LINES, journal=journal)
        keeper.recover()
        assert states(keeper) == {"26": "assigned"}  # kubelet has not answered yet
        forget_pods(keeper)
        keeper.give_back_unused()
        assert states(keeper) == {"26": "bindable"}
        assert journal.bindings.all() == []
    assert node.states() == {}
    assert not node.kernel.writes
