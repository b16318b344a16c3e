"""Journal and VM agree again for what is no plain disk: NVDIMMs, connections, networks."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.sandbox import Breaking, Dying, Killed, Refusing, Sandbox
from tests.contract.world import MemorySide
from tests.support.daemons import vhost_user_backend
from vmplug.drivers.place import GuestAddress
from vmplug.drivers.ports import Command
from vmplug.errors import CommandError, ProtocolError, UnplugTimeout
from vmplug.hypervisor.fake.monitor import Guest
from vmplug.hypervisor.qmp.monitor import Monitor
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment
from vmplug.journal.state import State
from vmplug.manager.reconcile import Repair, RepairOutcome
from vmplug.oci.info import DeviceInfo
from vmplug.oci.requests import NetInfo, Request, RngInfo, ShareInfo

AT_ONCE_S = 0.1
"""For a guest that will not answer anyway."""
MIB = 1 << 20
STRANGER = "0123456789abcdef"
NAME = f"vmplug-{STRANGER}"
NO_UNPLUG = "QEMU refused device_del: nvdimm device hot unplug is not supported yet."


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Request, ...]]:
    """One of each kind at whose other end is somebody."""
    ours, theirs = socket.socketpair()
    with vhost_user_backend("net") as backend, ours, theirs:
        yield (
            NetInfo(label="eth0", socket_path=str(backend.socket_path)),
            ShareInfo(tag="work", source=f"fd:{ours.fileno()}"),
            RngInfo(),
        )


@pytest.fixture(params=["live", "restored"])
def sandbox(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path, is_restored=request.param == "restored")
    yield made
    made.close()


def nvdimm(sandbox: Sandbox, name: str = "m.img", *, ro: bool = False) -> DeviceInfo:
    sandbox.file(name, size_bytes=2 * MIB)
    return sandbox.disk(name, ro=ro, options={"block-driver": "nvdimm"})


def break_off(sandbox: Sandbox, request: Request, count: int, *, is_sent: bool) -> Attachment:
    """An attach whose conversation breaks at its `count`-th command; what the journal keeps."""
    sandbox.talk_through(lambda monitor: Breaking(monitor, count, is_sent=is_sent))
    with pytest.raises(ProtocolError):
        sandbox.devices.attach(request, owner="c1")
    sandbox.talk_plainly()
    (interrupted,) = sandbox.devices.attachments()
    assert interrupted.state is State.PLUGGING
    return interrupted


def states(sandbox: Sandbox) -> list[State]:
    return [attachment.state for attachment in sandbox.devices.attachments()]


def ask(sandbox: Sandbox, execute: str, **arguments: object) -> None:
    """Something that somebody does to the VM behind vmplug's back."""
    command = {key.replace("_", "-"): value for key, value in arguments.items()}
    assert sandbox.side.ask(Command(execute, command)) == {}


def add_memory(sandbox: Sandbox, name: str = NAME) -> None:
    """The memory of an NVDIMM, without the module."""
    properties = {"mem_path": "/m", "size": MIB, "share": True}
    ask(sandbox, "object-add", qom_type="memory-backend-file", id=f"{name}-memory", **properties)


def add_link(sandbox: Sandbox, name: str) -> None:
    """A connection, to nobody in particular."""
    address = {"type": "unix", "data": {"path": "/run/s"}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    ask(sandbox, "chardev-add", id=name, backend=backend)


def removed(device_id: str = STRANGER) -> Repair:
    reason = "it is in the VM, but not in the journal"
    return Repair(device_id, None, RepairOutcome.REMOVED, reason)


# NVDIMMs whose attach broke off


@pytest.mark.parametrize(
    ("count", "is_sent"), [(1, False), (1, True), (2, False)], ids=["none", "memory", "half"]
)
def test_an_nvdimm_that_was_not_plugged_whole_is_undone(
    sandbox: Sandbox, count: int, *, is_sent: bool
) -> None:
    before = sandbox.picture()
    interrupted = break_off(sandbox, nvdimm(sandbox), count, is_sent=is_sent)
    assert bool(sandbox.vmplugs()) is (count == 2 or is_sent)

    (repair,) = sandbox.devices.reconcile()

    assert repair == Repair(
        interrupted.device_id,
        interrupted.host_path,
        RepairOutcome.UNDONE,
        "its attach was interrupted",
    )
    assert sandbox.picture() == before
    assert sandbox.devices.reconcile() == []


def test_half_an_nvdimm_whose_removal_is_refused_is_tried_again(sandbox: Sandbox) -> None:
    before = sandbox.picture()
    break_off(sandbox, nvdimm(sandbox), 2, is_sent=False)
    sandbox.talk_through(lambda monitor: Refusing(monitor, 1))
    with pytest.raises(CommandError, match="refused by the test"):
        sandbox.devices.reconcile()
    sandbox.talk_plainly()
    assert states(sandbox) == [State.DETACHING]
    assert [repair.outcome for repair in sandbox.devices.reconcile()] == [RepairOutcome.FINISHED]
    assert sandbox.picture() == before


def test_an_nvdimm_that_came_whole_stays_and_is_told_once(sandbox: Sandbox) -> None:
    interrupted = break_off(sandbox, nvdimm(sandbox), 2, is_sent=True)
    parts = sandbox.side.parts()

    (repair,) = sandbox.devices.reconcile()

    assert repair == Repair(
        interrupted.device_id,
        interrupted.host_path,
        RepairOutcome.RETAINED,
        "QEMU cannot unplug it",
    )
    assert states(sandbox) == [State.RETAINED]
    assert sandbox.side.parts() == parts
    before = sandbox.picture()
    assert sandbox.devices.reconcile() == []
    assert sandbox.picture() == before


def test_a_retained_nvdimm_serves_the_next_request(sandbox: Sandbox) -> None:
    interrupted = break_off(sandbox, nvdimm(sandbox), 2, is_sent=True)
    sandbox.devices.reconcile()
    sent = len(sandbox.changes_sent())
    again = sandbox.devices.attach(nvdimm(sandbox), owner="c2")
    assert (again.device_id, again.owner) == (interrupted.device_id, "c2")
    assert again.guest_address == GuestAddress(nvdimm_id=0, nvdimm_handle=1)
    assert states(sandbox) == [State.ATTACHED]
    assert len(sandbox.changes_sent()) == sent


@pytest.mark.parametrize("is_sent", [False, True], ids=["before", "after"])
def test_reconcile_undoes_or_retains_an_nvdimm_after_a_death_at_any_command(
    tmp_path: Path, *, is_sent: bool
) -> None:
    outcomes = list[RepairOutcome]()
    for count in range(1, 40):
        sandbox = Sandbox(tmp_path / str(count))
        before = sandbox.picture()

        def dying(monitor: Monitor, count: int = count) -> Dying:
            return Dying(monitor, count, is_sent=is_sent)

        sandbox.talk_through(dying)
        try:
            sandbox.devices.attach(nvdimm(sandbox))
        except Killed:
            sandbox.talk_plainly()
            repairs = sandbox.devices.reconcile()
            outcomes += [repair.outcome for repair in repairs]
            if RepairOutcome.RETAINED not in outcomes:
                assert sandbox.picture() == before
            assert sandbox.devices.reconcile() == []
            sandbox.close()
        else:
            sandbox.close()
            break
    assert outcomes
    assert set(outcomes) <= {RepairOutcome.UNDONE, RepairOutcome.RETAINED}
    assert (RepairOutcome.RETAINED in outcomes) is is_sent


# NVDIMMs that nobody holds, and that are gone


@pytest.fixture
def retained(sandbox: Sandbox) -> Attachment:
    """An NVDIMM that stayed when its owner let go."""
    attachment = sandbox.devices.attach(nvdimm(sandbox), owner="c1")
    sandbox.devices.detach(attachment.id)
    assert states(sandbox) == [State.RETAINED]
    return attachment


def test_a_retained_nvdimm_agrees_with_the_vm(sandbox: Sandbox, retained: Attachment) -> None:
    before, sent = sandbox.picture(), len(sandbox.changes_sent())
    assert sandbox.devices.reconcile() == []
    assert sandbox.picture() == before
    assert len(sandbox.changes_sent()) == sent


def test_it_is_forgotten_with_its_vm(sandbox: Sandbox, retained: Attachment) -> None:
    sandbox.close()
    sandbox.side = sandbox.memory = MemorySide()
    (repair,) = sandbox.devices.reconcile()
    assert (repair.device_id, repair.outcome) == (retained.device_id, RepairOutcome.FORGOTTEN)
    assert sandbox.devices.attachments() == []
    assert sandbox.changes_sent() == []
    again = sandbox.devices.attach(nvdimm(sandbox))
    assert again.guest_address == retained.guest_address
    assert again.device_id != retained.device_id


@pytest.mark.parametrize("is_held", [False, True])
def test_the_memory_of_an_nvdimm_that_is_gone_is_removed(
    sandbox: Sandbox, *, is_held: bool
) -> None:
    """Nothing takes a module out; a VM that came by migration may lack it all the same."""
    before = sandbox.picture()
    attachment = sandbox.devices.attach(nvdimm(sandbox))
    if not is_held:
        sandbox.devices.detach(attachment.id)
    del sandbox.machine.devices[f"vmplug-{attachment.device_id}"]
    assert sandbox.vmplugs() == {f"vmplug-{attachment.device_id}-memory"}

    (repair,) = sandbox.devices.reconcile()

    assert (repair.outcome, repair.reason) == (
        RepairOutcome.FORGOTTEN,
        "the VM no longer holds it",
    )
    assert sandbox.picture() == before


def test_a_reconcile_that_another_process_overtook_keeps_the_nvdimm(sandbox: Sandbox) -> None:
    """One process saw no module and wrote "detaching"; the other then plugged it, and died."""
    attachment = sandbox.devices.attach(nvdimm(sandbox))
    with Journal.open(sandbox.state_dir) as journal:
        journal.set_state([attachment.device_id], State.DETACHING)
        journal.give_up([attachment.device_id])
    parts = sandbox.side.parts()
    (repair,) = sandbox.devices.reconcile()
    assert (repair.device_id, repair.outcome) == (attachment.device_id, RepairOutcome.RETAINED)
    assert states(sandbox) == [State.RETAINED]
    assert sandbox.side.parts() == parts
    assert sandbox.devices.reconcile() == []


# NVDIMMs of nobody


def test_an_nvdimm_that_the_journal_does_not_know_is_told_with_qemus_words(
    sandbox: Sandbox,
) -> None:
    add_memory(sandbox)
    ask(sandbox, "device_add", driver="nvdimm", id=NAME, memdev=f"{NAME}-memory", slot=2)
    before = sandbox.picture()
    for _ in range(2):
        assert sandbox.devices.reconcile(take_over=True) == [
            Repair(STRANGER, None, RepairOutcome.STILL_DETACHING, NO_UNPLUG)
        ]
        assert sandbox.picture() == before


def test_its_slot_and_its_number_are_not_given_away(sandbox: Sandbox) -> None:
    add_memory(sandbox)
    ask(sandbox, "device_add", driver="nvdimm", id=NAME, memdev=f"{NAME}-memory", slot=0)
    attachment = sandbox.devices.attach(nvdimm(sandbox))
    assert attachment.guest_address == GuestAddress(nvdimm_id=1, nvdimm_handle=2)


def test_its_memory_alone_is_removed(sandbox: Sandbox) -> None:
    before = sandbox.picture()
    add_memory(sandbox)
    assert sandbox.devices.reconcile() == [removed()]
    assert sandbox.picture() == before


def test_an_nvdimm_of_nobody_does_not_keep_the_rest_from_being_repaired(
    sandbox: Sandbox,
) -> None:
    add_memory(sandbox)
    ask(sandbox, "device_add", driver="nvdimm", id=NAME, memdev=f"{NAME}-memory", slot=2)
    before = sandbox.picture()
    add_link(sandbox, "vmplug-012345fedcba9876-link")
    break_off(sandbox, sandbox.disk(), 2, is_sent=True)
    outcomes = {
        repair.device_id: repair.outcome for repair in sandbox.devices.reconcile(take_over=True)
    }
    assert outcomes.pop(STRANGER) is RepairOutcome.STILL_DETACHING
    assert outcomes.pop("012345fedcba9876") is RepairOutcome.REMOVED
    assert list(outcomes.values()) == [RepairOutcome.UNDONE]
    assert sandbox.picture() == before


# Connections and networks of nobody


def test_a_connection_without_a_device_is_removed(sandbox: Sandbox) -> None:
    before = sandbox.picture()
    add_link(sandbox, f"{NAME}-link")
    assert sandbox.devices.reconcile() == [removed()]
    assert sandbox.picture() == before


def test_a_network_without_a_device_is_removed_with_its_connection(sandbox: Sandbox) -> None:
    before = sandbox.picture()
    add_link(sandbox, f"{NAME}-link")
    ask(sandbox, "netdev_add", type="vhost-user", id=f"{NAME}-net", chardev=f"{NAME}-link")
    assert sandbox.devices.reconcile() == [removed()]
    assert sandbox.picture() == before


@pytest.mark.parametrize("model", ["virtio-net-pci", "vhost-user-blk-pci"])
def test_a_whole_device_of_nobody_is_unplugged_with_all_its_parts(
    sandbox: Sandbox, model: str
) -> None:
    before = sandbox.picture()
    add_link(sandbox, f"{NAME}-link")
    other_end = {"chardev": f"{NAME}-link"}
    if model == "virtio-net-pci":
        ask(sandbox, "netdev_add", type="vhost-user", id=f"{NAME}-net", **other_end)
        other_end = {"netdev": f"{NAME}-net"}
    ask(sandbox, "device_add", driver=model, id=NAME, bus="rp2", addr="0x0", **other_end)
    assert sandbox.devices.reconcile(take_over=True) == [removed()]
    assert sandbox.picture() == before


def test_a_source_without_a_device_is_removed(sandbox: Sandbox) -> None:
    before = sandbox.picture()
    source = {"qom_type": "rng-random", "id": f"{NAME}-source", "filename": "/dev/urandom"}
    ask(sandbox, "object-add", **source)
    assert sandbox.devices.reconcile() == [removed()]
    assert sandbox.picture() == before


def test_connections_networks_and_memory_of_others_stay(sandbox: Sandbox) -> None:
    for name in ("char0", "vmplugin-link", "notvmplug-0123456789abcdef-link"):
        add_link(sandbox, name)
    ask(sandbox, "netdev_add", type="vhost-user", id="net0", chardev="char0")
    add_memory(sandbox, "m0")
    ask(sandbox, "device_add", driver="nvdimm", id="nv0", memdev="m0-memory", slot=0)
    before = sandbox.picture()
    assert sandbox.devices.reconcile() == []
    assert sandbox.picture() == before


# Every kind, broken off at every command


@pytest.mark.parametrize("is_sent", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("kind", "commands"), [(0, 3), (1, 3), (2, 2)], ids=["net", "fs", "rng"])
def test_an_interrupted_attach_of_any_kind_is_undone(
    sandbox: Sandbox, served: tuple[Request, ...], kind: int, commands: int, *, is_sent: bool
) -> None:
    before = sandbox.picture()
    for count in range(1, commands + 1):
        break_off(sandbox, served[kind], count, is_sent=is_sent)
        (repair,) = sandbox.devices.reconcile()
        assert repair.outcome is RepairOutcome.UNDONE
        assert sandbox.picture().rows == before.rows
        assert sandbox.side.parts() == before.parts
        assert sandbox.devices.reconcile() == []
    sandbox.devices.attach(served[kind])
    assert states(sandbox) == [State.ATTACHED]


# Backends that are gone


def test_a_backend_that_is_gone_is_told_until_it_is_back(
    sandbox: Sandbox, served: tuple[Request, ...], tmp_path: Path
) -> None:
    net, _, rng = sandbox.devices.attach_all(served)
    lose(sandbox, net)
    before = sandbox.picture()
    for _ in range(2):
        assert sandbox.devices.reconcile() == [
            Repair(
                net.device_id,
                net.host_path,
                RepairOutcome.BACKEND_LOST,
                "start its backend again, or detach the device",
            )
        ]
        assert sandbox.picture() == before
    lose(sandbox, net, state="unix:")
    assert sandbox.devices.reconcile() == []
    assert rng.state is State.ATTACHED


def test_a_guest_that_waits_for_a_lost_backend_is_said_to(
    sandbox: Sandbox, served: tuple[Request, ...]
) -> None:
    before = sandbox.picture()
    net = sandbox.devices.attach(served[0])
    sandbox.machine.guest = Guest.SILENT
    lose(sandbox, net)
    with pytest.raises(UnplugTimeout, match=f"the backend of {net.host_path} is gone"):
        sandbox.devices.detach(net.id, timeout_s=AT_ONCE_S)
    (repair,) = sandbox.devices.reconcile(timeout_s=AT_ONCE_S)
    assert (repair.outcome, repair.reason) == (
        RepairOutcome.STILL_DETACHING,
        "its vhost-user backend is gone, and the guest waits for it",
    )
    assert states(sandbox) == [State.DETACHING]
    sandbox.machine.wake_guest()
    assert [repair.outcome for repair in sandbox.devices.reconcile()] == [RepairOutcome.FINISHED]
    assert sandbox.picture() == before


def lose(sandbox: Sandbox, attachment: Attachment, state: str = "disconnected:unix:") -> None:
    """What QEMU says of the device's connection from now on."""
    sandbox.machine.chardevs[f"vmplug-{attachment.device_id}-link"] = state
