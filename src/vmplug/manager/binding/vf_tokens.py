"""Give a physical function and its virtual ones the token that they share.

Linux opens a virtual function whose physical one is with vfio-pci only for a user who knows the
token that the physical one was opened with. So a physical function that can have virtual ones gets
a new token, which the journal keeps, and its virtual functions get the same. QEMU takes a token
for a group, not for a device's own node. Measured on Linux 6.1 and 6.12 with QEMU 10.
"""

from collections.abc import Iterator
from typing import Protocol

from msgspec.structs import replace

from vmplug.address import Bdf
from vmplug.drivers.plug import Plug, VFIODevice, VFIODevices
from vmplug.drivers.ports import HIDDEN, Hypervisor
from vmplug.errors import StateError
from vmplug.host.check.vfio_node import check_group_node
from vmplug.host.finding import Code, Finding
from vmplug.host.pci.function import PciFunction, find_function, read_virtfns
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.vfio import can_have_virtfns, find_vfio_owner
from vmplug.host.root import HostRoot


class Tokens(Protocol):
    """Where tokens come from: see VfTokens."""

    def give(self, bdf: Bdf, device_id: str, *, keep: bool) -> str:
        """The token to plug a physical function with."""

    def find(self, bdf: Bdf) -> str | None:
        """The token of a physical function that a VM has."""


class HiddenTokens(Tokens):
    """Words in place of every token, to show the steps of a plug."""

    def give(self, bdf: Bdf, device_id: str, *, keep: bool) -> str:  # noqa: ARG002
        """See Tokens."""
        return HIDDEN

    def find(self, bdf: Bdf) -> str | None:  # noqa: ARG002
        """See Tokens."""
        return HIDDEN


def check_tokens(
    group: VfioGroup, tokens: Tokens | None, vm: Hypervisor | None, root: HostRoot
) -> Iterator[Finding]:
    """Why virtual functions of the group cannot be opened; `tokens` None: nothing is journalled.

    Without a `vm` any VM will do.
    """
    owned = [(f, owner) for f in group.functions if (owner := find_vfio_owner(f, root))]
    for function, owner in owned:
        if tokens is None or tokens.find(owner.bdf) is None:
            yield _without_token(function, owner)
        elif vm is not None and not vm.takes_vf_token:
            yield _not_taken(function, owner)
    if owned and group.cdev_nodes:
        yield from check_group_node(group, root)


def _without_token(function: PciFunction, owner: PciFunction) -> Finding:
    return Finding(
        Code.PHYSFN_WITH_VFIO,
        f"{function.bdf} is a virtual function of {owner.bdf}, which VFIO has: the kernel opens "
        f"it only with a token that both share, and no VM has {owner.bdf} with a token of "
        "vmplug",
        f"attach {owner.bdf} to a running VM first (vmplug attach --device vfio:{owner.bdf}); its "
        "QEMU must have vf-token (8.1 or later). Or give it back to a driver of the host (vmplug "
        f"unbind {owner.bdf} if vmplug bound it), make the virtual functions there (vmplug sriov "
        f"{owner.bdf} --count N), and hand over one of them",
    )


def _not_taken(function: PciFunction, owner: PciFunction) -> Finding:
    return Finding(
        Code.PHYSFN_WITH_VFIO,
        f"{function.bdf} is a virtual function of {owner.bdf}, which VFIO has: QEMU must open it "
        "with a token, and this VM cannot be given one",
        "attach it when the VM runs, as everybody can read a command line; QEMU must have "
        "vf-token (8.1 or later)",
    )


def with_tokens(plug: Plug, tokens: Tokens, vm: Hypervisor, root: HostRoot) -> Plug:
    """The plug, with the tokens that the kernel asks for; each is in the journal now.

    Raises StateError when a physical function has left its VM since the check.
    """
    if not isinstance(plug, VFIODevices):
        return plug
    devices = [
        replace(device, vf_token=_find_token(device, plug.id, tokens, vm, root))
        for device in plug.devices
    ]
    if any(device.vf_token for device in devices):
        devices = [replace(device, cdev_node=None) for device in devices]
    return replace(plug, devices=tuple(devices))


def _find_token(
    device: VFIODevice, device_id: str, tokens: Tokens, vm: Hypervisor, root: HostRoot
) -> str | None:
    """The token to plug one function with; None where the kernel takes or needs none."""
    function = find_function(device.bdf, root) if device.bdf else None
    if function is None:
        return None
    if owner := find_vfio_owner(function, root):
        token = tokens.find(owner.bdf)
        if token is None or not vm.takes_vf_token:
            raise StateError(
                f"{owner.bdf}, the physical function of {function.bdf}, has no VF token any more",
                state="without a token",
                required="in a VM",
                hint="vmplug check shows the reason",
            )
        return token
    if can_have_virtfns(function.bdf, root) and vm.takes_vf_token:
        keep = bool(read_virtfns(function.bdf, root))
        return tokens.give(function.bdf, device_id, keep=keep)
    return None
