"""Let a VM run again that an error on a disk has stopped."""

from contextlib import closing

import msgspec

from vmplug.drivers.ports import FailedDisk
from vmplug.errors import ConnectError, StateError
from vmplug.hypervisor.qemu.failed_disks import IO_ERROR
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.records import foreign_names
from vmplug.manager.left_files import close_left_files
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.vms.known import is_gone, require_started
from vmplug.vms.listing import of_requests

_WATCHED_S = 0.5
"""How long a resumed VM must run: QEMU repeats the requests that failed at once."""


class ResumedVm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that runs again, and the disks that had stopped it."""

    name: str
    failed_disks: tuple[FailedDisk, ...]


def resume_vm(name: str, *, setup: Setup = DEFAULT_SETUP) -> ResumedVm:
    """Let a VM run again that an error on a disk has stopped, such as no space for its image.

    The guest's writes are repeated, and nothing of them is lost. Raises StateError when the VM is
    not known, runs, was stopped by something else, or when the error stops it again at once;
    ConnectError when it does not answer.
    """
    with Journal.open_existing(setup.state_dir) as journal:
        record = journal.require_vm(name)
        require_started(record, journal.host)
        if is_gone(record, journal.host):
            raise ConnectError(
                record.qmp_socket,
                f"VM {name} is not running any more",
                hint="vmplug reconcile frees what it held",
            )
        devices = journal.devices(name)
        with closing(Qemu.connect(record.qmp_socket)) as qemu:
            qemu.claim_foreign_names(foreign_names(devices))
            _require_stopped(name, qemu.status())
            disks = of_requests(qemu.find_failed_disks(), devices)
            qemu.resume()
            close_left_files(name, journal, qemu)
            if not qemu.keeps_running(_WATCHED_S):
                told = "; ".join(map(str, of_requests(qemu.find_failed_disks(), devices)))
                raise StateError(
                    f"VM {name} ran, and an error stopped it again: {told}",
                    state=IO_ERROR,
                    required="room on its disks",
                    hint="make room where the disk is, or mend it, and try again",
                )
    return ResumedVm(name=name, failed_disks=disks)


def _require_stopped(name: str, status: str) -> None:
    """StateError unless an error has stopped the VM."""
    if status != IO_ERROR:
        raise StateError(
            f"no error on a disk has stopped VM {name}: it is {status}",
            state=status,
            required=IO_ERROR,
            hint="no action needed"
            if status == "running"
            else "the program that stopped it knows when it may run",
        )
