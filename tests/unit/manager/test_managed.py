"""attach --managed as one transaction: the host's drivers and the VM's devices change together.

The kernel is a tree that reacts as the real one does (`tests/contract/binding.py` holds it to
that), the VM is in memory; `tests/lab` has the same with a real kernel and a real QEMU.
"""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.support.fake_kernel import FakeKernel
from tests.support.pci_tree import PciTree
from vmplug.drivers.place import Place, Places
from vmplug.drivers.plug import Plug
from vmplug.drivers.ports import Command
from vmplug.errors import (
    BindError,
    CommandError,
    InUse,
    NoFreePort,
    NoSuchDevice,
    UnplugTimeout,
)
from vmplug.host.finding import Code
from vmplug.hypervisor.fake.monitor import FakeHypervisor, Guest
from vmplug.journal.journal import Journal
from vmplug.journal.state import State
from vmplug.manager.binding.binder import Binder
from vmplug.manager.manager import DeviceManager
from vmplug.manager.reconcile import RepairOutcome
from vmplug.oci.requests import VfioInfo

GPU, SOUND, NET = "0000:3b:00.0", "0000:3b:00.1", "0000:3c:00.0"
BEFORE = {GPU: "nouveau", SOUND: "snd_hda_intel", NET: "e1000e"}
BOOT_ID = "11111111-2222-3333-4444-555555555555\n"


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    tree = PciTree(tmp_path / "host")
    tree.file("/proc/sys/kernel/random/boot_id", BOOT_ID)
    tree.pci_function(GPU, class_code=0x030200, driver="nouveau", group=26)
    tree.pci_function(SOUND, class_code=0x040300, driver="snd_hda_intel", group=26)
    tree.pci_function(NET, class_code=0x020000, driver="e1000e", group=27)
    tree.pci_driver("vfio-pci")
    takes = {driver: [bdf] for bdf, driver in BEFORE.items()}
    return FakeKernel(tree, takes=takes)


@pytest.fixture
def vm() -> FakeHypervisor:
    return FakeHypervisor(root_ports=2)


@pytest.fixture(params=["live", "restored"])
def manager(
    request: pytest.FixtureRequest, kernel: FakeKernel, vm: FakeHypervisor, journal: Journal
) -> "Managers":
    return Managers(kernel, vm, journal, is_restored=request.param == "restored")


class Managers:
    """The VM's manager: one for the whole test, or for each step one that has read the journal."""

    def __init__(
        self, kernel: FakeKernel, vm: FakeHypervisor, journal: Journal, *, is_restored: bool
    ) -> None:
        self._parts = (kernel, vm, journal)
        self._is_restored = is_restored
        self._manager = self._new()

    def _new(self) -> DeviceManager:
        kernel, vm, journal = self._parts
        return DeviceManager(vm="sb1", host=kernel, hypervisor=vm, journal=journal)

    @property
    def now(self) -> DeviceManager:
        if self._is_restored:
            self._manager = self._new()
        return self._manager


def drivers(kernel: FakeKernel) -> dict[str, str | None]:
    return {bdf: kernel.driver_of(bdf) for bdf in BEFORE}


def want(bdf: str) -> VfioInfo:
    return VfioInfo(label=bdf, device=bdf)


def plugged(vm: FakeHypervisor) -> set[str]:
    hosts = (device.properties.get("host") for device in vm.monitor.devices.values())
    return {host for host in hosts if host}


def test_the_whole_group_is_bound_and_plugged_and_goes_back(
    manager: Managers, kernel: FakeKernel, vm: FakeHypervisor, journal: Journal
) -> None:
    before = kernel.picture()
    held = manager.now.attach(want(SOUND), managed=True)
    assert drivers(kernel) == {GPU: "vfio-pci", SOUND: "vfio-pci", NET: "e1000e"}
    assert plugged(vm) == {GPU, SOUND}
    manager.now.detach(held.id)
    assert (plugged(vm), kernel.picture()) == (set(), before)
    assert (journal.devices("sb1"), journal.bindings.all()) == ([], [])


def test_the_last_owner_gives_it_back_and_not_the_first(
    manager: Managers, kernel: FakeKernel
) -> None:
    first = manager.now.attach(want(GPU), owner="ctr1", managed=True)
    second = manager.now.attach(want(GPU), owner="ctr2", managed=True)
    manager.now.detach(first.id)
    assert kernel.driver_of(GPU) == "vfio-pci"
    manager.now.detach(second.id)
    assert drivers(kernel) == BEFORE


def test_what_was_bound_before_stays_so(manager: Managers, kernel: FakeKernel) -> None:
    kernel.tree.pci_function("0000:3d:00.0", driver="vfio-pci", group=28)
    held = manager.now.attach(want("0000:3d:00.0"), managed=True)
    manager.now.detach(held.id)
    assert kernel.driver_of("0000:3d:00.0") == "vfio-pci"


def test_without_managed_nothing_is_bound(
    manager: Managers, kernel: FakeKernel, vm: FakeHypervisor, journal: Journal
) -> None:
    with pytest.raises(InUse) as refusal:
        manager.now.attach(want(GPU))
    assert refusal.value.codes == (Code.NOT_BOUND,)
    assert (drivers(kernel), plugged(vm), kernel.writes) == (BEFORE, set(), [])
    assert journal.devices("sb1") == []


def test_a_plan_says_what_is_bound_and_binds_nothing(
    manager: Managers, kernel: FakeKernel
) -> None:
    first, *plugs = manager.now.plan([want(GPU)], managed=True)
    assert first.do == Command("bind", {"functions": [GPU, SOUND]})
    assert first.undo == Command("unbind", {"functions": [GPU, SOUND]})
    assert [step.do.execute for step in plugs] == ["device_add", "device_add"]
    assert kernel.writes == []


def test_a_bind_that_fails_half_way_leaves_all_as_it_was(
    manager: Managers, kernel: FakeKernel, vm: FakeHypervisor, journal: Journal
) -> None:
    before = kernel.picture()
    kernel.refuse("vfio-pci", SOUND)
    with pytest.raises(BindError):
        manager.now.attach(want(GPU), managed=True)
    assert (kernel.picture(), plugged(vm)) == (before, set())
    assert (journal.devices("sb1"), journal.bindings.all()) == ([], [])


def test_a_plug_that_is_refused_gives_everything_back(
    manager: Managers, kernel: FakeKernel, vm: FakeHypervisor, journal: Journal
) -> None:
    before = kernel.picture()
    vm.monitor.fail_at = "device_add"
    with pytest.raises(CommandError):
        manager.now.attach(want(GPU), managed=True)
    assert (kernel.picture(), plugged(vm)) == (before, set())
    assert (journal.devices("sb1"), journal.bindings.all()) == ([], [])
    manager.now.attach(want(GPU), managed=True)
    assert plugged(vm) == {GPU, SOUND}


class Swapping(FakeHypervisor):
    """A VM in whose host the sound card is swapped at one moment of an attach."""

    def __init__(self, kernel: FakeKernel, moment: str) -> None:
        super().__init__(root_ports=2)
        self._kernel, self._moment = kernel, moment

    def _swap_at(self, moment: str) -> None:
        if moment == self._moment:
            self._moment = "done"
            self._kernel.tree.swap_function(SOUND)

    def places(self, known: Mapping[str, str] = MappingProxyType({})) -> Places:
        self._swap_at("planned")
        return super().places(known)

    def plug(self, plug: Plug, place: Place) -> None:
        super().plug(plug, place)
        self._swap_at("plugged")


@pytest.mark.parametrize("moment", ["planned", "plugged"])
def test_a_card_that_is_swapped_during_an_attach_is_not_handed_over(
    kernel: FakeKernel, journal: Journal, moment: str
) -> None:
    """What was checked is what is plugged, and nothing is done to what nobody asked for."""
    vm = Swapping(kernel, moment)
    devices = DeviceManager(vm="sb1", host=kernel, hypervisor=vm, journal=journal)
    with pytest.raises(NoSuchDevice, match="after vmplug checked it"):
        devices.attach(want(GPU), managed=True)
    assert plugged(vm) == set()
    assert (journal.devices("sb1"), journal.bindings.all()) == ([], [])
    assert all(write.device != SOUND for write in kernel.writes) or moment == "plugged"
    assert kernel.driver_of(GPU) == "nouveau"


def test_a_second_device_without_a_port_takes_the_first_back_before_anything_is_bound(
    manager: Managers, kernel: FakeKernel, vm: FakeHypervisor
) -> None:
    stranger = {"driver": "pci-testdev", "id": "stranger", "bus": "rp1", "addr": "0x0"}
    vm.monitor.execute(Command("device_add", stranger))
    with pytest.raises(NoFreePort):
        manager.now.attach_all([want(GPU), want(NET)], managed=True)
    assert (drivers(kernel), kernel.writes, plugged(vm)) == (BEFORE, [], set())


def test_a_group_that_the_guest_keeps_stays_bound_until_it_lets_go(
    manager: Managers, kernel: FakeKernel, vm: FakeHypervisor
) -> None:
    held = manager.now.attach(want(GPU), managed=True)
    vm.monitor.guest = Guest.SILENT
    with pytest.raises(UnplugTimeout):
        manager.now.detach(held.id, timeout_s=0.01)
    assert kernel.driver_of(GPU) == "vfio-pci"
    vm.monitor.wake_guest()
    manager.now.detach(held.id)
    assert drivers(kernel) == BEFORE


def test_an_attach_that_was_interrupted_is_taken_back_with_its_drivers(
    manager: Managers, kernel: FakeKernel, vm: FakeHypervisor, journal: Journal
) -> None:
    held = manager.now.attach(want(GPU), managed=True)
    with closing(sqlite3.connect(journal.path)) as db:
        db.execute("UPDATE device SET state = 'plugging'")
        db.commit()
    assert [record.state for record in journal.devices("sb1")] == [State.PLUGGING]
    manager.now.reconcile()
    assert (drivers(kernel), plugged(vm)) == (BEFORE, set())
    assert (journal.devices("sb1"), journal.bindings.all()) == ([], [])
    assert held.device_id not in vm.find_devices()


def test_what_another_journal_bound_and_plugged_is_left_bound_and_plugged(
    manager: Managers, kernel: FakeKernel, vm: FakeHypervisor, tmp_path: Path
) -> None:
    held = manager.now.attach(want(GPU), managed=True)
    before = kernel.picture()
    with Journal.open(tmp_path / "another") as journal:
        theirs = DeviceManager(vm="sb1", host=kernel, hypervisor=vm, journal=journal)
        (repair,) = theirs.reconcile()
        assert (repair.device_id, repair.is_gone) == (held.device_id, False)
        assert repair.outcome is RepairOutcome.ANOTHER_JOURNAL
        assert Binder(journal, kernel).recover() == []
        assert (kernel.picture(), plugged(vm)) == (before, {GPU, SOUND})

        (repair,) = theirs.reconcile(take_over=True)
        assert repair.outcome is RepairOutcome.REMOVED
        assert (kernel.picture(), plugged(vm)) == (before, set())
    manager.now.reconcile()
    assert drivers(kernel) == BEFORE
