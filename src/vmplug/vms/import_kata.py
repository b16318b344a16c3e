"""Take over the devices that Kata Containers has attached to a sandbox."""

from contextlib import ExitStack, closing

import msgspec

from vmplug.errors import StateError
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.names import check_vm_name
from vmplug.manager.kata.adopt import Adopted, adopt
from vmplug.manager.kata.saved_state import read_kata
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.manager.vm_identity import release_if_restarted


class KataImport(msgspec.Struct, frozen=True, kw_only=True):
    """The sandbox, with Kata's name for it, and what was done with each of its devices."""

    sandbox: str
    devices: tuple[Adopted, ...]


def import_kata(
    state: str,
    vm: str,
    *,
    qmp_socket: str | None = None,
    setup: Setup = DEFAULT_SETUP,
) -> KataImport:
    """Write what QEMU holds for a sandbox of Kata into the journal; change nothing in the VM.

    `state` is a sandbox id below /run/vc/sbs, or the path of a persist.json. `vm` is a VM of the
    journal, or a new name with the QMP socket of Kata's QEMU. Raises SpecError, StateError,
    ConnectError.
    """
    saved = read_kata(state)
    with (
        (Journal.open if qmp_socket else Journal.open_existing)(setup.state_dir) as journal,
        closing(_connect(journal, vm, qmp_socket)) as qemu,
    ):
        release_if_restarted(vm, journal, qemu)
        return KataImport(sandbox=saved.sandbox, devices=tuple(adopt(saved, vm, journal, qemu)))


def _connect(journal: Journal, vm: str, socket: str | None) -> Qemu:
    """The VM at the named socket, which must be the journal's when that knows the VM."""
    record = journal.require_vm(vm) if socket is None else journal.find_vm(vm)
    if record is None:
        check_vm_name(vm)
    qemu = Qemu.connect(socket or (record.qmp_socket if record else ""))
    with ExitStack() as undo:
        undo.callback(qemu.close)
        named = qemu.endpoint.qmp_socket if qemu.endpoint else None
        if record and named != record.qmp_socket:
            raise StateError(
                f"VM {vm} is known at {record.qmp_socket}, not at {socket}",
                state="another VM",
                required="this one",
                hint="leave out --qmp, or choose another name with --vm",
            )
        undo.pop_all()
    return qemu
