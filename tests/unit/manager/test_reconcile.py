"""Journal and VM agree again, whatever died in between: on a VM in memory."""

import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from tests.contract.sandbox import (
    CHANGING,
    Breaking,
    Dying,
    Hooked,
    Killed,
    Noticed,
    Picture,
    Refusing,
    Sandbox,
)
from tests.contract.world import MemorySide
from tests.support.daemons import vhost_user_backend
from vmplug.devnum import DevNum
from vmplug.drivers.ports import Command
from vmplug.errors import CommandError, ProtocolError, UnplugTimeout
from vmplug.host.root import HostRoot
from vmplug.hypervisor.fake.monitor import Guest
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment
from vmplug.journal.state import State
from vmplug.manager.manager import DeviceManager
from vmplug.manager.reconcile import RepairOutcome
from vmplug.manager.reconcile import reconcile as repair
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import NetInfo, Request, RngInfo, ShareInfo

AT_ONCE_S = 0.001
"""For a guest that will not answer anyway; one in memory that does has answered before it."""
LIMITED = {"bps-total": "10M", "iothread": "on"}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Request, ...]]:
    """A network and a share at whose other ends is somebody, and random numbers."""
    ours, theirs = socket.socketpair()
    with vhost_user_backend("net") as backend, ours, theirs:
        yield (
            NetInfo(label="eth0", socket_path=str(backend.socket_path)),
            ShareInfo(tag="work", source=f"fd:{ours.fileno()}"),
            RngInfo(),
        )


@pytest.fixture(params=["live", "restored"])
def sandbox(
    request: pytest.FixtureRequest, tmp_path: Path, served: tuple[Request, ...]
) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path, is_restored=request.param == "restored", served=served)
    yield made
    made.close()


def batch(sandbox: Sandbox) -> list[Request]:
    """A batch that needs every kind of command, and a device that needs none."""
    return [
        sandbox.disk("a.img", options=LIMITED),
        DeviceInfo(container_path="/dev/null", dev_type=DevType.CHAR, devnum=DevNum(1, 3)),
        sandbox.disk("b.img", options={"block-driver": "virtio-scsi"}),
        *sandbox.served,
    ]


def take_away(sandbox: Sandbox, attachment: Attachment, *, remains: bool) -> None:
    """Somebody unplugs behind the manager's back, with all that belongs to it or without."""
    name = f"vmplug-{attachment.device_id}"
    requests = [Command("device_del", {"id": name})]
    if not remains:
        requests.append(Command("blockdev-del", {"node-name": name}))
    for request in requests:
        assert sandbox.side.ask(request) == {}


def changes(sandbox: Sandbox) -> int:
    return len(sandbox.changes_sent())


# meanwhile


def test_a_device_plugged_between_two_reads_is_left(tmp_path: Path) -> None:
    """Another process attaches after the journal was read, and before the VM is."""
    sandbox = Sandbox(tmp_path)
    with Journal.open(sandbox.state_dir) as journal, closing(Qemu(sandbox.side.monitor())) as qemu:
        find_devices = qemu.find_devices

        def find_after_another_attach() -> dict[str, bool]:
            sandbox.devices.attach(sandbox.disk("meanwhile.img"))
            return find_devices()

        qemu.find_devices = find_after_another_attach  # type: ignore[method-assign]
        assert repair(sandbox.vm, journal, qemu, timeout_s=AT_ONCE_S) == []
    (attachment,) = sandbox.devices.attachments()
    assert attachment.state is State.ATTACHED
    assert f"vmplug-{attachment.device_id}" in str(sandbox.side.parts())
    sandbox.close()


# the table


def test_reconcile_does_nothing_when_journal_and_vm_agree(sandbox: Sandbox) -> None:
    assert sandbox.devices.reconcile() == []
    sandbox.devices.attach_all(batch(sandbox))
    before, sent = sandbox.picture(), changes(sandbox)
    assert sandbox.devices.reconcile() == []
    assert sandbox.picture() == before
    assert changes(sandbox) == sent


def test_a_failed_attach_that_the_guest_kept_is_undone(sandbox: Sandbox) -> None:
    """Such as the half of a group that the guest does not let go of."""

    def keep(command: Command) -> None:
        if command.execute == "device_add":
            raise UnplugTimeout(("kept",), "half of it is still in the VM")

    before = sandbox.picture()
    sandbox.talk_through(lambda monitor: Noticed(monitor, keep))
    with pytest.raises(UnplugTimeout, match="still in the VM"):
        sandbox.devices.attach(sandbox.disk())
    sandbox.talk_plainly()
    (interrupted,) = sandbox.devices.attachments()
    assert interrupted.state is State.PLUGGING
    (repair,) = sandbox.devices.reconcile()
    assert (repair.device_id, repair.outcome) == (interrupted.device_id, RepairOutcome.UNDONE)
    assert sandbox.picture() == before


@pytest.mark.parametrize("is_sent", [False, True], ids=["nothing came", "all came"])
def test_an_interrupted_attach_is_undone(sandbox: Sandbox, *, is_sent: bool) -> None:
    before = sandbox.picture()
    last = 2 if is_sent else 1
    sandbox.talk_through(lambda monitor: Breaking(monitor, last, is_sent=is_sent))
    with pytest.raises(ProtocolError):
        sandbox.devices.attach(sandbox.disk())
    sandbox.talk_plainly()
    (interrupted,) = sandbox.devices.attachments()
    assert interrupted.state is State.PLUGGING
    assert bool(sandbox.vmplugs()) is is_sent

    (repair,) = sandbox.devices.reconcile()

    assert repair.device_id == interrupted.device_id
    assert repair.host_path == interrupted.host_path
    assert repair.outcome is RepairOutcome.UNDONE
    assert repair.reason
    assert sandbox.picture() == before


@pytest.mark.parametrize("remains", [False, True], ids=["none", "remains"])
def test_an_attached_device_that_is_gone_is_forgotten(sandbox: Sandbox, *, remains: bool) -> None:
    before = sandbox.picture()
    attachment = sandbox.devices.attach(sandbox.disk())
    sandbox.devices.attach(sandbox.disk(), owner="another")
    take_away(sandbox, attachment, remains=remains)

    (repair,) = sandbox.devices.reconcile()

    assert (repair.device_id, repair.outcome) == (attachment.device_id, RepairOutcome.FORGOTTEN)
    assert sandbox.picture() == before


def test_its_place_is_free_again(sandbox: Sandbox) -> None:
    attachment = sandbox.devices.attach(sandbox.disk("a.img"))
    take_away(sandbox, attachment, remains=False)
    sandbox.devices.reconcile()
    assert sandbox.devices.attach(sandbox.disk("b.img")).guest_address == attachment.guest_address


def test_a_detach_that_was_interrupted_is_finished(sandbox: Sandbox) -> None:
    before = sandbox.picture()
    attachment = sandbox.devices.attach(sandbox.disk(options=LIMITED))
    sandbox.talk_through(lambda monitor: Breaking(monitor, 1, is_sent=False))
    with pytest.raises(ProtocolError):
        sandbox.devices.detach(attachment.id)
    sandbox.talk_plainly()

    (repair,) = sandbox.devices.reconcile()

    assert (repair.device_id, repair.outcome) == (attachment.device_id, RepairOutcome.FINISHED)
    assert sandbox.picture() == before


@pytest.mark.parametrize("whole", [False, True], ids=["a node", "a device"])
def test_a_device_that_the_journal_does_not_know_is_removed_where_no_guest_has_it(
    sandbox: Sandbox, *, whole: bool
) -> None:
    before = sandbox.picture()
    name = "vmplug-0123456789abcdef"
    sandbox.side.ask(Command("blockdev-add", {"node-name": name, "driver": "null-co"}))
    if whole:
        front_end = {"driver": "virtio-blk-pci", "bus": "rp2", "addr": "0x0"}
        sandbox.side.ask(Command("device_add", {"id": name, "drive": name, **front_end}))
        parts = sandbox.side.parts()
        (repair,) = sandbox.devices.reconcile()
        assert repair.outcome is RepairOutcome.ANOTHER_JOURNAL
        assert sandbox.side.parts() == parts

    (repair,) = sandbox.devices.reconcile(take_over=whole)

    assert (repair.device_id, repair.host_path) == ("0123456789abcdef", None)
    assert repair.outcome is RepairOutcome.REMOVED
    assert sandbox.picture() == before


def test_devices_of_other_clients_stay(sandbox: Sandbox) -> None:
    for name in ("node0", "vmplugin", "notvmplug-0123456789abcdef"):
        sandbox.side.ask(Command("blockdev-add", {"node-name": name, "driver": "null-co"}))
    sandbox.side.ask(Command("object-add", {"qom-type": "iothread", "id": "thread0"}))
    before = sandbox.picture()
    assert sandbox.devices.reconcile() == []
    assert sandbox.picture() == before


def test_devices_that_are_only_counted_stay(sandbox: Sandbox) -> None:
    null = DeviceInfo(container_path="/dev/null", dev_type=DevType.CHAR, devnum=DevNum(1, 3))
    sandbox.devices.attach(null)
    before = sandbox.picture()
    assert sandbox.devices.reconcile() == []
    assert sandbox.picture() == before


def test_several_disagreements_are_repaired_at_once(sandbox: Sandbox) -> None:
    healthy = sandbox.devices.attach(sandbox.disk("healthy.img"))
    before = sandbox.picture()
    gone = sandbox.devices.attach(sandbox.disk("gone.img"))
    take_away(sandbox, gone, remains=True)
    unknown = {"node-name": "vmplug-0123456789abcdef", "driver": "null-co"}
    sandbox.side.ask(Command("blockdev-add", unknown))
    sandbox.talk_through(lambda monitor: Breaking(monitor, 2, is_sent=True))
    with pytest.raises(ProtocolError):
        sandbox.devices.attach(sandbox.disk("broken.img"))
    sandbox.talk_plainly()

    outcomes = {repair.outcome for repair in sandbox.devices.reconcile()}

    assert outcomes == {RepairOutcome.FORGOTTEN, RepairOutcome.REMOVED, RepairOutcome.UNDONE}
    assert sandbox.devices.attachments() == [healthy]
    assert sandbox.picture() == before


# two at once


@pytest.mark.parametrize("moment", range(1, 6))
def test_a_reconcile_that_another_one_overtakes_has_nothing_left_to_do(
    sandbox: Sandbox, moment: int
) -> None:
    before = sandbox.picture()
    sandbox.talk_through(lambda monitor: Breaking(monitor, 2, is_sent=True))
    with pytest.raises(ProtocolError):
        sandbox.devices.attach(sandbox.disk())
    asked = itertools.count(1)
    overtaken: list[RepairOutcome] = []

    def overtake(command: Command) -> None:
        assert command.execute not in CHANGING
        if next(asked) != moment:
            return
        with DeviceManager.open(
            vm=sandbox.vm,
            host=HostRoot(),
            hypervisor=Qemu(sandbox.side.monitor()),
            state_dir=sandbox.state_dir,
        ) as other:
            overtaken.extend(repair.outcome for repair in other.reconcile())

    sandbox.talk_through(lambda monitor: Hooked(monitor, overtake))
    assert sandbox.devices.reconcile() == []
    assert overtaken == [RepairOutcome.UNDONE]
    assert sandbox.picture() == before


# guests that do not let go


def test_a_device_that_a_silent_guest_keeps_stays_detaching(sandbox: Sandbox) -> None:
    before = sandbox.picture()
    attachment = sandbox.devices.attach(sandbox.disk())
    sandbox.machine.guest = Guest.SILENT
    with pytest.raises(UnplugTimeout):
        sandbox.devices.detach(attachment.id, timeout_s=AT_ONCE_S)
    for _ in range(2):
        (repair,) = sandbox.devices.reconcile(timeout_s=AT_ONCE_S)
        assert (repair.outcome, repair.reason) == (
            RepairOutcome.STILL_DETACHING,
            "the guest does not answer",
        )
        assert [a.state for a in sandbox.devices.attachments()] == [State.DETACHING]
        assert sandbox.vmplugs() == {f"vmplug-{attachment.device_id}"}

    sandbox.machine.wake_guest()
    (repair,) = sandbox.devices.reconcile()
    assert repair.outcome is RepairOutcome.FINISHED
    assert sandbox.picture() == before


def test_a_device_that_a_guest_refuses_to_release_stays_detaching(sandbox: Sandbox) -> None:
    before = sandbox.picture()
    sandbox.talk_through(lambda monitor: Breaking(monitor, 2, is_sent=True))
    with pytest.raises(ProtocolError):
        sandbox.devices.attach(sandbox.disk())
    sandbox.talk_plainly()
    sandbox.machine.guest = Guest.REFUSES
    (repair,) = sandbox.devices.reconcile()
    assert (repair.outcome, repair.reason) == (RepairOutcome.STILL_DETACHING, "the guest refuses")
    assert [a.state for a in sandbox.devices.attachments()] == [State.DETACHING]

    sandbox.machine.guest = Guest.ANSWERS
    assert [repair.outcome for repair in sandbox.devices.reconcile()] == [RepairOutcome.FINISHED]
    assert sandbox.picture() == before


def test_a_device_that_qemu_does_not_ask_for_is_told_and_can_be_tried_again(
    sandbox: Sandbox,
) -> None:
    before = sandbox.picture()
    sandbox.talk_through(lambda monitor: Breaking(monitor, 4, is_sent=True))
    with pytest.raises(ProtocolError):
        sandbox.devices.attach_all([sandbox.disk("a.img"), sandbox.disk("b.img")])
    plugged = sandbox.side.parts()

    sandbox.talk_through(lambda monitor: Refusing(monitor, 1))
    first, second = sandbox.devices.reconcile()
    sandbox.talk_plainly()
    assert first.outcome is RepairOutcome.STILL_DETACHING
    assert first.reason == "QEMU refused device_del: refused by the test"
    assert (second.outcome, second.host_path) == (RepairOutcome.UNDONE, str(sandbox.file("b.img")))
    assert [a.state for a in sandbox.devices.attachments()] == [State.DETACHING]
    kept = f"vmplug-{first.device_id}"
    assert sandbox.vmplugs() == {name for name in sandbox.vmplugs() if name.startswith(kept)}
    assert kept in sandbox.side.parts().devices.keys() & plugged.devices.keys()

    assert [repair.outcome for repair in sandbox.devices.reconcile()] == [RepairOutcome.FINISHED]
    assert sandbox.picture() == before


def test_a_refused_repair_can_be_tried_again(sandbox: Sandbox) -> None:
    before = sandbox.picture()
    sandbox.talk_through(lambda monitor: Breaking(monitor, 2, is_sent=True))
    with pytest.raises(ProtocolError):
        sandbox.devices.attach(sandbox.disk())

    sandbox.talk_through(lambda monitor: Refusing(monitor, 2))
    with pytest.raises(CommandError, match="refused by the test"):
        sandbox.devices.reconcile()
    sandbox.talk_plainly()
    assert [a.state for a in sandbox.devices.attachments()] == [State.DETACHING]

    assert [repair.outcome for repair in sandbox.devices.reconcile()] == [RepairOutcome.FINISHED]
    assert sandbox.picture() == before


# other VMs


def test_a_restarted_vm_holds_nothing(sandbox: Sandbox) -> None:
    attachments = sandbox.devices.attach_all(batch(sandbox))
    plugged = {a.device_id for a in attachments if a.guest_address}
    sandbox.close()
    sandbox.side = sandbox.memory = MemorySide()

    repairs = sandbox.devices.reconcile()

    assert {repair.device_id for repair in repairs} == plugged
    assert {repair.outcome for repair in repairs} == {RepairOutcome.FORGOTTEN}
    assert [a.container_path for a in sandbox.devices.attachments()] == ["/dev/null"]
    assert changes(sandbox) == 0


def test_the_records_of_other_vms_stay(sandbox: Sandbox, tmp_path: Path) -> None:
    other = Sandbox(tmp_path, vm="sandbox-2")
    try:
        theirs = other.devices.attach(other.disk("theirs.img"))
        assert sandbox.devices.reconcile() == []
        assert other.devices.attachments() == [theirs]
    finally:
        other.close()


# killed anywhere

Verb = Callable[[Sandbox], object]


def attach(sandbox: Sandbox) -> object:
    return sandbox.devices.attach_all(batch(sandbox), owner="c1")


def detach(sandbox: Sandbox) -> object:
    return sandbox.devices.detach_owner("c1", timeout_s=AT_ONCE_S)


def reconcile(sandbox: Sandbox) -> object:
    return sandbox.devices.reconcile(timeout_s=AT_ONCE_S)


def nothing(sandbox: Sandbox) -> None:
    pass


def attach_and_break(sandbox: Sandbox) -> None:
    sandbox.talk_through(lambda monitor: Breaking(monitor, 6, is_sent=True))
    with pytest.raises(ProtocolError):
        attach(sandbox)
    sandbox.talk_plainly()


LIVES: dict[str, tuple[Verb, Verb]] = {
    "attach": (nothing, attach),
    "detach": (attach, detach),
    "reconcile": (attach_and_break, reconcile),
}
"""What is done first, and the verb in which the process is killed."""


DEATHS = [pytest.param(False, id="before", marks=pytest.mark.slow), pytest.param(True, id="after")]
"""When a process is killed: most deaths before a command leave what one after the last did."""


def deaths(
    directory: Path, life: str, guest: Guest, served: tuple[Request, ...], *, is_sent: bool
) -> Iterator[tuple[Sandbox, Picture]]:
    """A sandbox for every command of a verb, killed there, with the picture before it all."""
    prepare, verb = LIVES[life]
    for count in itertools.count(1):
        sandbox = Sandbox(directory / str(count), served=served)
        before = sandbox.picture()
        prepare(sandbox)
        sandbox.machine.guest = guest
        sandbox.talk_through(partial(Dying, count=count, is_sent=is_sent))
        killed = was_killed(sandbox, verb)
        sandbox.talk_plainly()
        if killed:
            yield sandbox, before
        sandbox.close()
        if not killed:
            assert count > (6 if is_sent else 8)
            return


def was_killed(sandbox: Sandbox, verb: Verb) -> bool:
    try:
        verb(sandbox)
    except Killed:
        return True
    except UnplugTimeout:
        return False
    return False


@pytest.mark.slow
@pytest.mark.parametrize("is_sent", DEATHS)
@pytest.mark.parametrize("life", LIVES)
def test_reconcile_leaves_nothing_after_a_death_at_any_command(
    tmp_path: Path, life: str, served: tuple[Request, ...], *, is_sent: bool
) -> None:
    for sandbox, before in deaths(tmp_path, life, Guest.ANSWERS, served, is_sent=is_sent):
        sandbox.devices.reconcile()
        assert sandbox.picture() == before
        assert sandbox.devices.reconcile() == []


def on_ports(sandbox: Sandbox) -> set[str]:
    """What vmplug put behind ports, where a silent guest keeps it."""
    devices = sandbox.side.parts().devices
    names = {name for name, driver in devices.items() if driver.endswith("-pci")}
    return names & sandbox.vmplugs()


@pytest.mark.slow
@pytest.mark.parametrize("is_sent", DEATHS)
@pytest.mark.parametrize("life", LIVES)
def test_reconcile_finishes_a_killed_verb_when_the_guest_wakes(
    tmp_path: Path, life: str, served: tuple[Request, ...], *, is_sent: bool
) -> None:
    for sandbox, before in deaths(tmp_path, life, Guest.SILENT, served, is_sent=is_sent):
        reconcile(sandbox)
        left = sandbox.devices.attachments()
        assert {f"vmplug-{a.device_id}" for a in left} == on_ports(sandbox)
        assert {a.state for a in left} <= {State.DETACHING}
        assert {a.name for a in left} <= {"/dev/a.img", *(request.name for request in served)}

        sandbox.machine.wake_guest()
        sandbox.devices.reconcile()
        assert sandbox.picture() == before


SENT_ELSEWHERE = {"closefd", "add-fd", "remove-fd"}


def test_the_verbs_that_are_killed_send_every_kind_of_command(
    tmp_path: Path, served: tuple[Request, ...]
) -> None:
    """But for the one that only takes a step back that was the last, and for fd sets.

    Only a VM with a socket gets those: the fault matrix kills vmplug at them.
    """
    sandbox = Sandbox(tmp_path, served=served)
    attach(sandbox)
    detach(sandbox)
    sandbox.close()
    assert {command.execute for command in sandbox.machine.sent} >= CHANGING - SENT_ELSEWHERE
