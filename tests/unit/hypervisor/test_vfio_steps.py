"""An IOMMU group as QMP commands, and plugged whole or not at all into the VM in memory."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.abilities import NEW
from vmplug.address import Bdf, CcwDevNo, PciPath, PciSlot, device_id_of, qemu_id
from vmplug.drivers.place import ApPlace, CcwPlace, GroupPlace, PciPlace
from vmplug.drivers.plug import VFIODevice, VFIODevices
from vmplug.drivers.ports import Step, UnplugFailure
from vmplug.errors import AttributeReadError, CommandError, UnplugTimeout
from vmplug.host.pci.mdev import VFIODeviceType
from vmplug.host.root import HostRoot
from vmplug.hypervisor.fake.monitor import FakeHypervisor, Guest
from vmplug.hypervisor.qemu.iommufd import IOMMUFD, iommufd_steps
from vmplug.hypervisor.qemu.start.cold import ColdQemu
from vmplug.hypervisor.qemu.start.cold_devices import arguments
from vmplug.hypervisor.qemu.start.machine import VmSpec
from vmplug.hypervisor.qemu.steps.plug import plug_steps
from vmplug.hypervisor.qemu.steps.vfio import nodes, opened

ID = "00000000000000a1"
NAME = qemu_id(ID)
UUID = "f94290f8-78ac-45fb-bb22-e55e519fa64f"


def function(number: int, cdev_node: str | None = None) -> VFIODevice:
    bdf = Bdf(0, 0x3B, 0, number)
    return VFIODevice(name=str(bdf), type=VFIODeviceType.NORMAL, bdf=bdf, cdev_node=cdev_node)


def place(bus: str, function: int = 0) -> PciPlace:
    return PciPlace(bus=bus, slot=PciSlot(0, function), path=PciPath.parse("10/00"))


def group(*devices: VFIODevice, **more: object) -> VFIODevices:
    return VFIODevices(
        id=ID,
        node="/dev/vfio/26",
        devices=devices,
        **more,  # type: ignore[arg-type]
    )


def at(*places: PciPlace) -> GroupPlace:
    return GroupPlace(places=places)


def added(steps: Sequence[Step]) -> list[dict[str, object]]:
    return [dict(step.do.arguments) for step in steps if step.do.execute == "device_add"]


def test_one_function_is_one_device_without_its_rom() -> None:
    (step,) = plug_steps(group(function(0)), at(place("rp0")), NEW)
    assert step.do.execute == "device_add"
    assert dict(step.do.arguments) == {
        "driver": "vfio-pci",
        "id": NAME,
        "host": "0000:3b:00.0",
        "bus": "rp0",
        "addr": "0x0",
        "romfile": "",
    }
    assert step.undo
    assert (step.undo.execute, dict(step.undo.arguments)) == ("device_del", {"id": NAME})


def test_function_0_of_a_slot_comes_last_so_that_the_guest_finds_all() -> None:
    plug = group(function(0), function(1), function(3))
    steps = added(plug_steps(plug, at(place("rp0"), place("rp0", 1), place("rp0", 3)), NEW))
    assert [step["addr"] for step in steps] == ["0x0.3", "0x0.1", "0x0"]
    assert [step["id"] for step in steps] == [f"{NAME}-f2", f"{NAME}-f1", NAME]
    assert all(step["multifunction"] for step in steps)


def test_functions_on_ports_of_their_own_are_each_alone() -> None:
    steps = added(plug_steps(group(function(0), function(1)), at(place("rp0"), place("rp1")), NEW))
    assert [(step["bus"], "multifunction" in step) for step in steps] == [
        ("rp0", False),
        ("rp1", False),
    ]


def test_only_the_slot_that_is_shared_has_several_functions() -> None:
    plug = group(function(0), function(1), function(2))
    steps = added(plug_steps(plug, at(place("rp0"), place("rp0", 1), place("rp1")), NEW))
    assert [(step["bus"], "multifunction" in step) for step in steps] == [
        ("rp0", True),
        ("rp0", True),
        ("rp1", False),
    ]


def test_a_function_of_a_domain_that_qemu_does_not_take_goes_by_its_directory() -> None:
    bdf = Bdf.parse("10000:e1:00.0")
    path = f"/sys/bus/pci/devices/{bdf}"
    device = VFIODevice(name=str(bdf), type=VFIODeviceType.NORMAL, bdf=bdf, sysfs_path=path)
    (step,) = added(plug_steps(group(device), at(place("rp0")), NEW))
    assert step["sysfsdev"] == path
    assert "host" not in step


def test_the_guest_reads_other_ids_and_sees_the_rom_when_that_is_wanted() -> None:
    plug = group(function(0), vendor_id=0x10DE, device_id=0x1B80, rom=True)
    (step,) = added(plug_steps(plug, at(place("rp0")), NEW))
    assert (step["x-pci-vendor-id"], step["x-pci-device-id"]) == (0x10DE, 0x1B80)
    assert "romfile" not in step


def test_a_mediated_device_goes_by_its_own_directory_and_never_by_its_parents_address() -> None:
    path = f"/sys/devices/pci0000:00/0000:00:02.0/{UUID}"
    device = VFIODevice(name=UUID, type=VFIODeviceType.MEDIATED, sysfs_path=path)
    (step,) = added(plug_steps(group(device), at(place("rp0")), NEW))
    assert (step["driver"], step["sysfsdev"]) == ("vfio-pci", path)
    assert "host" not in step


def test_an_adapter_matrix_has_no_place() -> None:
    path = f"/sys/devices/vfio_ap/matrix/{UUID}"
    device = VFIODevice(name=UUID, type=VFIODeviceType.AP, sysfs_path=path)
    steps = added(plug_steps(group(device), ApPlace(), NEW))
    assert steps == [{"driver": "vfio-ap", "id": NAME, "sysfsdev": path}]


def test_a_channel_device_has_a_number() -> None:
    path = f"/sys/devices/css0/0.0.0313/{UUID}"
    device = VFIODevice(name=UUID, type=VFIODeviceType.CCW, sysfs_path=path)
    steps = added(plug_steps(group(device), CcwPlace(devno=CcwDevNo(0, 0x313)), NEW))
    number = {"devno": "fe.0.0313"}
    assert steps == [{"driver": "vfio-ccw", "id": NAME, "sysfsdev": path, **number}]


def test_through_iommufd_qemu_gets_open_files_and_the_one_object_of_the_vm() -> None:
    plug = group(function(0, "/dev/vfio/devices/vfio0"), function(1, "/dev/vfio/devices/vfio1"))
    files = {"0000:3b:00.0": 8, "0000:3b:00.1": 9}
    steps = plug_steps(opened(plug, files), at(place("rp0"), place("rp0", 1)), NEW)
    assert [(step.do.execute, step.do.descriptor) for step in steps] == [
        ("getfd", 9),
        ("device_add", None),
        ("getfd", 8),
        ("device_add", None),
    ]
    for step in added(steps):
        assert (step["iommufd"], step["fd"]) == (IOMMUFD, f"{NAME}-fd")
        assert "host" not in step
    assert nodes(plug) == {
        "0000:3b:00.0": "/dev/vfio/devices/vfio0",
        "0000:3b:00.1": "/dev/vfio/devices/vfio1",
    }


def test_qemu_learns_what_an_open_node_is_of_from_its_directory() -> None:
    """Without that QEMU 10 takes a mediated device for another one, and refuses it."""
    path = f"/sys/devices/virtual/mtty/mtty/{UUID}"
    mediated = VFIODevice(
        name=UUID,
        type=VFIODeviceType.MEDIATED,
        sysfs_path=path,
        cdev_node="/dev/vfio/devices/vfio7",
    )
    (step,) = added(plug_steps(group(mediated), at(place("rp0")), NEW))
    assert (step["sysfsdev"], step["fd"], step["iommufd"]) == (path, f"{NAME}-fd", IOMMUFD)


def test_the_vms_object_is_no_part_of_any_device() -> None:
    assert device_id_of(IOMMUFD) is None
    make = iommufd_steps(7)[-1]
    assert make.undo is None
    assert dict(make.do.arguments) == {"qom-type": "iommufd", "id": IOMMUFD, "fd": IOMMUFD}


def test_on_the_command_line_the_files_are_those_that_qemu_inherits() -> None:
    plug = group(function(0, "/dev/vfio/devices/vfio0"), function(1, "/dev/vfio/devices/vfio1"))
    files = {"0000:3b:00.0": 8, "0000:3b:00.1": 9}
    steps = plug_steps(opened(plug, files), at(place("rp0"), place("rp0", 1)), NEW)
    written = arguments([*iommufd_steps(), *steps], {IOMMUFD: 7})
    assert written[::2] == ["-object", "-device", "-device"]
    assert [json.loads(value)["fd"] for value in written[1::2]] == ["7", "9", "8"]


def second() -> VFIODevices:
    bdf = Bdf(0, 0x3C, 0, 0)
    node = "/dev/vfio/devices/vfio1"
    device = VFIODevice(
        name=str(bdf), type=VFIODeviceType.NORMAL, bdf=bdf, cdev_node=node, sysfs_path="/sys/x"
    )
    return VFIODevices(id="00000000000000b2", node=node, devices=(device,))


def test_a_vm_that_is_to_be_started_inherits_one_iommufd_for_all(tmp_path: Path) -> None:
    for node in ("iommu", "vfio/devices/vfio0", "vfio/devices/vfio1"):
        path = tmp_path / "dev" / node
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    spec, root = VmSpec(name="sb1"), HostRoot(tmp_path)
    with ColdQemu(spec, tmp_path, abilities=NEW, host=root) as cold:
        assert cold.offer().iommufd
        first = group(function(0, "/dev/vfio/devices/vfio0"))
        assert [s.do.execute for s in cold.steps(first, at(place("rp0")))][:2] == [
            "getfd",
            "object-add",
        ]
        cold.plug(first, at(place("rp0")))
        cold.plug(second(), at(place("rp1")))
        written, files = cold.arguments(), cold.descriptors()
        assert written[::2] == ["-object", "-device", "-device"]
        said = {json.loads(value)["fd"] for value in written[1::2]}
        assert said == {str(descriptor) for descriptor in files}
        assert {os.readlink(f"/proc/self/fd/{n}").rpartition("/")[2] for n in files} == {
            "iommu",
            "vfio0",
            "vfio1",
        }
        assert not cold.request_unplug([ID])
        assert len(cold.descriptors()) == 2
        cold.started()
        assert not any(os.path.exists(f"/proc/self/fd/{n}") for n in files)


def test_a_host_without_iommufd_costs_no_question_to_qemu(tmp_path: Path) -> None:
    with ColdQemu(VmSpec(name="sb1"), tmp_path, abilities=NEW, host=HostRoot(tmp_path)) as cold:
        assert not cold.offer().iommufd


def test_a_group_without_nodes_of_its_own_opens_nothing() -> None:
    assert nodes(group(function(0))) == {}


# the whole group or nothing


def names(vm: FakeHypervisor) -> set[str]:
    monitor = vm.monitor
    return {n for n in (*monitor.devices, *monitor.objects) if n.startswith("vmplug-")}


@pytest.fixture
def vm() -> FakeHypervisor:
    return FakeHypervisor()


@pytest.fixture
def occupied(vm: FakeHypervisor) -> GroupPlace:
    """Places of which the second is somebody else's meanwhile."""
    other = VFIODevices(
        id="00000000000000b2",
        node="/dev/vfio/27",
        devices=(VFIODevice(name="x", type=VFIODeviceType.NORMAL, bdf=Bdf(0, 9, 0, 0)),),
    )
    vm.plug(other, at(place("rp1")))
    return at(place("rp0"), place("rp1"))


def test_all_functions_come_and_all_go(vm: FakeHypervisor) -> None:
    plug = group(function(0), function(1))
    vm.plug(plug, at(place("rp0"), place("rp0", 1)))
    assert names(vm) == {NAME, f"{NAME}-f1"}
    assert vm.find_devices() == {ID: True}
    assert not vm.request_unplug([ID])
    assert vm.wait_unplugged([ID], 1.0) == {}
    assert names(vm) == set()


def test_a_refused_function_takes_the_others_out_again(
    vm: FakeHypervisor, occupied: GroupPlace
) -> None:
    before = names(vm)
    with pytest.raises(CommandError, match="in use by vfio-pci"):
        vm.plug(group(function(0), function(1)), occupied)
    assert names(vm) == before


def test_a_guest_that_keeps_half_of_a_group_is_told_apart(
    vm: FakeHypervisor, occupied: GroupPlace
) -> None:
    vm.undo_timeout_s = 0.05
    vm.monitor.guest = Guest.SILENT
    with pytest.raises(UnplugTimeout, match="still in the VM"):
        vm.plug(group(function(0), function(1)), occupied)
    assert vm.find_devices()[ID] is True
    vm.monitor.wake_guest()
    assert vm.wait_unplugged([ID], 1.0) == {}
    assert ID not in vm.find_devices()


def test_a_silent_guest_keeps_the_group_and_a_second_request_is_harmless(
    vm: FakeHypervisor,
) -> None:
    vm.plug(group(function(0), function(1)), at(place("rp0"), place("rp0", 1)))
    vm.monitor.guest = Guest.SILENT
    for _ in range(2):
        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], 0.01) == {ID: UnplugFailure.TIMEOUT}
    vm.monitor.wake_guest()
    assert vm.wait_unplugged([ID], 1.0) == {}


def test_a_guest_that_refuses_is_told(vm: FakeHypervisor) -> None:
    vm.plug(group(function(0)), at(place("rp0")))
    vm.monitor.guest = Guest.REFUSES
    assert not vm.request_unplug([ID])
    assert vm.wait_unplugged([ID], 0.01) == {ID: UnplugFailure.REFUSED}


def test_one_function_is_not_in_one_vm_twice(vm: FakeHypervisor) -> None:
    vm.plug(group(function(0)), at(place("rp0")))
    again = VFIODevices(id="00000000000000b2", node="/dev/vfio/26", devices=(function(0),))
    with pytest.raises(CommandError, match="already attached"):
        vm.plug(again, at(place("rp1")))


def test_a_node_that_cannot_be_opened_is_told_before_anything_is_sent(
    vm: FakeHypervisor,
) -> None:
    sent = len(vm.monitor.sent)
    with pytest.raises(AttributeReadError, match=r"/dev/(iommu|vfio/devices)"):
        vm.plug(group(function(0, "/dev/vfio/devices/vfio999")), at(place("rp0")))
    assert len(vm.monitor.sent) == sent
