"""What may follow what in the life of a device."""

from collections.abc import Callable, Mapping
from enum import StrEnum

from vmplug.address import qom_path
from vmplug.errors import HypervisorError, NotAttached, StateError, UnplugRefused, UnplugTimeout


class State(StrEnum):
    """Where a device is in its life; what has no state is not in the journal."""

    PLUGGING = "plugging"
    ATTACHED = "attached"
    DETACHING = "detaching"
    RETAINED = "retained"


ABSENT = "absent"
"""What errors call the state of a device that is not in the journal."""

FOLLOWS: dict[State | None, frozenset[State | None]] = {
    None: frozenset({State.PLUGGING, State.ATTACHED}),
    State.PLUGGING: frozenset({State.ATTACHED, State.DETACHING, State.RETAINED, None}),
    State.ATTACHED: frozenset({State.DETACHING, State.RETAINED, None}),
    State.DETACHING: frozenset({State.DETACHING, State.ATTACHED, State.RETAINED, None}),
    State.RETAINED: frozenset({State.ATTACHED, None}),
}
"""None is "not in the journal". What somebody else plugged is attached from the beginning. An
attached device is forgotten at once only when the VM turns out not to hold it; a detaching one is
attached again only when QEMU refused to be asked. A retained one has no owner any more and stays
until its VM ends, as QEMU cannot take it out."""

ON_ITS_WAY = frozenset({State.PLUGGING, State.DETACHING})
"""What a process has in progress, or left so."""


def check_step(device: str, state: State | None, wanted: State | None) -> None:
    """StateError unless `wanted` may follow `state`."""
    if wanted not in FOLLOWS[state]:
        raise StateError(
            f"{device} is {state or ABSENT} and cannot become {wanted or ABSENT}",
            state=str(state or ABSENT),
            required=" or ".join(
                str(s or ABSENT) for s, nexts in FOLLOWS.items() if wanted in nexts
            ),
        )


def on_its_way(vm: str, host_path: str, state: State) -> StateError:
    """The error for a device that is still on its way in or out."""
    return StateError(
        f"{host_path} is {state}",
        state=state,
        required=State.ATTACHED,
        hint=f"vmplug reconcile --vm {vm} finishes what was begun",
    )


def not_in_journal(device_id: str) -> StateError:
    """The error for a device that the journal does not know."""
    return StateError(f"no device {device_id} is known", state=ABSENT, required="in the journal")


def not_attached(attachment_id: str, vm: str, *, has_ended: bool) -> NotAttached:
    """The error for an attachment that the VM has not; `has_ended` is one that had the name."""
    ended = ", which has ended, and another has its name" if has_ended else ""
    return NotAttached(
        f"no attachment {attachment_id} in VM {vm}{ended}",
        hint=f"vmplug list --vm {vm} shows what there is",
    )


def holds_nothing(owner: str, vm: str) -> NotAttached:
    """The error for an owner without a device."""
    return NotAttached(
        f"{owner} holds no device of VM {vm}",
        hint=f"vmplug list --vm {vm} shows who holds what",
    )


def known_already(name: str, qmp_socket: str | None = None) -> StateError:
    """The error for a VM whose name, or whose QMP socket under that name, is in the journal."""
    what = f"{qmp_socket} is the VM {name}, which" if qmp_socket else f"VM {name}"
    return StateError(
        f"{what} is known already",
        state="known",
        required="unknown",
        hint=f"vmplug vm list shows it; vmplug vm stop {name} ends or forgets it",
    )


def unplug_error(
    left: Mapping[str, str],
    paths: Mapping[str, str],
    *,
    timeout_s: float,
    status: Callable[[], str],
) -> HypervisorError:
    """The error for devices that are `left` in the VM, by id with the reason.

    `status` gives the VM's run state.
    """
    names = ", ".join(paths.get(device_id, device_id) for device_id in left)
    if "refused" in left.values():
        return UnplugRefused(
            qom_path(next(name for name, why in left.items() if why == "refused")),
            f"the guest refuses to release {names}",
            hint="unmount it in the guest, then detach again",
        )
    lost = [paths.get(name, name) for name, why in left.items() if why == "lost"]
    message = f"the guest did not release {names} within {timeout_s:g} s"
    if lost:
        return UnplugTimeout(
            tuple(left),
            f"{message}: the backend of {', '.join(lost)} is gone",
            hint="start that backend again, then detach again; without it the guest waits "
            "for its I/O for ever",
        )
    hint = "it stays detaching; detach again when the guest is up and has unmounted it"
    if (now := status()) != "running":
        hint = f"the VM is {now}: the guest answers when it runs; then detach again"
    return UnplugTimeout(tuple(left), message, hint=hint)
