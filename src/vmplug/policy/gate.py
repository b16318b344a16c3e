"""Ask the policy about a request: the device in the terms that rules use."""

from collections.abc import Iterator

import msgspec
from msgspec.structs import replace

from vmplug.devnum import DevNum
from vmplug.drivers.place import PlugMode
from vmplug.drivers.ports import PlugDriver
from vmplug.errors import AttributeReadError, NoSuchDevice
from vmplug.host.block.device import BlockDevice
from vmplug.host.device import CharDevice, EntropySource, HostDevice
from vmplug.host.finding import Code, Finding, Severity
from vmplug.host.kind import DeviceType
from vmplug.host.paths import find_paths
from vmplug.host.pci.group import VfioGroup
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.oci.info import DeviceInfo
from vmplug.oci.requests import Request
from vmplug.policy.rules import Policy, PolicySubject, Verdict


class PolicyCheck(msgspec.Struct, frozen=True, kw_only=True):
    """The policy, and the VM, the owner and the time for which a device is requested.

    Each is None where it is not known yet.
    """

    policy: Policy
    vm: str | None = None
    owner: str | None = None
    mode: PlugMode | None = None

    def judge(
        self, request: Request, device: HostDevice, driver: PlugDriver | None, root: HostRoot
    ) -> Verdict:
        """The verdict of the rules, which must allow each device that a request brings.

        A device that cannot be read is not allowed.
        """
        try:
            parts = list(_parts(device, root))
        except (AttributeReadError, NoSuchDevice) as error:
            why = f"{self.policy.name} cannot decide about it: {error.message}"
            return Verdict(refusals=(Finding(Code.NOT_ALLOWED, why, "check that file"),))
        is_disk = device.kind is DeviceType.BLOCK and driver is not None
        verdict = self.policy.judge(
            replace(
                part,
                cdi_kinds=request.cdi_kinds if isinstance(request, DeviceInfo) else (),
                read_only=request.read_only,
                share_rw=is_disk and driver is not None and driver.share_rw,
                vm=self.vm,
                owner=self.owner,
                mode=self.mode,
            )
            for part in parts
        )
        # A VM never gets one, so a rule for all of them may be about counting.
        is_opened = self.mode is PlugMode.LEASE and isinstance(device, CharDevice)
        if is_opened and not (verdict.refusals or verdict.is_named):
            return replace(verdict, refusals=(self._not_named(device),))
        return verdict

    def _not_named(self, device: HostDevice) -> Finding:
        return Finding(
            Code.NOT_ALLOWED,
            f"{device.host_path}: a lease hands it over open, and no rule of {self.policy.name} "
            "names it alone",
            "a rule names it by its number or by a path without wildcards",
        )


def _parts(device: HostDevice, root: HostRoot) -> Iterator[PolicySubject]:
    """A device, or each member of a group by itself: rules apply to these."""
    if not (isinstance(device, VfioGroup) and (device.functions or device.mediated)):
        yield PolicySubject(
            name=device.host_path,
            kind=device.kind,
            number=_number(device),
            paths=find_paths(device, root),
        )
        return
    if device.mediated:
        real = root.real_path(device.mediated.sysfs_path)
        yield PolicySubject(name=device.mediated.uuid, kind=device.kind, paths=(real,))
    for function in device.functions:
        real = root.real_path(function.sysfs_path)
        name = str(function.bdf)
        yield PolicySubject(name=name, kind=device.kind, paths=(real,), function=function)


def _number(device: HostDevice) -> tuple[str, DevNum] | None:
    match device:
        case BlockDevice(devnum=devnum):
            return "b", devnum
        case VhostUserSocket(devnum=devnum) if devnum:
            return "b", devnum
        case CharDevice(devnum=devnum) | EntropySource(devnum=devnum) if devnum:
            return "c", devnum
        case _:
            return None


def not_overruled(
    findings: list[Finding], codes: frozenset[Code], verdict: Verdict, policy: str
) -> list[Finding]:
    """A refusal for each finding that `--allow` names against the policy."""
    return [
        Finding(
            Code.NOT_ALLOWED,
            f"{finding.message}; no rule of {policy} that allows the device lists {finding.code} "
            "in `allow`",
            finding.hint,
        )
        for finding in findings
        if finding.severity is Severity.ERROR and finding.code in codes - verdict.allow
    ]
