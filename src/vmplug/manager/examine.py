"""Find and check the devices of requests without the VM.

`check` shows the result and `attach` acts on it, so that both refuse the same devices.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from vmplug.drivers.block import BlockDiskDriver
from vmplug.drivers.generic import check_generic
from vmplug.drivers.place import Places, PlugMode
from vmplug.drivers.ports import Hypervisor, PlugDriver
from vmplug.drivers.select import select_driver
from vmplug.errors import AttributeReadError, HostError, InUse, NoSuchDevice, PolicyError
from vmplug.host.block.content import look_into
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.usage import NO_VMS, HostUsage, read_usage
from vmplug.host.check.device import check_device
from vmplug.host.check.relate import relate_device, relate_image
from vmplug.host.check.thing import has_changed, identify
from vmplug.host.device import CharDevice, HostDevice
from vmplug.host.file_id import file_replaced
from vmplug.host.finding import NEVER_ALLOWED, Access, Code, Finding, Severity, allow
from vmplug.host.pci.group import VfioGroup
from vmplug.host.resolve import resolve_all
from vmplug.host.root import HostRoot
from vmplug.host.use.claim import Claim, VmProcess
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.journal.records import DeviceRecord
from vmplug.manager.overlaps import Asked, Overlaps
from vmplug.oci.requests import Request
from vmplug.policy.budget import Budget

if TYPE_CHECKING:
    from vmplug.policy.gate import PolicyCheck

FindClaims = Callable[[HostDevice], Sequence[Claim]]


class CheckContext(msgspec.Struct, frozen=True, kw_only=True):
    """Sources of findings besides the host; by default none.

    `find_claims` returns the claims of VMs on a device and its relatives. vmplug does not ask the
    backend of a device that the VM already has (`is_held`), or who has it open: that VM does.
    `find_more` returns the VM's findings about a device. `vms` are the processes of vmplug's own
    VMs, by pid. `gate` is the operator's policy, None where there is none. `budget` is the time of
    the request, None for the default from now on.
    """

    find_claims: FindClaims = lambda _: ()
    is_held: Callable[[HostDevice], bool] = lambda _: False
    find_more: Callable[[HostDevice], Iterable[Finding]] = lambda _: ()
    vms: Mapping[int, VmProcess] = NO_VMS
    gate: "PolicyCheck | None" = None
    budget: Budget | None = None


_BINDABLE = {Code.NOT_BOUND, Code.GROUP_NOT_VIABLE}
"""Findings that binding resolves."""


class CheckedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request with its result; when `device` is None, `error` is the reason.

    `driver` is None for a device that is only counted. `thing` is what has the name of the device
    now (see `vmplug.host.check.thing`), None where that is unknown. `is_counted`: the VM has it
    already, so that `attach` only counts it; None as long as no VM was asked.
    """

    info: Request
    driver: PlugDriver | None
    device: HostDevice | None
    error: HostError | None
    findings: tuple[Finding, ...]
    thing: str | None = None
    is_counted: bool | None = None

    @property
    def is_refused(self) -> bool:
        """Whether `attach` refuses it."""
        return any(finding.severity is Severity.ERROR for finding in self.findings)

    def with_finding(self, finding: Finding) -> "CheckedRequest":
        """The same with one more finding."""
        return replace(self, findings=(*self.findings, finding))

    def as_counted(self) -> "CheckedRequest":
        """The same for a device that the VM has already: only the policy may refuse it."""
        findings = (
            finding
            if finding.code is Code.NOT_ALLOWED
            else replace(finding, severity=Severity.WARNING)
            for finding in self.findings
        )
        return replace(self, findings=tuple(findings), is_counted=True)


def examine(
    requests: Sequence[Request],
    host: HostRoot,
    vhost_user_store: VhostUserStore | None = None,
    *,
    known: CheckContext = CheckContext(),  # noqa: B008  it is frozen
    allowed: Iterable[Code] = (),
    managed: bool = False,
) -> list[CheckedRequest]:
    """Find every device and the reasons not to hand it over, in the same order.

    `allowed` findings become warnings; `managed`: functions will be bound to VFIO where they are
    not. A device that the policy does not allow is not checked further. Raises SpecError for
    malformed options, and PolicyError when the time of the request is spent.
    """
    budget = known.budget or Budget(known.gate.policy if known.gate else None)
    found = resolve_all(requests, host, vhost_user_store)
    terms = _Terms(
        host=host,
        known=known,
        usage=read_usage(host, vms=known.vms),
        allowed=frozenset(allowed),
        managed=managed,
        overlaps=Overlaps(host),
        budget=budget,
    )
    return [
        _examine_one(request, answer, terms)
        for request, answer in zip(requests, found, strict=True)
    ]


class _Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for every request of a batch; see `examine`."""

    host: HostRoot
    known: CheckContext
    usage: HostUsage
    allowed: frozenset[Code]
    managed: bool
    overlaps: Overlaps
    budget: Budget


def _examine_one(
    request: Request,
    answer: HostDevice | HostError,
    terms: _Terms,
) -> CheckedRequest:
    terms.budget.check()
    if not isinstance(answer, HostError) and not _is_text(answer.host_path):
        answer = AttributeReadError(answer.host_path, why="its name is not UTF-8")
    if isinstance(answer, HostError):
        findings = allow([_unresolved(answer)], terms.allowed)
        return CheckedRequest(
            info=request, driver=None, device=None, error=answer, findings=tuple(findings)
        )
    device = _relate(answer, terms)
    driver, gate = select_driver(request, device), terms.known.gate
    verdict = gate.judge(request, device, driver, terms.host) if gate else None
    if verdict and verdict.refusals:
        thing, findings = None, list(verdict.refusals)
    else:
        thing = _identify(device, terms.host)  # before the check, which must hold for it
        device, findings = _check_device(driver, request, device, terms)
    if verdict and verdict.is_named:  # the operator says that it gives random numbers
        findings = [finding for finding in findings if finding.code is not Code.NOT_RANDOM]
    if gate and verdict:
        from vmplug.policy.gate import not_overruled  # noqa: PLC0415  2 ms, as there is one

        findings += not_overruled(findings, terms.allowed, verdict, gate.policy.name)
    return CheckedRequest(
        info=request,
        driver=driver,
        device=device,
        error=None,
        findings=tuple(allow(findings, terms.allowed)),
        thing=thing,
    )


def _identify(device: HostDevice, host: HostRoot) -> str | None:
    with suppress(HostError):
        return identify(device, host)
    return None


def _relate(device: HostDevice, terms: _Terms) -> HostDevice:
    """The device, with everything that shows the same bytes; as it is where that is unknown."""
    try:
        return relate_device(device, terms.usage, terms.host)
    except HostError:
        return device  # the check will report it


def _check_device(
    driver: PlugDriver | None,
    request: Request,
    device: HostDevice,
    terms: _Terms,
) -> tuple[HostDevice, list[Finding]]:
    """The device, with what its backend says of it, and everything against handing it over."""
    known, asked = terms.known, list[Finding]()
    if isinstance(driver, BlockDiskDriver):
        device, asked = _look_into(device, driver, terms)
    claims, is_held = known.find_claims(device), known.is_held(device)
    access = Access(read_only=request.read_only, share_rw=driver is not None and driver.share_rw)
    overlaps = terms.overlaps.find(asked_for := Asked(info=request, device=device, access=access))
    terms.overlaps.add(asked_for)
    if isinstance(device, VhostUserSocket) and not (claims or is_held):
        from vmplug.host.vhost_user.probe import ask_backend  # noqa: PLC0415  socket: 2.5 ms

        device, asked = ask_backend(device, terms.host, terms.usage.questions)
    against = _check(driver, device, access, claims, terms, is_held=is_held)
    findings = [*asked, *against, *overlaps, *known.find_more(device)]
    if terms.managed:
        findings = [finding for finding in findings if finding.code not in _BINDABLE]
    return device, findings


def _look_into(
    device: HostDevice, driver: BlockDiskDriver, terms: _Terms
) -> tuple[HostDevice, list[Finding]]:
    assert isinstance(device, BlockDevice | DiskFile)
    try:
        device = look_into(device, driver.format, terms.host, terms.usage.questions)
        if isinstance(device, DiskFile) and device.image:
            device = relate_image(device, terms.usage, terms.host)
    except HostError as error:
        return device, [_unresolved(error)]
    return device, []


def check_vfio(
    group: VfioGroup, hypervisor: Hypervisor, offer: Places, host: HostRoot
) -> Iterator[Finding]:
    """Findings about a group for the VM's QEMU, or the one that this process will start."""
    from vmplug.drivers.vfio import check_address_space  # noqa: PLC0415  6 ms, with the checks
    from vmplug.host.check.vfio_group import GuestMemory, check_vm  # noqa: PLC0415

    endpoint = hypervisor.endpoint
    pid = endpoint.pid if endpoint else None
    if offer.mode is PlugMode.COLD:
        pid = os.getpid()
    memory = GuestMemory(size_bytes=offer.memory_bytes, pid=pid)
    yield from check_vm(group, memory, host, has_iommufd=offer.iommufd)
    yield from check_address_space(group, offer)


def require_same(records: Iterable[DeviceRecord], host: HostRoot) -> None:
    """NoSuchDevice if another device has the number or the address that was checked.

    A card may be swapped, or a loop device get another file, while QEMU opens it.
    """
    for record in records:
        if has_changed(record.thing, host):
            raise file_replaced(record.host_path, host)


def _is_text(path: str) -> bool:
    """Whether QMP and the journal, which use UTF-8, can name it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check(
    driver: PlugDriver | None,
    device: HostDevice,
    access: Access,
    claims: Sequence[Claim],
    terms: _Terms,
    *,
    is_held: bool,
) -> list[Finding]:
    """All findings about one device; a failure to check it is one too."""
    host, usage = terms.host, terms.usage
    try:
        findings = check_device(
            device, access, usage=usage, claims=claims, is_held=is_held, root=host
        )
    except HostError as error:
        return [_unresolved(error)]
    if driver:
        findings += driver.check(device, read_only=access.read_only)
    elif isinstance(device, CharDevice):
        findings += check_generic(device)
    return findings


def refuse_not_allowed(examined: Iterable[CheckedRequest]) -> None:
    """Raise PolicyError when the operator's rules refuse any of the requests."""
    problems = [
        (request.info.name, finding)
        for request in examined
        for finding in request.findings
        if finding.code is Code.NOT_ALLOWED
    ]
    if problems:
        message = "; ".join(f"{name}: {finding.message}" for name, finding in problems)
        raise PolicyError(message, hint=problems[0][1].hint)


def refuse(examined: Sequence[CheckedRequest]) -> None:
    """Raise the errors of the requests: that of one, or one report of several."""
    refused = [request for request in examined if request.is_refused]
    unresolved = [request.error for request in refused if request.error]
    if len(unresolved) == len(refused) == 1:
        raise unresolved[0]
    problems = [
        (request, finding)
        for request in refused
        for finding in request.findings
        if finding.severity is Severity.ERROR
    ]
    if not problems:
        return
    request, first = problems[0]
    message = "; ".join(f"{r.info.name}: {finding.message}" for r, finding in problems)
    hint = first.hint
    if len(problems) > 1:
        hint = "vmplug check shows each finding with its remedy"
    elif first.code not in NEVER_ALLOWED:
        hint += f"; or accept the risk with --allow {first.code}"
    missing = [error for error in unresolved if isinstance(error, NoSuchDevice)]
    if missing and len(missing) == len(refused):
        raise NoSuchDevice(", ".join(error.wanted for error in missing), message, hint=hint)
    if len(unresolved) == len(refused):  # nothing of it is in use
        raise HostError(message, hint=hint)
    raise InUse(
        request.device.host_path if request.device else request.info.name,
        message,
        codes=tuple(finding.code for _, finding in problems),
        hint=hint,
    )


def _unresolved(error: HostError) -> Finding:
    code = Code.NO_SUCH_DEVICE if isinstance(error, NoSuchDevice) else Code.UNREADABLE
    return Finding(code, error.message, error.hint or "check that file")
