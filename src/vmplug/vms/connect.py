"""Connect to a VM that the journal knows."""

from contextlib import ExitStack

from vmplug.drivers.ports import Hypervisor
from vmplug.errors import ConnectError
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.leases.life import end_ended
from vmplug.manager.left_files import close_left_files
from vmplug.manager.manager import DeviceManager
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.vms.known import is_gone, require_started


def connect_vm(name: str, *, setup: Setup = DEFAULT_SETUP) -> DeviceManager:
    """Return the manager of a VM that was started or adopted; close it when done.

    Leases whose process has ended are given back first, and files are closed that it has kept.

    Raises StateError when the VM is not known, ConnectError when it does not answer.
    """
    with Journal.open_existing(setup.state_dir) as journal:
        record, this_host = journal.require_vm(name), journal.host
        end_ended(journal, setup.host)
    require_started(record, this_host)
    try:
        hypervisor = Qemu.connect(record.qmp_socket)
    except ConnectError as error:
        if is_gone(record, this_host):
            message = f"VM {name} is not running any more: {error.message}"
            hint = "vmplug reconcile frees what it held"
            raise ConnectError(error.socket, message, hint=hint) from error
        raise
    with ExitStack() as undo:
        undo.callback(hypervisor.close)
        with Journal.open_existing(setup.state_dir) as journal:
            close_left_files(name, journal, hypervisor)
        undo.pop_all()
    return open_manager(name, hypervisor, setup)


def open_manager(name: str, hypervisor: Hypervisor, setup: Setup) -> DeviceManager:
    """Return the manager of a VM; it closes the hypervisor with itself. Raises StoreError."""
    return DeviceManager.open(
        vm=name,
        host=setup.host,
        hypervisor=hypervisor,
        state_dir=setup.state_dir,
        vhost_user_store=setup.vhost_user_store,
        policy=setup.policy,
    )
