"""The contract of every kind of device that is no disk: in memory, with a guest, before boot."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from tests.contract.sandbox import CHANGING, Refusing
from tests.contract.test_hypervisor_contract import (
    AT_ONCE_S,
    ID,
    MIB,
    NAME,
    OTHER_ID,
    RP0,
    RP1,
    UNPLUG_S,
    Connected,
    add_stranger,
    ask,
    command,
    qom_get,
)
from tests.contract.world import (
    Backend,
    MemorySide,
    Parts,
    QemuSide,
    Side,
    in_old_words,
    recorded,
)
from vmplug.drivers.place import MemorySlot, Place
from vmplug.drivers.plug import (
    BlockDrive,
    DiskFrontend,
    Plug,
    RNGDevice,
    SharedFS,
    VhostUserDevice,
    VirtiofsdSpec,
)
from vmplug.drivers.ports import START_DAEMON, Command, Step, UnplugFailure
from vmplug.errors import CannotPlug, CommandError
from vmplug.host.kind import DeviceType
from vmplug.hypervisor.fake.monitor import FakeHypervisor
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.monitor import Monitor

LINK, NETDEV = f"{NAME}-link", f"{NAME}-net"
MAC = "52:54:00:12:34:56"
SLOT2 = MemorySlot(slot=2, index=0)

real = pytest.mark.qemu


class Kind(NamedTuple):
    """A kind of device as these tests plug it; `served` is what serves it, None for nothing.

    `brings` are the driver of its device, and every other part by the names of `Parts`.
    """

    served: DeviceType | None
    by_descriptor: bool
    brings: Mapping[str, Any]


def served(kind: DeviceType, driver: str, *, by_descriptor: bool = False) -> Kind:
    parts = {"chardevs": {LINK}}
    if kind is DeviceType.VHOST_USER_NET:
        parts["netdevs"] = {NETDEV}
    return Kind(kind, by_descriptor, {"driver": driver, **parts})


KINDS = {
    "rng": Kind(
        None,
        by_descriptor=False,
        brings={"driver": "virtio-rng-pci", "objects": {f"{NAME}-source": "rng-random"}},
    ),
    "blk": served(DeviceType.VHOST_USER_BLK, "vhost-user-blk-pci"),
    "blk by descriptor": served(
        DeviceType.VHOST_USER_BLK, "vhost-user-blk-pci", by_descriptor=True
    ),
    "scsi": served(DeviceType.VHOST_USER_SCSI, "vhost-user-scsi-pci"),
    "net": served(DeviceType.VHOST_USER_NET, "virtio-net-pci"),
    "fs": served(DeviceType.VHOST_USER_FS, "vhost-user-fs-pci"),
    "fs by descriptor": served(DeviceType.VHOST_USER_FS, "vhost-user-fs-pci", by_descriptor=True),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One device to be plugged into `side` at RP0; `backend` is None for what none serves."""

    side: Side
    kind: Kind
    plug: Plug
    backend: Backend | None

    @property
    def brought(self) -> Mapping[str, Any]:
        """Everything of it that a VM holds, by the names of `Parts`."""
        parts = {key: value for key, value in self.kind.brings.items() if key != "driver"}
        return {**parts, "devices": {NAME: self.kind.brings["driver"]}}


def pairs(*sides: str) -> list[object]:
    """Each side with each kind."""
    return [
        pytest.param(
            (side, name),
            id=f"{side}-{name}",
            marks=[] if side == "memory" else [real, pytest.mark.root][: 1 + ("fs" in name)],
        )
        for side in sides
        for name in KINDS
    ]


def make_thing(request: pytest.FixtureRequest, stack: ExitStack, directory: Path) -> Thing:
    side_name, kind_name = request.param
    side: Side = request.getfixturevalue(f"{side_name}_side")
    kind = KINDS[kind_name]
    if kind.served is None:
        return Thing(side, kind, RNGDevice(id=ID, filename="/dev/urandom"), None)
    backend = stack.enter_context(side.backend(kind.served, directory))
    if isinstance(side, QemuSide) and side_name == "guest":
        stack.callback(side.clean)  # a guest lets go of nothing whose backend has ended
    is_net = kind.served is DeviceType.VHOST_USER_NET
    is_fs = kind.served is DeviceType.VHOST_USER_FS
    device = VhostUserDevice(
        id=ID,
        type=kind.served,
        reconnect_s=1 if kind.served is DeviceType.VHOST_USER_BLK else 0,
        msix=not is_net,  # without KVM, QEMU dies of it
        mac_address=MAC if is_net else None,
        tag="work" if is_fs else None,
        queue_size=1024 if is_fs else None,
    )
    if kind.by_descriptor:
        connection = stack.enter_context(side.connection(backend))
        device = replace(device, descriptor=connection.fileno(), reconnect_s=0)
    else:
        device = replace(device, socket_path=str(backend.socket_path))
    return Thing(side, kind, device, backend)


@pytest.fixture(params=pairs("memory", "guest", "prelaunch"))
def thing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Thing]:
    with ExitStack() as stack:
        yield make_thing(request, stack, tmp_path)


@pytest.fixture(params=pairs("memory", "guest"))
def awake_thing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Thing]:
    """In a guest that answers until it is told not to."""
    with ExitStack() as stack:
        yield make_thing(request, stack, tmp_path)


def more(after: Parts, before: Parts) -> dict[str, Any]:
    """What has come, by the names of `Parts`; nothing may have gone."""
    came = {
        "devices": dict(after.devices.items() - before.devices.items()),
        "objects": dict(after.objects.items() - before.objects.items()),
        "nodes": set(after.nodes - before.nodes),
        "chardevs": set(after.chardevs).difference(before.chardevs),
        "netdevs": set(after.netdevs - before.netdevs),
    }
    assert before.devices.items() <= after.devices.items()
    assert before.objects.items() <= after.objects.items()
    assert before.nodes <= after.nodes
    assert set(before.chardevs) <= set(after.chardevs)
    assert before.netdevs <= after.netdevs
    return {name: parts for name, parts in came.items() if parts}


def carry_out(monitor: Monitor, steps: Sequence[Step]) -> None:
    """On one conversation: a descriptor belongs to it."""
    for step in steps:
        monitor.execute(step.do)


# plugging


def test_what_is_plugged_is_found_and_nothing_else_came(thing: Thing) -> None:
    before = thing.side.parts()
    with Connected(thing.side) as vm:
        assert vm.find_devices() == {}
        vm.plug(thing.plug, RP0)
        assert vm.find_devices() == {ID: True}
        assert [port.free for port in vm.offer().ports[:2]] == [(), RP1_FREE]
    assert more(thing.side.parts(), before) == thing.brought
    bus = ask(thing.side, "qom-get", path=f"/machine/peripheral/{NAME}", property="parent_bus")
    assert str(bus).rpartition("/")[2] == RP0.bus


RP1_FREE = (RP1.slot,)


def test_steps_are_exactly_what_plug_sends(thing: Thing) -> None:
    vm, recorder = recorded(thing.side)
    with closing(vm):
        steps = vm.steps(thing.plug, RP0)
        assert not {asked.execute for asked in recorder.sent} & CHANGING
        recorder.sent.clear()
        vm.plug(thing.plug, RP0)
        assert recorder.sent == [step.do for step in steps]
    (front_end,) = [c.arguments for c in recorder.sent if c.execute == "device_add"]
    assert (front_end["bus"], front_end["addr"]) == (RP0.bus, "0x0")


def test_undoing_the_steps_backwards_leaves_nothing(awake_thing: Thing) -> None:
    """A netdev takes its chardev along, a chardev the descriptor: those are gone by then."""
    side, before = awake_thing.side, awake_thing.side.parts()
    with closing(side.monitor()) as monitor:
        steps = Qemu(monitor).steps(awake_thing.plug, RP0)
        carry_out(monitor, steps)
        refusals = []
        for step in reversed(steps):
            assert step.undo
            _, refusal = monitor.attempt([step.undo])
            refusals += [(refusal.command, refusal.desc)] if refusal else []
            if step.undo.execute == "device_del":
                side.wait_gone(NAME)
    assert refusals == [
        refusal
        for refusal, is_expected in (
            (("chardev-remove", f"Chardev '{LINK}' not found"), "netdevs" in awake_thing.brought),
            (
                ("closefd", f"File descriptor named '{LINK}' not found"),
                awake_thing.kind.by_descriptor,
            ),
        )
        if is_expected
    ]
    assert side.parts() == before


def test_a_device_whose_place_is_taken_leaves_nothing(thing: Thing) -> None:
    add_stranger(thing.side, RP0)
    before = thing.side.parts()
    driver = thing.kind.brings["driver"]
    with Connected(thing.side) as vm, pytest.raises(CommandError) as caught:
        vm.plug(thing.plug, RP0)
    assert (caught.value.command, caught.value.desc) == (
        "device_add",
        f"PCI: slot 0 function 0 not available for {driver}, in use by virtio-blk-pci,id=stranger",
    )
    assert caught.value.hint
    assert thing.side.parts() == before


def test_a_refusal_at_any_step_undoes_the_steps_before(thing: Thing) -> None:
    """One try for each step; a virtiofsd lets one only be connected to, its last."""
    before = thing.side.parts()
    with Connected(thing.side) as vm:
        count = len(vm.steps(thing.plug, RP0))
    first = count if thing.kind.served is DeviceType.VHOST_USER_FS else 1
    for refused in range(first, count + 1):
        with (
            closing(Qemu(Refusing(thing.side.monitor(), refused))) as vm,
            pytest.raises(CommandError, match="refused by the test"),
        ):
            vm.plug(thing.plug, RP0)
        assert thing.side.parts() == before


def test_the_same_device_twice_is_refused_and_the_first_stays(thing: Thing) -> None:
    with Connected(thing.side) as vm:
        vm.plug(thing.plug, RP0)
        before = thing.side.parts()
        with pytest.raises(CommandError):
            vm.plug(thing.plug, RP1)
        assert thing.side.parts() == before
        assert vm.find_devices() == {ID: True}


# unplugging


def test_unplugging_leaves_nothing(awake_thing: Thing) -> None:
    before = awake_thing.side.parts()
    with Connected(awake_thing.side) as vm:
        vm.plug(awake_thing.plug, RP0)
        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], UNPLUG_S) == {}
        assert vm.find_devices() == {}
    assert awake_thing.side.parts() == before


def test_a_silent_guest_keeps_the_device_whole(thing: Thing) -> None:
    thing.side.silence()
    with Connected(thing.side) as vm:
        vm.plug(thing.plug, RP0)
        before = thing.side.parts()
        for _ in range(2):
            assert not vm.request_unplug([ID])
            assert vm.wait_unplugged([ID], AT_ONCE_S) == {ID: UnplugFailure.TIMEOUT}
        assert vm.find_devices() == {ID: True}
        assert thing.side.parts() == before


def test_parts_without_a_device_are_found_and_taken_away(thing: Thing) -> None:
    """A descriptor alone is no part: QEMU does not tell of it."""
    before = thing.side.parts()
    with closing(thing.side.monitor()) as monitor:
        vm = Qemu(monitor)
        steps = vm.steps(thing.plug, RP0)
        for count in range(1, len(steps)):
            carry_out(monitor, steps[:count])
            is_seen = steps[count - 1].do.execute != "getfd"
            assert (thing.side.parts() != before) is is_seen

            assert vm.find_devices() == ({ID: False} if is_seen else {})
            assert vm.wait_unplugged([ID], UNPLUG_S) == {}

            assert vm.find_devices() == {}
            assert thing.side.parts() == before


def test_what_went_while_nobody_listened_is_taken_away(awake_thing: Thing) -> None:
    side, before = awake_thing.side, awake_thing.side.parts()
    side.silence()
    with Connected(side) as vm:
        vm.plug(awake_thing.plug, RP0)
        assert not vm.request_unplug([ID])
    side.wake()
    side.wait_gone(NAME)
    with Connected(side) as vm:
        assert vm.find_devices() == {ID: False}
        assert vm.wait_unplugged([ID], UNPLUG_S) == {}
    assert side.parts() == before


def test_what_others_have_is_neither_found_nor_taken_away(side: Side, tmp_path: Path) -> None:
    """Somebody else's network, source and connection, and a disk of vmplug's own."""
    ask(side, "object-add", qom_type="rng-random", id="their-source", filename="/dev/urandom")
    with side.backend(DeviceType.VHOST_USER_NET, tmp_path) as backend:
        ask(side, "chardev-add", id="their-link", backend=client_of(backend.socket_path))
        ask(side, "netdev_add", type="vhost-user", id="their-net", chardev="their-link")
        before = side.parts()
        with Connected(side) as vm:
            assert vm.find_devices() == {}
            vm.plug(RNGDevice(id=ID, filename="/dev/urandom"), RP0)
            assert vm.find_devices() == {ID: True}
            assert vm.wait_unplugged([OTHER_ID], UNPLUG_S) == {}
        after = side.parts()
        came = more(after, before)
        assert set(came) == {"devices", "objects"}
        assert {"their-link", "their-net", "their-source"} <= {
            *after.chardevs,
            *after.netdevs,
            *after.objects,
        }
        ask(side, "netdev_del", id="their-net")


def client_of(path: Path | str) -> dict[str, Any]:
    """The backend of a chardev that connects there, in QMP's words."""
    address = {"type": "unix", "data": {"path": str(path)}}
    return {"type": "socket", "data": {"addr": address, "server": False}}


# lost backends


@pytest.mark.parametrize(
    "kind", [DeviceType.VHOST_USER_BLK, DeviceType.VHOST_USER_SCSI, DeviceType.VHOST_USER_NET]
)
def test_a_device_whose_backend_is_gone_is_lost_and_not_only_slow(
    throwaway: Side, tmp_path: Path, kind: DeviceType
) -> None:
    throwaway.silence()
    with throwaway.backend(kind, tmp_path) as backend, Connected(throwaway) as vm:
        vm.plug(device_on(backend, kind), RP0)
        vm.plug(RNGDevice(id=OTHER_ID, filename="/dev/urandom"), RP1)
        ids = (ID, OTHER_ID)
        assert not vm.request_unplug(ids)
        assert vm.wait_unplugged(ids, AT_ONCE_S) == {
            ID: UnplugFailure.TIMEOUT,
            OTHER_ID: UnplugFailure.TIMEOUT,
        }

        backend.kill()
        before = throwaway.parts()

        assert vm.wait_unplugged(ids, AT_ONCE_S) == {
            ID: UnplugFailure.LOST,
            OTHER_ID: UnplugFailure.TIMEOUT,
        }
        assert vm.find_devices() == {ID: True, OTHER_ID: True}
        assert throwaway.parts() == before


def device_on(backend: Backend, kind: DeviceType) -> VhostUserDevice:
    is_net = kind is DeviceType.VHOST_USER_NET
    return VhostUserDevice(
        id=ID,
        type=kind,
        socket_path=str(backend.socket_path),
        reconnect_s=1 if kind is DeviceType.VHOST_USER_BLK else 0,
        msix=not is_net,
        mac_address=MAC if is_net else None,
    )


def test_a_disk_whose_backend_came_back_can_be_taken_out(
    awake_throwaway: Side, tmp_path: Path
) -> None:
    """In a VM of its own: QEMU has lost a request or two by then."""
    awake = awake_throwaway
    before = awake.parts()
    kind = DeviceType.VHOST_USER_BLK
    with awake.backend(kind, tmp_path) as backend, Connected(awake) as vm:
        vm.plug(device_on(backend, kind), RP0)
        awake.wait_disk()  # what a backend has begun and not answered is lost with it
        awake.silence()
        backend.kill()
        assert not vm.request_unplug([ID])
        assert vm.wait_unplugged([ID], AT_ONCE_S) == {ID: UnplugFailure.LOST}

        backend.restart()
        awake.wake()

        assert vm.wait_unplugged([ID], UNPLUG_S) == {}
    assert awake.parts() == before


# what a running VM does not take


def test_a_virtio_9p_share_is_refused_before_anything_is_sent(side: Side, tmp_path: Path) -> None:
    share = SharedFS(id=ID, directory=str(tmp_path), tag="work", read_only=False)
    assert_cannot_plug(side, share, RP0, "cold-plug-only")


def assert_cannot_plug(side: Side, plug: Plug, place: Place, reason: str) -> None:
    before = side.parts()
    vm, recorder = recorded(side)
    with closing(vm):
        with pytest.raises(CannotPlug) as caught:
            vm.plug(plug, place)
        assert recorder.sent == []
    assert caught.value.reason == reason
    assert caught.value.hint
    assert side.parts() == before


# persistent memory


@pytest.fixture
def memory_file(tmp_path: Path) -> Path:
    path = tmp_path / "memory.img"
    path.write_bytes(bytes(4 * MIB))
    return path


@pytest.fixture
def nvdimm(memory_file: Path) -> BlockDrive:
    return BlockDrive(
        id=ID,
        file=str(memory_file),
        is_device=False,
        driver=DiskFrontend.NVDIMM,
        size_bytes=4 * MIB,
    )


@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_an_nvdimm_is_plugged_and_counted_and_never_leaves(
    throwaway: Side, nvdimm: BlockDrive, *, read_only: bool
) -> None:
    before = throwaway.parts()
    with Connected(throwaway) as vm:
        first = vm.offer()
        assert (first.memory_slots, first.memory_slots_used, first.nvdimms) == (4, frozenset(), 0)
        vm.plug(replace(nvdimm, read_only=read_only), SLOT2)
        assert vm.find_devices() == {ID: True}
        assert vm.offer() == replace(
            first,
            memory_slots_used=frozenset({2}),
            nvdimms=1,
            memory_bytes=first.memory_bytes + 4 * MIB,
        )

        plugged = throwaway.parts()
        assert more(plugged, before) == {
            "devices": {NAME: "nvdimm"},
            "objects": {f"{NAME}-memory": "memory-backend-file"},
        }
        path = f"/machine/peripheral/{NAME}"
        assert ask(throwaway, "qom-get", path=path, property="slot") == 2
        assert ask(throwaway, "qom-get", path=path, property="unarmed") is read_only

        refused = vm.request_unplug([ID])
        assert {name: (error.command, error.desc) for name, error in refused.items()} == {
            ID: ("device_del", "nvdimm device hot unplug is not supported yet.")
        }
        assert vm.wait_unplugged([ID], AT_ONCE_S) == {ID: UnplugFailure.TIMEOUT}
        assert vm.find_devices() == {ID: True}
        assert throwaway.parts() == plugged


def test_the_steps_of_an_nvdimm_are_exactly_what_plug_sends(
    throwaway: Side, nvdimm: BlockDrive
) -> None:
    vm, recorder = recorded(throwaway)
    with closing(vm):
        steps = vm.steps(nvdimm, SLOT2)
        assert recorder.sent == []
        vm.plug(nvdimm, SLOT2)
        assert recorder.sent == [step.do for step in steps]
    assert [step.undo and step.undo.execute for step in steps] == ["object-del", None]
    assert steps[0].do.arguments["share"] is True


def test_a_slot_that_is_taken_leaves_nothing_of_the_second(
    throwaway: Side, nvdimm: BlockDrive
) -> None:
    with Connected(throwaway) as vm:
        vm.plug(nvdimm, SLOT2)
        before = throwaway.parts()
        with pytest.raises(CommandError, match="slot 2 is busy") as caught:
            vm.plug(replace(nvdimm, id=OTHER_ID), SLOT2)
        assert caught.value.command == "device_add"
        assert throwaway.parts() == before
        vm.plug(replace(nvdimm, id=OTHER_ID), MemorySlot(slot=0, index=1))
        assert vm.find_devices() == {ID: True, OTHER_ID: True}
        assert vm.offer().nvdimms == 2


@pytest.mark.parametrize("refused", [1, 2])
def test_half_an_nvdimm_is_undone(side: Side, nvdimm: BlockDrive, refused: int) -> None:
    before = side.parts()
    with (
        closing(Qemu(Refusing(side.monitor(), refused))) as vm,
        pytest.raises(CommandError, match="refused by the test"),
    ):
        vm.plug(nvdimm, SLOT2)
    assert side.parts() == before


def test_memory_without_an_nvdimm_is_found_and_taken_away(side: Side, nvdimm: BlockDrive) -> None:
    before = side.parts()
    with closing(side.monitor()) as monitor:
        vm = Qemu(monitor)
        offer = vm.offer()
        carry_out(monitor, vm.steps(nvdimm, SLOT2)[:1])
        assert side.parts() != before
        assert vm.find_devices() == {ID: False}
        assert vm.wait_unplugged([ID], UNPLUG_S) == {}
        assert vm.find_devices() == {}
        assert vm.offer() == offer
    assert side.parts() == before


def test_an_nvdimm_on_a_file_that_has_gone_is_refused_before_anything_is_sent(
    side: Side, nvdimm: BlockDrive, memory_file: Path
) -> None:
    memory_file.unlink()
    assert_cannot_plug(side, nvdimm, SLOT2, "no-such-file")
    assert not memory_file.exists()


# only in memory


def test_a_share_of_vmplugs_own_is_plugged_with_no_process_at_all(tmp_path: Path) -> None:
    hypervisor = FakeHypervisor()
    before = FakeHypervisor()
    daemon = VirtiofsdSpec(
        program="/no/such/virtiofsd",
        options=frozenset(),
        directory=str(tmp_path),
        cache="auto",
        read_only=False,
    )
    share = VhostUserDevice(
        id=ID, type=DeviceType.VHOST_USER_FS, daemon=daemon, tag="work", queue_size=1024
    )
    steps = hypervisor.steps(share, RP0)
    hypervisor.plug(share, RP0)
    first, *others = [step.do for step in steps]
    assert first.execute == START_DAEMON
    sent = hypervisor.monitor.sent
    assert [(c.execute, c.arguments) for c in sent] == [(c.execute, c.arguments) for c in others]
    assert [c.descriptor is not None for c in sent] == [c.execute == "getfd" for c in sent]
    assert hypervisor.find_devices() == {ID: True}

    assert not hypervisor.request_unplug([ID])
    assert hypervisor.wait_unplugged([ID], UNPLUG_S) == {}
    assert hypervisor.monitor.devices == before.monitor.devices
    assert hypervisor.monitor.chardevs == {}


def test_every_command_of_a_plug_is_known_to_change_the_vm() -> None:
    """Else tests that fail at each of them would leave one out."""
    vm = FakeHypervisor()
    device = VhostUserDevice(id=ID, type=DeviceType.VHOST_USER_NET, descriptor=0, mac_address=MAC)
    rng = RNGDevice(id=ID, filename="/dev/urandom")
    steps = [*vm.steps(device, RP0), *vm.steps(rng, RP0)]
    commands = {c.execute for step in steps for c in (step.do, step.undo) if c}
    assert commands <= CHANGING


# command by command

Words = Callable[[str], Sequence[Command]]


def chardev(name: str, path: str) -> Command:
    return command("chardev-add", id=name, backend=client_of(path))


def device(driver: str, name: str, bus: str, **properties: object) -> Command:
    return command("device_add", driver=driver, id=name, bus=bus, addr="0x0", **properties)


def module(name: str, memory: str, slot: int) -> Command:
    return command("device_add", driver="nvdimm", id=name, memdev=memory, slot=slot)


def memory_object(name: str, path: str) -> Command:
    properties: dict[str, object] = {"mem_path": path, "size": 4 * MIB, "share": True}
    return command("object-add", qom_type="memory-backend-file", id=name, **properties)


def source(name: str) -> Command:
    return command("object-add", qom_type="rng-random", id=name, filename="/dev/urandom")


CONVERSATIONS: dict[str, tuple[DeviceType | None, Words]] = {
    "persistent memory": (
        None,
        lambda path: [
            memory_object("m0", path),
            memory_object("m1", path),
            memory_object("m0", path),
            module("v0", "m9", 0),
            module("v0", "m0", 4),
            module("v0", "m0", 3),
            module("v0", "m1", 0),
            module("v1", "m1", 3),
            module("v1", "m0", 0),
            module("v1", "m0", 3),
            command("object-del", id="m0"),
            command("device_del", id="v0"),
            qom_get("/machine/peripheral/v0", "slot"),
            command("object-del", id="m1"),
            command("object-del", id="m1"),
        ],
    ),
    "random numbers": (
        None,
        lambda _: [
            source("r0"),
            source("r0"),
            device("virtio-rng-pci", "g0", "rp0", rng="r9"),
            device("virtio-rng-pci", "g0", "rp9", rng="r0"),
            device("virtio-rng-pci", "g0", "rp0", rng="r0"),
            device("virtio-rng-pci", "g0", "rp1", rng="r0"),
            device("virtio-rng-pci", "g1", "rp0", rng="r0"),
            command("object-del", id="r0"),
            command("object-del", id="r0"),
        ],
    ),
    "descriptors": (
        None,
        lambda _: [
            command("closefd", fdname="f9"),
            command(
                "chardev-add",
                id="c0",
                backend={
                    "type": "socket",
                    "data": {"addr": {"type": "fd", "data": {"str": "f9"}}, "server": False},
                },
            ),
        ],
    ),
    "vhost-user disks": (
        DeviceType.VHOST_USER_BLK,
        lambda path: [
            chardev("c0", path),
            chardev("c0", path),
            device("vhost-user-blk-pci", "b0", "rp0", chardev="c9"),
            device("vhost-user-blk-pci", "b0", "rp0", chardev="c0"),
            device("vhost-user-blk-pci", "b1", "rp1", chardev="c0"),
            device("vhost-user-blk-pci", "b1", "rp0", chardev="c9"),
            command("chardev-remove", id="c0"),
            command("chardev-remove", id="c9"),
            command("netdev_add", type="vhost-user", id="n0", chardev="c9"),
        ],
    ),
    "vhost-user controllers": (
        DeviceType.VHOST_USER_SCSI,
        lambda path: [
            chardev("c0", path),
            device("vhost-user-scsi-pci", "s0", "rp0", chardev="c9"),
            device("vhost-user-scsi-pci", "s0", "rp0", chardev="c0"),
            device("vhost-user-scsi-pci", "s1", "rp1", chardev="c0"),
        ],
    ),
    "networks": (
        DeviceType.VHOST_USER_NET,
        lambda path: [
            chardev("c0", path),
            command("netdev_add", type="vhost-user", id="n0", chardev="c0"),
            command("netdev_add", type="vhost-user", id="n0", chardev="c0"),
            command("chardev-remove", id="c0"),
            command("netdev_del", id="n9"),
            device("virtio-net-pci", "e0", "rp0", netdev="n9", vectors=0),
            device("virtio-net-pci", "e0", "rp0", netdev="n0", vectors=0),
            device("virtio-net-pci", "e1", "rp1", netdev="n0", vectors=0),
        ],
    ),
    "a network without its device": (
        DeviceType.VHOST_USER_NET,
        lambda path: [
            chardev("c0", path),
            command("netdev_add", type="vhost-user", id="n0", chardev="c0"),
            command("netdev_del", id="n0"),
            command("netdev_del", id="n0"),
            command("chardev-remove", id="c0"),
        ],
    ),
    "shares": (
        DeviceType.VHOST_USER_FS,
        lambda path: [
            chardev("c0", path),
            device("vhost-user-fs-pci", "f0", "rp0", chardev="c9", tag="a"),
            device("vhost-user-fs-pci", "f0", "rp0", chardev="c0", tag="a"),
            device("vhost-user-fs-pci", "f1", "rp1", chardev="c0", tag="a"),
        ],
    ),
}


@real
@pytest.mark.root
@pytest.mark.parametrize("topic", CONVERSATIONS)
def test_memory_answers_every_command_as_qemu_does(
    prelaunch_side: QemuSide,
    memory_side: MemorySide,
    tmp_path: Path,
    memory_file: Path,
    topic: str,
) -> None:
    kind, words = CONVERSATIONS[topic]
    with ExitStack() as stack:
        path = memory_file
        if kind:
            path = stack.enter_context(prelaunch_side.backend(kind, tmp_path)).socket_path
        commands = words(str(path))

        def answers(side: Side) -> list[tuple[str, object]]:
            return [
                (f"{c.execute} {dict(c.arguments)}", in_old_words(side.ask(c))) for c in commands
            ]

        assert answers(memory_side) == answers(prelaunch_side)


@real
def test_memory_emits_the_events_that_qemu_does(
    guest_side: QemuSide, memory_side: MemorySide
) -> None:
    def deletions(side: Side) -> list[Mapping[str, Any]]:
        with closing(side.monitor()) as monitor:
            carry_out(monitor, Qemu(monitor).steps(RNGDevice(id=ID, filename="/dev/urandom"), RP0))
            monitor.execute(command("device_del", id=NAME))
        return side.deletions(NAME)

    assert deletions(memory_side) == deletions(guest_side)
