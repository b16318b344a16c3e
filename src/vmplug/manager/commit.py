"""Journal a plan before another process can contradict it."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from vmplug.errors import StateError
from vmplug.host.kind import Identity
from vmplug.host.pci.group import VfioGroup
from vmplug.journal.database import written_too_fast
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment
from vmplug.journal.state import ABSENT, State
from vmplug.manager.plan import Plan
from vmplug.waiting import caller_has_left, waiting

_ATTEMPTS = 20
_PLUG_TIMEOUT_S, _PLUG_STEP_S = 30.0, 0.02
"""The longest wait for a running process that plugs the same device: a QEMU that does not answer
can delay it this long. Usually it takes milliseconds."""


def plan_and_journal(
    plan_now: Callable[[], Plan],
    journal: Journal,
    lock: AbstractContextManager[object],
    *,
    vm: str,
) -> tuple[Plan, list[Attachment]]:
    """A plan and its holds on new devices of `vm`, journalled; the `lock` is held per attempt.

    If there is nothing to plug, the attach is complete. It waits while another process or thread
    plugs the same device, but not for one that has ended or given up.
    """
    deadline = time.monotonic() + _PLUG_TIMEOUT_S
    while True:
        try:
            with lock:
                return _decide_now(plan_now, journal)
        except StateError as error:
            left_s = deadline - time.monotonic()
            if not _is_passing(error, vm, journal) or left_s <= 0 or caller_has_left():
                raise
            what = f"another process that plugs the same device into VM {vm}"
        with waiting(what, left_s):
            time.sleep(_PLUG_STEP_S)  # other processes plug too, and SQLite reports no changes


def _is_passing(error: StateError, vm: str, journal: Journal) -> bool:
    """Whether the obstacle will go away by itself, or has just done so."""
    if error.state != State.PLUGGING:
        return error.state == ABSENT
    workers = [d.in_progress_by for d in journal.devices(vm) if d.state is State.PLUGGING]
    return not workers or any(worker and worker.is_alive(journal.host) for worker in workers)


def mark_attached(plan: Plan, journal: Journal) -> list[Attachment]:
    """Record that new devices are attached, and the holds on known ones.

    StateError when a known one has been detached meanwhile.
    """
    ids = [*(new.record.id for new in plan.new), *plan.revived]
    return journal.set_state(ids, State.ATTACHED, plan.holds_on(new=False))


def _identities(plan: Plan) -> set[Identity] | None:
    """The things of the host that a plan is about; None where it may be about any.

    The tokens of virtual functions are those of other devices too.
    """
    devices = [new.device for new in plan.new]
    if any(isinstance(device, VfioGroup) for device in devices):
        return None
    return {one for device in devices for one in (device.identity, *device.related_identities)}


def _decide_now(plan_now: Callable[[], Plan], journal: Journal) -> tuple[Plan, list[Attachment]]:
    """A plan that was journalled before any process had journalled a device that matters."""
    for _ in range(_ATTEMPTS):
        known = journal.device_ids()
        plan = plan_now()
        records = [new.record for new in plan.new]
        if not records:
            return plan, mark_attached(plan, journal)
        held, about = plan.holds_on(new=True), _identities(plan)
        added = journal.add_devices(records, held, known=known, about=about)
        if added is not None:
            return plan, added
    raise written_too_fast(journal.path)
