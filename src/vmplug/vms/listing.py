"""What is plugged where, is it still on the host, and has an error on it stopped its VM?"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial

import msgspec
from msgspec.structs import replace

from vmplug.address import device_id_of
from vmplug.drivers.ports import FailedDisk
from vmplug.errors import HypervisorError
from vmplug.host.program import Looks
from vmplug.hypervisor.listening import is_listening
from vmplug.hypervisor.qemu import failed_disks
from vmplug.hypervisor.qemu.fd_sets import close_sets
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, DeviceRecord, VmRecord, foreign_names
from vmplug.manager.left_files import choose_left
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.manager.watching.health import DeviceHealth, HostSnapshot, find_silent
from vmplug.vms.known import find_ended, is_gone

ANSWER_TIMEOUT_S = 2.0
_ASKED_AT_ONCE = 16


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What is attached, in the order it came.

    `health`, by device id, is the state of a device on the host, where that can be known.
    `ended_vms` are the VMs and leases of the list that seem to have ended: reconcile frees what
    they held.
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
        vms = [record for record in journal.all_holders() if vm in {None, record.name}]
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
                for name, disks in find_failed_disks(vms, devices, journal).items()
                if disks
            },
        )


def read_attachments(journal: Journal, vm: str | None) -> list[Attachment]:
    """Return all holds, or those of one VM. Raises StateError when that VM is not known."""
    held = journal.attachments(vm)
    if vm and not held:
        journal.require_vm(vm)
    return held


def of_requests(
    disks: Iterable[FailedDisk], devices: Iterable[DeviceRecord]
) -> tuple[FailedDisk, ...]:
    """Those disks, with the paths of the requests for `devices` in place of QEMU's."""
    paths = {device.id: device.host_path for device in devices}
    return tuple(replace(disk, file=paths.get(disk.device_id or "", disk.file)) for disk in disks)


def find_failed_disks(
    vms: Sequence[VmRecord], devices: Sequence[DeviceRecord], journal: Journal
) -> dict[str, tuple[FailedDisk, ...]]:
    """By VM, the disks that have stopped it, none for one that runs.

    All are asked at once, and a VM that does not answer in time is left out.
    """
    asked = [vm for vm in vms if not (vm.is_lease or vm.starting_by or is_gone(vm, journal.host))]
    held = defaultdict[str, list[DeviceRecord]](list)
    for device in devices:
        held[device.vm].append(device)
    if not asked:
        return {}
    answers = _ask_all([(vm, held[vm.name], journal) for vm in asked])
    answered = zip((vm.name for vm in asked), answers, strict=True)
    return {name: disks for name, disks in answered if disks is not None}


def _ask_all(
    asked: Sequence[tuple[VmRecord, Sequence[DeviceRecord], Journal]],
) -> "list[tuple[FailedDisk, ...] | None]":
    if len(asked) == 1:
        return [_ask(*asked[0])]
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  5 ms, with logging

    with ThreadPoolExecutor(max_workers=min(len(asked), _ASKED_AT_ONCE)) as pool:
        return [*pool.map(lambda one: _ask(*one), asked)]


def _ask(
    record: VmRecord, devices: Sequence[DeviceRecord], journal: Journal
) -> tuple[FailedDisk, ...] | None:
    if not is_listening(record.qmp_socket):
        return None
    foreign = foreign_names(devices)

    def find_owner(name: str) -> str | None:
        return foreign.get(name) or device_id_of(name)

    try:
        with closing(
            QmpMonitor.connect(
                record.qmp_socket,
                timeout_s=ANSWER_TIMEOUT_S,
                command_timeout_s=ANSWER_TIMEOUT_S,
            )
        ) as monitor:
            disks = failed_disks.find_failed_disks(monitor, find_owner)
            close_sets(monitor, partial(choose_left, record.name, journal))
    except HypervisorError:  # busy, hung or ending: `vm list` says which
        return None
    return of_requests(disks, devices)
