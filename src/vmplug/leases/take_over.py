"""Which devices of leases does a running QEMU have, and where?

A QEMU that got the words of `Lease.qemu_args` has each device under the name that attach would
give it. So a VM that is adopted can take them over, as if it had plugged them.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from vmplug.address import qemu_id
from vmplug.drivers.place import GuestAddress, Place
from vmplug.drivers.plug import found_address
from vmplug.errors import StateError
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.lease_rows import Taken
from vmplug.journal.records import DeviceRecord, VmRecord
from vmplug.leases.life import lease_id_of, leases_of
from vmplug.leases.state import LeaseState, find_state


def find_leased(qemu: Qemu, journal: Journal) -> Taken:
    """By the names of leases, their devices that QEMU has, at their places in it.

    QEMU needs the open files that it inherited no more, and closes them: a device that is
    unplugged later leaves none. StateError for a lease that was not given to a process yet.
    """
    held, found = qemu.find_drivers(), dict[str, list[DeviceRecord]]()
    identities = set[object]()
    for lease in leases_of(journal):
        devices = [device for device in journal.devices(lease.name) if device.id in held]
        if devices and find_state(lease, journal.host) is LeaseState.MADE:
            raise _not_given(lease)
        for device in devices:
            places = [qemu.find_place(name) for name in _names(device)]
            if None not in places and device.identity not in identities:
                identities.add(device.identity)
                found.setdefault(lease.name, []).append(_at(device, [p for p in places if p]))
    qemu.close_files([device.id for devices in found.values() for device in devices])
    return found


def _names(device: DeviceRecord) -> list[str]:
    """Its names in QEMU: a group has one for each function."""
    count = len(device.guest_address.functions) if device.guest_address else 0
    return [qemu_id(device.id, f"f{n}" if n else "") for n in range(max(count, 1))]


def _at(device: DeviceRecord, places: Sequence[Place]) -> DeviceRecord:
    known = device.guest_address or GuestAddress()
    functions = [function.host for function in known.functions]
    address = found_address(places, functions, known)
    return replace(device, place=" ".join(map(str, places)), guest_address=address)


def _not_given(lease: VmRecord) -> StateError:
    return StateError(
        f"this QEMU has devices of lease {lease_id_of(lease)}, which was not given to it",
        state=LeaseState.MADE,
        required=LeaseState.HELD,
        hint="its maker calls give_to first",
    )
