"""Which VMs are known, and what does each offer?"""

import os
from contextlib import closing, suppress

import msgspec

from vmplug.drivers.ports import FailedDisk
from vmplug.errors import HypervisorError
from vmplug.hypervisor.listening import is_listening
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.records import VmRecord, foreign_names, has_ended
from vmplug.manager.left_files import close_left_files
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.manager.vm_identity import find_process
from vmplug.vms.known import is_gone, is_starting
from vmplug.vms.listing import of_requests

LIST_TIMEOUT_S = 2.0


class VmStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A VM of the journal as it is now.

    `state` is QEMU's run state; `starting` while a process starts it, `interrupted` when that has
    died; `gone` when the VM has ended; `unreachable` when its QMP socket takes no client, `busy`
    when another client holds the socket or QEMU hangs. `pid` is QEMU's process, None where it has
    ended or is unknown. The offer (`machine` to `shared_memory`) is None unless the VM answered,
    and so is the number of devices that the journal has no row of. `failed_disks` are those
    that have stopped it, in state `io-error`. `logs` is the directory with the logs of one that
    vmplug started, None for another.
    """

    name: str
    state: str
    pid: int | None
    machine: str | None
    free_ports: int | None
    scsi_controllers: int | None
    shared_memory: bool | None
    attachments: int
    foreign_devices: int | None
    qmp_socket: str
    logs: str | None
    failed_disks: tuple[FailedDisk, ...]


def list_vms(
    *,
    timeout_s: float = LIST_TIMEOUT_S,
    setup: Setup = DEFAULT_SETUP,
) -> list[VmStatus]:
    """Return every known VM; each that runs has `timeout_s` to answer."""
    with Journal.open_existing(setup.state_dir) as journal:
        return [_read_status(vm, journal, timeout_s) for vm in journal.vms()]


def _read_status(record: VmRecord, journal: Journal, timeout_s: float) -> VmStatus:
    offer = foreign = None
    failed = tuple[FailedDisk, ...]()
    if record.starting_by:
        state = "starting" if is_starting(record, journal.host) else "interrupted"
    elif is_gone(record, journal.host):
        state = "gone"
    elif not is_listening(record.qmp_socket):
        state = "unreachable"
    else:
        state = "busy"
        with (
            suppress(HypervisorError),
            closing(Qemu.connect(record.qmp_socket, timeout_s=timeout_s)) as qemu,
        ):
            if has_ended(record, journal.host):
                record = find_process(record, journal, qemu)
            state, offer = qemu.status(), qemu.offer()
            known = journal.device_ids()  # before and after: others attach and detach meanwhile
            foreign = len(qemu.find_drivers().keys() - known - journal.device_ids())
            devices = journal.devices(record.name)
            qemu.claim_foreign_names(foreign_names(devices))
            failed = of_requests(qemu.find_failed_disks(), devices)
            close_left_files(record.name, journal, qemu)
    return VmStatus(
        name=record.name,
        state=state,
        pid=None if state == "gone" else record.pid,
        machine=offer.machine if offer else None,
        free_ports=sum(len(port.free) for port in offer.ports) if offer else None,
        scsi_controllers=len(offer.controllers) if offer else None,
        shared_memory=offer.shared_memory if offer else None,
        attachments=len(journal.attachments(record.name)),
        foreign_devices=foreign,
        qmp_socket=record.qmp_socket,
        logs=os.path.dirname(record.qmp_socket) if record.is_ours else None,
        failed_disks=failed,
    )
