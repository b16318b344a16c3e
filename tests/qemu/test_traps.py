"""Rules of QEMU that were learned the hard way: each test is a trap that must not snap."""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import pytest

from tests.contract.sandbox import Hooked, Noticed, Sandbox
from tests.contract.world import QemuSide, qemu_parts
from tests.qemu.conftest import Lab, opened_by_another_qemu, request
from tests.support.disks import disk_image
from tests.support.raw_qmp import RawQmp
from tests.support.vm import Device, GuestVm, pci_bridge, root_ports, scsi_controller, start_vm
from vmplug.address import ScsiAddress, device_id_of
from vmplug.devnum import DevNum
from vmplug.drivers.place import Offer
from vmplug.drivers.ports import Command
from vmplug.errors import (
    CommandError,
    ConnectError,
    HypervisorError,
    NoFreePort,
    NoSuchDevice,
    ProtocolError,
    StateError,
    UnplugTimeout,
)
from vmplug.host.finding import Code
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.journal.state import State
from vmplug.manager.manager import DeviceManager
from vmplug.manager.reconcile import RepairOutcome
from vmplug.oci.info import DeviceInfo, DevType

pytestmark = pytest.mark.qemu

AT_ONCE_S, SOON_S, PATIENT_S = 0.3, 60.0, 300.0
"""For what will not answer anyway."""
SCSI = {"block-driver": "virtio-scsi"}
PERIPHERAL = "/machine/peripheral"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return disk_image(tmp_path / "a.img", 1, "trap")


@contextmanager
def sleeping_vm(
    directory: Path, devices: list[Device], *, machine: str = "q35"
) -> Iterator[GuestVm]:
    """A VM that has not begun to run and has nothing to boot."""
    directory.mkdir(exist_ok=True)
    with start_vm(directory, machine=machine, devices=devices, guest=False, paused=True) as vm:
        yield vm


def offer_of(vm: GuestVm) -> Offer:
    hypervisor = Qemu.connect(str(vm.qmp_path))
    try:
        return hypervisor.offer()
    finally:
        hypervisor.close()


def add_stranger(lab: Lab, bus: str, **more: str) -> None:
    """A disk of somebody else's; without an id it is anonymous."""
    lab.query("blockdev-add", **{"node-name": "stranger-node", "driver": "null-co"})
    where = {"driver": "virtio-blk-pci", "bus": bus, "addr": "0x0"}
    lab.query("device_add", drive="stranger-node", **where, **more)


def behind(lab: Lab, bus: str) -> list[tuple[int, int]]:
    """Slot and function of everything behind a root port, as QEMU says."""
    (root_bus,) = lab.query("query-pci")
    (port,) = [device for device in root_bus["devices"] if device["qdev_id"] == bus]
    return [(d["slot"], d["function"]) for d in port["pci_bridge"].get("devices", [])]


# places


def test_an_occupied_port_is_an_error_and_never_slot_1(lab: Lab, image: Path) -> None:
    held = lab.attach(disk_image(image.with_name("held.img"), 1, "held"))
    lab.devices.plan([request(image)])
    add_stranger(lab, "rp1", id="stranger")
    before = lab.picture()

    with pytest.raises(CommandError) as caught:
        lab.attach(image)  # the manager remembers that rp1 was free

    assert caught.value.desc == (
        "PCI: slot 0 function 0 not available for virtio-blk-pci, "
        "in use by virtio-blk-pci,id=stranger"
    )
    assert caught.value.hint
    assert lab.picture() == before
    assert behind(lab, "rp1") == [(0, 0)]

    attachment = lab.attach(image)
    assert str(attachment.guest_address) == "PCI 12/00"
    assert lab.seen(attachment, of=3).pci_path == "12/00"
    for one in (held, attachment):
        lab.devices.detach(one.id)


@pytest.mark.parametrize("name", [{"id": "stranger"}, {}], ids=["named", "anonymous"])
def test_a_port_that_somebody_occupies_is_left_out(
    tmp_path: Path, image: Path, name: Mapping[str, str]
) -> None:
    """An anonymous device could not be taken away again from a guest that runs on."""
    with sleeping_vm(tmp_path / "vm", root_ports(2)) as vm:
        lab = Sandbox(tmp_path, side=QemuSide(vm))
        vm.oracle.execute("blockdev-add", {"node-name": "n", "driver": "null-co"})
        place = {"bus": "rp0", "addr": "0x0"}
        vm.oracle.execute("device_add", driver="virtio-blk-pci", drive="n", **place, **name)
        try:
            attachment = lab.devices.attach(request(image))
            assert str(attachment.guest_address) == "PCI 11/00"
            before = lab.picture()
            with pytest.raises(NoFreePort):
                lab.devices.attach(lab.disk("more.img"))
            assert lab.picture() == before
        finally:
            lab.close()


TOPOLOGIES: dict[str, tuple[str, list[Device], list[tuple[str, str]]]] = {
    "a bridge without its hot-plug controller": (
        "pc",
        [{**pci_bridge()[0], "shpc": False}],
        [],
    ),
    "one that says how large its windows are to be": (
        "q35",
        [
            {
                **pci_bridge()[0],
                "bus": "pcie.0",
                "shpc": False,
                "mem-reserve": 1 << 20,
                "pref64-reserve": 1 << 20,
            }
        ],
        [("br0", "10")],
    ),
    "a bridge": ("pc", pci_bridge(), [("br0", "10")]),
    "a bridge of a q35": ("q35", [{**pci_bridge()[0], "bus": "pcie.0"}], [("br0", "10")]),
    "a port without hot-plug": (
        "q35",
        [{**root_ports(1)[0], "hotplug": False}, *root_ports(2)[1:]],
        [("rp1", "11")],
    ),
    "a port behind an expander bus": (
        "q35",
        [
            {"driver": "pxb-pcie", "id": "pxb", "bus": "pcie.0", "addr": "0x9", "bus_nr": 64},
            {**root_ports(2)[1], "bus": "pxb", "addr": "0x0"},
            *root_ports(1),
        ],
        [("rp0", "10"), ("rp1", "40:00")],
    ),
    "a switch": (
        "q35",
        [
            *root_ports(2),
            {"driver": "x3130-upstream", "id": "up0", "bus": "rp1", "addr": "0x0"},
            {
                "driver": "xio3130-downstream",
                "id": "dn0",
                "bus": "up0",
                "addr": "0x2",
                "chassis": 7,
                "slot": 7,
            },
            {
                "driver": "xio3130-downstream",
                "id": "dn1",
                "bus": "up0",
                "addr": "0x1",
                "chassis": 8,
                "slot": 8,
            },
        ],
        [("rp0", "10"), ("dn1", "11/00/01"), ("dn0", "11/00/02")],
    ),
    "a bridge behind a port": (
        "q35",
        [*root_ports(1), {"driver": "pcie-pci-bridge", "id": "br0", "bus": "rp0", "addr": "0x0"}],
        [("br0", "10/00")],
    ),
    "ports that are functions": (
        "q35",
        root_ports(16)[:3],
        [("rp0", "10"), ("rp1", "10.1"), ("rp2", "10.2")],
    ),
    "nothing to plug into": ("q35", [], []),
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_only_ports_that_a_guest_can_use_are_offered(tmp_path: Path, topology: str) -> None:
    machine, devices, expected = TOPOLOGIES[topology]
    with sleeping_vm(tmp_path, devices, machine=machine) as vm:
        offer = offer_of(vm)
    offered = {port.bus: port for port in offer.ports if port.free}
    assert [(bus, str(port.path)) for bus, port in offered.items()] == expected
    for bus, port in offered.items():
        slots = [place.slot for place in port.free]
        assert slots == (list(range(1, 32)) if bus.startswith("br") else [0])


@pytest.mark.parametrize(
    ("machine", "devices"),
    [
        ("q35", []),
        ("pc", [{**pci_bridge()[0], "shpc": False}]),
        ("q35", [{**root_ports(1)[0], "hotplug": False}]),
    ],
    ids=["nothing", "no shpc", "no hot-plug"],
)
def test_a_vm_without_a_port_is_told(
    tmp_path: Path, image: Path, machine: str, devices: list[Device]
) -> None:
    with sleeping_vm(tmp_path / "vm", devices, machine=machine) as vm:
        lab = Sandbox(tmp_path, side=QemuSide(vm))
        before = lab.picture()
        try:
            with pytest.raises(NoFreePort) as caught:
                lab.devices.attach(request(image))
        finally:
            lab.close()
        assert caught.value.hint
        assert lab.picture() == before


def test_slots_of_a_bridge_that_somebody_has_are_left_out(tmp_path: Path) -> None:
    occupants: list[Device] = [
        {"driver": "virtio-rng-pci", "id": "first", "bus": "br0", "addr": "0x1"},
        {"driver": "virtio-rng-pci", "bus": "br0", "addr": "0x3.1"},
        {"driver": "pci-bridge", "id": "br1", "bus": "br0", "addr": "0x1f", "chassis_nr": 2},
    ]
    with sleeping_vm(tmp_path, [*pci_bridge(), *occupants], machine="pc") as vm:
        outer, inner = offer_of(vm).ports
    assert (outer.bus, str(outer.path)) == ("br0", "10")
    assert {place.slot for place in outer.free} == set(range(1, 32)) - {1, 3, 0x1F}
    assert (inner.bus, str(inner.path)) == ("br1", "10/1f")
    assert len(inner.free) == 31


CONTROLLER: Device = {"driver": "virtio-scsi-pci", "id": "scsi1"}


def test_every_scsi_controller_is_offered_with_its_path(tmp_path: Path) -> None:
    devices: list[Device] = [
        *scsi_controller(),
        *root_ports(1),
        {**CONTROLLER, "bus": "rp0", "addr": "0x0"},
        {"driver": "pxb-pcie", "id": "pxb", "bus": "pcie.0", "addr": "0x9", "bus_nr": 64},
        {**root_ports(2)[1], "bus": "pxb", "addr": "0x0"},
        {**CONTROLLER, "id": "scsi2", "bus": "rp1", "addr": "0x0"},
        {"driver": "scsi-cd", "bus": "scsi1.0", "channel": 0, "scsi-id": 2, "lun": 7},
        {"driver": "scsi-cd", "bus": "scsi1.0", "channel": 0, "scsi-id": 2, "lun": 300},
    ]
    with sleeping_vm(tmp_path, devices) as vm:
        offer = offer_of(vm)
    assert [(c.bus, str(c.path), c.used) for c in offer.controllers] == [
        ("scsi0.0", "08", frozenset()),
        ("scsi1.0", "10/00", {ScsiAddress(2, 7)}),
        ("scsi2.0", "40:00/00", frozenset()),
    ]


@pytest.mark.parametrize(
    ("backends", "is_shared"),
    [([], False), ([True], True), ([False], False), ([True, False], False)],
    ids=["unsaid", "shared", "private", "half"],
)
def test_memory_is_shared_only_if_all_of_it_is(
    tmp_path: Path, backends: list[bool], *, is_shared: bool
) -> None:
    extra = []
    for index, share in enumerate(backends):
        backend = {"qom-type": "memory-backend-memfd", "id": f"m{index}", "size": 128 << 20}
        extra += ["-object", json.dumps({**backend, "share": share})]
        extra += ["-numa", f"node,memdev=m{index}"]
    memory = f"{128 * max(len(backends), 1)}M"
    with start_vm(tmp_path, extra=extra, guest=False, paused=True, memory=memory) as vm:
        assert offer_of(vm).shared_memory is is_shared


# guests that do not answer


def test_a_paused_vm_keeps_a_disk_until_it_runs(lab: Lab, image: Path) -> None:
    attachment = lab.attach(image)
    lab.seen(attachment)
    parts = lab.side.parts()
    lab.query("stop")

    for _ in range(2):
        with pytest.raises(UnplugTimeout) as caught:
            lab.devices.detach(attachment.id, timeout_s=AT_ONCE_S)
        assert caught.value.ids == (attachment.device_id,)
        assert caught.value.hint
        assert "paused" in caught.value.hint
        (listed,) = lab.devices.attachments()
        assert (listed.id, listed.state) == (attachment.id, State.DETACHING)
        assert lab.side.parts() == parts

    other = lab.attach(disk_image(image.with_name("b.img"), 1, "other"))
    assert str(other.guest_address) == "PCI 11/00"
    with pytest.raises(StateError, match="is detaching"):
        lab.attach(image)

    lab.query("cont")
    lab.devices.detach(attachment.id)
    assert [a.id for a in lab.devices.attachments()] == [other.id]
    assert lab.seen(other).marker == "other"
    again = lab.attach(image)
    assert str(again.guest_address) == "PCI 10/00"
    assert lab.seen(again, of=2).marker == "trap"
    lab.devices.detach_owner("lab-1")


def test_what_is_attached_to_a_paused_vm_is_seen_when_it_runs(lab: Lab, image: Path) -> None:
    lab.query("stop")
    attachment = lab.attach(image)
    lab.query("cont")
    assert lab.seen(attachment).marker == "trap"
    lab.devices.detach(attachment.id)


def test_a_scsi_disk_goes_from_a_paused_vm(lab: Lab, image: Path) -> None:
    before = lab.picture()
    lab.query("stop")
    attachment = lab.attach(image, SCSI)
    lab.devices.detach(attachment.id)
    assert lab.picture() == before


def test_a_vm_that_never_ran_says_so(tmp_path: Path, image: Path) -> None:
    with sleeping_vm(tmp_path / "vm", root_ports(1)) as vm:
        lab = Sandbox(tmp_path, side=QemuSide(vm))
        try:
            attachment = lab.devices.attach(request(image))
            for _ in range(2):
                with pytest.raises(UnplugTimeout) as caught:
                    lab.devices.detach(attachment.id, timeout_s=AT_ONCE_S)
                assert "prelaunch" in (caught.value.hint or "")
            (repair,) = lab.devices.reconcile(timeout_s=AT_ONCE_S)
            assert repair.outcome is RepairOutcome.STILL_DETACHING
            assert lab.vmplugs() == {f"vmplug-{attachment.device_id}"}
        finally:
            lab.close()


def test_the_event_of_the_inner_half_is_not_the_devices(lab: Lab, image: Path) -> None:
    """virtio says DEVICE_DELETED twice, and first of a part that has no id."""
    before = lab.picture()
    attachment = lab.attach(image)
    lab.seen(attachment)
    lab.guest_vm.oracle.events.clear()
    lab.devices.detach(attachment.id)
    assert lab.picture() == before
    name = f"vmplug-{attachment.device_id}"
    lab.guest_vm.oracle.wait_event("DEVICE_DELETED", device=name, path=f"{PERIPHERAL}/{name}")
    (inner,) = [e["data"] for e in lab.guest_vm.oracle.events if e["event"] == "DEVICE_DELETED"]
    assert inner == {"path": f"{PERIPHERAL}/{name}/virtio-backend"}


def test_the_deletion_of_another_device_is_not_waited_for(lab: Lab, image: Path) -> None:
    attachment = lab.attach(image)
    scsi = lab.attach(disk_image(image.with_name("b.img"), 1, "scsi"), SCSI)
    lab.query("stop")
    with pytest.raises(UnplugTimeout) as caught:
        lab.devices.detach_all([attachment.id, scsi.id], timeout_s=AT_ONCE_S)
    assert caught.value.ids == (attachment.device_id,)
    assert [a.id for a in lab.devices.attachments()] == [attachment.id]
    assert lab.vmplugs() == {f"vmplug-{attachment.device_id}"}


def test_who_waits_for_a_silent_guest_keeps_nobody_waiting(lab: Lab, image: Path) -> None:
    asked = threading.Event()

    def notice(command: Command) -> None:
        if command.execute == "device_del":
            asked.set()

    first = lab.attach(image)
    lab.seen(first)
    lab.talk_through(lambda monitor: Hooked(monitor, notice))
    lab.query("stop")
    manager = lab.devices
    second_image = disk_image(image.with_name("b.img"), 1, "second")
    with ThreadPoolExecutor(1) as pool:
        detached = pool.submit(manager.detach, first.id, timeout_s=PATIENT_S)
        assert asked.wait(SOON_S)
        second = manager.attach(request(second_image))
        assert str(second.guest_address) == "PCI 11/00"
        assert manager.attach(request(second_image)).count == 2
        assert not detached.done()
        lab.query("cont")
        detached.result(SOON_S)
    assert [a.id for a in manager.attachments()] == [second.id]
    assert lab.seen(second).marker == "second"
    manager.detach_owner("lab-1")


# locks and nodes


def test_a_locked_image_is_told_with_what_to_do(lab: Lab, image: Path, tmp_path: Path) -> None:
    before = lab.picture()
    with opened_by_another_qemu(image, tmp_path):
        with pytest.raises(CommandError) as caught:
            lab.attach(image, allow=(Code.IMAGE_LOCKED,))
        assert caught.value.error_class == "GenericError"
        assert 'Failed to get "write" lock' in caught.value.desc
        assert caught.value.hint
        assert "another process has the disk open" in caught.value.hint
        assert lab.picture() == before

    attachment = lab.attach(image)
    assert lab.seen(attachment).marker == "trap"
    lab.devices.detach(attachment.id)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/kmsg", "/tmp"])
def test_what_is_no_disk_is_refused_before_qemu_is_asked(lab: Lab, path: str) -> None:
    """QEMU would take a character device for a disk."""
    before = lab.picture()
    commands: list[Command] = []
    lab.talk_through(lambda monitor: Hooked(monitor, commands.append))
    info = DeviceInfo(container_path="/dev/x", dev_type=DevType.BLOCK, host_path=path)
    with pytest.raises(NoSuchDevice):
        lab.devices.attach(info)
    assert commands == []
    assert lab.picture() == before


def test_the_number_of_a_char_device_is_no_disk(lab: Lab) -> None:
    before = lab.picture()
    commands: list[Command] = []
    lab.talk_through(lambda monitor: Hooked(monitor, commands.append))
    kmsg = os.stat("/dev/kmsg").st_rdev
    number = DevNum(os.major(kmsg), os.minor(kmsg))
    info = DeviceInfo(container_path="/dev/kmsg", dev_type=DevType.BLOCK, devnum=number)
    with pytest.raises(NoSuchDevice):
        lab.devices.attach(info)
    assert commands == []
    assert lab.picture() == before


# QEMU dies


class Doomed(Sandbox):
    """A VM that is killed in the middle of something, and another that takes its name."""

    def kill_at(self, vm: GuestVm, execute: str) -> None:
        """Kill QEMU just before it is sent this command."""

        def kill(command: Command) -> None:
            if command.execute == execute:
                vm.kill()

        self.talk_through(lambda monitor: Hooked(monitor, kill))


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[tuple[Doomed, GuestVm]]:
    with sleeping_vm(tmp_path / "vm", [*root_ports(2), *scsi_controller()]) as vm:
        lab = Doomed(tmp_path, side=QemuSide(vm))
        yield lab, vm
        with suppress(HypervisorError):
            lab.close()


def expect_reborn(lab: Doomed, directory: Path, *, outcomes: set[RepairOutcome]) -> None:
    """The same VM started anew is empty, and so becomes its journal."""
    with sleeping_vm(directory, [*root_ports(2), *scsi_controller()]) as vm:
        lab.close()
        lab.side = QemuSide(vm)
        parts = qemu_parts(vm)
        assert {repair.outcome for repair in lab.devices.reconcile()} <= outcomes
        assert lab.devices.attachments() == []
        assert lab.side.parts() == parts
        assert lab.devices.reconcile() == []
        assert lab.devices.attach(lab.disk("again.img")).state is State.ATTACHED
        lab.close()


@pytest.mark.parametrize("execute", ["object-add", "blockdev-add", "device_add"])
def test_a_qemu_that_dies_during_an_attach_is_told_and_reconciled(
    doomed: tuple[Doomed, GuestVm], tmp_path: Path, execute: str
) -> None:
    lab, vm = doomed
    lab.kill_at(vm, execute)
    info = lab.disk("a.img", options={"bps-total": "10M"})
    with pytest.raises(HypervisorError) as caught:
        lab.devices.attach_all([lab.disk("b.img"), info] if execute == "object-add" else [info])
    assert caught.value.code in {"connection-lost", "cannot-connect"}
    assert caught.value.hint
    states = {a.state for a in lab.devices.attachments()}
    assert State.ATTACHED not in states

    with pytest.raises(ConnectError):
        lab.devices.reconcile()
    assert {a.state for a in lab.devices.attachments()} == states
    expect_reborn(
        lab, tmp_path / "reborn", outcomes={RepairOutcome.UNDONE, RepairOutcome.FINISHED}
    )


@pytest.mark.parametrize("execute", ["device_del", "qom-list"])
def test_a_qemu_that_dies_during_a_detach_is_told_and_reconciled(
    doomed: tuple[Doomed, GuestVm], tmp_path: Path, execute: str
) -> None:
    lab, vm = doomed
    attachment = lab.devices.attach(lab.disk("a.img"))
    lab.kill_at(vm, execute)
    with pytest.raises(HypervisorError) as caught:
        lab.devices.detach(attachment.id, timeout_s=AT_ONCE_S)
    assert caught.value.code in {"connection-lost", "cannot-connect"}
    assert caught.value.hint
    assert [a.state for a in lab.devices.attachments()] == [State.DETACHING]
    expect_reborn(lab, tmp_path / "reborn", outcomes={RepairOutcome.FINISHED})


def test_a_qemu_that_dies_while_its_guest_is_waited_for_is_told(
    doomed: tuple[Doomed, GuestVm], tmp_path: Path
) -> None:
    lab, vm = doomed
    attachment = lab.devices.attach(lab.disk("a.img"))
    waiting = threading.Event()

    def notice(command: Command) -> None:
        if command.execute == "qom-list":
            waiting.set()

    lab.talk_through(lambda monitor: Hooked(monitor, notice))
    manager = lab.devices
    with ThreadPoolExecutor(1) as pool:
        detached = pool.submit(manager.detach, attachment.id, timeout_s=PATIENT_S)
        assert waiting.wait(SOON_S)
        vm.kill()
        with pytest.raises(HypervisorError) as caught:
            detached.result(SOON_S)
    assert caught.value.code in {"connection-lost", "cannot-connect"}
    assert [a.state for a in lab.devices.attachments()] == [State.DETACHING]
    expect_reborn(lab, tmp_path / "reborn", outcomes={RepairOutcome.FINISHED})


def test_a_qemu_that_died_between_two_commands_is_told(
    doomed: tuple[Doomed, GuestVm], tmp_path: Path
) -> None:
    lab, vm = doomed
    attachment = lab.devices.attach(lab.disk("a.img"))
    manager = lab.devices
    vm.kill()
    for verb in (
        lambda: manager.attach(lab.disk("b.img", options=SCSI)),
        lambda: manager.resize(attachment.id, 4 << 20),
        manager.reconcile,
    ):
        with pytest.raises(HypervisorError) as caught:
            verb()
        assert caught.value.code in {"connection-lost", "cannot-connect"}
    expect_reborn(
        lab, tmp_path / "reborn", outcomes={RepairOutcome.FORGOTTEN, RepairOutcome.UNDONE}
    )


# conversations


def test_a_socket_that_is_busy_is_told_within_the_deadline(tmp_path: Path) -> None:
    with sleeping_vm(tmp_path, []) as vm:
        with (
            RawQmp.connect(vm.qmp_path),
            pytest.raises(
                ConnectError, match=r"within 0\.3 s.*busy with another client"
            ) as caught,
        ):
            Qemu.connect(str(vm.qmp_path), timeout_s=0.3)
        assert caught.value.socket == str(vm.qmp_path)
        assert caught.value.hint
        second = Qemu.connect(str(vm.qmp_path))
        assert second.status() == "prelaunch"
        second.close()


def nothing(path: Path) -> None:
    pass


def bind_only(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("missing", nothing),
        ("file", Path.touch),
        ("directory", Path.mkdir),
        ("abandoned", bind_only),
        ("long" * 30, nothing),
    ],
    ids=["missing", "a file", "a directory", "abandoned", "too long"],
)
def test_a_socket_that_is_none_is_told(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(ConnectError) as caught:
        Qemu.connect(str(path), timeout_s=5)
    assert str(path) in caught.value.message
    assert caught.value.socket == str(path)
    assert caught.value.hint


@contextmanager
def server(path: Path, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """Something on a socket that is not QEMU, for one client."""

    def run(listener: socket.socket) -> None:
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                serve(connection)

    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(str(path))
        listener.listen()
        serving = pool.submit(run, listener)
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            serving.result(SOON_S)


def hang_up(connection: socket.socket) -> None:
    pass


def never_greet(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


def say(*lines: bytes) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        for line in lines:
            connection.sendall(line)
        never_greet(connection)

    return serve


VERSION = b'{"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}'
GREETING = b'{"QMP": {"version": ' + VERSION + b', "capabilities": []}}\r\n'


@pytest.mark.parametrize(
    "serve",
    [
        hang_up,
        never_greet,
        say(b"220 mail.example ESMTP\r\n"),
        say(b"\x00\x01\x02\xff\n"),
        say(b"{}\n"),
        say(b'{"QMP": 1}\n'),
        say(b"[]\n"),
        say(GREETING),
        say(GREETING, b'{"error": {"class": "GenericError", "desc": "no"}}\r\n'),
    ],
    ids=[
        "hangs up",
        "says nothing",
        "mail",
        "bytes",
        "no greeting",
        "half a greeting",
        "no object",
        "no capabilities",
        "refuses capabilities",
    ],
)
def test_a_socket_that_does_not_speak_qmp_is_told_within_the_deadline(
    tmp_path: Path, serve: Callable[[socket.socket], None]
) -> None:
    path = tmp_path / "not-qmp.sock"
    with server(path, serve):
        with pytest.raises(ConnectError) as caught:
            Qemu.connect(str(path), timeout_s=0.5)
        assert str(path) in caught.value.message
        assert caught.value.hint


class Proxy:
    """A QMP socket in front of QEMU's; `cut` breaks the conversations that go through it."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self._target = target
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.connections = 0
        self._refuses = threading.Event()
        self._last_command: bytes | None = None
        self._threads = ThreadPoolExecutor(16)
        self._threads.submit(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        self._threads.shutdown()
        for one in (self._listener, *self._sockets):
            one.close()

    def cut(self) -> None:
        """Hang up on both sides."""
        shut(*self._sockets)

    def refuse_after(self, command: bytes) -> None:
        """Hang up once this command is answered, and on everybody who comes then."""
        self._last_command = command

    def take(self) -> None:
        """Take clients again."""
        self._last_command = None
        self._refuses.clear()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                if self._refuses.is_set():
                    client.close()
                    continue
                qemu = socket.socket(socket.AF_UNIX)
                qemu.connect(str(self._target))
                self._sockets += [client, qemu]
                was_sent = threading.Event()
                self._threads.submit(self._ask, client, qemu, was_sent)
                self._threads.submit(self._answer, qemu, client, was_sent)

    def _ask(self, client: socket.socket, qemu: socket.socket, was_sent: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                if self._last_command and self._last_command in data:
                    was_sent.set()
                qemu.sendall(data)
        shut(client, qemu)

    def _answer(
        self, qemu: socket.socket, client: socket.socket, was_sent: threading.Event
    ) -> None:
        with suppress(OSError):
            while data := qemu.recv(1 << 16):
                # Before the client has it: it may send the last command at once.
                is_last = was_sent.is_set() and b'"return"' in data
                client.sendall(data)
                if is_last:
                    self._refuses.set()
                    break
        shut(client, qemu)


def shut(*connections: socket.socket) -> None:
    for connection in connections:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(q35_vm: GuestVm, tmp_path: Path) -> Iterator[Proxy]:
    with Proxy(tmp_path / "proxy.sock", q35_vm.qmp_path) as made:
        yield made


class Proxied(QemuSide):
    """The product comes in through a proxy."""

    def __init__(self, vm: GuestVm, proxy: Proxy) -> None:
        super().__init__(vm)
        self._proxy = proxy

    def monitor(self) -> QmpMonitor:
        """A conversation that can be cut."""
        return QmpMonitor.connect(str(self._proxy.path))


@pytest.fixture
def cuttable(lab: Lab, proxy: Proxy) -> Iterator[Lab]:
    lab.side = Proxied(lab.guest_vm, proxy)
    yield lab
    lab.close()


def lose(hypervisor: Qemu, proxy: Proxy) -> None:
    """Cut the conversation; a command may notice it, or the next one begins another."""
    proxy.cut()
    with suppress(ProtocolError):
        hypervisor.status()


def test_a_conversation_lost_between_commands_is_taken_up_again(
    lab: Lab, proxy: Proxy, image: Path
) -> None:
    hypervisor = Qemu.connect(str(proxy.path))
    with DeviceManager.open(
        vm=lab.vm, host=lab.root, hypervisor=hypervisor, state_dir=lab.state_dir
    ) as manager:
        first = manager.attach(request(image))
        lose(hypervisor, proxy)
        second = manager.attach(request(disk_image(image.with_name("b.img"), 1, "second")))
        assert lab.seen(second, of=2).marker == "second"
        lose(hypervisor, proxy)
        manager.detach(first.id)
        lose(hypervisor, proxy)
        assert manager.reconcile() == []
        assert manager.attachments() == [second]
        lose(hypervisor, proxy)
        manager.detach(second.id)
        assert proxy.connections >= 5
    assert lab.vmplugs() == set()


def test_several_threads_take_a_lost_conversation_up_together(proxy: Proxy) -> None:
    hypervisor = Qemu.connect(str(proxy.path), timeout_s=SOON_S)
    try:
        for _ in range(3):
            lose(hypervisor, proxy)
            start = threading.Barrier(4)

            def ask(_: int, start: threading.Barrier = start) -> str:
                start.wait()
                return hypervisor.status()

            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(ask, range(4))) == ["running"] * 4
    finally:
        hypervisor.close()


@pytest.mark.parametrize("command", [b'"object-add"', b'"blockdev-add"'])
def test_what_a_broken_attach_left_in_the_vm_is_in_the_journal(
    cuttable: Lab, proxy: Proxy, command: bytes
) -> None:
    """The conversation breaks in the middle of a disk and cannot be taken up again.

    The next command either notices while it is sent, or finds that there is nobody to talk to:
    that is a race, hence several times.
    """
    lab = cuttable
    before = lab.picture()
    info = lab.disk("a.img", options={"bps-total": "10M"})
    for _ in range(10):
        proxy.refuse_after(command)
        with pytest.raises(HypervisorError) as caught:
            lab.devices.attach(info)
        assert caught.value.code in {"connection-lost", "cannot-connect"}
        left = {device_id_of(name) for name in lab.vmplugs()}
        assert left
        assert left == {a.device_id for a in lab.devices.attachments()}

        proxy.take()
        assert [repair.outcome for repair in lab.devices.reconcile()] == [RepairOutcome.UNDONE]
        assert lab.picture() == before


def test_an_event_that_was_lost_is_made_up_for(cuttable: Lab, proxy: Proxy, image: Path) -> None:
    """The conversation breaks while the guest is waited for, and the guest answers meanwhile."""
    lab = cuttable
    asked, waiting = threading.Event(), threading.Event()

    def notice(command: Command) -> None:
        if command.execute == "device_del":
            asked.set()
        elif asked.is_set() and command.execute == "qom-list":
            waiting.set()

    attachment = lab.attach(image)
    lab.seen(attachment)
    lab.query("stop")
    lab.talk_through(lambda monitor: Noticed(monitor, notice))
    manager = lab.devices
    with ThreadPoolExecutor(1) as pool:
        detached = pool.submit(manager.detach, attachment.id, timeout_s=PATIENT_S)
        assert waiting.wait(SOON_S)
        proxy.cut()
        lab.query("cont")
        detached.result(SOON_S)
    assert manager.attachments() == []
    assert lab.vmplugs() == set()
