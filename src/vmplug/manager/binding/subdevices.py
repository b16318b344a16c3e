"""Create and remove virtual functions and mediated devices, unless one is in use."""

from collections.abc import Collection, Iterable

from vmplug.address import Bdf
from vmplug.errors import BindError, NoSuchDevice, StateError
from vmplug.host.finding import Code
from vmplug.host.pci.function import find_function
from vmplug.host.pci.mdev_create import remove_mediated
from vmplug.host.pci.sriov import Sriov, find_interface, read_sriov, set_count
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.root import HostRoot
from vmplug.journal.journal import Journal
from vmplug.manager.binding.users import (
    USED_BY_VM,
    children_users,
    find_conflicts,
    raise_in_use,
)

_NO_USE = frozenset(
    {
        Code.NOT_BOUND,
        Code.GROUP_NOT_VIABLE,
        Code.MEMBER_IN_USE,
        Code.MACHINE_PART,
        Code.NO_IOMMU,
        Code.NO_INTERRUPT_REMAPPING,
        Code.NO_NODE,
        Code.NO_RESET,
        Code.NO_RESPONSE,
        Code.BAR_UNASSIGNED,
        Code.VFIO_REFUSES,
        Code.RESERVED_MEMORY,
        Code.WRONG_NODE,
    }
)
"""Findings that a function cannot be handed over as it is, not that it is in use."""


def find_sriov(bdf: Bdf, host: HostRoot) -> Sriov:
    """The virtual functions of one. Raises NoSuchDevice, and BindError without SR-IOV."""
    function = find_function(bdf, host)
    if function is None:
        raise NoSuchDevice(
            str(bdf),
            f"no PCI function {bdf} on this host",
            found="nothing",
            hint="vmplug host lists the devices",
        )
    found = read_sriov(bdf, host)
    if found is None:
        owner = f": it is one of {function.physfn}" if function.physfn else ""
        raise BindError(
            str(bdf),
            "sriov_totalvfs",
            f"{bdf} cannot have virtual functions{owner}",
            hint="vmplug host shows which functions can",
        )
    return found


def divide(
    bdf: Bdf,
    count: int,
    *,
    journal: Journal,
    host: HostRoot,
    autoprobe: bool | None = None,
    allow: Collection[Code] = (),
) -> tuple[Bdf, ...]:
    """Set the number of a physical function's virtual ones, and return them; see `set_count`.

    A new number removes all existing ones first. So none of them may be in use by a VM, a process
    or the host, or bound to VFIO by vmplug; nor may a mediated device of the physical function be
    in use. Raises InUse or StateError for those, and then nothing has changed.
    """
    with journal.bindings.alone():
        found = find_sriov(bdf, host)
        if count != len(found.virtfns):
            _refuse_used(bdf, found.virtfns, journal, host, allow)
        return set_count(bdf, count, host, autoprobe=autoprobe)


def _refuse_used(
    physfn: Bdf,
    virtfns: Iterable[Bdf],
    journal: Journal,
    host: HostRoot,
    allow: Collection[Code],
) -> None:
    findings = [
        finding
        for bdf in virtfns
        for finding in find_conflicts(find_vfio_device(str(bdf), host), journal, host, only=bdf)
        if finding.code not in _NO_USE
    ]
    findings += children_users(physfn, journal, host)
    raise_in_use(", ".join(map(str, virtfns)) or str(physfn), findings, allow)
    known = {row.bdf for row in journal.bindings.all()}
    bound = [bdf for bdf in virtfns if bdf in known]
    if bound:
        raise StateError(
            f"{', '.join(map(str, bound))} is bound to VFIO by vmplug",
            state="bound",
            required="not bound",
            hint=f"give it back first: vmplug unbind {bound[0]}",
        )


def read_interface(bdf: Bdf, host: HostRoot) -> str:
    """The network interface of a physical function. Raises NoSuchDevice or BindError."""
    find_sriov(bdf, host)
    interface = find_interface(bdf, host)
    if interface is None:
        raise BindError(
            str(bdf),
            "net",
            f"{bdf} has no network interface, which vmplug needs to configure its virtual "
            "functions",
            hint="bind it to its driver, and move its interface to this network namespace",
        )
    return interface


def remove_unused(uuid: str, *, journal: Journal, host: HostRoot) -> None:
    """Remove a mediated device. Raises InUse while a VM or a process has it."""
    with journal.bindings.alone():
        group = find_vfio_device(uuid, host)
        found = find_conflicts(group, journal, host)
        raise_in_use(uuid, [finding for finding in found if finding.code in USED_BY_VM])
        remove_mediated(uuid, host)
