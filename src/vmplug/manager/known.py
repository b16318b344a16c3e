"""What a plan must know of a VM, and no more: a VM may have hundreds of devices."""

from collections.abc import Collection, Iterable, Sequence

import msgspec

from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord
from vmplug.manager.examine import CheckedRequest


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of a VM that are asked for, and its shares; and the places of all."""

    devices: Sequence[DeviceRecord]
    places: Collection[str]


def find_known(vm: str, examined: Iterable[CheckedRequest], journal: Journal) -> Known:
    """What the journal has for a plan of these requests.

    A device that comes between the two reads makes the plan void: see `Journal.add_devices`.
    """
    asked = (request.device.identity for request in examined if request.device)
    return Known(devices=journal.devices_for(vm, asked), places=tuple(journal.places(vm).values()))
