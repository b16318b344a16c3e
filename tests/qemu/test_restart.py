"""A QEMU that ends while nobody looks, and another one behind the same socket: two real ones."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.monitors import Gate
from tests.qemu.conftest import request
from tests.support.disks import disk_image
from tests.support.vm import GuestVm, root_ports, start_vm
from vmplug.errors import ConnectError, InUse, NotAttached, ProtocolError, StillAttached
from vmplug.host.finding import Code
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.manager.host_listing import show_thing
from vmplug.manager.manager import DeviceManager
from vmplug.manager.reconcile import RepairOutcome
from vmplug.manager.setup import Setup
from vmplug.vms.adopt import adopt_vm
from vmplug.vms.check import check_requests
from vmplug.vms.connect import connect_vm
from vmplug.vms.reconcile import reconcile_host
from vmplug.vms.status import list_vms
from vmplug.vms.stop import stop_vm

pytestmark = pytest.mark.qemu

BOOT_S = 60.0


class Vms:
    """VMs that take turns behind one socket; the tests made the sockets and passed them on."""

    def __init__(self, directory: Path, vms: tuple[GuestVm, GuestVm]) -> None:
        self.directory = directory
        self.first, self.second = vms
        self.socket = self.first.qmp_path

    def manager(self) -> DeviceManager:
        """Whoever answers at the socket, as VM sb1."""
        return DeviceManager.open(
            vm="sb1",
            host=HostRoot(),
            hypervisor=Qemu.connect(str(self.socket)),
            state_dir=self.directory / "state",
        )

    def take_turns(self) -> None:
        """The first VM crashes, the second takes its socket."""
        self.first.kill()
        os.replace(self.second.qmp_path, self.socket)


@pytest.fixture
def vms(tmp_path: Path) -> Iterator[Vms]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    ports = root_ports(2)
    with (
        start_vm(tmp_path / "one", devices=ports, guest=False, paused=True) as first,
        start_vm(tmp_path / "two", devices=ports, guest=False, paused=True) as second,
    ):
        yield Vms(tmp_path, (first, second))


def test_qemus_own_process_is_found_behind_a_socket_of_its_launcher(vms: Vms) -> None:
    for vm in (vms.first, vms.second):
        qemu = Qemu.connect(str(vm.qmp_path))
        assert qemu.endpoint
        qemu.close()
        assert (qemu.endpoint.pid, vm.pid == os.getpid()) == (vm.pid, False)


def test_what_a_vm_held_that_ended_unseen_is_released(vms: Vms, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "a")
    with vms.manager() as devices:
        old = devices.attach(request(image))
    vms.take_turns()
    with vms.manager() as devices:
        with pytest.raises(NotAttached, match="has ended, and another VM has its name"):
            devices.detach(old.id)
        new = devices.attach(request(image))
        assert new.device_id != old.device_id
        (told,) = devices.reconcile()
        assert (told.device_id, told.outcome) == (old.device_id, RepairOutcome.FORGOTTEN)
    names = {e["name"] for e in vms.second.oracle.execute("qom-list", path="/machine/peripheral")}
    assert f"vmplug-{new.device_id}" in names
    with Journal.open(tmp_path / "state") as journal:
        assert [vm.pid for vm in journal.vms()] == [vms.second.pid]


def test_a_manager_that_outlives_its_vm_serves_the_next_one(vms: Vms, tmp_path: Path) -> None:
    images = [disk_image(tmp_path / name, 1, name) for name in ("a.img", "b.img")]
    with vms.manager() as devices:
        old = [devices.attach(request(image)) for image in images]
        vms.take_turns()
        with pytest.raises((ProtocolError, NotAttached)):
            devices.detach(old[1].id)  # in the conversation with the first
        new = devices.attach(request(images[0]))
        assert (new.count, str(new.guest_address)) == (1, "PCI 10/00")
        assert [hold.id for hold in devices.attachments()] == [new.id]
        told = devices.reconcile()
        assert {repair.device_id for repair in told} == {hold.device_id for hold in old}
        assert devices.reconcile() == []
    with Journal.open(tmp_path / "state") as journal:
        assert [vm.pid for vm in journal.vms()] == [vms.second.pid]


def test_what_another_journal_plugged_is_left_alone(vms: Vms, tmp_path: Path) -> None:
    """Two state directories, one QEMU: neither unplugs a live disk of the other."""
    image = disk_image(tmp_path / "a.img", 1, "a")
    elsewhere = Setup(state_dir=tmp_path / "elsewhere")
    with vms.manager() as devices:
        held = devices.attach(request(image))
    assert adopt_vm("theirs", str(vms.socket), setup=elsewhere).foreign_devices == 1
    with (
        Journal.open(tmp_path / "state") as journal,
        Journal.open(tmp_path / "elsewhere") as other,
    ):
        assert held.device_id.startswith(journal.id)
        assert journal.id != other.id
    for _ in range(2):
        ((repair,),) = [[one.repair for one in reconcile_host(setup=elsewhere).repairs]]
        assert (repair.device_id, repair.is_gone) == (held.device_id, False)
        assert repair.outcome is RepairOutcome.ANOTHER_JOURNAL
    assert [vm.foreign_devices for vm in list_vms(setup=elsewhere)] == [1]
    with vms.manager() as devices:
        assert devices.reconcile() == []
        assert devices.attachments() == [held]


def test_a_disk_that_the_vm_has_of_another_journal_is_found(vms: Vms, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "a")
    elsewhere = Setup(state_dir=tmp_path / "elsewhere")
    with vms.manager() as devices:
        held = devices.attach(request(image))
        adopt_vm("theirs", str(vms.socket), setup=elsewhere)
        (checked,) = check_requests([request(image)], vm="theirs", setup=elsewhere)
        assert [finding.code for finding in checked.findings] == [Code.IMAGE_LOCKED]
        assert "VM 'theirs', which did not get it from this journal" in checked.findings[0].message
        (use,) = show_thing(str(image), setup=elsewhere).uses
        assert use.who == "VM 'theirs' (not from this journal)"
        with (
            connect_vm("theirs", setup=elsewhere) as others,
            pytest.raises(InUse, match="did not get it from this journal"),
        ):
            others.attach(request(image))
        assert (devices.reconcile(), devices.attachments()) == ([], [held])


def test_a_vm_that_goes_on_keeps_what_it_holds(vms: Vms, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "a")
    with vms.manager() as devices:
        old = devices.attach(request(image))
    with vms.manager() as devices:
        assert [hold.id for hold in devices.attachments()] == [old.id]
        assert devices.attach(request(image)).count == 2
        assert devices.reconcile() == []


def test_a_proxy_that_starts_again_takes_nothing_from_its_vm(vms: Vms, tmp_path: Path) -> None:
    """Its socket refuses meanwhile, and its process was never the VM's."""
    setup, proxy = Setup(state_dir=tmp_path / "state"), vms.socket.with_name("proxy")
    image = disk_image(tmp_path / "a.img", 1, "a")
    with Gate(proxy, vms.socket):
        assert adopt_vm("sb1", str(proxy), setup=setup).pid == vms.first.pid
        with connect_vm("sb1", setup=setup) as devices:
            held = devices.attach(request(image))
    (failure,) = reconcile_host(setup=setup).failures
    assert isinstance(failure.error, ConnectError)
    assert [vm.state for vm in list_vms(setup=setup)] == ["unreachable"]
    proxy.unlink()
    with Gate(proxy, vms.socket):
        told = reconcile_host(setup=setup)
        assert (told.repairs, told.failures) == ((), ())
        with connect_vm("sb1", setup=setup) as devices:
            assert [hold.id for hold in devices.attachments()] == [held.id]
    vms.first.kill()
    assert [vm.state for vm in list_vms(setup=setup)] == ["gone"]


def test_a_detach_that_a_booting_guest_loses_is_asked_for_again(tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "a")
    with (
        start_vm(tmp_path, devices=root_ports(1)) as vm,
        DeviceManager.open(
            vm="sb1",
            host=HostRoot(),
            hypervisor=Qemu.connect(str(vm.qmp_path)),
            state_dir=tmp_path / "state",
        ) as devices,
    ):
        held = devices.attach(request(image))
        devices.detach(held.id, timeout_s=BOOT_S)
        assert devices.attachments() == []


def test_an_adopted_vm_is_not_forgotten_while_its_qemu_answers(vms: Vms, tmp_path: Path) -> None:
    """The journal has the process of a launcher that has ended, as older ones do."""
    setup = Setup(state_dir=tmp_path / "state")
    with vms.manager() as devices:
        held = devices.attach(request(disk_image(tmp_path / "a.img", 1, "a")))
    with Journal.open(tmp_path / "state") as journal:
        journal.set_process("sb1", os.getpid(), 1)
        assert (reconcile_host(setup=setup).repairs, journal.attachments()) == ((), [held])
        assert [vm.pid for vm in journal.vms()] == [vms.first.pid]
        journal.set_process("sb1", os.getpid(), 1)
        with pytest.raises(StillAttached):
            stop_vm("sb1", setup=setup)
        assert journal.attachments() == [held]
        vms.take_turns()
        (released,) = reconcile_host(setup=setup).repairs
        assert released.repair.outcome is RepairOutcome.FORGOTTEN
        assert journal.vms() == []
