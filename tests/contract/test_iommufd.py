"""The one iommufd object of a VM: made once, kept, and shared, in memory and in a real QEMU.

No host of these tests has an IOMMU: plain files are in the places of its nodes. QEMU takes them
for as long as nobody tries to map memory with them, and refuses the device then.
"""

import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import real
from tests.contract.sandbox import Dying, Killed, Refusing
from tests.contract.world import MemorySide, Parts, QemuSide, Recorder, Side, old_words
from vmplug.address import Bdf, PciPath, PciSlot, qemu_id
from vmplug.drivers.place import GroupPlace, PciPlace
from vmplug.drivers.plug import VFIODevice, VFIODevices
from vmplug.drivers.ports import Command
from vmplug.errors import AttributeReadError, CommandError, NoFreePort
from vmplug.host.pci.iommu import IOMMU_NODE
from vmplug.host.pci.mdev import VFIODeviceType
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.iommufd import IOMMUFD, make_iommufd
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.monitor import Monitor

ID, OTHER_ID = "00000000000000a1", "00000000000000b2"
NODE = "/dev/vfio/devices/vfio0"
ROUNDS = 20
CLIENTS = 4


@pytest.fixture
def host(tmp_path: Path) -> HostRoot:
    """A host with files in the places of the nodes."""
    for node in (IOMMU_NODE, NODE):
        path = tmp_path / "host" / node.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return HostRoot(tmp_path / "host")


@pytest.fixture(params=["memory", pytest.param("prelaunch", marks=real)])
def side(request: pytest.FixtureRequest) -> Side:
    """A VM whose QEMU has iommufd or, if it is an older one, has not."""
    side: Side = request.getfixturevalue(f"{request.param}_side")
    if isinstance(side, MemorySide):
        side.machine.iommufd = True
    return side


def is_able(side: Side) -> bool:
    with closing(Qemu(side.monitor())) as vm:
        return vm.abilities.iommufd


def group(device_id: str = ID, number: int = 0) -> VFIODevices:
    bdf = Bdf(0, 0x3B, 0, number)
    device = VFIODevice(
        name=str(bdf),
        type=VFIODeviceType.NORMAL,
        bdf=bdf,
        sysfs_path=f"/sys/bus/pci/devices/{bdf}",
        cdev_node=NODE,
    )
    return VFIODevices(id=device_id, node=NODE, devices=(device,))


def at(bus: str) -> GroupPlace:
    place = PciPlace(bus=bus, slot=PciSlot(0), path=PciPath.parse("10/00"))
    return GroupPlace(places=(place,))


def files_of(side: Side, host: HostRoot) -> list[str]:
    """The nodes that the VM has open, each as often as that."""
    if isinstance(side, MemorySide):
        names = [*side.machine.kept, *side.machine.descriptors]
        return sorted(IOMMU_NODE if name == IOMMUFD else NODE for name in names)
    assert isinstance(side, QemuSide)
    links = [link for entry in Path(f"/proc/{side.pid}/fd").iterdir() if (link := read(entry))]
    return sorted(link.removeprefix(host.path) for link in links if link.startswith(host.path))


def read(link: Path) -> str:
    with suppress(FileNotFoundError):
        return str(link.readlink())
    return ""


def with_object(parts: Parts) -> Parts:
    return Parts(
        devices=parts.devices,
        nodes=parts.nodes,
        objects={**parts.objects, IOMMUFD: "iommufd"},
        chardevs=parts.chardevs,
        netdevs=parts.netdevs,
    )


def try_plug(side: Side, host: HostRoot, monitor: Monitor | None = None) -> CommandError | None:
    """A plug and, in a VM in memory, where it succeeds, the unplug."""
    with closing(Qemu(monitor or side.monitor(), host=host)) as vm:
        try:
            vm.plug(group(), at("rp0"))
        except CommandError as error:
            return error
        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], 1.0) == {}
        return None


def test_it_is_made_once_and_no_file_is_left_by_what_comes_after(
    side: Side, host: HostRoot
) -> None:
    before, able = side.parts(), is_able(side)
    for _ in range(ROUNDS):
        refusal = try_plug(side, host)
        assert isinstance(side, MemorySide) or refusal
        assert files_of(side, host) == ([IOMMU_NODE] if able else [])
    assert side.parts() == (with_object(before) if able else before)


def test_it_is_nobodys_device(side: Side, host: HostRoot) -> None:
    try_plug(side, host)
    with closing(Qemu(side.monitor())) as vm:
        assert vm.find_devices() == {}
        assert vm.wait_unplugged([ID], 1.0) == {}
    assert (IOMMUFD in side.parts().objects) is is_able(side)


def test_steps_tell_of_it_until_it_is_there(side: Side, host: HostRoot) -> None:
    with closing(Qemu(side.monitor(), host=host)) as vm:
        first = [step.do.execute for step in vm.steps(group(), at("rp0"))]
        try_plug(side, host)
        then = [step.do.execute for step in vm.steps(group(), at("rp0"))]
    assert first == ["getfd", "object-add", "getfd", "device_add"]
    assert then == (["getfd", "device_add"] if is_able(side) else first)


def test_clients_that_come_at_once_make_one(side: Side, host: HostRoot) -> None:
    failures: list[BaseException] = []

    def make() -> None:
        try:
            with closing(side.monitor()) as monitor:
                make_iommufd(monitor, host)
        except CommandError as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    able = is_able(side)
    assert len(failures) == (0 if able else CLIENTS)
    assert files_of(side, host) == ([IOMMU_NODE] if able else [])


@pytest.mark.parametrize("is_sent", [False, True], ids=["before", "after"])
def test_a_client_that_dies_at_any_command_neither_leaks_nor_breaks_the_next_attach(
    side: Side, host: HostRoot, *, is_sent: bool
) -> None:
    recorder = Recorder(side.monitor())
    with closing(recorder), suppress(CommandError):
        make_iommufd(recorder, host)
    counted = len(recorder.sent)
    assert counted >= 4
    for count in range(1, counted + 1):
        delete(side)
        before = [node for node in files_of(side, host) if node == IOMMU_NODE]
        dying = Dying(side.monitor(), count, is_sent=is_sent)
        with closing(dying), suppress(Killed, CommandError):
            make_iommufd(dying, host)
        try_plug(side, host)
        able = is_able(side)
        assert files_of(side, host) == [*before, *([IOMMU_NODE] if able else [])]
        assert (IOMMUFD in side.parts().objects) is able


def delete(side: Side) -> None:
    """The tests take it away, which vmplug never does; QEMU keeps its file all the same."""
    side.ask(Command("object-del", {"id": IOMMUFD}))


@pytest.mark.parametrize("refused", [1, 2])
def test_a_refusal_leaves_nothing_open(side: Side, host: HostRoot, refused: int) -> None:
    before = side.parts()
    with closing(Refusing(side.monitor(), refused)) as monitor, pytest.raises(CommandError):
        make_iommufd(monitor, host)
    assert files_of(side, host) == []
    assert side.parts() == before


def test_a_host_without_iommufd_is_told_before_anything_is_done(
    side: Side, host: HostRoot
) -> None:
    Path(host.path + IOMMU_NODE).unlink()
    before = side.parts()
    with (
        closing(Qemu(side.monitor(), host=host)) as vm,
        pytest.raises(AttributeReadError, match=IOMMU_NODE),
    ):
        vm.plug(group(), at("rp0"))
    assert side.parts() == before
    assert files_of(side, host) == []


def test_qemu_gets_no_node_for_a_place_that_somebody_has_taken(side: Side, host: HostRoot) -> None:
    """It would never close it, and VFIO never take the device back."""
    stranger = {"driver": "virtio-rng-pci", "id": "stranger", "bus": "rp0", "addr": "0x0"}
    side.ask(Command("object-add", {"qom-type": "rng-random", "id": "r", "filename": "/dev/zero"}))
    side.ask(Command("device_add", {**stranger, "rng": "r"}))
    before = side.parts()
    with closing(Qemu(side.monitor(), host=host)) as vm, pytest.raises(NoFreePort, match="rp0"):
        vm.plug(group(), at("rp0"))
    assert side.parts() == before
    assert files_of(side, host) == []


def test_what_an_attach_left_open_is_closed(side: Side, host: HostRoot) -> None:
    with closing(side.monitor()) as monitor:
        vm = Qemu(monitor, host=host)
        descriptor = host.open_node(NODE)
        with open(descriptor, closefd=True):
            name = {"fdname": qemu_id(ID, "fd")}
            monitor.execute(Command("getfd", name, descriptor=descriptor))
        assert files_of(side, host) == [NODE]
        vm.close_files([OTHER_ID])
        assert files_of(side, host) == [NODE]
        vm.close_files([ID])
        vm.close_files([ID])
    assert files_of(side, host) == []


# command by command


def take(name: str, descriptor: int) -> Command:
    return Command("getfd", {"fdname": name}, descriptor=descriptor)


def make(name: str, file: str) -> Command:
    return Command("object-add", {"qom-type": "iommufd", "id": name, "fd": file})


def device(name: str, bus: str, *, file: str, object_name: str) -> Command:
    where = {"driver": "vfio-pci", "id": name, "bus": bus, "addr": "0x0"}
    return Command("device_add", {**where, "fd": file, "iommufd": object_name})


def conversation(descriptor: int) -> Sequence[Command]:
    source = {"qom-type": "rng-random", "id": "r", "filename": "/dev/zero"}
    stranger = {"driver": "virtio-rng-pci", "id": "g", "bus": "rp0", "addr": "0x0", "rng": "r"}
    return [
        Command("qom-list-types", {"implements": "iommufd"}),
        make("i0", "f9"),
        take("f0", descriptor),
        make("i0", "f0"),
        Command("closefd", {"fdname": "f0"}),
        take("f0", descriptor),
        make("i0", "f0"),
        Command("closefd", {"fdname": "f0"}),
        take("f1", descriptor),
        device("v0", "rp9", file="f1", object_name="i0"),
        device("v0", "rp1", file="f9", object_name="i0"),
        Command("object-add", source),
        Command("device_add", stranger),
        device("g", "rp1", file="f1", object_name="i0"),
        device("v0", "rp0", file="f1", object_name="i0"),
        Command("closefd", {"fdname": "f1"}),
        Command("object-del", {"id": "i0"}),
        Command("object-del", {"id": "i0"}),
    ]


@real
def test_memory_answers_every_command_as_qemu_does(
    prelaunch_side: QemuSide, memory_side: MemorySide, host: HostRoot
) -> None:
    memory_side.machine.iommufd = is_able(prelaunch_side)

    def answers(side: Side) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        with closing(side.monitor()) as monitor, open(host.path + NODE, "r+b") as file:
            for command in conversation(file.fileno()):
                given, refusal = monitor.attempt([command])
                said = old_words(refusal.desc) if refusal else given[0]
                found.append((f"{command.execute} {dict(command.arguments)}", said))
        return found

    assert answers(memory_side) == answers(prelaunch_side)
    kinds = [files_of(side, host) for side in (memory_side, prelaunch_side)]
    assert len(kinds[0]) == len(kinds[1])
