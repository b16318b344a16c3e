"""SCSI addresses in use."""

from functools import cache

from vmplug.address import ScsiAddress


@cache
def first_addresses(count: int) -> frozenset[ScsiAddress]:
    """So many addresses of a controller; all of them take a tenth of a second to make."""
    return frozenset(map(ScsiAddress.from_index, range(count)))
