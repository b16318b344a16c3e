"""Binder: bind functions to VFIO and give them back to their drivers, through any crash.

| journal | function | recover |
| --- | --- | --- |
| binding, unbinding | anything | given back to its former driver |
| bound, for a device that is gone | with VFIO | given back |
| bound, by hand or for a device | with VFIO | left |
| bound by hand | another driver has it | forgotten: it was bound elsewhere |
| anything | gone, or of an earlier boot | forgotten |
| anything | another has its address | forgotten: that one is not touched |

A function that a process has open stays as it is. Rows stay when giving back fails, so that it can
be repeated.
"""

import errno
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum

import msgspec
from msgspec.structs import replace

from vmplug.address import Bdf
from vmplug.errors import (
    AttributeReadError,
    BindError,
    DeviceError,
    HostError,
    NoSuchDevice,
    StateError,
    StoreError,
)
from vmplug.host.check.thing import has_changed, identify_function
from vmplug.host.finding import Code, Finding
from vmplug.host.pci.bind import (
    WRITE_TIMEOUT_S,
    FormerBinding,
    bind_function,
    read_driver,
    read_former,
    restore,
)
from vmplug.host.pci.function import PciFunction, find_function
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.vfio import is_vfio_driver
from vmplug.host.pci.vfio_driver import check_driver, choose_driver, is_same_driver, load_driver
from vmplug.host.root import HostRoot
from vmplug.journal.bindings import LOCK_TIMEOUT_S, Binding, BindingState
from vmplug.journal.database import is_locked
from vmplug.journal.journal import Journal
from vmplug.journal.process import read_boot_id
from vmplug.log import Log
from vmplug.manager.binding.users import (
    USED_BY_VM,
    find_conflicts,
    find_users,
    raise_in_use,
    virtfn_users,
)
from vmplug.waiting import waiting

log = Log(__name__)

_CLOSE_TIMEOUT_S, _CLOSE_STEP_S = 10.0, 0.02
_MENDED = frozenset({Code.NOT_BOUND, Code.GROUP_NOT_VIABLE})
"""Findings that binding resolves."""
_UNFIT = frozenset({Code.NO_IOMMU, Code.MEMBER_IN_USE, Code.MACHINE_PART})
"""Findings that a group which VFIO has already cannot be handed over, and no bind changes that."""


class BindOutcome(StrEnum):
    """The outcome for a binding that had to be repaired."""

    GIVEN_BACK = "given back"
    FORGOTTEN = "forgotten"
    STILL_OPEN = "still open"
    IN_PROGRESS = "in progress"
    FAILED = "failed"


class Returned(msgspec.Struct, frozen=True):
    """The result of giving a function back; `error` is set when that failed."""

    former: FormerBinding
    outcome: BindOutcome
    reason: str
    error: BindError | None = None


class _Step(msgspec.Struct, frozen=True, kw_only=True):
    """One function to bind: its row, and its binding and row before, for the undo."""

    bdf: Bdf
    driver: str
    row: Binding
    before: FormerBinding
    row_before: Binding | None


class Binder:
    """Binds functions of `host` and records it in the journal."""

    def __init__(
        self, journal: Journal, host: HostRoot, *, timeout_s: float = WRITE_TIMEOUT_S
    ) -> None:
        self._journal = journal
        self._host = host
        self._timeout_s = timeout_s

    def bindings(self) -> list[Binding]:
        """Every function that vmplug has bound since the host booted."""
        boot_id = self._boot_id()
        return [row for row in self._journal.bindings.all() if row.boot_id == boot_id]

    def bind(
        self,
        group: VfioGroup,
        *,
        device_id: str | None = None,
        driver: str | None = None,
        allow: Collection[Code] = (),
    ) -> list[Binding]:
        """Bind every function of a group to VFIO, or none; return those that vmplug bound.

        Functions that are bound to VFIO already stay so, unless another `driver` is named. They
        are not journalled, and vmplug does not give them back. A group that is bound for a device
        (`device_id`) has been checked already; otherwise InUse is raised for findings. Raises
        BindError, NoSuchDevice; then nothing has changed. A mediated device needs no binding.
        """
        if group.mediated:
            return []
        _check_functions(group)
        with self._alone() as rows:
            functions = [_find(function.bdf, self._host) for function in group.functions]
            wanted = [f for f in functions if not self._is_bound(f, driver)]
            if device_id is None:
                found = find_conflicts(group, self._journal, self._host)
                raise_in_use(group.host_path, [f for f in found if _stops(f, wanted)], allow)
            steps = [self._plan(f, driver, rows.get(f.bdf), device_id) for f in wanted]
            if steps:
                self._bind_all(steps)
                bound = ", ".join(str(step.bdf) for step in steps)
                log.info("bound %s to VFIO", bound, extra={"device_id": device_id})
            held = [rows[f.bdf] for f in functions if f.bdf in rows and f not in wanted]
            self._adopt(held, device_id)
            members = {function.bdf for function in functions}
            return [row for row in self.bindings() if row.bdf in members]

    def unbind(self, group: VfioGroup) -> list[Returned]:
        """Give the functions of a group back to their former drivers, and return them.

        Functions that vmplug has not bound stay as they are. Raises StateError when it has bound
        none of them, InUse while a VM or a process has the group, BindError for the first that its
        driver does not take; the others are given back all the same.
        """
        _check_functions(group)
        with self._alone() as rows:
            mine = [rows[f.bdf] for f in group.functions if f.bdf in rows]
            if not mine:
                raise _not_bound(group)
            found = find_conflicts(group, self._journal, self._host)
            used = [finding for finding in found if finding.code in USED_BY_VM]
            below = virtfn_users(group, self._journal, self._host)
            raise_in_use(group.host_path, [*used, *below])
            told = self._return_all(mine)
        for returned in told:
            if returned.error:
                raise returned.error
        return told

    def give_back(self, device_id: str) -> list[Returned]:
        """Give back the functions that were bound for a device, and return them; empty for none.

        One that its driver does not take has an `error` and stays in the journal, for `recover`.
        """
        if not any(row.device_id == device_id for row in self._journal.bindings.all()):
            return []
        with self._alone() as rows:
            return self._return_all([r for r in rows.values() if r.device_id == device_id])

    def recover(self, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> list[Returned]:
        """Make the journal and the drivers agree after a crash; returns what was done.

        Functions that another process still works on at the deadline are left to it.
        """
        if not self._journal.bindings.all():
            return []
        told = [
            Returned(row.former, BindOutcome.FORGOTTEN, why)
            for row in self._journal.bindings.all()
            if (why := self._why_stale(row))
        ]
        try:
            with self._alone(lock_timeout_s) as rows:
                return told + self._recover_all(rows)
        except StoreError as error:
            if not is_locked(error):
                raise
        reason = "another process is working on it"
        begun = [row for row in self.bindings() if row.state is not BindingState.BOUND]
        return [Returned(row.former, BindOutcome.IN_PROGRESS, reason) for row in begun]

    def _recover_all(self, rows: Mapping[Bdf, Binding]) -> list[Returned]:
        known, told = self._journal.bindings.ids(), list[Returned]()
        for row in rows.values():
            try:
                done = self._recover_one(row, known)
            except HostError as error:
                done = _failed(row.former, error)
            told += [done] if done else []
        return told

    # one function

    def _is_bound(self, function: PciFunction, driver: str | None) -> bool:
        is_wanted = driver is None or is_same_driver(function.driver or "", driver)
        return is_wanted and is_vfio_driver(function, self._host)

    def _plan(
        self, function: PciFunction, driver: str | None, row: Binding | None, device_id: str | None
    ) -> _Step:
        """The steps for a function; this loads the driver."""
        before = read_former(function.bdf, self._host)
        is_older = row and (row.state is not BindingState.BOUND or self._is_bound(function, None))
        if driver:
            check_driver(driver, function, self._host)
        name = driver or choose_driver(function, self._host)
        return _Step(
            bdf=function.bdf,
            driver=load_driver(name, self._host, device=str(function.bdf)),
            row=Binding(
                former=row.former if row and is_older else before,
                state=BindingState.BINDING,
                device_id=device_id,
                boot_id=self._boot_id(),
                thing=identify_function(function.sysfs_path, self._host),
            ),
            before=before,
            row_before=row,
        )

    def _bind_all(self, steps: Sequence[_Step]) -> None:
        """1. Journal. 2. Bind each. 3. Journal. After a failure nothing has changed."""
        rows = self._journal.bindings
        rows.put(step.row for step in steps)
        begun: list[_Step] = []
        try:
            for step in steps:
                begun.append(step)
                bind_function(step.bdf, step.driver, self._host, timeout_s=self._timeout_s)
                self._check_taken(step)
            rows.put(replace(step.row, state=BindingState.BOUND) for step in steps)
        except BaseException as error:
            self._undo(steps, begun, error)
            raise

    def _check_taken(self, step: _Step) -> None:
        if not is_vfio_driver(_find(step.bdf, self._host), self._host):
            raise BindError(
                str(step.bdf),
                "drivers_probe",
                f"{step.driver} took {step.bdf}, but is not a VFIO driver",
                hint="pass --driver with vfio-pci or one of its variants",
            )

    def _undo(self, steps: Sequence[_Step], begun: Sequence[_Step], error: BaseException) -> None:
        """Undo the steps that were begun; those that cannot be undone stay in the journal."""
        stuck = set[Bdf]()
        for step in reversed(begun):
            if step is begun[-1] and getattr(error, "errno", None) == errno.ETIMEDOUT:
                stuck.add(step.bdf)  # the kernel is still working on it
                continue
            try:
                restore(step.before, self._host, timeout_s=self._timeout_s)
            except HostError as failure:
                if not isinstance(failure, NoSuchDevice):
                    stuck.add(step.bdf)
        undone = [step for step in steps if step.bdf not in stuck]
        self._journal.bindings.forget(step.bdf for step in undone)
        self._journal.bindings.put(step.row_before for step in undone if step.row_before)
        if stuck and isinstance(error, DeviceError):
            names = ", ".join(map(str, sorted(stuck)))
            again = f"{names} could not be restored: vmplug reconcile tries again"
            error.hint = f"{error.hint}; {again}" if error.hint else again

    def _adopt(self, rows: Iterable[Binding], device_id: str | None) -> None:
        """Assign functions that a crash, or a former device, left with VFIO to this device."""
        known = self._journal.bindings.ids() | {device_id, None}
        self._journal.bindings.put(
            replace(row, state=BindingState.BOUND, device_id=device_id)
            for row in rows
            if row.state is not BindingState.BOUND or row.device_id not in known
        )

    # giving back

    def _return_all(self, rows: Sequence[Binding]) -> list[Returned]:
        """Give back all of them, and return the result of each."""
        self._journal.bindings.put(replace(row, state=BindingState.UNBINDING) for row in rows)
        return [self._return(row, "vmplug had bound it") for row in rows]

    def _return(self, row: Binding, reason: str) -> Returned:
        former = row.former
        try:
            self._wait_closed(former)
            restore(former, self._host, timeout_s=self._timeout_s)
        except NoSuchDevice:
            told = Returned(former, BindOutcome.FORGOTTEN, "the function is gone")
        except HostError as error:
            return _failed(former, error)
        else:
            told = Returned(former, BindOutcome.GIVEN_BACK, reason)
            log.info("gave %s back to %s", former.bdf, former.driver or "no driver")
        self._journal.bindings.forget([former.bdf])
        return told

    def _wait_closed(self, former: FormerBinding) -> None:
        """Wait until no process has it open: an unbind before would block the function's files.

        QEMU closes a device shortly after it has reported that the device is gone.
        """
        if read_driver(former.bdf, self._host) in {None, former.driver}:
            return
        deadline = time.monotonic() + min(self._timeout_s, _CLOSE_TIMEOUT_S)
        while user := find_users(former.bdf, None, self._host):
            if time.monotonic() >= deadline:
                raise BindError(
                    str(former.bdf),
                    "unbind",
                    user,
                    errno=errno.EBUSY,
                    hint="end that process; then vmplug reconcile gives it back",
                )
            time.sleep(_CLOSE_STEP_S)  # /proc gives no event for a closed file

    def _recover_one(self, row: Binding, known: Collection[str]) -> Returned | None:
        """Repair one row; None when there is nothing to repair."""
        function = PciFunction(bdf=row.bdf, driver=read_driver(row.bdf, self._host))
        is_with_vfio = is_vfio_driver(function, self._host)
        if row.state is not BindingState.BOUND:
            reason = "it was interrupted"
        elif function.driver and not is_with_vfio:
            self._journal.bindings.forget([row.bdf])
            return Returned(row.former, BindOutcome.FORGOTTEN, f"{function.driver} has it now")
        elif self._host.stat(function.sysfs_path) and (row.device_id in {None, *known}):
            return None
        else:
            reason = "its device is detached"
        # A function bound for a device may belong to a device that is in the journal.
        user = find_users(row.bdf, None if row.device_id else self._journal, self._host)
        if user and function.driver != row.former.driver:
            return Returned(row.former, BindOutcome.STILL_OPEN, user)
        if row.state is BindingState.BOUND:  # half given back it would look bound elsewhere
            self._journal.bindings.put([replace(row, state=BindingState.UNBINDING)])
        return self._return(row, reason)

    # the journal

    def _boot_id(self) -> str:
        return read_boot_id(self._host)

    @contextmanager
    def _alone(self, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[dict[Bdf, Binding]]:
        """The rows of this boot, while no other process binds; stale ones are forgotten."""
        with ExitStack() as locked:
            with waiting("another process that binds functions", timeout_s):
                locked.enter_context(self._journal.bindings.alone(timeout_s=timeout_s))
            rows = {row.bdf: row for row in self._journal.bindings.all()}
            stale = {bdf: why for bdf, row in rows.items() if (why := self._why_stale(row))}
            if stale:
                self._journal.bindings.forget(stale)
                bound = ", ".join(map(str, stale))
                log.info("forgot %s, which vmplug had bound: gone or replaced", bound)
            yield {bdf: row for bdf, row in rows.items() if bdf not in stale}

    def _why_stale(self, row: Binding) -> str | None:
        """Why a row no longer says anything about a function; None while it does."""
        if row.boot_id != self._boot_id():
            return "the host has booted since"
        with suppress(AttributeReadError):
            if has_changed(row.thing, self._host):
                return "another function has its address now"
        return None


def give_back_unused(journal: Journal) -> None:
    """Give functions whose device is gone from the journal back to their former drivers.

    Raises BindError for the first that cannot be given back; reconcile tries again.
    """
    failures = [done.error for done in Binder(journal, journal.host).recover() if done.error]
    if failures:
        raise failures[0]


def _failed(former: FormerBinding, error: HostError) -> Returned:
    """Wrap any error as BindError, so that callers handle one type."""
    if not isinstance(error, BindError):
        bdf = str(former.bdf)
        error = BindError(bdf, "read", f"{bdf} cannot be given back: {error.message}")
    return Returned(former, BindOutcome.FAILED, error.message, error)


def _stops(finding: Finding, wanted: Collection[PciFunction]) -> bool:
    """Whether it is a reason not to bind; where nothing is left to bind, the users may stay."""
    return finding.code not in _MENDED if wanted else finding.code in _UNFIT


def _find(bdf: Bdf, host: HostRoot) -> PciFunction:
    function = find_function(bdf, host)
    if function is None:
        raise NoSuchDevice(str(bdf), f"PCI function {bdf} has gone", found="nothing")
    return function


def _check_functions(group: VfioGroup) -> None:
    """NoSuchDevice or BindError for a group without a function that can be bound."""
    what = group.named or group.host_path
    if not group.members and not group.bridges:
        raise NoSuchDevice(
            what,
            f"the kernel has no device behind {what}",
            found="nothing",
            hint="vmplug host lists the devices",
        )
    bridges = {str(f.bdf) for f in (*group.functions, *group.bridges) if f.is_bridge}
    if group.named in bridges or not group.functions:
        raise BindError(
            what,
            "choose",
            f"{what} is a PCI bridge, which stays with the host",
            hint="name a function behind it: vmplug host lists them",
        )


def _not_bound(group: VfioGroup) -> StateError:
    what = group.named or group.host_path
    return StateError(
        f"vmplug did not bind any function of {what}, so it has no driver to give it back to",
        state="not bound by vmplug",
        required="bound by vmplug",
        hint="vmplug gives back only what it bound itself; vmplug host shows the drivers",
    )
