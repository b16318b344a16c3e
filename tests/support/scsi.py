"""SCSI addresses in use."""

from functools import cache

from vmplug.address import ScsiAddress

ALL = 1 << 16


@cache
def first_addresses(count: int) -> frozenset[ScsiAddress]:
    """So many addresses of a controller."""
    return frozenset(_all_addresses()[:count])


@cache
def _all_addresses() -> tuple[ScsiAddress, ...]:
    """They take a tenth of a second to make."""
    return tuple(map(ScsiAddress.from_index, range(ALL)))
