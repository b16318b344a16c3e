"""The states of a device and their allowed order."""

from collections.abc import Callable, Mapping
from enum import StrEnum

from vmplug.address import qom_path
from vmplug.errors import HypervisorError, NotAttached, StateError, UnplugRefused, UnplugTimeout


class State(StrEnum):
    """The state of a device; a device without one is not in the journal."""

    PLUGGING = "plugging"
    ATTACHED = "attached"
    DETACHING = "detaching"
    RETAINED = "retained"


ABSENT = "absent"
"""The name in errors for the state of a device that is not in the journal."""

FOLLOWS: dict[State | None, frozenset[State | None]] = {
    None: frozenset({State.PLUGGING, State.ATTACHED}),
    State.PLUGGING: frozenset({State.ATTACHED, State.DETACHING, State.RETAINED, None}),
    State.ATTACHED: frozenset({State.DETACHING, State.RETAINED, None}),
    State.DETACHING: frozenset({State.DETACHING, State.ATTACHED, State.RETAINED, None}),
    State.RETAINED: frozenset({State.ATTACHED, None}),
}
"""None is "not in the journal". A device that another program plugged is attached from the
beginning. An attached device is forgotten at once only when the VM does not have it; a detaching
one is attached again only when QEMU refused the request. A retained one has no owner any more and
stays until its VM ends, as QEMU cannot unplug it."""

ON_ITS_WAY = frozenset({State.PLUGGING, State.DETACHING})
"""The states of a device in progress, or left so by a process."""


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
    """The error for a device that is still plugging or detaching."""
    return StateError(
        f"{host_path} is {state}",
        state=state,
        required=State.ATTACHED,
        hint=f"vmplug reconcile --vm {vm} finishes what was begun",
    )


def not_in_journal(device_id: str) -> StateError:
    """The error for a device that is not in the journal."""
    return StateError(
        f"the journal has no device {device_id}", state=ABSENT, required="in the journal"
    )


def not_attached(attachment_id: str, vm: str, *, has_ended: bool) -> NotAttached:
    """The error for an attachment that is absent; `has_ended`: a former VM had the name."""
    ended = ": the VM has ended, and another VM has its name" if has_ended else ""
    return NotAttached(
        f"no attachment {attachment_id} in VM {vm}{ended}",
        hint=f"vmplug list --vm {vm} shows the attachments",
    )


def holds_nothing(owner: str, vm: str) -> NotAttached:
    """The error for an owner without a device."""
    return NotAttached(
        f"{owner} holds no device of VM {vm}",
        hint=f"vmplug list --vm {vm} shows the owners and their devices",
    )


def known_already(name: str, qmp_socket: str | None = None) -> StateError:
    """The error for a VM whose name, or whose QMP socket under that name, is in the journal."""
    what = f"{qmp_socket} is the VM {name}, which" if qmp_socket else f"VM {name}"
    return StateError(
        f"{what} is already in the journal",
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
            hint="start that backend again, then detach again; without the backend the guest "
            "waits for its I/O forever",
        )
    hint = "it stays detaching; detach again when the guest has booted and unmounted it"
    if (now := status()) != "running":
        hint = f"the VM is {now}: the guest can answer only while the VM runs; detach again then"
    return UnplugTimeout(tuple(left), message, hint=hint)
