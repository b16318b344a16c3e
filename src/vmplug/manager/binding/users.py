"""Find the users of a function of the host, and refuse to unbind it from them."""

from collections.abc import Collection, Iterable, Iterator

from vmplug.address import Bdf
from vmplug.errors import InUse
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import NEVER_ALLOWED, Access, Code, Finding, Severity, allow
from vmplug.host.kind import Identity
from vmplug.host.pci.function import read_virtfns
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.iommu import find_group, group_node, is_noiommu, read_group
from vmplug.host.pci.uses import BlockDevices
from vmplug.host.pci.vfio import read_cdev, with_disks
from vmplug.host.root import HostRoot
from vmplug.host.use.openers import DeviceNode, read_open_files, wanted_node
from vmplug.journal.journal import Journal

USED_BY_VM = frozenset({Code.IN_USE_BY_VM, Code.OPEN_BY_PROCESS})
"""Findings that a VM, or another VFIO user, has it."""


def find_conflicts(
    group: VfioGroup, journal: Journal, host: HostRoot, *, only: Bdf | None = None
) -> list[Finding]:
    """Every reason not to unbind the group, or `only` one function, from its users."""
    members = group if only is None else _only(only, group, host)
    paths = members.member_paths
    nodes = ((name, node) for name, path in paths.items() if (node := read_cdev(path, host)))
    return check_device(
        members._replace(cdev_nodes=tuple(nodes)),
        Access(read_only=False),
        usage=read_usage(host, vms=journal.vm_processes(host)),
        claims=journal.find_claims(None, group.identity, group.related_identities),
        root=host,
    )


def find_users(bdf: Bdf, journal: Journal | None, host: HostRoot) -> str | None:
    """The user of a function, or of one of its virtual ones, through VFIO; None for none.

    It is a process, or a VM in the journal. The virtual functions end with the function's driver,
    and the kernel waits for their users.
    """
    functions = (bdf, *read_virtfns(bdf, host))
    return next(filter(None, (_find_user(one, journal, host) for one in functions)), None)


def virtfn_users(group: VfioGroup, journal: Journal, host: HostRoot) -> Iterator[Finding]:
    """The virtual functions of a group's functions that somebody uses through VFIO."""
    for function in group.functions:
        for virtfn in read_virtfns(function.bdf, host):
            if user := _find_user(virtfn, journal, host):
                yield Finding(
                    Code.IN_USE_BY_VM,
                    f"{user}, a virtual function of {function.bdf}, which would disappear",
                    f"detach {virtfn} there, or end that process",
                )


def _find_user(bdf: Bdf, journal: Journal | None, host: HostRoot) -> str | None:
    """The user of one function.

    This reads only links: readers of the function's files wait while the kernel unbinds it from
    its last user.
    """
    device = f"{host.pci_devices}/{bdf}"
    number = find_group(device, host)
    if number is None:
        return None
    node = group_node(number, is_noiommu=is_noiommu(number, host))
    paths = filter(None, (node, read_cdev(device, host)))
    wanted = {
        key: name
        for path in paths
        for key, name in wanted_node(DeviceNode.of_char(path, host), host).items()
    }
    for opener in read_open_files(host).find(wanted) if wanted else ():
        return f"{bdf} is open in process {opener.pid} ({opener.name})"
    if journal:
        members = [Identity.of_vfio(name) for name in read_group(number, host)]
        for claim in journal.find_claims(None, Identity.of_vfio(bdf), members):
            return f"{bdf} is handed to {claim.holder}"
    return None


def _only(bdf: Bdf, group: VfioGroup, host: HostRoot) -> VfioGroup:
    """The group with only that function."""
    functions = tuple(function for function in group.functions if function.bdf == bdf)
    return with_disks(group._replace(functions=functions, bridges=()), host, BlockDevices(host))


def raise_in_use(what: str, findings: Iterable[Finding], allowed: Collection[Code] = ()) -> None:
    """Raise InUse for findings that are not allowed: one report of all of them."""
    problems = [
        finding
        for finding in allow(findings, frozenset(allowed))
        if finding.severity is Severity.ERROR
    ]
    if not problems:
        return
    hints = dict.fromkeys(finding.hint for finding in problems)
    if not any(finding.code in NEVER_ALLOWED for finding in problems):
        options = dict.fromkeys(f"--allow {finding.code}" for finding in problems)
        hints[f"or accept the risk with {' '.join(options)}"] = None
    raise InUse(
        what,
        "; ".join(dict.fromkeys(finding.message for finding in problems)),
        codes=tuple(finding.code for finding in problems),
        hint="; ".join(hints),
    )
