"""Which VMs of vmplug, leases and pods have it already?"""

from collections.abc import Collection, Iterator, Sequence

from vmplug.host.finding import Access, Code, Finding, UsedBy
from vmplug.host.kind import Identity, IdentityKind
from vmplug.host.pci.group import VfioGroup
from vmplug.host.root import HostRoot
from vmplug.host.use.claim import Claim, is_lease, is_pod


def without_shared(claims: Sequence[Claim], group: VfioGroup, root: HostRoot) -> Sequence[Claim]:
    """A VM that has the physical function of a virtual one may share it: manager's vf_tokens."""
    if not claims:
        return claims
    from vmplug.host.pci.vfio import find_vfio_owner  # noqa: PLC0415  3 ms, as for all of VFIO

    owners = {str(o.bdf) for f in group.functions if (o := find_vfio_owner(f, root))}
    shared = {Identity.of_vfio(bdf) for bdf in owners - set(group.members)}
    return [claim for claim in claims if claim.identity not in shared]


def find_claimed(
    claims: Sequence[Claim], access: Access, only_read: Collection[Identity] = ()
) -> Iterator[Finding]:
    """The holds of VMs; readers may share, and so may writers if all have share-rw.

    `only_read` are parts that the VM would only read: backing files.
    """
    for claim in claims:
        readers = claim.read_only and (access.read_only or claim.identity in only_read)
        sharers = access.share_rw and claim.share_rw
        if not (readers or sharers):
            yield _conflict(claim)


def _conflict(claim: Claim) -> Finding:
    device = _spoken(claim.identity)
    sharing = "" if claim.identity.kind is IdentityKind.VFIO else _SHARING
    code = Code.IN_USE_BY_VM
    if is_pod(claim.vm):
        code, held, sharing = Code.GIVEN_TO_POD, "given to", ""
        remedy = "delete that pod"
        otherwise = f"for its own VM, pass --allow {code}"
    elif is_lease(claim.vm):
        held = "held by"
        remedy = "end that process, or run vmplug lease end"
        otherwise = "if it has ended, run vmplug reconcile"
    else:
        held = "already handed to"
        remedy = f"detach it from {claim.holder} first (vmplug detach)"
        otherwise = "if that VM is gone, run vmplug reconcile"
    return Finding(
        code,
        f"{device} is {held} {claim.holder}" + (" for reading" if claim.read_only else ""),
        f"{remedy}; {sharing}{otherwise}",
        used_by=UsedBy(on=str(claim.identity), who=claim.holder, how="the journal of vmplug"),
    )


_SHARING = (
    "share it read-only; or set share-rw=on on both sides if its file system "
    "supports several writers; "
)


def _spoken(identity: Identity) -> str:
    """`block device 7:0`, or the path or name of anything else."""
    if identity.devnum:
        return f"{identity.kind} device {identity.devnum}"
    return identity.path or identity.key
