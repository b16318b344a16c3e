"""The state of each unit: free, with a pod, used by somebody else, or broken; and why."""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

import msgspec

from vmplug.errors import HostError
from vmplug.host.block.usage import HostUsage
from vmplug.host.check.device import check_device
from vmplug.host.check.relate import relate_device
from vmplug.host.device import HostDevice
from vmplug.host.finding import USES, Access, Code, Finding, Severity
from vmplug.host.root import HostRoot
from vmplug.host.use.claim import Claim
from vmplug.kubernetes.units import Unit

_BINDABLE = frozenset({Code.NOT_BOUND, Code.GROUP_NOT_VIABLE})
"""Findings that binding resolves."""
OPEN = frozenset({Code.OPEN_BY_PROCESS, Code.OPEN_EXCLUSIVELY, Code.IMAGE_LOCKED})
"""Findings that a process has it open, of which nothing says what it is."""

FindClaims = Callable[[HostDevice], Sequence[Claim]]


class UnitState(StrEnum):
    """The state of one device of a resource."""

    FREE = "free"
    BINDABLE = "bindable"
    ASSIGNED = "assigned"
    USED = "used"
    BROKEN = "broken"

    @property
    def is_healthy(self) -> bool:
        """Whether Kubernetes may give it to a pod, or leave it to the one that has it."""
        return self not in {UnitState.USED, UnitState.BROKEN}


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What all units are judged by.

    `find_claims` gives what VMs and leases of the journal have of a device. `foreign` are files of
    others by the devices of CDI that they define.
    """

    host: HostRoot
    usage: HostUsage
    find_claims: FindClaims
    foreign: Mapping[str, str]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """A state, with its reason in one sentence; `is_open`: a process has it open.

    `code` is that of the finding which is the reason; None where there is none.
    """

    state: UnitState
    reason: str = ""
    code: Code | None = None
    is_open: bool = False


def judge(unit: Unit, look: Look, *, is_assigned: bool) -> Health:
    """How a unit is now.

    While it is assigned to a pod, a process that has it open, and that nothing explains, is that
    pod's.
    """
    if unit.resource.managed and unit.not_selected:
        names = " ".join(unit.not_selected)
        return _broken(
            f"{names} is in IOMMU group {unit.id} and the resource does not select it, so vmplug "
            "does not bind the group: select it too"
        )
    qualified = f"{unit.resource.name}={unit.id}"
    if unit.resource.given.is_cdi and (file := look.foreign.get(qualified)):
        return _broken(f"{file} defines {qualified} too, which makes it unusable: remove it there")
    try:
        findings = _find(unit, look)
        is_bound = unit.is_bound(look.host)
    except HostError as error:
        return _broken(error.message)
    is_open = any(finding.code in OPEN for finding in findings)
    if is_assigned:
        findings = [finding for finding in findings if finding.code not in OPEN]
    if findings:
        worst = next((finding for finding in findings if finding.code in USES), findings[0])
        state = UnitState.USED if worst.code in USES else UnitState.BROKEN
        return Health(state=state, reason=worst.message, code=worst.code, is_open=is_open)
    if is_assigned:
        return Health(state=UnitState.ASSIGNED, is_open=is_open)
    return Health(state=UnitState.FREE if is_bound else UnitState.BINDABLE)


def _find(unit: Unit, look: Look) -> list[Finding]:
    """Everything that stops a hand-over, without what binding will resolve."""
    device = relate_device(unit.device, look.usage, look.host)
    found = check_device(
        device,
        Access(read_only=False),
        usage=look.usage,
        claims=look.find_claims(device),
        root=look.host,
    )
    resolved = _BINDABLE if unit.resource.managed else frozenset[Code]()
    return [f for f in found if f.severity is Severity.ERROR and f.code not in resolved]


def _broken(reason: str) -> Health:
    return Health(state=UnitState.BROKEN, reason=reason)
