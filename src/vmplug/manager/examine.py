"""Everything about requests that can be known before a VM is asked: found, and allowed or not.

`check` shows it and `attach` acts on it, so that the one refuses exactly what the other does.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vmplug.drivers.block import BlockOptions, check_disk
from vmplug.errors import HostError, InUse, NoSuchDevice
from vmplug.host import safety
from vmplug.host.device import BlockDevice, CharDevice, DeviceType, DiskFile, HostDevice
from vmplug.host.mounts import HostUsage, read_usage
from vmplug.host.resolve import resolve_all
from vmplug.host.root import HostRoot
from vmplug.host.safety import Claim, Code, Finding, Severity, Wish
from vmplug.host.vhost_user import VhostUserStore
from vmplug.oci.info import DeviceInfo

FindClaims = Callable[[HostDevice], Sequence[Claim]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """One request with what came of it; `device` is None when `error` says why there is none."""

    info: DeviceInfo
    options: BlockOptions
    device: HostDevice | None
    error: HostError | None
    findings: tuple[Finding, ...]

    @property
    def is_refused(self) -> bool:
        """Whether `attach` refuses it."""
        return any(finding.severity is Severity.ERROR for finding in self.findings)


def examine(
    infos: Sequence[DeviceInfo],
    host: HostRoot,
    *,
    store: VhostUserStore | None = None,
    find_claims: FindClaims = lambda _: (),
    allowed: Iterable[Code] = (),
) -> list[Examined]:
    """Find every device and everything against handing it over, in the order asked.

    `allowed` findings become warnings. Raises SpecError for malformed options only.
    """
    options = [BlockOptions.parse(info.driver_options) for info in infos]
    found = resolve_all(infos, host, store)
    usage = _try_read_usage(host, found)
    examined: list[Examined] = []
    for info, option, answer in zip(infos, options, found, strict=True):
        device = None if isinstance(answer, HostError) else answer
        error = answer if isinstance(answer, HostError) else None
        if device:
            claims = [*find_claims(device), *_overlaps(device, examined)]
            findings = _check(info, option, device, usage, claims, host)
        else:
            findings = [_unresolved(error)] if error else []
        findings = safety.allow(findings, frozenset(allowed))
        examined.append(
            Examined(
                info=info, options=option, device=device, error=error, findings=tuple(findings)
            )
        )
    return examined


def _try_read_usage(
    host: HostRoot, found: Iterable[HostDevice | HostError]
) -> HostUsage | HostError:
    has_nodes = any(isinstance(device, BlockDevice) for device in found)
    try:
        return read_usage(host, with_mounts=has_nodes)
    except HostError as error:
        return error


def _check(
    info: DeviceInfo,
    options: BlockOptions,
    device: HostDevice,
    usage: HostUsage | HostError,
    claims: Sequence[Claim],
    host: HostRoot,
) -> list[Finding]:
    """All findings about one device; what cannot be found out is one too."""
    if isinstance(usage, HostError):
        return [_unresolved(usage)]
    wish = Wish(read_only=info.read_only, share_rw=options.share_rw)
    try:
        findings = safety.check(device, wish, usage=usage, claims=claims, root=host)
    except HostError as error:
        return [_unresolved(error)]
    findings += _no_driver(device)
    if isinstance(device, BlockDevice | DiskFile):
        findings += check_disk(device, options)
    return findings


def refuse(examined: Sequence[Examined]) -> None:
    """Raise what stands against the requests: the error of one, or one report of several."""
    refused = [request for request in examined if request.is_refused]
    if len(refused) == 1 and refused[0].error:
        raise refused[0].error
    problems = [
        (request, finding)
        for request in refused
        for finding in request.findings
        if finding.severity is Severity.ERROR
    ]
    if not problems:
        return
    request, first = problems[0]
    hint = first.hint
    if len(problems) > 1:
        hint = "vmplug check shows each of them with its remedy"
    elif first.code not in safety.NEVER_ALLOWED:
        hint += f"; or take the risk with --allow {first.code}"
    raise InUse(
        request.device.host_path if request.device else request.info.container_path,
        "; ".join(f"{r.info.container_path}: {finding.message}" for r, finding in problems),
        codes=tuple(finding.code for _, finding in problems),
        hint=hint,
    )


def _unresolved(error: HostError) -> Finding:
    code = Code.NO_SUCH_DEVICE if isinstance(error, NoSuchDevice) else Code.UNREADABLE
    return Finding(code, error.message, error.hint or "look at the file it names")


def _overlaps(device: HostDevice, earlier: Iterable[Examined]) -> list[Claim]:
    """Devices of the same request that show the same bytes under another number."""
    return [
        Claim(
            vm="of this very request",
            identity=other.device.identity,
            read_only=other.info.read_only,
            share_rw=other.options.share_rw,
        )
        for other in earlier
        if other.device and other.device.identity in device.related_identities
    ]


def _no_driver(device: HostDevice) -> list[Finding]:
    if isinstance(device, BlockDevice | DiskFile):
        return []
    if isinstance(device, CharDevice) and device.kind is DeviceType.GENERIC:
        return []
    return [
        Finding(
            Code.NO_DRIVER,
            f"{device.host_path} is a {device.kind} device, which this vmplug cannot plug",
            "leave it out of the bundle; vmplug plugs block devices and disk images",
        )
    ]
