"""Ask the kernel whether a block device is held exclusively: an open with O_EXCL finds it."""

import errno
import os
import time
from collections.abc import Iterable, Iterator
from shlex import quote

from vmplug.host.block.device import BlockDevice, DiskPart
from vmplug.host.block.usage import HostUsage
from vmplug.host.finding import Code, Finding, UsedBy
from vmplug.host.root import HostRoot

_PROBE_S, _PROBE_STEP_S = 1.0, 0.001
"""How long an exclusive open may be just a probe, for example of another vmplug, which a busy host
may suspend for a while. It gets the CPU that this one does not use to ask again at once."""


def exclusive_errno(
    path: str, usage: HostUsage, root: HostRoot, *, explained: bool = False
) -> int | None:
    """Why it cannot be opened exclusively; a holder that is `explained` is not waited for.

    Where `usage` may not claim it, why it cannot be opened at all.
    """
    asked, most_s = usage.questions, 0 if explained else _PROBE_S
    flags = os.O_EXCL if usage.may_claim else 0

    def ask() -> int | None:
        return asked.within(
            lambda patience_s: _try_exclusively(path, root, patience_s, flags),
            most_s,
            is_vain=lambda number: number == errno.EBUSY,
        )

    return asked.once(("open exclusively", path), ask)


def _try_exclusively(path: str, root: HostRoot, patience_s: float, flags: int) -> int | None:
    deadline = time.monotonic() + patience_s
    while True:
        is_over = time.monotonic() >= deadline  # this process may have been suspended too
        number = root.open_errno(path, flags)
        if number != errno.EBUSY or is_over:
            return number
        time.sleep(_PROBE_STEP_S)


def find_claims_elsewhere(
    device: BlockDevice, usage: HostUsage, root: HostRoot, *, explained: bool
) -> Iterator[Finding]:
    """The kernel keeps claims for each name of a LUN, and none for what a loop device is on."""
    for parts in (device.twins or (), device.behind or ()):
        for part in parts:
            if part.is_whole and not explained:
                number = exclusive_errno(part.device_node, usage, root)
                if number == errno.EBUSY:
                    yield held_exclusively(part.device_node, parts)


def held_exclusively(node: str, relatives: Iterable[DiskPart]) -> Finding:
    """The finding for a device of which the kernel does not say who holds it.

    The holder may have the whole disk, or a partition of it.
    """
    nodes = dict.fromkeys((node, *(part.device_node for part in relatives)))
    return Finding(
        Code.OPEN_EXCLUSIVELY,
        f"{node} is open exclusively (O_EXCL) on the host",
        f"fuser --verbose {' '.join(map(quote, nodes))} may name the process; stop it first",
        used_by=UsedBy(
            on=node,
            who="a program or a part of the kernel",
            how="an exclusive open (O_EXCL), which the kernel refused",
        ),
    )
