"""Claims: who holds a device, according to the journal, and how holders are named."""

import msgspec

from vmplug.host.kind import Identity

LEASE_PREFIX = "lease:"
"""The beginning of a lease's name in the journal, where it stands for a VM's; no VM has it."""


def is_lease(name: str) -> bool:
    """Whether the journal's name of a holder is that of a lease, and not that of a VM."""
    return name.startswith(LEASE_PREFIX)


def spoken_holder(name: str) -> str:
    """`VM sb1`, or `lease job-17`."""
    return name.replace(":", " ", 1) if is_lease(name) else f"VM {name}"


POD_PREFIX = "pod:"
"""The same for a pod of Kubernetes, before the name of the device that it was given."""


def is_pod(name: str) -> bool:
    """Whether it is that of a pod: nothing says which VM is the pod's."""
    return name.startswith(POD_PREFIX)


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A device that a VM, a lease or a pod holds, according to the journal.

    `process` is that of a lease, in words; None for the others.
    """

    vm: str
    identity: Identity
    read_only: bool
    share_rw: bool
    process: str | None = None

    @property
    def holder(self) -> str:
        """`VM 'sb1'`, `lease job-17, process 4711 (cloud-hypervisor)`, or the device of a pod."""
        if is_pod(self.vm):
            return f"a pod of Kubernetes as {self.vm.removeprefix(POD_PREFIX)}"
        if not is_lease(self.vm):
            return f"VM {self.vm!r}"
        return ", ".join(filter(None, (spoken_holder(self.vm), self.process)))


class VmProcess(msgspec.Struct, frozen=True, kw_only=True):
    """The process of a VM, and what the journal says that the VM has: texts of identities."""

    vm: str
    holds: frozenset[str]
