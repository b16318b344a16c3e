"""An IOMMU group as QMP commands, and plugged whole or not at all into the VM in memory."""

from collections.abc import Sequence

import pytest

from tests.support.abilities import NEW
from vmplug.address import Bdf, CcwDevNo, PciPath, PciSlot, qemu_id
from vmplug.drivers.base import Step, VFIODevice, VFIODevices
from vmplug.drivers.place import ApPlace, CcwPlace, GroupPlace, PciPlace
from vmplug.errors import AttributeReadError, CommandError, UnplugTimeout
from vmplug.host.mdev import VFIODeviceType
from vmplug.hypervisor.memory import Guest, MemoryHypervisor
from vmplug.hypervisor.qemu.coldplug import arguments
from vmplug.hypervisor.qemu.plug import plug_steps
from vmplug.hypervisor.qemu.vfio import nodes

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


def test_through_iommufd_qemu_gets_open_files_and_one_object() -> None:
    plug = group(function(0, "/dev/vfio/devices/vfio0"), function(1, "/dev/vfio/devices/vfio1"))
    steps = plug_steps(plug, at(place("rp0"), place("rp0", 1)), NEW)
    assert [step.do.execute for step in steps] == [
        "getfd",
        "object-add",
        "getfd",
        "device_add",
        "getfd",
        "device_add",
    ]
    assert dict(steps[1].do.arguments) == {
        "qom-type": "iommufd",
        "id": f"{NAME}-iommufd",
        "fd": f"{NAME}-fd",
    }
    for step in added(steps):
        assert step["iommufd"] == f"{NAME}-iommufd"
        assert "host" not in step
    assert nodes(plug) == {
        f"{NAME}-fd": "/dev/iommu",
        f"{NAME}-fd0": "/dev/vfio/devices/vfio0",
        f"{NAME}-fd1": "/dev/vfio/devices/vfio1",
    }


def test_on_the_command_line_the_files_are_those_that_qemu_inherits() -> None:
    plug = group(function(0, "/dev/vfio/devices/vfio0"))
    steps = plug_steps(plug, at(place("rp0")), NEW)
    written = arguments(steps, {f"{NAME}-fd": 7, f"{NAME}-fd0": 8})
    assert [option for option in written if option.startswith("-")] == ["-object", "-device"]
    assert '"fd": "7"' in written[1]
    assert '"fd": "8"' in written[3]


def test_a_group_without_nodes_of_its_own_opens_nothing() -> None:
    assert nodes(group(function(0))) == {}


# the whole group or nothing


def names(vm: MemoryHypervisor) -> set[str]:
    monitor = vm.monitor
    return {n for n in (*monitor.devices, *monitor.objects) if n.startswith("vmplug-")}


@pytest.fixture
def vm() -> MemoryHypervisor:
    return MemoryHypervisor()


@pytest.fixture
def occupied(vm: MemoryHypervisor) -> GroupPlace:
    """Places of which the second is somebody else's meanwhile."""
    other = VFIODevices(
        id="00000000000000b2",
        node="/dev/vfio/27",
        devices=(VFIODevice(name="x", type=VFIODeviceType.NORMAL, bdf=Bdf(0, 9, 0, 0)),),
    )
    vm.plug(other, at(place("rp1")))
    return at(place("rp0"), place("rp1"))


def test_all_functions_come_and_all_go(vm: MemoryHypervisor) -> None:
    plug = group(function(0), function(1))
    vm.plug(plug, at(place("rp0"), place("rp0", 1)))
    assert names(vm) == {NAME, f"{NAME}-f1"}
    assert vm.find_devices() == {ID: True}
    vm.request_unplug(ID)
    assert vm.wait_unplugged([ID], 1.0) == {}
    assert names(vm) == set()


def test_a_refused_function_takes_the_others_out_again(
    vm: MemoryHypervisor, occupied: GroupPlace
) -> None:
    before = names(vm)
    with pytest.raises(CommandError, match="in use by vfio-pci"):
        vm.plug(group(function(0), function(1)), occupied)
    assert names(vm) == before


def test_a_guest_that_keeps_half_of_a_group_is_told_apart(
    vm: MemoryHypervisor, occupied: GroupPlace
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
    vm: MemoryHypervisor,
) -> None:
    vm.plug(group(function(0), function(1)), at(place("rp0"), place("rp0", 1)))
    vm.monitor.guest = Guest.SILENT
    for _ in range(2):
        vm.request_unplug(ID)
        assert vm.wait_unplugged([ID], 0.01) == {ID: "timeout"}
    vm.monitor.wake_guest()
    assert vm.wait_unplugged([ID], 1.0) == {}


def test_a_guest_that_refuses_is_told(vm: MemoryHypervisor) -> None:
    vm.plug(group(function(0)), at(place("rp0")))
    vm.monitor.guest = Guest.REFUSES
    vm.request_unplug(ID)
    assert vm.wait_unplugged([ID], 0.01) == {ID: "refused"}


def test_one_function_is_not_in_one_vm_twice(vm: MemoryHypervisor) -> None:
    vm.plug(group(function(0)), at(place("rp0")))
    again = VFIODevices(id="00000000000000b2", node="/dev/vfio/26", devices=(function(0),))
    with pytest.raises(CommandError, match="already attached"):
        vm.plug(again, at(place("rp1")))


def test_a_node_that_cannot_be_opened_is_told_before_anything_is_sent(
    vm: MemoryHypervisor,
) -> None:
    sent = len(vm.monitor.sent)
    with pytest.raises(AttributeReadError, match=r"/dev/(iommu|vfio/devices)"):
        vm.plug(group(function(0, "/dev/vfio/devices/vfio999")), at(place("rp0")))
    assert len(vm.monitor.sent) == sent
