"""One suite for the hypervisor in memory and for real QEMU: with a guest, and before its boot."""

from collections.abc import Iterator, Mapping, Sequence
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.contract.world import (
    MEMORY_SIDE_DEVICES,
    MemorySide,
    QemuSide,
    Refusal,
    Side,
    in_old_words,
    recorded,
)
from tests.support.disks import disk_image, qcow2_image
from tests.support.no_aio import without_aio
from tests.support.vm import QEMU, start_vm
from vmplug.address import PciPath, PciSlot, ScsiAddress, qemu_id
from vmplug.drivers.place import PciPlace, ScsiPlace
from vmplug.drivers.plug import Aio, BlockDrive, Cache, DiskFrontend, Throttle
from vmplug.drivers.ports import Command, UnplugFailure
from vmplug.errors import CommandError
from vmplug.host.block.formats import ImageFormat
from vmplug.hypervisor.fake.monitor import FakeHypervisor, FakeMonitor, Guest
from vmplug.hypervisor.qemu.graph import QUERY
from vmplug.hypervisor.qemu.running import Qemu

MIB = 1 << 20
UNPLUG_S = 60.0
AT_ONCE_S = 0.05
"""For a guest that will not answer anyway."""

ID = "00000000000000a1"
OTHER_ID = "00000000000000b2"
NAME = qemu_id(ID)
PERIPHERAL = "/machine/peripheral"

RP0 = PciPlace(bus="rp0", slot=PciSlot(0), path=PciPath.parse("10/00"))
RP1 = PciPlace(bus="rp1", slot=PciSlot(0), path=PciPath.parse("11/00"))
LUN3 = ScsiPlace(bus="scsi0.0", address=ScsiAddress(0, 3), path=PciPath.parse("05"))
LUN4 = ScsiPlace(bus="scsi0.0", address=ScsiAddress(1, 4), path=PciPath.parse("05"))

DiskPlace = PciPlace | ScsiPlace

real = pytest.mark.qemu


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return disk_image(tmp_path / "a.img", 2, "contract")


@pytest.fixture
def drive(image: Path) -> BlockDrive:
    return BlockDrive(
        id=ID, file=str(image), is_device=False, driver=DiskFrontend.VIRTIO_BLOCK, serial="A1"
    )


@pytest.fixture
def laden(drive: BlockDrive) -> BlockDrive:
    """A drive that needs every kind of part."""
    return replace(drive, iothread=True, throttle=Throttle(bps_total=50 * MIB, iops_write=900))


@pytest.fixture
def other_drive(tmp_path: Path) -> BlockDrive:
    file = disk_image(tmp_path / "b.img", 2, "other")
    return BlockDrive(
        id=OTHER_ID, file=str(file), is_device=False, driver=DiskFrontend.VIRTIO_BLOCK
    )


class Connected:
    """The product on one side, connected as long as the `with` lasts."""

    def __init__(self, side: Side) -> None:
        self.hypervisor = Qemu(side.monitor())

    def __enter__(self) -> Qemu:
        return self.hypervisor

    def __exit__(self, *exception: object) -> None:
        self.hypervisor.close()


def ask(side: Side, execute: str, **arguments: object) -> object:
    """A command of the tests' own that must succeed."""
    return send(side, command(execute, **arguments))


def send(side: Side, request: Command) -> object:
    answer = side.ask(request)
    assert not isinstance(answer, Refusal), answer
    return answer


def command(execute: str, **arguments: object) -> Command:
    return Command(execute, {key.replace("_", "-"): value for key, value in arguments.items()})


def add_node(side: Side, name: str) -> None:
    ask(side, "blockdev-add", node_name=name, driver="null-co")


def add_stranger(side: Side, place: DiskPlace, name: str = "stranger") -> None:
    """A disk of somebody else's."""
    add_node(side, f"{name}-node")
    ask(side, "device_add", id=name, drive=f"{name}-node", **front_end(place))


def front_end(place: DiskPlace) -> dict[str, object]:
    match place:
        case PciPlace():
            return {"driver": "virtio-blk-pci", "bus": place.bus, "addr": "0x0"}
        case ScsiPlace():
            address = {"scsi-id": place.address.scsi_id, "lun": place.address.lun}
            return {"driver": "scsi-hd", "bus": place.bus, "channel": 0, **address}


# what the VM offers


def test_memory_and_qemu_offer_the_same(side: Side) -> None:
    """The machine's name has QEMU's version in it, and a QEMU in memory has no iommufd."""
    with Connected(side) as vm:
        offer = vm.offer()
    memory = FakeHypervisor().offer()
    assert offer == replace(memory, machine=offer.machine, iommufd=offer.iommufd)


def test_every_port_is_offered_with_its_guest_path_and_free_slot(side: Side) -> None:
    with Connected(side) as vm:
        offer = vm.offer()
    assert [(port.bus, str(port.path), port.free) for port in offer.ports] == [
        (f"rp{index}", f"{0x10 + index:02x}", (PciSlot(0),)) for index in range(4)
    ]
    assert [(c.bus, str(c.path), c.used) for c in offer.controllers] == [
        ("scsi0.0", "05", frozenset())
    ]
    assert offer.shared_memory
    assert f"{offer.machine}-machine" == ask(side, "qom-get", path="/machine", property="type")


def takes_chardev_option(side: Side, option: str) -> bool:
    address = {"type": "unix", "data": {"path": "/nowhere/s"}}
    data = {"addr": address, "server": False, option: 1000}
    answer = side.ask(command("chardev-add", id="c0", backend={"type": "socket", "data": data}))
    if isinstance(answer, Refusal):
        return False
    ask(side, "chardev-remove", id="c0")
    return True


def test_a_chardev_takes_the_option_that_is_known_of_it(side: Side) -> None:
    with Connected(side) as vm:
        is_known = vm.abilities.reconnect_ms
    assert takes_chardev_option(side, "reconnect-ms") == is_known
    assert is_known or takes_chardev_option(side, "reconnect")


def test_iommufd_is_known_where_qemu_has_such_objects(side: Side) -> None:
    answer = side.ask(command("object-add", qom_type="iommufd", id="o0"))
    unknown = "Parameter 'qom-type' does not accept value 'iommufd'"
    with Connected(side) as vm:
        assert vm.abilities.iommufd == (answer != Refusal("GenericError", unknown))
    side.ask(command("object-del", id="o0"))  # where there is a /dev/iommu too


def test_what_others_plug_and_unplug_is_seen_in_the_next_offer(awake: Side) -> None:
    with Connected(awake) as vm:
        first = vm.offer()
        add_stranger(awake, RP1)
        add_stranger(awake, LUN3, "stranger-disk")

        occupied = vm.offer()

        assert [port.free for port in occupied.ports] == [
            (PciSlot(0),),
            (),
            (PciSlot(0),),
            (PciSlot(0),),
        ]
        assert [c.used for c in occupied.controllers] == [{ScsiAddress(0, 3)}]

        for name in ("stranger", "stranger-disk"):
            remove_stranger(awake, name)
        assert vm.offer() == first


def test_a_stranger_that_moved_is_seen_in_the_next_offer(awake: Side) -> None:
    with Connected(awake) as vm:
        add_stranger(awake, RP0)
        assert vm.offer().ports[0].free == ()

        remove_stranger(awake, "stranger")
        add_stranger(awake, RP1)
        vm.status()  # so that whatever events there were have come

        assert [port.free for port in vm.offer().ports[:2]] == [(PciSlot(0),), ()]


def remove_stranger(side: Side, name: str) -> None:
    """Needs a guest that answers."""
    ask(side, "device_del", id=name)
    side.wait_gone(name)
    ask(side, "blockdev-del", node_name=f"{name}-node")


def test_a_prelaunch_vm_tells_what_is_occupied_too(side: Side) -> None:
    add_stranger(side, RP0)
    add_stranger(side, LUN3, "stranger-disk")
    with Connected(side) as vm:
        offer = vm.offer()
    assert [port.free for port in offer.ports[:2]] == [(), (PciSlot(0),)]
    assert [c.used for c in offer.controllers] == [{ScsiAddress(0, 3)}]


# plugging


@pytest.mark.parametrize("place", [RP1, LUN3], ids=str)
def test_what_is_plugged_is_found_and_nothing_else_came(
    side: Side, drive: BlockDrive, place: DiskPlace
) -> None:
    before = side.parts()
    with Connected(side) as vm:
        assert vm.find_devices() == {}
        vm.plug(drive, place)
        assert vm.find_devices() == {ID: True}
        assert vm.find_drivers() == {ID: front_end(place)["driver"]}

    after = side.parts()
    assert after.vmplugs() == {NAME}
    assert after.devices == {**before.devices, NAME: front_end(place)["driver"]}
    assert after.objects == before.objects
    assert ask(side, "qom-get", path=f"{PERIPHERAL}/{NAME}", property="drive") == NAME
    bus = ask(side, "qom-get", path=f"{PERIPHERAL}/{NAME}", property="parent_bus")
    assert str(bus).rpartition("/")[2] == place.bus


def test_every_part_bears_the_name_of_its_device(side: Side, laden: BlockDrive) -> None:
    with Connected(side) as vm:
        vm.plug(laden, RP0)
        assert vm.find_devices() == {ID: True}
    parts = side.parts()
    assert parts.objects[f"{NAME}-limits"] == "throttle-group"
    assert parts.objects[f"{NAME}-thread"] == "iothread"
    assert {NAME, f"{NAME}-limit"} <= parts.nodes
    assert ask(side, "qom-get", path=f"{PERIPHERAL}/{NAME}", property="drive") == f"{NAME}-limit"


@pytest.mark.parametrize("place", [RP0, LUN4], ids=str)
def test_steps_are_exactly_what_plug_sends(
    side: Side, laden: BlockDrive, place: DiskPlace
) -> None:
    drive = laden if place is RP0 else replace(laden, iothread=False)
    vm, recorder = recorded(side)
    try:
        steps = vm.steps(drive, place)
        assert recorder.sent == []
        vm.plug(drive, place)
        assert recorder.sent == [step.do for step in steps]
    finally:
        vm.close()


def test_what_an_image_with_a_header_opened_is_looked_at_before_the_guest_sees_it(
    side: Side, drive: BlockDrive, tmp_path: Path
) -> None:
    image = qcow2_image(tmp_path / "a.qcow2", 2, "contract")
    named = replace(drive, file=str(image), format=ImageFormat.QCOW2)
    vm, recorder = recorded(side)
    try:
        vm.plug(named, RP0)
        *opening, shows = [step.do for step in vm.steps(named, RP0)]
        assert recorder.sent == [*opening, QUERY, shows]
    finally:
        vm.close()


def test_steps_never_leave_the_slot_to_qemu(side: Side, drive: BlockDrive) -> None:
    with Connected(side) as vm:
        virtio, scsi = vm.steps(drive, RP0)[-1], vm.steps(drive, LUN4)[-1]
    assert virtio.do.arguments["addr"] == "0x0"
    where = [scsi.do.arguments[key] for key in ("channel", "scsi-id", "lun")]
    assert where == [0, 1, 4]


def test_undoing_the_steps_backwards_leaves_nothing(awake: Side, laden: BlockDrive) -> None:
    before = awake.parts()
    with Connected(awake) as vm:
        steps = vm.steps(laden, RP0)
    for step in steps:
        send(awake, step.do)
    for step in reversed(steps):
        assert step.undo
        send(awake, step.undo)
        if step.undo.execute == "device_del":
            awake.wait_gone(NAME)
    assert awake.parts() == before


def test_the_same_device_twice_is_refused(side: Side, drive: BlockDrive) -> None:
    with Connected(side) as vm:
        vm.plug(drive, RP0)
        before = side.parts()

        with pytest.raises(CommandError) as caught:
            vm.plug(drive, RP1)

        assert (caught.value.command, caught.value.error_class) == ("blockdev-add", "GenericError")
        assert f"Duplicate nodes with node-name='{NAME}'" in caught.value.desc
        assert caught.value.hint
        assert "reconcile" in caught.value.hint
        assert side.parts() == before


def test_an_id_that_is_taken_is_refused(side: Side, drive: BlockDrive) -> None:
    add_node(side, "stranger-node")
    ask(side, "device_add", id=NAME, drive="stranger-node", **front_end(LUN3))
    before = side.parts()
    with Connected(side) as vm, pytest.raises(CommandError) as caught:
        vm.plug(drive, RP1)
    assert (caught.value.command, caught.value.error_class) == ("device_add", "GenericError")
    assert caught.value.desc == f"Duplicate device ID '{NAME}'"
    assert side.parts() == before


@pytest.mark.parametrize(
    "place", [replace(RP0, bus="rp99"), replace(LUN3, bus="scsi99.0")], ids=str
)
def test_a_bus_that_does_not_exist_is_refused(
    side: Side, drive: BlockDrive, place: DiskPlace
) -> None:
    before = side.parts()
    with Connected(side) as vm, pytest.raises(CommandError) as caught:
        vm.plug(drive, place)
    assert (caught.value.command, caught.value.error_class) == ("device_add", "GenericError")
    assert caught.value.desc == f"Bus '{place.bus}' not found"
    assert side.parts() == before


def test_an_occupied_port_is_refused_and_slot_1_is_never_tried(
    side: Side, drive: BlockDrive
) -> None:
    add_stranger(side, RP0)
    before = side.parts()
    with Connected(side) as vm, pytest.raises(CommandError) as caught:
        vm.plug(drive, RP0)
    assert caught.value.error_class == "GenericError"
    assert caught.value.desc == (
        "PCI: slot 0 function 0 not available for virtio-blk-pci, "
        "in use by virtio-blk-pci,id=stranger"
    )
    assert caught.value.hint
    assert side.parts() == before


def test_a_used_lun_is_refused(side: Side, drive: BlockDrive) -> None:
    add_stranger(side, LUN3)
    before = side.parts()
    with Connected(side) as vm, pytest.raises(CommandError) as caught:
        vm.plug(drive, LUN3)
    assert (caught.value.error_class, caught.value.desc) == (
        "GenericError",
        "lun already used by 'stranger'",
    )
    assert side.parts() == before


def obstruct(side: Side, step: str) -> Sequence[Command]:
    """Make one step of a laden drive fail; gives the commands that clear the way again."""
    match step:
        case "limits" | "thread":
            ask(side, "object-add", qom_type="iothread", id=f"{NAME}-{step}")
            return [command("object-del", id=f"{NAME}-{step}")]
        case "node" | "limit":
            name = NAME if step == "node" else f"{NAME}-limit"
            add_node(side, name)
            return [command("blockdev-del", node_name=name)]
        case _:
            add_stranger(side, RP0)
            return [
                command("device_del", id="stranger"),
                command("blockdev-del", node_name="stranger-node"),
            ]


@pytest.mark.parametrize(
    ("step", "refused"),
    [
        ("limits", "object-add"),
        ("thread", "object-add"),
        ("node", "blockdev-add"),
        ("limit", "blockdev-add"),
        ("device", "device_add"),
    ],
)
def test_a_failure_at_any_step_undoes_the_steps_before(
    side: Side, laden: BlockDrive, step: str, refused: str
) -> None:
    obstruct(side, step)
    before = side.parts()
    with Connected(side) as vm:
        assert len(vm.steps(laden, RP0)) == 5
        with pytest.raises(CommandError) as caught:
            vm.plug(laden, RP0)
    assert caught.value.command == refused
    assert side.parts() == before


@pytest.mark.parametrize("step", ["limits", "thread", "node", "limit", "device"])
def test_once_the_obstacle_is_gone_the_same_plug_succeeds(
    awake: Side, laden: BlockDrive, step: str
) -> None:
    clearing = obstruct(awake, step)
    with Connected(awake) as vm:
        with pytest.raises(CommandError):
            vm.plug(laden, RP0)
        for undo in clearing:
            send(awake, undo)
            if undo.execute == "device_del":
                awake.wait_gone("stranger")
        vm.plug(laden, RP0)
        assert vm.find_devices() == {ID: True}


# unplugging


@pytest.mark.parametrize("place", [RP0, LUN3], ids=str)
def test_unplugging_leaves_nothing(awake: Side, drive: BlockDrive, place: DiskPlace) -> None:
    before = awake.parts()
    with Connected(awake) as vm:
        vm.plug(drive, place)
        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], UNPLUG_S) == {}
        assert vm.find_devices() == {}
    assert awake.parts() == before


def test_limits_and_thread_go_with_the_device(awake: Side, laden: BlockDrive) -> None:
    before = awake.parts()
    with Connected(awake) as vm:
        vm.plug(laden, RP0)
        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], UNPLUG_S) == {}
    assert awake.parts() == before


def test_several_go_together(
    awake: Side, laden: BlockDrive, drive: BlockDrive, other_drive: BlockDrive
) -> None:
    before = awake.parts()
    with Connected(awake) as vm:
        vm.plug(laden, RP0)
        vm.plug(other_drive, LUN3)
        assert not vm.request_unplug([ID])
        assert not vm.request_unplug([OTHER_ID])
        assert vm.wait_unplugged([ID, OTHER_ID], UNPLUG_S) == {}
    assert awake.parts() == before


def test_a_place_can_be_used_again_and_again(awake: Side, drive: BlockDrive) -> None:
    with Connected(awake) as vm:
        for _ in range(3):
            vm.plug(drive, RP0)
            assert not vm.request_unplug([ID])
            assert vm.wait_unplugged([ID], UNPLUG_S) == {}


def test_a_scsi_disk_needs_no_guest_to_go(side: Side, drive: BlockDrive) -> None:
    side.silence()
    before = side.parts()
    with Connected(side) as vm:
        vm.plug(drive, LUN3)
        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], UNPLUG_S) == {}
    assert side.parts() == before


def test_a_silent_guest_keeps_the_device_whole(side: Side, laden: BlockDrive) -> None:
    side.silence()
    with Connected(side) as vm:
        vm.plug(laden, RP0)
        before = side.parts()

        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], AT_ONCE_S) == {ID: UnplugFailure.TIMEOUT}
        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], AT_ONCE_S) == {ID: UnplugFailure.TIMEOUT}

        assert vm.find_devices() == {ID: True}
        assert side.parts() == before


def test_a_guest_that_wakes_lets_go_of_what_it_was_asked_for(
    awake: Side, laden: BlockDrive
) -> None:
    before = awake.parts()
    with Connected(awake) as vm:
        vm.plug(laden, RP0)
        awake.silence()
        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], AT_ONCE_S) == {ID: UnplugFailure.TIMEOUT}

        awake.wake()

        assert vm.wait_unplugged([ID], UNPLUG_S) == {}
    assert awake.parts() == before


def test_what_went_while_nobody_listened_is_noticed(awake: Side, laden: BlockDrive) -> None:
    before = awake.parts()
    awake.silence()
    with Connected(awake) as vm:
        vm.plug(laden, RP0)
        assert not vm.request_unplug([ID])
    awake.wake()
    awake.wait_gone(NAME)

    with Connected(awake) as vm:
        assert vm.find_devices() == {ID: False}
        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], UNPLUG_S) == {}
    assert awake.parts() == before


def test_only_those_are_left_that_the_guest_keeps(
    side: Side, drive: BlockDrive, other_drive: BlockDrive
) -> None:
    side.silence()
    with Connected(side) as vm:
        vm.plug(drive, RP0)
        vm.plug(other_drive, LUN3)
        assert not vm.request_unplug([ID])
        assert not vm.request_unplug([OTHER_ID])
        assert vm.wait_unplugged([ID, OTHER_ID], AT_ONCE_S) == {ID: UnplugFailure.TIMEOUT}
        assert vm.find_devices() == {ID: True}
    assert side.parts().vmplugs() == {NAME}


def test_a_device_that_is_not_there_is_unplugged_already(side: Side) -> None:
    before = side.parts()
    with Connected(side) as vm:
        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], UNPLUG_S) == {}
        assert vm.wait_unplugged([], UNPLUG_S) == {}
    assert side.parts() == before


# remains


@pytest.mark.parametrize("count", range(1, 5))
def test_parts_without_a_device_are_found_and_taken_away(
    side: Side, laden: BlockDrive, count: int
) -> None:
    before = side.parts()
    with Connected(side) as vm:
        for step in vm.steps(laden, RP0)[:count]:
            send(side, step.do)
        assert side.parts() != before

        assert vm.find_devices() == {ID: False}
        assert vm.wait_unplugged([ID], UNPLUG_S) == {}

        assert vm.find_devices() == {}
    assert side.parts() == before


def test_what_others_have_is_neither_found_nor_taken_away(side: Side, drive: BlockDrive) -> None:
    add_stranger(side, RP1)
    add_node(side, "stranger-orphan")
    ask(side, "object-add", qom_type="iothread", id="stranger-thread")
    before = side.parts()
    with Connected(side) as vm:
        vm.plug(drive, LUN3)
        assert vm.find_devices() == {ID: True}
        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], UNPLUG_S) == {}
        assert vm.find_devices() == {}
    assert side.parts() == before


# size and state


@pytest.mark.parametrize("limited", [False, True], ids=["plain", "limited"])
def test_resize_reaches_the_node(side: Side, laden: BlockDrive, *, limited: bool) -> None:
    drive = laden if limited else replace(laden, throttle=None)
    with Connected(side) as vm:
        vm.plug(drive, RP0)
        vm.resize(ID, 4 * MIB)
    assert side.size_of(f"{NAME}-limit" if limited else NAME) == 4 * MIB


def test_resizing_what_is_not_there_is_refused(side: Side) -> None:
    before = side.parts()
    with Connected(side) as vm, pytest.raises(CommandError) as caught:
        vm.resize(ID, 4 * MIB)
    assert caught.value.error_class == "DeviceNotFound"
    assert caught.value.desc == f"Device '{PERIPHERAL}/{NAME}' not found"
    assert side.parts() == before


def test_the_run_state_is_qemus_word(awake: Side) -> None:
    with Connected(awake) as vm:
        assert vm.status() == "running"
        awake.silence()
        assert vm.status() == "paused"
        awake.wake()
        assert vm.status() == "running"


# only in memory: real QEMU cannot be made to do it at will


def test_a_guest_that_refuses_is_told_apart_from_a_silent_one(drive: BlockDrive) -> None:
    hypervisor = FakeHypervisor()
    hypervisor.plug(drive, RP0)
    hypervisor.monitor.guest = Guest.REFUSES
    assert not hypervisor.request_unplug([ID])
    assert hypervisor.wait_unplugged([ID], UNPLUG_S) == {ID: UnplugFailure.REFUSED}
    assert hypervisor.find_devices() == {ID: True}

    hypervisor.monitor.guest = Guest.ANSWERS
    assert not hypervisor.request_unplug([ID])
    assert hypervisor.wait_unplugged([ID], UNPLUG_S) == {}


def test_a_refusal_of_the_past_does_not_count(drive: BlockDrive) -> None:
    hypervisor = FakeHypervisor()
    hypervisor.plug(drive, RP0)
    hypervisor.monitor.guest = Guest.REFUSES
    assert not hypervisor.request_unplug([ID])
    hypervisor.monitor.guest = Guest.SILENT
    assert not hypervisor.request_unplug([ID])
    assert hypervisor.wait_unplugged([ID], AT_ONCE_S) == {ID: UnplugFailure.TIMEOUT}


@pytest.mark.parametrize("name", ["object-add", "blockdev-add", "device_add"])
def test_fail_at_refuses_a_command_once(laden: BlockDrive, name: str) -> None:
    hypervisor = FakeHypervisor()
    before = FakeMonitor()
    hypervisor.monitor.fail_at = name
    with pytest.raises(CommandError) as caught:
        hypervisor.plug(laden, RP0)
    assert caught.value.command == name
    assert hypervisor.find_devices() == {}
    assert hypervisor.monitor.devices == before.devices

    hypervisor.plug(laden, RP0)
    assert hypervisor.find_devices() == {ID: True}


def test_ports_and_controller_are_as_many_as_wanted() -> None:
    offer = FakeHypervisor(root_ports=2, scsi=False).offer()
    assert [port.bus for port in offer.ports] == ["rp0", "rp1"]
    assert offer.controllers == ()


# command by command


def blk(name: str, drive: str, bus: str, **more: object) -> Command:
    where = {"driver": "virtio-blk-pci", "bus": bus, "addr": "0x0"}
    return command("device_add", id=name, drive=drive, **where, **more)


def scsi(name: str, drive: str, lun: int, bus: str = "scsi0.0") -> Command:
    where = {"driver": "scsi-hd", "bus": bus, "channel": 0, "scsi-id": 0, "lun": lun}
    return command("device_add", id=name, drive=drive, **where)


def node(name: str) -> Command:
    return command("blockdev-add", node_name=name, driver="null-co")


def limited_node(name: str, group: str, file: str) -> Command:
    return command(
        "blockdev-add", node_name=name, driver="throttle", throttle_group=group, file=file
    )


def qom_get(path: str, name: str) -> Command:
    return command("qom-get", path=path, property=name)


CONVERSATIONS: dict[str, list[Command]] = {
    "nodes": [
        node("n0"),
        node("n0"),
        command("blockdev-del", node_name="nope"),
        command("blockdev-del", node_name="n0"),
        command("blockdev-del", node_name="n0"),
    ],
    "virtio disks": [
        node("n0"),
        node("n1"),
        blk("b0", "nope", "rp0"),
        blk("b0", "n0", "rp9"),
        blk("b0", "n0", "rp0"),
        blk("b0", "n1", "rp1"),
        blk("b0", "n1", "rp9"),
        blk("b0", "nope", "rp0"),
        blk("b1", "n1", "rp0"),
        blk("b1", "nope", "rp0"),
        command("blockdev-del", node_name="n0"),
        command("device_del", id="b1"),
        qom_get(f"{PERIPHERAL}/b0", "drive"),
        qom_get(f"{PERIPHERAL}/b0", "addr"),
        qom_get(f"{PERIPHERAL}/b0", "parent_bus"),
        qom_get(f"{PERIPHERAL}/b0", "nope"),
        qom_get(f"{PERIPHERAL}/rp0/rp0", "child[0]"),
        qom_get(f"{PERIPHERAL}/b1", "drive"),
        command("qom-list", path=f"{PERIPHERAL}/b1"),
    ],
    "scsi disks": [
        node("n0"),
        node("n1"),
        scsi("s0", "nope", 3),
        scsi("s0", "n0", 3, "scsi9.0"),
        scsi("s0", "n0", 3),
        scsi("s0", "n1", 4),
        scsi("s1", "n1", 3),
        scsi("s1", "n1", 4),
        qom_get(f"{PERIPHERAL}/s1", "drive"),
        qom_get(f"{PERIPHERAL}/s1", "scsi-id"),
        qom_get(f"{PERIPHERAL}/s1", "lun"),
        qom_get(f"{PERIPHERAL}/s1", "parent_bus"),
        command("blockdev-del", node_name="n1"),
    ],
    "limits": [
        command("object-add", qom_type="throttle-group", id="g0", limits={"bps-total": MIB}),
        command("object-add", qom_type="throttle-group", id="g0", limits={"bps-total": MIB}),
        node("n0"),
        limited_node("f0", "g9", "n0"),
        limited_node("f0", "g0", "n9"),
        limited_node("f0", "g0", "n0"),
        command("object-del", id="g0"),
        command("blockdev-del", node_name="n0"),
        blk("b0", "f0", "rp0"),
        command("blockdev-del", node_name="f0"),
        command("object-del", id="g9"),
    ],
    "threads": [
        command("object-add", qom_type="iothread", id="t0"),
        command("object-add", qom_type="iothread", id="t0"),
        node("n0"),
        blk("b0", "n0", "rp0", iothread="t9"),
        blk("b0", "n0", "rp0", iothread="t0"),
        command("object-del", id="t0"),  # QEMU takes it away from under the device
    ],
    "resizing": [
        node("n0"),
        command("block_resize", node_name="n9", size=4 * MIB),
        qom_get(f"{PERIPHERAL}/b9", "drive"),
    ],
    "nothing there": [
        command("device_del", id="nope"),
        command("object-del", id="nope"),
        command("qom-list", path="/nope"),
        command("x-nonsense"),
    ],
}


@real
@pytest.mark.parametrize("topic", CONVERSATIONS)
def test_memory_answers_every_command_as_qemu_does(
    prelaunch_side: QemuSide, memory_side: MemorySide, topic: str
) -> None:
    def answers(side: Side) -> list[tuple[str, Any]]:
        asked = CONVERSATIONS[topic]
        return [(f"{c.execute} {dict(c.arguments)}", in_old_words(side.ask(c))) for c in asked]

    assert answers(memory_side) == answers(prelaunch_side)


@real
def test_memory_emits_the_events_that_qemu_does(
    guest_side: QemuSide, memory_side: MemorySide
) -> None:
    def deletions(side: Side) -> list[Mapping[str, Any]]:
        """What two unplugs say."""
        for request in (node("n0"), node("n1"), scsi("s0", "n0", 0), blk("b0", "n1", "rp0")):
            send(side, request)
        said = []
        for name in ("s0", "b0"):
            ask(side, "device_del", id=name)
            said += side.deletions(name)
        return said

    assert deletions(memory_side) == deletions(guest_side)


# what vmplug chose and cannot be had


@pytest.fixture(params=["memory", pytest.param("qemu", marks=real)])
def side_without_aio(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    """A VM on a host that has no AIO context left."""
    if request.param == "memory":
        memory = MemorySide()
        memory.machine.aio = False
        yield memory
        return
    qemu = without_aio(QEMU, tmp_path)
    with start_vm(tmp_path, guest=False, devices=MEMORY_SIDE_DEVICES, qemu=qemu) as vm:
        yield QemuSide(vm)


@pytest.mark.parametrize("place", [RP0, LUN3], ids=["virtio", "scsi"])
def test_a_disk_is_plugged_with_threads_where_native_aio_was_only_vmplugs_choice(
    side_without_aio: Side,
    laden: BlockDrive,
    place: DiskPlace,
    logged: BufferingHandler,
) -> None:
    side = side_without_aio
    native = replace(laden, cache=Cache.NONE, aio=Aio.NATIVE, iothread=place is RP0)
    before = side.parts()
    with Connected(side) as vm:
        try:  # QEMU 10 uses threads by itself
            vm.plug(native, place)
        except CommandError as error:
            assert "Unable to use native AIO" in error.desc  # noqa: PT017
            assert side.parts() == before
            vm.plug(replace(native, aio_is_choice=True), place)
            (record,) = logged.buffer
            assert "vmplug uses aio=threads" in record.getMessage()
    assert NAME in side.parts().devices


def test_a_disk_is_plugged_as_planned_where_there_is_native_aio(
    side: Side, drive: BlockDrive, logged: BufferingHandler
) -> None:
    with Connected(side) as vm:
        vm.plug(replace(drive, cache=Cache.NONE, aio=Aio.NATIVE, aio_is_choice=True), RP0)
    assert NAME in side.parts().devices
    assert logged.buffer == []
