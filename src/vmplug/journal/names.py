"""Names that a caller gives: those of VMs, and of owners."""

import re

from vmplug.errors import SpecError
from vmplug.oci.limits import NAME_BYTES_MAX, check_text

_VM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


def is_vm_name(name: str) -> bool:
    """Whether it can be a VM's."""
    return bool(_VM.match(name))


def check_vm_name(name: str) -> None:
    """Raise SpecError for a name that cannot be a VM's."""
    if not is_vm_name(name):
        raise SpecError(
            f"VM name {name!r}", "it is made of letters, digits, '.', '_' and '-', 63 at most"
        )


def check_owner(owner: str) -> None:
    """Raise SpecError for a name that cannot be an owner's."""
    if not owner:
        raise SpecError("owner", "the name is empty")
    check_text("owner", owner, NAME_BYTES_MAX)
