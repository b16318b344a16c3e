"""Lease devices of this host to a process, whatever it is."""

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Self

from msgspec.structs import replace

from vmplug.errors import DeviceError, SpecError, StateError
from vmplug.host.process import ProcessLock, read_start_time, wait_for_end
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.start.foreign import (
    DEFAULT_MEMORY,
    DEFAULT_PROGRAM,
    ForeignQemu,
    QemuCommand,
)
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner
from vmplug.journal.journal import Journal
from vmplug.journal.names import check_owner
from vmplug.journal.records import Attachment, VmRecord
from vmplug.leases.device import LeasedDevice, Opened, describe, without_descriptors
from vmplug.leases.holder import DEFAULT_TERMS, LeaseHolder, LeaseTerms
from vmplug.leases.life import (
    STEP_S,
    end_ended,
    end_or_pass_on,
    give_back,
    lease_id_of,
    record_lease,
    release,
)
from vmplug.leases.qemu_words import make_words
from vmplug.leases.state import LeaseState, find_state
from vmplug.leases.template import find_named, render
from vmplug.manager.binding.binder import Binder
from vmplug.manager.manager import DeviceManager
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.oci.requests import Request
from vmplug.waiting import LONGEST_S

_MOST_OF_ONE_OWNER = 1000


class Lease:
    """Devices that this process has leased, until it gives them to another one.

        with vmplug.lease(requests, owner="job-17", managed=True) as lease:
            words = lease.render("--device path={sysfs_path}", kind="vfio")
            vmm = subprocess.Popen(
                ["cloud-hypervisor", *words], pass_fds=lease.descriptors
            )
            lease.give_to(vmm.pid)
            vmm.wait()

    The end of the `with` gives the devices back, unless a process that was given them still runs.
    Each method opens the journal for itself, and may be called from any thread. A child of fork(2)
    gets StateError, and the end of its `with` does nothing: the lease is its parent's.
    """

    def __init__(
        self,
        record: VmRecord,
        owner: str,
        devices: tuple[LeasedDevice, ...],
        holder: LeaseHolder,
        setup: Setup,
    ) -> None:
        self._record = record
        self._holder = holder
        self._setup = setup
        self._process: int | None = None
        self._started_at: int | None = None
        self._words: ForeignQemu | None = None
        self._maker = ProcessLock()
        self._is_over = False
        self.id = lease_id_of(record)
        self.owner = owner
        self.devices = devices

    @property
    def process(self) -> int | None:
        """The process that has it: it was given to it, or uses the devices since; None before."""
        return self._process

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The open files for the process to inherit, as `pass_fds`; none once it was given."""
        given = self._words.descriptors() if self._words else ()
        opened = self._holder.opened.values()
        return tuple(sorted({*given, *(number for one in opened for number in one.all())}))

    def render(
        self, template: str | Sequence[str], *, kind: str | None = None, name: str | None = None
    ) -> list[str]:
        """Return the words of a template for each device, and each function of a group.

        `{FIELD}` is a field of `LeasedDevice` or `LeasedFunction`. A text is split at blanks; what
        a field brings stays in its word. `kind` and `name` select devices. Raises SpecError.
        """
        devices: Iterable[LeasedDevice] = self.devices
        for wanted in filter(None, (kind, name)):
            devices = find_named(devices, wanted)
        return render(devices, template)

    def qemu_args(
        self,
        machine: str,
        *,
        memory: str = DEFAULT_MEMORY,
        shared_memory: bool = False,
        kvm: bool = False,
        program: str = DEFAULT_PROGRAM,
    ) -> list[str]:
        """Return the words that put the devices on the command line of a QEMU.

        `machine` and `memory` are what its -machine and -m say, `kvm` whether its -accel is. Where
        a device needs shared memory, the words bring some, unless the command has its own: then
        `shared_memory` says that it is shared. QEMU inherits `descriptors`, and a field
        `descriptor` has no value any more. `adopt_vm` takes the devices over later.

        Raises SpecError for another machine than q35, pc and microvm, and for a lease with locks;
        CannotPlug and NoFreePort for what the machine cannot have, StateError after `give_to`.
        """
        command = QemuCommand(
            machine=machine, memory=memory, shared_memory=shared_memory, kvm=kvm, program=program
        )
        self._maker.check()
        with Journal.open_existing(self._setup.state_dir) as journal:
            record = self._require_held(journal)
            if self._process is not None:
                raise self._ended()
            devices = journal.devices(record.name)
        self._close_words()
        self._words = make_words(command, devices, self._holder, self._setup.host)
        self.devices = tuple(without_descriptors(device) for device in self.devices)
        return self._words.arguments()

    def give_to(self, pid: int) -> None:
        """Give the lease to a process, and close what this process has open of it.

        From now on it ends with that process. Raises StateError for a process that has
        ended, also one that is a zombie, and for a lease that has ended.
        """
        self._maker.check()
        with Journal.open_existing(self._setup.state_dir) as journal:
            record = self._require_held(journal)
            started_at = read_start_time(pid, journal.host)
            if started_at is None:
                raise StateError(
                    f"process {pid} has ended: lease {self.id} cannot be given to it",
                    state="ended",
                    required="running",
                    hint="its output says why; the devices are still leased by this process",
                )
            if not journal.leases.hand_over(record, pid, started_at):
                raise self._ended()
        self._process, self._started_at = pid, started_at
        self._close_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the process that has it, and give the devices back; False if it runs.

        A process that uses the devices when that one ends has the lease then, and is waited for
        too. Raises StateError when it was not given, BindError.
        """
        self._maker.check()
        if self._process is None:
            raise StateError(
                f"lease {self.id} was not given to a process",
                state=LeaseState.MADE,
                required=LeaseState.HELD,
            )
        deadline = time.monotonic() + (LONGEST_S if timeout_s is None else timeout_s)
        while True:
            is_leased = self._find_process()
            left_s = max(0, deadline - time.monotonic())
            if not wait_for_end(self._process, left_s, started_at=self._started_at):
                return False
            if is_leased:
                self.settle()
            if not is_leased or self._is_over:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(STEP_S)  # there is no event for the end of a user without a name

    def _find_process(self) -> bool:
        """Find which process has it by now; False when none has, or a VM has the devices."""
        with Journal.open_existing(self._setup.state_dir) as journal:
            record = self._find(journal)
        if record and record.pid:
            self._process, self._started_at = record.pid, record.started_at
        return record is not None

    def settle(self) -> str | None:
        """Give back what the process had, if it has ended; in words, who uses it instead.

        None when it is given back, or its process runs. Before `give_to` this process lets it go.
        Raises BindError.
        """
        self._maker.check()
        if self._process is None:
            self._close_all()
        with Journal.open_existing(self._setup.state_dir) as journal:
            record = self._find(journal)
            if record is None or self._is_over:
                return None
            if self._process and find_state(record, journal.host) is not LeaseState.ENDED:
                return None
            repairs = end_or_pass_on(record, journal, self._setup.host)
            if (now := self._find(journal)) and repairs:
                self._process, self._started_at = now.pid, now.started_at
                return repairs[0].reason
            if now:
                return None
            self._is_over = True
            failures = [r.error for r in Binder(journal, self._setup.host).recover() if r.error]
            if failures:
                raise failures[0]
        return None

    def release(self) -> None:
        """Give the devices back now. A second call does nothing.

        Raises StateError while a process uses one of them: end it first; and BindError for a
        function that its driver does not take, which `reconcile` tries again.
        """
        self._maker.check()
        with Journal.open_existing(self._setup.state_dir) as journal:
            record = self._find(journal)
            if record is None or self._is_over:
                self._close_all()
                return
            release(record, journal, self._setup.host)
        self._is_over = True
        self._close_all()

    def _close_words(self) -> None:
        if self._words:
            self._words.started()
            self._words = None

    def _close_all(self) -> None:
        self._close_words()
        self._holder.close_all()

    def _find(self, journal: Journal) -> VmRecord | None:
        """It as the journal has it now; None when it has ended, whatever has its name."""
        record = journal.find_vm(self._record.name)
        return record if record and record.qmp_socket == self._record.qmp_socket else None

    def _require_held(self, journal: Journal) -> VmRecord:
        record = self._find(journal)
        if self._is_over or record is None:
            raise self._ended()
        return record

    def _ended(self) -> StateError:
        words = f"lease {self.id} has ended, or another process has it"
        return StateError(words, state=LeaseState.ENDED, required=LeaseState.MADE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Give back what no process was given, or had that has ended."""
        if self._maker.is_ours:
            self.settle()


def lease(
    requests: Sequence[Request],
    *,
    owner: str | None = None,
    managed: bool = False,
    terms: LeaseTerms = DEFAULT_TERMS,
    host: HostRoot | None = None,
    setup: Setup = DEFAULT_SETUP,
) -> Lease:
    """Lease all of the devices or none: resolve, check, bind, open and lock them.

    `owner` is who they are for, by default this process; `managed` binds PCI functions to VFIO
    where they are not, until the lease ends. `host` stands for that of the `setup`. What the
    policy does not allow, and what a VM, another lease or the host uses, is refused. Leases whose
    process has ended are given back first. Raises SpecError, PolicyError, HostError, and
    HypervisorError for a virtiofsd.
    """
    setup = replace(setup, host=host) if host else setup
    setup.host.require_live("lease devices")
    return make_lease(
        requests,
        owner=owner or f"process-{os.getpid()}",
        managed=managed,
        terms=terms,
        setup=setup,
    )


def make_lease(
    requests: Sequence[Request],
    *,
    owner: str,
    managed: bool = False,
    terms: LeaseTerms = DEFAULT_TERMS,
    setup: Setup,
) -> Lease:
    """`lease`, also on the picture of a host."""
    check_owner(owner)
    if not requests:
        raise SpecError("lease", "no devices are asked for")
    with Journal.open(setup.state_dir) as journal:
        end_ended(journal, setup.host)
        record = _claim_name(owner, journal)
        holder = LeaseHolder(HostVirtiofsdRunner(record.qmp_socket), setup.host, terms)
        try:
            with _manager(record, holder, setup) as devices:
                holds = devices.attach_all(
                    requests, owner=owner, allow=terms.allow, managed=managed
                )
            described = _describe(record, holds, holder, journal)
        except BaseException:
            holder.close_all()
            with suppress(DeviceError):  # why it failed matters more, and reconcile tries again
                give_back(record, journal, setup.host)
            raise
    return Lease(record, owner, described, holder, setup)


def _claim_name(owner: str, journal: Journal) -> VmRecord:
    """A row for a new lease: with the name of its owner, or that and a number."""
    known = {record.name for record in journal.all_holders()}
    for number in range(1, _MOST_OF_ONE_OWNER):
        record = record_lease(owner if number == 1 else f"{owner}.{number}", journal)
        if record.name in known:
            continue
        with suppress(StateError):  # another process was faster
            journal.add_vm(record)
            return record
    raise StateError(
        f"owner {owner!r} has {_MOST_OF_ONE_OWNER} leases",
        state="too many",
        required="fewer",
        hint="vmplug lease list shows them",
    )


def _manager(record: VmRecord, holder: LeaseHolder, setup: Setup) -> DeviceManager:
    return DeviceManager.open(
        vm=record.name,
        host=setup.host,
        hypervisor=holder,
        state_dir=setup.state_dir,
        vhost_user_store=setup.vhost_user_store,
        policy=setup.policy,
    )


def _describe(
    record: VmRecord, holds: Sequence[Attachment], holder: LeaseHolder, journal: Journal
) -> tuple[LeasedDevice, ...]:
    records = {device.id: device for device in journal.devices(record.name)}
    for hold in holds:
        number = records[hold.device_id].identity.devnum
        if hold.device_id not in holder.plugs and number:
            holder.open_char(hold.device_id, hold.host_path, number, read_only=hold.read_only)
    return tuple(
        describe(
            hold,
            holder.plugs.get(hold.device_id),
            holder.opened.get(hold.device_id, Opened()),
        )
        for hold in holds
    )
