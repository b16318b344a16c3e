"""The operator's policy: which devices may be handed over, to which VM, and how.

Rules only allow. A device may be handed over when one rule allows it. Their order does not matter,
so that no rule can narrow or widen another one.
"""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import msgspec

from vmplug.devnum import DevNum
from vmplug.drivers.place import PlugMode
from vmplug.host.finding import Code, Finding
from vmplug.host.kind import DeviceType
from vmplug.host.pci.function import PciFunction
from vmplug.oci.limits import REQUEST_S
from vmplug.policy.pattern import (
    CdiKindPattern,
    ClassPattern,
    NumberPattern,
    PathPattern,
    PciPattern,
)

_SHOWN = 4


class PolicySubject(msgspec.Struct, frozen=True, kw_only=True):
    """One object that would go into a VM: a device, or each function of a group by itself.

    `number` has `b` or `c` beside it. `vm`, `owner` and `mode` are None where they are not known
    yet; then the rules for them do not apply.
    """

    name: str
    kind: DeviceType
    number: tuple[str, DevNum] | None = None
    paths: tuple[str, ...] = ()
    function: PciFunction | None = None
    cdi_kinds: tuple[str, ...] = ()
    read_only: bool = False
    share_rw: bool = False
    vm: str | None = None
    owner: str | None = None
    mode: PlugMode | None = None

    def __str__(self) -> str:
        """The terms that a rule can match."""
        facts = [self.kind.word]
        if self.number:
            facts.append(f"{self.number[0]}:{self.number[1]}")
        if self.function:
            vendor, device = self.function.vendor_id, self.function.device_id
            facts.append(f"{_digits(vendor, 4)}:{_digits(device, 4)}")
            facts.append(f"class 0x{_digits(self.function.class_code, 6)}")
        facts += [f"CDI {kind}" for kind in self.cdi_kinds]
        return ", ".join([*facts, *(path for path in self.paths if path != self.name)])


def _digits(value: int | None, width: int) -> str:
    return "?" * width if value is None else f"{value:0{width}x}"


class Objection(msgspec.Struct, frozen=True):
    """Why a rule does not allow it; `is_of_device` means that the rule is for other devices."""

    is_of_device: bool
    wanted: str


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """The devices and uses that one rule allows; None is any.

    `kinds`, `numbers`, `paths`, `pci`, `classes` and `cdi_kinds` select the devices: each one that
    is given must match. `vms` and `owners` are patterns of names. `read_only` allows them only for
    reading, `cold_only` only before the VM starts; `share_rw` also with other writers, and `allow`
    lists the findings that `--allow` may overrule.
    """

    name: str
    kinds: frozenset[DeviceType] | None = None
    numbers: tuple[NumberPattern, ...] | None = None
    paths: tuple[PathPattern, ...] | None = None
    pci: tuple[PciPattern, ...] | None = None
    classes: tuple[ClassPattern, ...] | None = None
    cdi_kinds: tuple[CdiKindPattern, ...] | None = None
    vms: tuple[str, ...] | None = None
    owners: tuple[str, ...] | None = None
    read_only: bool = False
    cold_only: bool = False
    share_rw: bool = False
    allow: frozenset[Code] = frozenset()

    def names(self, subject: PolicySubject) -> bool:
        """Whether one of its numbers or paths is that of this very device."""
        return any(
            subject.number and pattern.minor is not None and pattern.matches(*subject.number)
            for pattern in self.numbers or ()
        ) or any(
            pattern.is_one and pattern.matches(path)
            for pattern in self.paths or ()
            for path in subject.paths
        )

    def objections(self, subject: PolicySubject) -> list[Objection]:
        """Every reason why the rule does not allow it; empty when it does."""
        of_device = (
            Objection(is_of_device=True, wanted=wanted) for wanted in self._other_device(subject)
        )
        return [
            *of_device,
            *(Objection(is_of_device=False, wanted=wanted) for wanted in self._other_use(subject)),
        ]

    def _other_device(self, subject: PolicySubject) -> Iterator[str]:
        function = subject.function
        if self.kinds is not None and subject.kind not in self.kinds:
            yield f"is for {_few(sorted(kind.word for kind in self.kinds))}"
        if self.numbers is not None and not (
            subject.number and any(pattern.matches(*subject.number) for pattern in self.numbers)
        ):
            yield f"is for {_few(self.numbers)}"
        if self.paths is not None and not any(
            pattern.matches(path) for pattern in self.paths for path in subject.paths
        ):
            yield f"is for {_few(self.paths)}"
        if self.pci is not None and not (
            function and any(p.matches(function.vendor_id, function.device_id) for p in self.pci)
        ):
            yield f"is for the PCI ids {_few(self.pci)}"
        if self.classes is not None and not (
            function and any(pattern.matches(function.class_code) for pattern in self.classes)
        ):
            yield f"is for the PCI classes {_few(self.classes)}"
        if self.cdi_kinds is not None and not any(
            pattern.matches(kind) for pattern in self.cdi_kinds for kind in subject.cdi_kinds
        ):
            yield f"is for the CDI kinds {_few(self.cdi_kinds)}"

    def _other_use(self, subject: PolicySubject) -> Iterator[str]:
        if self.vms is not None and not _is_among(subject.vm, self.vms):
            yield f"is for the VMs {_few(self.vms)}"
        if self.owners is not None and not _is_among(subject.owner, self.owners):
            yield f"is for the owners {_few(self.owners)}"
        if self.read_only and not subject.read_only:
            yield "allows it only read-only"
        if self.cold_only and subject.mode is PlugMode.HOT:
            yield "allows it only before the VM starts"
        if subject.share_rw and not self.share_rw:
            yield "does not allow share-rw"


def _is_among(name: str | None, patterns: Iterable[str]) -> bool:
    return name is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def _few(patterns: Sequence[object]) -> str:
    """The first of them, for a message."""
    return ", ".join(map(str, patterns[:_SHOWN])) + (", ..." if len(patterns) > _SHOWN else "")


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The result: refusals, and if there are none, the findings that may be overruled.

    `is_named`: a rule that allows the device names it and no other.
    """

    refusals: tuple[Finding, ...]
    allow: frozenset[Code] = frozenset()
    is_named: bool = False


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of one file; `name` is its path, for messages.

    One request may take `request_s` seconds. Names of CDI devices are looked for in
    `cdi_directories`, lowest priority first: None for those that engines read, none where CDI is
    off.
    """

    name: str = "the policy"
    rules: tuple[Rule, ...]
    request_s: float = REQUEST_S
    cdi_directories: tuple[str, ...] | None = None

    def judge(self, parts: Iterable[PolicySubject]) -> Verdict:
        """The verdict on a device, given as its parts, each of which must be allowed."""
        refusals: list[Finding] = []
        allow, is_named = frozenset(Code), True
        for subject in parts:
            allowing = [rule for rule in self.rules if not rule.objections(subject)]
            if not allowing:
                refusals.append(self._refusal(subject))
            allow &= frozenset[Code]().union(*(rule.allow for rule in allowing))
            is_named = is_named and any(rule.names(subject) for rule in allowing)
        return Verdict(refusals=tuple(refusals), allow=allow, is_named=is_named)

    def _refusal(self, subject: PolicySubject) -> Finding:
        """The finding, with the closest rule: the first of those with the fewest objections."""
        what = f"{subject.name} ({subject}): "
        hint = f"the operator of this host decides in {self.name} which devices may be handed over"
        if not self.rules:
            return Finding(
                Code.NOT_ALLOWED, f"{what}{self.name} has no rules, so it allows nothing", hint
            )
        objections = [(rule, rule.objections(subject)) for rule in self.rules]
        rule, objecting = min(objections, key=lambda pair: _distance(pair[1]))
        wanted = " and ".join(objection.wanted for objection in objecting)
        message = f"no rule of {self.name} allows it; the closest, {rule.name!r}, {wanted}"
        if not any(objection.is_of_device for objection in objecting):
            hint = f"request it as the rule requires; {hint}"
        return Finding(Code.NOT_ALLOWED, what + message, hint)


def _distance(objections: Sequence[Objection]) -> tuple[int, int]:
    of_device = sum(objection.is_of_device for objection in objections)
    return of_device, len(objections) - of_device
