"""Attachments of all VMs: detached by id or by owner, resized."""

from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

from vmplug.errors import DeviceError, NotAttached
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment
from vmplug.journal.state import State
from vmplug.manager import UNPLUG_TIMEOUT_S
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.vms.connect import connect_vm
from vmplug.vms.listing import read_attachments


class DetachOutcome(StrEnum):
    """What a detach did to an attachment."""

    DETACHED = "detached"
    STILL_HELD = "still held"
    """It was attached more than once, and has lost one count."""
    RETAINED = "retained"
    """QEMU cannot unplug it: it stays in the VM until that ends."""


class Detached(msgspec.Struct, frozen=True, kw_only=True):
    """An attachment as it was before, and what the detach did."""

    attachment: Attachment
    outcome: DetachOutcome


class DetachReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was detached, and what stopped the rest, by the name of the VM."""

    detached: tuple[Detached, ...]
    failures: Mapping[str, DeviceError]

    def require(self) -> list[Detached]:
        """Raise the first failure if there is one, with a note for each further one."""
        if self.failures:
            first, *others = self.failures
            for vm in others:
                self.failures[first].add_note(f"VM {vm}: {self.failures[vm].message}")
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
        known = {hold.id: hold for hold in read_attachments(journal, None) if _is_held(hold)}
    for attachment_id in attachment_ids:
        if attachment_id not in known:
            raise _not_attached(attachment_id)
    chosen = [known[attachment_id] for attachment_id in attachment_ids]
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
            f"{owner} holds no device" + (f" of VM {vm}" if vm else ""),
            hint="vmplug list shows who holds what",
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
        hold = next((hold for hold in journal.attachments() if hold.id == attachment_id), None)
    if hold is None:
        raise _not_attached(attachment_id)
    with connect_vm(hold.vm, setup=setup) as devices:
        return hold, devices.resize(attachment_id, size_bytes)


def _is_held(hold: Attachment) -> bool:
    return hold.state is not State.RETAINED


def _not_attached(attachment_id: str) -> NotAttached:
    return NotAttached(
        f"there is no attachment {attachment_id}", hint="vmplug list shows what there is"
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
    for name in dict.fromkeys(hold.vm for hold in chosen):
        ids = [hold.id for hold in chosen if hold.vm == name]
        try:
            with connect_vm(name, setup=setup) as devices:
                devices.detach_all(ids, timeout_s=timeout_s, whole=whole)
        except DeviceError as error:  # by whosever fault: the other VMs have their turn
            failures[name] = error
    with Journal.open_existing(setup.state_dir) as journal:
        left = {hold.id: hold for hold in journal.attachments()}
    detached = (
        Detached(attachment=hold, outcome=outcome)
        for hold in chosen
        if (outcome := _outcome(hold, left.get(hold.id), failed=hold.vm in failures))
    )
    return DetachReport(detached=tuple(detached), failures=failures)


def _outcome(hold: Attachment, left: Attachment | None, *, failed: bool) -> DetachOutcome | None:
    """None when the detach failed before it changed anything for good."""
    if left is None:
        return DetachOutcome.DETACHED
    if left.state is State.RETAINED:
        return DetachOutcome.RETAINED
    return DetachOutcome.STILL_HELD if left.count < hold.count or not failed else None
