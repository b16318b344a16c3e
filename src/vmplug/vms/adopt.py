"""Plug into a QEMU that somebody else started."""

from contextlib import closing

import msgspec

from vmplug.host.permissions import can_all_connect
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.names import check_vm_name
from vmplug.journal.records import Attachment, record_vm
from vmplug.leases.take_over import find_leased
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.vms.release import forget_ended


class AdoptedVm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that vmplug serves from now on, and what it offers.

    `pid` is None when the process cannot be seen from here. `is_open_to_all` is whether every
    user of the host may connect to the socket, and so control the VM. `foreign_devices` are those
    of vmplug that the journal has no row of: `reconcile_host` lists them and leaves them alone.
    `attachments` are what it had by leases, which are its own now.
    """

    name: str
    qmp_socket: str
    pid: int | None
    machine: str
    free_pci_places: int
    scsi_controllers: int
    is_open_to_all: bool
    foreign_devices: int
    attachments: tuple[Attachment, ...] = ()


def adopt_vm(
    name: str,
    qmp_socket: str,
    *,
    setup: Setup = DEFAULT_SETUP,
) -> AdoptedVm:
    """Write a running QEMU into the journal under that name, and return what it offers.

    Give QEMU a QMP socket for vmplug alone. Devices that it got by `Lease.qemu_args` become its
    attachments, and their lease has ended, if it has no others. Nothing is released in between.
    Raises SpecError, ConnectError, and StateError when another VM has the name, or such a lease
    was not given to a process yet.
    """
    check_vm_name(name)
    with Journal.open(setup.state_dir) as journal:
        forget_ended(journal, name)
        with closing(Qemu.connect(qmp_socket)) as qemu:
            endpoint, offer, drivers = qemu.endpoint, qemu.offer(), qemu.find_drivers()
            taken = find_leased(qemu, journal)
        assert endpoint
        journal.add_vm(record_vm(name, endpoint), taken)
        foreign = drivers.keys() - journal.device_ids()
        held = journal.attachments(name)
    return AdoptedVm(
        name=name,
        qmp_socket=endpoint.qmp_socket,
        pid=endpoint.pid,
        machine=offer.machine,
        free_pci_places=sum(len(port.free) for port in offer.ports),
        scsi_controllers=len(offer.controllers),
        is_open_to_all=can_all_connect(endpoint.qmp_socket),
        foreign_devices=len(foreign),
        attachments=tuple(held),
    )
