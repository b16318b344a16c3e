"""What is plugged where, is it still on the host, and has an error on it stopped its VM?"""

from collections.abc import Mapping

import msgspec

from vmplug.drivers.ports import FailedDisk
from vmplug.host.program import Looks
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.manager.watching.health import DeviceHealth, HostSnapshot, find_silent
from vmplug.vms.io_errors import find_failed_disks
from vmplug.vms.known import find_ended


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What is attached, in the order it came.

    `health`, by device id, is the state of a device on the host, where that can be known.
    `ended_vms` are the VMs of the list that seem to have ended: reconcile frees what they held.
    `stopped_vms` are those that an error has stopped, with the disks: `resume_vm` lets them run.
    """

    attachments: tuple[Attachment, ...]
    health: Mapping[str, DeviceHealth]
    ended_vms: tuple[str, ...]
    stopped_vms: Mapping[str, tuple[FailedDisk, ...]]


def list_attachments(
    *,
    vm: str | None = None,
    setup: Setup = DEFAULT_SETUP,
) -> Listing:
    """Return what is attached to all VMs or to one. Reads the journal and the host.

    All VMs together have two seconds to say whether an error has stopped them.
    Raises StateError when the VM is not known.
    """
    with Journal.open_existing(setup.state_dir) as journal:
        held = read_attachments(journal, vm)
        vms = [record for record in journal.vms() if vm in {None, record.name}]
        devices = [device for record in vms for device in journal.devices(record.name)]
        with Looks() as looks:
            silent = find_silent(devices, looks, journal.host)
        snapshot = HostSnapshot(journal.host, vms, silent=silent)
        found = {device.id: snapshot.of(device) for device in devices}
        return Listing(
            attachments=tuple(held),
            health={device_id: health for device_id, health in found.items() if health},
            ended_vms=tuple(find_ended(journal, {hold.vm for hold in held})),
            stopped_vms={
                name: disks
                for name, disks in find_failed_disks(vms, devices, journal.host).items()
                if disks
            },
        )


def read_attachments(journal: Journal, vm: str | None) -> list[Attachment]:
    """Return all holds, or those of one VM. Raises StateError when that VM is not known."""
    held = journal.attachments(vm)
    if vm and not held:
        journal.require_vm(vm)
    return held
