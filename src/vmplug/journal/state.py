"""The states of a device and their allowed order."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import assert_never

from vmplug.address import qom_path
from vmplug.drivers.ports import UnplugFailure
from vmplug.errors import HypervisorError, NotAttached, StateError, UnplugRefused, UnplugTimeout
from vmplug.host.use.claim import spoken_holder


class State(StrEnum):
    """The state of a device; a device without one is not in the journal."""

    PLUGGING = "plugging"
    ATTACHED = "attached"
    DETACHING = "detaching"
    RETAINED = "retained"


REPLACED, UNIDENTIFIED = "replaced", "unidentified"
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
        f"nothing is attached for owner {owner!r} in VM {vm}",
        hint=f"vmplug list --vm {vm} shows the owners and their devices",
    )


def replaced(path: str, vm: str) -> StateError:
    """The error for a device whose name leads to another thing than the VM has."""
    return StateError(
        f"{path} is now another device or file than the one that VM {vm} has under this name",
        state=REPLACED,
        required="the same",
        hint="detach the one that the VM has from every owner first: vmplug list shows them",
    )


def unidentified(path: str, vm: str) -> StateError:
    """The error for a device of which it is unknown whether its name still leads to it."""
    return StateError(
        f"vmplug does not know whether {path} is still what VM {vm} has under this name: another "
        "program or an earlier vmplug attached it, or it cannot be read now",
        state=UNIDENTIFIED,
        required="identified",
        hint="detach it from every owner first, then attach it again: vmplug list shows them",
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
    left: Mapping[str, UnplugFailure],
    paths: Mapping[str, str],
    *,
    timeout_s: float,
    status: Callable[[], str],
) -> HypervisorError:
    """The error for devices that are `left` in the VM, by id with the reason.

    `status` gives the VM's run state; it is asked only when the guest does not answer.
    """
    names = ", ".join(paths.get(device_id, device_id) for device_id in left)
    message = f"the guest did not release {names} within {timeout_s:g} s"
    first = next(reason for reason in UnplugFailure if reason in left.values())
    theirs = [device_id for device_id, reason in left.items() if reason is first]
    match first:
        case UnplugFailure.REFUSED:
            return UnplugRefused(
                qom_path(theirs[0]),
                f"the guest refuses to release {names}",
                hint="unmount it in the guest, then detach again",
            )
        case UnplugFailure.LOST:
            lost = ", ".join(paths.get(device_id, device_id) for device_id in theirs)
            return UnplugTimeout(
                tuple(left),
                f"{message}: the backend of {lost} is gone",
                hint="start that backend again, then detach again; without the backend the guest "
                "waits for its I/O forever",
            )
        case UnplugFailure.TIMEOUT:
            return UnplugTimeout(tuple(left), message, hint=_hint_to_wait(status()))
        case _:
            assert_never(first)


def _hint_to_wait(status: str) -> str:
    if status == "running":
        return "it stays detaching; detach again when the guest has booted and unmounted it"
    return f"the VM is {status}: the guest can answer only while the VM runs; detach again then"


def unknown_vm(name: str) -> StateError:
    """The error for a VM that is not in the journal."""
    return StateError(
        f"no VM {name!r} is known",
        state="unknown",
        required="started or adopted",
        hint=f"vmplug vm list shows the known ones; vmplug vm adopt {name} --qmp SOCKET",
    )


def only_leased(name: str) -> StateError:
    """The error for the name of a lease where a VM is wanted."""
    return StateError(
        f"{spoken_holder(name)} is not a VM",
        state="leased",
        required="started or adopted",
        hint="it ends with its process; vmplug lease end ends it earlier",
    )
