"""VMs that an error on a disk has stopped: which disk it is, and how they run again."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import msgspec
from msgspec.structs import replace

from vmplug.drivers.ports import FailedDisk
from vmplug.errors import ConnectError, HypervisorError, StateError
from vmplug.host.root import HostRoot
from vmplug.hypervisor.listening import is_listening
from vmplug.hypervisor.qemu.failed_disks import IO_ERROR
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord, VmRecord, foreign_names
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.vms.known import is_gone, require_started

ANSWER_TIMEOUT_S = 2.0
_ASKED_AT_ONCE = 16
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
        _require_stopped(name, qemu.status())
        disks = read_failed_disks(qemu, devices)
        qemu.resume()
        if not qemu.keeps_running(_WATCHED_S):
            told = "; ".join(map(str, read_failed_disks(qemu, devices)))
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


def read_failed_disks(qemu: Qemu, devices: Iterable[DeviceRecord]) -> tuple[FailedDisk, ...]:
    """The disks that have stopped a VM, those of its `devices` by the paths of their requests."""
    records = {device.id: device for device in devices}
    qemu.claim_foreign_names(foreign_names(records.values()))
    paths = {device_id: device.host_path for device_id, device in records.items()}
    return tuple(
        replace(disk, file=paths.get(disk.device_id or "", disk.file))
        for disk in qemu.find_failed_disks()
    )


def find_failed_disks(
    vms: Sequence[VmRecord], devices: Sequence[DeviceRecord], host: HostRoot
) -> dict[str, tuple[FailedDisk, ...]]:
    """By VM, the disks that have stopped it, none for one that runs.

    All are asked at once, and a VM that does not answer in time is left out.
    """
    asked = [vm for vm in vms if not vm.starting_by and not is_gone(vm, host)]
    held = {vm.name: [device for device in devices if device.vm == vm.name] for vm in asked}
    if not asked:
        return {}
    with ThreadPoolExecutor(max_workers=min(len(asked), _ASKED_AT_ONCE)) as pool:
        answers = pool.map(lambda vm: _ask(vm, held[vm.name]), asked)
        answered: Mapping[str, tuple[FailedDisk, ...] | None] = dict(
            zip((vm.name for vm in asked), answers, strict=True)
        )
    return {name: disks for name, disks in answered.items() if disks is not None}


def _ask(record: VmRecord, devices: Sequence[DeviceRecord]) -> tuple[FailedDisk, ...] | None:
    if not is_listening(record.qmp_socket):
        return None
    try:
        with closing(
            Qemu.connect(
                record.qmp_socket,
                timeout_s=ANSWER_TIMEOUT_S,
                command_timeout_s=ANSWER_TIMEOUT_S,
            )
        ) as qemu:
            return read_failed_disks(qemu, devices)
    except HypervisorError:  # busy, hung or ending: `vm list` says which
        return None
