"""The life of leases: which process has one, when has it ended, and what is given back then?

A lease ends with its process. Until it is given to one, that is its maker. A child may have the
devices too: while a process has a function open, or a disk for writing, the lease does not end.
"""

import os
import time
from contextlib import suppress

import msgspec

from vmplug.address import new_id
from vmplug.errors import DeviceError, NotAttached, StateError
from vmplug.host.kind import DeviceType
from vmplug.host.process import read_start_time
from vmplug.host.root import HostRoot
from vmplug.host.use.claim import LEASE_PREFIX
from vmplug.host.use.openers import Opener
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner
from vmplug.journal.journal import Journal
from vmplug.journal.process import read_pid_namespace
from vmplug.journal.records import (
    Attachment,
    DeviceRecord,
    VmRecord,
    spoken_process,
)
from vmplug.leases.state import LeaseState, find_state
from vmplug.leases.users import LeaseUser, find_users
from vmplug.manager.reconcile import Repair, RepairOutcome
from vmplug.manager.setup import DEFAULT_SETUP, Setup

GRACE_S = 2.0
"""How long a process that has inherited nothing may take to open what it was started for, when
its launcher died before it said that the lease is this process's."""
STEP_S = 0.05


class LeaseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A lease of the journal as it is now; `process` is its number, `program` its command."""

    id: str
    owner: str
    state: LeaseState
    process: int | None
    program: str | None
    devices: tuple[Attachment, ...]


def lease_name(lease_id: str) -> str:
    """The name of a lease in the journal."""
    return LEASE_PREFIX + lease_id


def lease_id_of(record: VmRecord) -> str:
    """The id of a lease."""
    return record.name.removeprefix(LEASE_PREFIX)


def record_lease(lease_id: str, journal: Journal) -> VmRecord:
    """A new lease, which this process makes.

    In place of a QMP socket are the PID namespace in which its process has its number, and what
    no other lease has.
    """
    return VmRecord(
        name=lease_name(lease_id),
        qmp_socket=f"{LEASE_PREFIX}{read_pid_namespace(journal.host)}:{new_id()}",
        pid=None,
        started_at=None,
        is_ours=False,
        starting_by=journal.worker,
    )


def leases_of(journal: Journal) -> list[VmRecord]:
    """Every lease of the journal."""
    return [record for record in journal.all_holders() if record.is_lease]


def list_leases(*, setup: Setup = DEFAULT_SETUP) -> list[LeaseStatus]:
    """Return every lease of the journal; reads only."""
    with Journal.open_existing(setup.state_dir) as journal:
        return [_status(record, journal) for record in leases_of(journal)]


def _status(record: VmRecord, journal: Journal) -> LeaseStatus:
    held = journal.attachments(record.name)
    state = find_state(record, journal.host)
    pid = record.pid or (record.starting_by.pid if record.starting_by else None)
    is_there = state in {LeaseState.MADE, LeaseState.HELD}
    name = (journal.host.read_text(f"/proc/{pid}/comm") or "").strip() if is_there else ""
    return LeaseStatus(
        id=lease_id_of(record),
        owner=held[0].owner if held else lease_id_of(record),
        state=state,
        process=pid,
        program=name or None,
        devices=tuple(held),
    )


def end_lease(lease_id: str, *, setup: Setup = DEFAULT_SETUP) -> LeaseStatus:
    """Take a lease back, and return it as it was.

    Its process may still run, but not use the devices. Raises NotAttached for one that is not
    known, StateError while a process makes it or uses a device, and BindError for a function that
    its driver does not take; `reconcile` tries that again.
    """
    with Journal.open_existing(setup.state_dir) as journal:
        record = journal.find_vm(lease_name(lease_id))
        if record is None:
            raise NotAttached(
                f"there is no lease {lease_id}", hint="vmplug lease list shows the leases"
            )
        was = _status(record, journal)
        if was.state is LeaseState.MADE and was.process != os.getpid():
            raise _in_use(record, f"{spoken_process(record, journal.host)} is making it")
        release(record, journal, setup.host)
    return was


def release(record: VmRecord, journal: Journal, host: HostRoot) -> None:
    """Take a lease back, whose process may run. Raises StateError while one uses a device."""
    state = find_state(record, journal.host)
    if state is LeaseState.UNKNOWN:
        raise _in_use(record, "its process is in another PID namespace")
    for user in find_users(record, journal, host):
        raise _in_use(record, f"{user} has {user.path} {user.how}")
    give_back(record, journal, host)


def _in_use(record: VmRecord, why: str) -> StateError:
    return StateError(
        f"lease {lease_id_of(record)} cannot end: {why}",
        state="in use",
        required="not in use",
        hint="end that process first: then the lease has ended too",
    )


def give_back(record: VmRecord, journal: Journal, host: HostRoot) -> None:
    """Forget a lease that nobody uses; end its daemons, and give its functions to their drivers.

    Raises BindError for the first that fails, after the others; `reconcile` tries again.
    """
    from vmplug.manager.binding.binder import Binder  # noqa: PLC0415  6 ms, and most VMs save it

    forget(record, journal)
    failures = [done.error for done in Binder(journal, host).recover() if done.error]
    if failures:
        raise failures[0]


def forget(record: VmRecord, journal: Journal) -> list[DeviceRecord]:
    """Forget a lease, so that what was bound for it is free to go back, and end its daemons.

    Returns what it held, nothing when another process has changed it. A daemon ends by itself too.
    """
    held = journal.leases.forget(record) or []
    shares = [device.id for device in held if device.kind is DeviceType.VHOST_USER_FS]
    if shares:
        HostVirtiofsdRunner(record.qmp_socket).end(shares)
    return held


def repair_lease(
    record: VmRecord, journal: Journal, host: HostRoot, *, grace_s: float = GRACE_S
) -> list[Repair]:
    """What `reconcile` does about a lease: forget it when it has ended, and nobody uses it.

    The functions that were bound for it are left to `Binder.recover`.
    """
    state = find_state(record, journal.host)
    devices = journal.devices(record.name)
    if state is LeaseState.UNKNOWN:
        why = "its process is in another PID namespace"
        return [Repair(d.id, d.host_path, RepairOutcome.IN_PROGRESS, why) for d in devices]
    if state is not LeaseState.ENDED:
        return []
    return end_or_pass_on(record, journal, host, grace_s=grace_s)


def end_or_pass_on(
    record: VmRecord, journal: Journal, host: HostRoot, *, grace_s: float = 0
) -> list[Repair]:
    """Forget a lease that its process no longer has, unless another one uses it: then it has it.

    The functions that were bound for it are left to `Binder.recover`.
    """
    devices = journal.devices(record.name)
    if not record.is_of_earlier_boot and (heir := _find_heir(record, journal, host, grace_s)):
        why = f"{heir} has it {heir.how}"
        if heir.process:
            _pass_on(record, heir.process, journal)
            why += ": the lease is its now"
        return [Repair(d.id, d.host_path, RepairOutcome.IN_PROGRESS, why) for d in devices]
    reason = f"{spoken_process(record, journal.host)} has ended"
    if record.is_of_earlier_boot:
        reason = "the host has booted since"
    forgotten = forget(record, journal)
    return [Repair(d.id, d.host_path, RepairOutcome.FORGOTTEN, reason) for d in forgotten]


def end_ended(journal: Journal, host: HostRoot) -> None:
    """Give back what leases held whose process has ended; what fails is left to `reconcile`."""
    ended = [r for r in leases_of(journal) if find_state(r, journal.host) is LeaseState.ENDED]
    if not ended:
        return
    from vmplug.manager.binding.binder import Binder  # noqa: PLC0415  6 ms

    for record in ended:
        with suppress(DeviceError):
            repair_lease(record, journal, host)
    with suppress(DeviceError):  # a request for that very device is refused
        Binder(journal, host).recover()


def _find_heir(
    record: VmRecord, journal: Journal, host: HostRoot, grace_s: float
) -> LeaseUser | None:
    """What uses a device of a lease that has ended, for now or for longer.

    Of one that was never given to a process, the process may be about to open them. What no
    process shows may be what the kernel has not closed yet for the one that has ended.
    """
    may_come = record.starting_by and journal.devices(record.name)
    begun = time.monotonic()
    while True:
        heir = next(find_users(record, journal, host), None)
        if heir and heir.process:
            return heir
        if time.monotonic() - begun >= (GRACE_S if heir else grace_s if may_come else 0):
            return heir
        time.sleep(STEP_S)  # /proc gives no event for an opened file


def _pass_on(record: VmRecord, heir: Opener, journal: Journal) -> None:
    started_at = read_start_time(heir.pid, journal.host)
    if started_at is not None:
        journal.leases.hand_over(record, heir.pid, started_at)
