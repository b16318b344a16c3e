"""Find the users of a function of the host, and refuse to unbind it from them."""

from collections.abc import Collection, Iterable, Iterator

from vmplug.address import Bdf
from vmplug.errors import InUse
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.check.relate import relate_group
from vmplug.host.finding import NEVER_ALLOWED, Access, Code, Finding, Severity, allow
from vmplug.host.kind import Identity
from vmplug.host.pci.function import read_virtfns
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.iommu import find_group, read_group
from vmplug.host.pci.mdev import MDEV_DEVICES, UUID, list_children
from vmplug.host.pci.uses import BlockDevices
from vmplug.host.pci.vfio import list_vfio_nodes, read_cdev, with_parts
from vmplug.host.pci.vfio_use import is_open
from vmplug.host.root import HostRoot
from vmplug.host.use.mapped import find_vfio_users
from vmplug.host.use.openers import DeviceNode, read_open_files, wanted_node
from vmplug.journal.journal import Journal

USED_BY_VM = frozenset({Code.GIVEN_TO_POD, Code.IN_USE_BY_VM, Code.OPEN_BY_PROCESS})
"""Findings that a VM, a pod or another VFIO user has it."""


def find_conflicts(
    group: VfioGroup, journal: Journal, host: HostRoot, *, only: Bdf | None = None
) -> list[Finding]:
    """Every reason not to unbind the group, or `only` one function, from its users."""
    members = group if only is None else _only(only, group, host)
    paths = members.member_paths
    nodes = ((name, node) for name, path in paths.items() if (node := read_cdev(path, host)))
    usage = read_usage(host, vms=journal.vm_processes(host))
    members = relate_group(members._replace(cdev_nodes=tuple(nodes)), usage, host)
    related = (*group.related_identities, *members.related_identities)
    return check_device(
        members,
        Access(read_only=False),
        usage=usage,
        claims=journal.find_claims(None, group.identity, dict.fromkeys(related)),
        root=host,
    )


def find_users(bdf: Bdf, journal: Journal | None, host: HostRoot) -> str | None:
    """The user of a function, or of a part of it, through VFIO; None for none.

    It is a process, or a VM in the journal. The virtual functions and mediated devices end with
    the function's driver, and the kernel waits for their users.
    """
    names = [str(one) for one in (bdf, *read_virtfns(bdf, host))]
    names += list_children(names, host)
    return next(filter(None, (_find_user(one, journal, host) for one in names)), None)


def children_users(bdf: Bdf, journal: Journal, host: HostRoot) -> Iterator[Finding]:
    """The mediated devices of one function that somebody uses through VFIO."""
    for uuid in list_children({str(bdf)}, host):
        if user := _find_user(uuid, journal, host):
            yield Finding(
                Code.IN_USE_BY_VM,
                f"{user}, a mediated device of {bdf}, which may disappear",
                f"detach {uuid} there, or end that process",
            )


def virtfn_users(group: VfioGroup, journal: Journal, host: HostRoot) -> Iterator[Finding]:
    """The virtual functions of a group's functions that somebody uses through VFIO."""
    for function in group.functions:
        for virtfn in read_virtfns(function.bdf, host):
            if user := _find_user(str(virtfn), journal, host):
                yield Finding(
                    Code.IN_USE_BY_VM,
                    f"{user}, a virtual function of {function.bdf}, which would disappear",
                    f"detach {virtfn} there, or end that process",
                )


def _find_user(name: str, journal: Journal | None, host: HostRoot) -> str | None:
    """The user of one function, or of a mediated device by its UUID."""
    device = f"{MDEV_DEVICES if UUID.match(name) else host.pci_devices}/{name}"
    number = find_group(device, host)
    if number is None:
        return None
    wanted = {
        key: path
        for node in list_vfio_nodes(device, host)
        for key, path in wanted_node(DeviceNode.of_char(node, host), host).items()
    }
    for opener in read_open_files(host).find(wanted) if wanted else ():
        return f"{name} is open in process {opener.pid} ({opener.name})"
    if is_open(name, host):
        among = [f"process {one.pid} ({one.name})" for one in find_vfio_users(host)]
        which = f", maybe {' or '.join(among)}" if among else ", and no process shows it"
        return f"{name} is still open or mapped{which}"
    if journal:
        members = [Identity.of_vfio(member) for member in read_group(number, host)]
        for claim in journal.find_claims(None, Identity.of_vfio(name), members):
            return f"{name} is handed to {claim.holder}"
    return None


def _only(bdf: Bdf, group: VfioGroup, host: HostRoot) -> VfioGroup:
    """The group with only that function."""
    functions = tuple(function for function in group.functions if function.bdf == bdf)
    return with_parts(group._replace(functions=functions, bridges=()), host, BlockDevices(host))


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
