"""The physical addresses that the host has for memory and BARs.

Source: proc_cpuinfo(5); Linux arch/x86/kernel/cpu/proc.c.
"""

import re

from vmplug.host.root import HostRoot

_SIZES = r"(?ma)^address sizes\s*: ([0-9]{1,2}) bits physical"


def read_address_bits(root: HostRoot) -> int | None:
    """The bits of physical addresses, which a guest has too with KVM; None where not shown."""
    found = re.search(_SIZES, root.read_text("/proc/cpuinfo") or "")
    return int(found[1]) if found else None
