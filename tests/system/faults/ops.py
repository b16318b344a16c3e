"""The operations of the matrix, as the processes under test do them."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import NamedTuple

from tests.system.faults.kinds import FIRST, MEDIATED, MEDIATED_TYPE
from tests.system.faults.process import GO, Hooks, trace, trace_programs
from tests.system.faults.steps import Op, StepKind
from tests.system.faults.world import OWN_VM, OWNER, UNPLUG_S, VM, World
from vmplug.cli.answer import main
from vmplug.drivers.plug import VirtiofsdSpec
from vmplug.errors import HypervisorError
from vmplug.host.process import read_start_time
from vmplug.host.root import HostRoot
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner, VirtiofsdProcess
from vmplug.journal.database import Opened
from vmplug.journal.journal import Journal
from vmplug.journal.records import VmRecord
from vmplug.leases.lease import make_lease
from vmplug.leases.life import end_lease, leases_of, record_lease, repair_lease
from vmplug.manager.binding.binder import Binder
from vmplug.manager.binding.mediated import create_mediated_device, remove_mediated_device
from vmplug.manager.reconcile import RepairOutcome
from vmplug.manager.setup import Setup
from vmplug.vms.adopt import adopt_vm
from vmplug.vms.reconcile import reconcile_host, release_ended
from vmplug.vms.release import still_runs
from vmplug.vms.start import VmSpec, start_vm
from vmplug.vms.stop import stop_vm


class Waits(NamedTuple):
    """How long QEMU may take to answer, and the guest to let a device go."""

    answer_s: float = 10.0
    guest_s: float = UNPLUG_S


def attach(world: World, hooks: Hooks, waits: Waits) -> None:
    with world.manager(hooks, patience_s=waits.answer_s) as devices:
        devices.attach_all(world.behind.requests(), owner=OWNER, managed=world.kind.managed)


def detach(world: World, hooks: Hooks, waits: Waits) -> None:
    with world.manager(hooks, patience_s=waits.answer_s) as devices:
        devices.detach_owner(OWNER, timeout_s=min(waits))


def resize(world: World, hooks: Hooks, waits: Waits) -> None:
    with world.manager(hooks, patience_s=waits.answer_s) as devices:
        devices.resize(devices.attachments()[0].id, LARGER_BYTES)


LARGER_BYTES = 3 << 20


def adopt(world: World, hooks: Hooks, _: Waits) -> None:
    _trace_all(hooks)
    adopt_vm(VM, str(world.conductor.path), setup=Setup(state_dir=world.state_dir))


def forget(world: World, hooks: Hooks, _: Waits) -> None:
    """`vm stop` of an adopted VM."""
    _trace_all(hooks)
    stop_vm(VM, setup=Setup(state_dir=world.state_dir))


def start(world: World, hooks: Hooks, _: Waits) -> None:
    """`vm start` of a real QEMU, with the devices in it from the start."""
    _trace_all(hooks)
    trace_programs(hooks)
    spec = VmSpec(name=OWN_VM, accel="tcg", memory_mib=64)
    start_vm(spec, world.behind.requests(), owner=OWNER, setup=Setup(state_dir=world.state_dir))


def stop(world: World, hooks: Hooks, _: Waits) -> None:
    _trace_all(hooks)
    with hooks.step(StepKind.COMMAND, "quit"):
        pass  # its commands go past the conductor: this is before the first of them
    stop_vm(OWN_VM, timeout_s=0, setup=Setup(state_dir=world.state_dir))


def create(world: World, hooks: Hooks, _: Waits) -> None:
    """`mdev create`."""
    setup = Setup(state_dir=world.state_dir, host=world.host(hooks))
    create_mediated_device(FIRST, MEDIATED_TYPE, uuid=MEDIATED, setup=setup)


def remove(world: World, hooks: Hooks, _: Waits) -> None:
    """`mdev remove`."""
    _trace_all(hooks)
    setup = Setup(state_dir=world.state_dir, host=world.host(hooks))
    remove_mediated_device(MEDIATED, setup=setup)


def lease(world: World, hooks: Hooks, _: Waits) -> None:
    """`vmplug lease`, which gives the devices to a process that uses none of them."""
    _trace_all(hooks)
    _trace_daemons(hooks)
    setup = Setup(state_dir=world.state_dir, host=world.host(hooks))
    managed = world.kind.managed
    made = make_lease(world.behind.requests(), owner=OWNER, managed=managed, setup=setup)
    made.give_to(world.holder.pid)


def end(world: World, hooks: Hooks, _: Waits) -> None:
    """`vmplug lease end`."""
    _trace_all(hooks)
    end_lease(OWNER, setup=Setup(state_dir=world.state_dir, host=world.host(hooks)))


def lend(world: World, _: Hooks, __: Waits) -> None:
    """The VM is unknown, and a lease has its devices, as one has whose QEMU got its words."""
    with Journal.open(world.state_dir) as journal:
        leased = record_lease(OWNER, journal)
        journal.add_vm(leased)
        with journal._db as db:
            db.execute(_LEND, (leased.name, VM))
            db.execute("DELETE FROM vm WHERE name = ?", (VM,))
        started_at = read_start_time(world.holder.pid, journal.host)
        assert started_at
        assert journal.leases.hand_over(leased, world.holder.pid, started_at)


_LEND = """
UPDATE device SET vm = ?, place = 'lease/' || rowid,
    guest = json_remove(guest, '$.pci_path', '$.scsi_address', '$.nvdimm_handle') WHERE vm = ?
"""
"""Where its guest sees a device, a lease does not know."""


def reconcile(world: World, hooks: Hooks, waits: Waits) -> None:
    """`vmplug reconcile`; what that verb does for a host that is a tree, or a QEMU without words.

    HypervisorError when it reports that a device is still detaching.
    """
    _trace_all(hooks)
    with Journal.open(world.state_dir) as journal:
        record = journal.find_vm(VM)
        for leased in leases_of(journal):
            repair_lease(leased, journal, world.host(hooks), grace_s=0)
        own = journal.find_vm(OWN_VM)
    if own:
        done = reconcile_host(vm=OWN_VM, setup=Setup(state_dir=world.state_dir))
        assert not done.failures, done.failures
    if record is None:
        outcomes = []
    elif world.tree is None and waits.answer_s == Waits().answer_s:
        outcomes = _reconcile_by_verb(world, waits)
    else:
        outcomes = _reconcile_by_hand(record, world, hooks, waits)
    if RepairOutcome.STILL_DETACHING in outcomes:
        raise HypervisorError("reconcile reports that it is not done", hint="try again")


def _reconcile_by_verb(world: World, waits: Waits) -> list[str]:
    words = ["reconcile", "--vm", VM, "--state-dir", str(world.state_dir), "--json"]
    with redirect_stdout(io.StringIO()) as told:
        main.main([*words, "--timeout", str(waits.guest_s)], standalone_mode=False)
    return [repair["outcome"] for repair in json.loads(told.getvalue())["repairs"]]


def _trace_daemons(hooks: Hooks) -> None:
    """The same for the daemons of a lease."""
    start = HostVirtiofsdRunner.start

    def start_traced(
        runner: HostVirtiofsdRunner, daemon: VirtiofsdSpec, device_id: str
    ) -> VirtiofsdProcess:
        with hooks.step(StepKind.DAEMON, "start virtiofsd"):
            return start(runner, daemon, device_id)

    HostVirtiofsdRunner.start = start_traced  # type: ignore[assignment]


def _reconcile_by_hand(record: VmRecord, world: World, hooks: Hooks, waits: Waits) -> list[str]:
    with Journal.open(world.state_dir) as journal:
        if not still_runs(record, journal):
            repairs = release_ended(record, journal)
        else:
            with world.manager(hooks, patience_s=waits.answer_s) as devices:
                repairs = devices.reconcile(timeout_s=waits.guest_s)
        told = Binder(journal, world.host(hooks)).recover()
    for returned in told:
        if returned.error:
            raise returned.error
    return [repair.outcome for repair in repairs]


def _trace_all(hooks: Hooks) -> None:
    """From now on in this process, make the transactions of each journal steps.

    The verbs open their journals themselves, and this process ends soon.
    """
    complete = Journal._complete

    def complete_traced(opened: Opened, host: HostRoot) -> Journal:
        journal = complete(opened, host)
        trace(journal, hooks)
        return journal

    Journal._complete = complete_traced  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: what it needs `first`, how it runs, and the words that take it `back`."""

    run: Callable[[World, Hooks, Waits], None]
    first: tuple[Op, ...] = ()
    back: tuple[Op, ...] = ()


OPERATIONS = {
    Op.ATTACH: Operation(attach, back=(Op.DETACH,)),
    Op.DETACH: Operation(detach, first=(Op.ATTACH,)),
    Op.RECONCILE: Operation(reconcile),
    Op.RESIZE: Operation(resize, first=(Op.ATTACH,), back=(Op.DETACH,)),
    Op.ADOPT: Operation(adopt, first=(Op.FORGET,)),
    Op.FORGET: Operation(forget, back=(Op.ADOPT,)),
    Op.START: Operation(start, back=(Op.STOP,)),
    Op.STOP: Operation(stop, first=(Op.START,)),
    Op.CREATE: Operation(create, first=(Op.REMOVE,)),
    Op.REMOVE: Operation(remove, back=(Op.CREATE,)),
    Op.LEASE: Operation(lease, back=(Op.END,)),
    Op.END: Operation(end, first=(Op.LEASE,)),
    Op.LEND: Operation(lend),
    Op.TAKE_OVER: Operation(adopt, first=(Op.ATTACH, Op.LEND), back=(Op.DETACH,)),
}


def operate(world: World, op: Op, hooks: Hooks, *, waits: Waits) -> None:
    """The operation; what it needs first is done unobserved."""
    for needed in OPERATIONS[op].first:
        OPERATIONS[needed].run(world, hooks, Waits())
    hooks.ask(on=True)
    OPERATIONS[op].run(world, hooks, waits)


def follow(world: World, hooks: Hooks) -> None:
    """Whatever the matrix says, until it says no more."""
    while (word := hooks.ask(next=True)) != GO:
        OPERATIONS[Op(word)].run(world, hooks, Waits())
