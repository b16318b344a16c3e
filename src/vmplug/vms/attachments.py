"""Attachments of all VMs: detached by id or by owner, resized."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

from vmplug.errors import DeviceError, NotAttached
from vmplug.host.use.claim import spoken_holder
from vmplug.journal.journal import Journal
from vmplug.journal.naming import choose_device, choose_holds
from vmplug.journal.records import Attachment
from vmplug.journal.state import State
from vmplug.manager import UNPLUG_TIMEOUT_S
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.vms.connect import connect_vm
from vmplug.vms.listing import read_attachments


class DetachOutcome(StrEnum):
    """What a detach did to an attachment."""

    DETACHED = "detached"
    """The VM no longer has the device."""
    RELEASED = "released"
    """Its owner has let go. Others hold the device in the VM, or it was only counted."""
    STILL_HELD = "still held"
    """It was attached more than once, and has lost one count."""
    RETAINED = "retained"
    """QEMU cannot unplug it: it stays in the VM until that ends."""


class Detached(msgspec.Struct, frozen=True, kw_only=True):
    """An attachment as it was before, and what the detach did.

    `left_count` is how often its owner still has it attached, `held_by` who holds the device now.
    """

    attachment: Attachment
    outcome: DetachOutcome
    left_count: int = 0
    held_by: tuple[str, ...] = ()


class DetachReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was detached, and what stopped the rest, by the name of the VM."""

    detached: tuple[Detached, ...]
    failures: Mapping[str, DeviceError]

    def require(self) -> list[Detached]:
        """Raise the first failure if there is one, with a note for each further one."""
        if self.failures:
            first, *others = self.failures
            for vm in others:
                self.failures[first].add_note(f"{spoken_holder(vm)}: {self.failures[vm].message}")
            raise self.failures[first]
        return list(self.detached)


def detach_attachments(
    attachment_ids: Sequence[str],
    *,
    timeout_s: float = UNPLUG_TIMEOUT_S,
    setup: Setup = DEFAULT_SETUP,
) -> list[Detached]:
    """Take one count of each attachment back, in whatever VMs they are; the last one unplugs.

    Guests have `timeout_s` to let go. Raises NotAttached before anything is changed; the first
    error of a VM after the other VMs had their turn, with a note for each further one. The call
    may be repeated.
    """
    return report_detach(attachment_ids, timeout_s=timeout_s, setup=setup).require()


def report_detach(
    attachment_ids: Sequence[str], *, timeout_s: float, setup: Setup
) -> DetachReport:
    """`detach_attachments`, which reports what was detached also when a VM fails."""
    with Journal.open_existing(setup.state_dir) as journal:
        known = journal.attachments()
    chosen = choose_holds(attachment_ids, known, _not_attached)
    return _detach(chosen, timeout_s, whole=False, setup=setup)


def detach_owner(
    owner: str,
    *,
    vm: str | None = None,
    timeout_s: float = UNPLUG_TIMEOUT_S,
    setup: Setup = DEFAULT_SETUP,
) -> list[Detached]:
    """Take back everything that an owner holds, however often, in all VMs or in one.

    Raises NotAttached when it holds none; otherwise as `detach_attachments`.
    """
    return report_detach_owner(owner, vm=vm, timeout_s=timeout_s, setup=setup).require()


def report_detach_owner(
    owner: str, *, vm: str | None, timeout_s: float, setup: Setup
) -> DetachReport:
    """`detach_owner`, which reports what was detached also when a VM fails."""
    with Journal.open_existing(setup.state_dir) as journal:
        known = filter(_is_held, read_attachments(journal, vm))
        held = [hold for hold in known if hold.owner == owner]
    if not held:
        raise NotAttached(
            f"nothing is attached for owner {owner!r}" + (f" in VM {vm}" if vm else ""),
            hint="vmplug list shows the owners and their devices",
        )
    return _detach(held, timeout_s, whole=True, setup=setup)


def resize_attachment(
    attachment_id: str,
    size_bytes: int | None = None,
    *,
    setup: Setup = DEFAULT_SETUP,
) -> tuple[Attachment, int]:
    """Give the guest a disk's new size; return the attachment and the size in bytes.

    None takes the size that the host's device has now; a number makes a regular file grow.
    Raises NotAttached, PolicyError for what would cut data off, HypervisorError.
    """
    with Journal.open_existing(setup.state_dir) as journal:
        hold = choose_device(attachment_id, journal.attachments(), _not_attached(attachment_id))
    with connect_vm(hold.vm, setup=setup) as devices:
        return hold, devices.resize(hold.id, size_bytes)


def _is_held(hold: Attachment) -> bool:
    return hold.state is not State.RETAINED


def _not_attached(attachment_id: str) -> NotAttached:
    return NotAttached(
        f"no attachment or device has the id {attachment_id!r}",
        hint="vmplug list shows what there is; the beginning of an id is enough",
    )


def _detach(
    chosen: Sequence[Attachment],
    timeout_s: float,
    *,
    whole: bool,
    setup: Setup,
) -> DetachReport:
    """Detach in one VM after the other; one that is gone keeps no other from its turn."""
    failures = dict[str, DeviceError]()
    by_vm = defaultdict[str, list[str]](list)
    for hold in chosen:
        by_vm[hold.vm].append(hold.id)
    for name, ids in by_vm.items():
        try:
            with connect_vm(name, setup=setup) as devices:
                devices.detach_all(ids, timeout_s=timeout_s, whole=whole)
        except DeviceError as error:  # by whosever fault: the other VMs have their turn
            failures[name] = error
    with Journal.open_existing(setup.state_dir) as journal:
        left = defaultdict[str, list[Attachment]](list)
        for hold in journal.attachments():
            left[hold.device_id].append(hold)
    told = (_detached(h, left[h.device_id], failed=h.vm in failures) for h in chosen)
    return DetachReport(detached=tuple(filter(None, told)), failures=failures)


def _detached(hold: Attachment, holds: Sequence[Attachment], *, failed: bool) -> Detached | None:
    """None when the detach failed before it changed anything for good.

    `holds` are those on the device now.
    """
    own = next((other for other in holds if other.id == hold.id), None)
    if own is None:
        is_gone = hold.guest_address is not None and not holds
        outcome = DetachOutcome.DETACHED if is_gone else DetachOutcome.RELEASED
    elif own.state is State.RETAINED:
        return Detached(attachment=hold, outcome=DetachOutcome.RETAINED)
    elif own.count == hold.count and failed:
        return None
    else:
        outcome = DetachOutcome.STILL_HELD
    return Detached(
        attachment=hold,
        outcome=outcome,
        left_count=own.count if own else 0,
        held_by=tuple(dict.fromkeys(other.owner for other in holds)),
    )
