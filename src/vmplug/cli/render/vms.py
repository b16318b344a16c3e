"""VMs: for people and as JSON."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from vmplug.cli.render.attachments import attachments_json, print_attachments
from vmplug.cli.render.output import resolved_json
from vmplug.cli.render.table import Column, name_column, path_column, print_table, state_column
from vmplug.cli.render.terminal import Style, say, wrapped
from vmplug.errors import counted
from vmplug.text import one_line

if TYPE_CHECKING:  # each is of one verb
    from vmplug.drivers.ports import FailedDisk
    from vmplug.vms.adopt import AdoptedVm
    from vmplug.vms.io_errors import ResumedVm
    from vmplug.vms.release import EndedLogs
    from vmplug.vms.start import StartedVm
    from vmplug.vms.status import VmStatus
    from vmplug.vms.stop import StoppedVm


def started_json(vm: "StartedVm", resolved_annotations: Sequence[str] = ()) -> dict[str, Any]:
    """A VM that was started, and what it has from the start."""
    facts = {
        "name": vm.name,
        "qmp": vm.qmp_socket,
        "pid": vm.pid,
        "directory": vm.directory,
        "accel": vm.accel,
        "why_not_kvm": vm.why_not_kvm,
    }
    return {
        "vm": facts,
        "attachments": attachments_json(vm.attachments, vm.attachments),
        **resolved_json(resolved_annotations),
    }


def print_started(vm: "StartedVm") -> None:
    """Its process, its files and what it has from the start."""
    accel = f"with {vm.accel.upper()} as process {vm.pid}"
    click.echo(f"VM {vm.name} runs {accel}; its files are in {vm.directory}")
    if vm.why_not_kvm:
        click.echo(f"TCG is slow, and KVM cannot be used: {one_line(vm.why_not_kvm)}")
    print_attachments(vm.attachments, with_vm=False)


def adopted_json(vm: "AdoptedVm") -> dict[str, Any]:
    """A VM that was adopted."""
    return {
        "vm": {
            "name": vm.name,
            "qmp": vm.qmp_socket,
            "pid": vm.pid,
            "qmp_open_to_all": vm.is_open_to_all,
            "machine": vm.machine,
            "foreign_devices": vm.foreign_devices,
        },
        "attachments": attachments_json(vm.attachments, vm.attachments),
    }


def print_adopted(vm: "AdoptedVm") -> None:
    """What it offers, whose devices it has, and a warning about a socket that is open to all."""
    places = counted(vm.free_pci_places, "free PCI place")
    controllers = counted(vm.scsi_controllers, "SCSI controller")
    click.echo(f"VM {vm.name} is adopted: {vm.machine} with {places} and {controllers}")
    if vm.attachments:
        click.echo(f"it has {counted(len(vm.attachments), 'attachment')}, which it got by leases:")
        print_attachments(vm.attachments, with_vm=False)
    _print_foreign(vm.name, vm.foreign_devices)
    if vm.is_open_to_all:
        socket = one_line(vm.qmp_socket)
        sentence = f"vmplug: every user of this host can connect to {socket} and control the VM"
        say(sentence, Style.WARNING, err=True)
        say(f"hint: chmod 600 {socket}", err=True)


def stopped_json(vm: "StoppedVm") -> dict[str, Any]:
    """A VM that was stopped, and what it held."""
    return {"vm": {"name": vm.name}, "released": [hold.id for hold in vm.released]}


def print_stopped(vm: "StoppedVm") -> None:
    """Whether it was stopped or forgotten."""
    count = counted(len(vm.released), "attachment")
    released = f", {count} released" if vm.released else ""
    click.echo(f"VM {vm.name} is {'forgotten' if vm.was_adopted else 'stopped'}{released}")


def status_json(vm: "VmStatus") -> dict[str, Any]:
    """A known VM."""
    return {
        "name": vm.name,
        "state": vm.state,
        "pid": vm.pid,
        "machine": vm.machine,
        "free_ports": vm.free_ports,
        "scsi_controllers": vm.scsi_controllers,
        "shared_memory": vm.shared_memory,
        "attachments": vm.attachments,
        "qmp": vm.qmp_socket,
        "foreign_devices": vm.foreign_devices,
        "logs": vm.logs,
        "failed_disks": [failed_disk_json(disk) for disk in vm.failed_disks],
    }


_COLUMNS = {
    "name": name_column("VM"),
    "state": state_column("STATE"),
    "pid": Column("PID", 1),
    "machine": Column("MACHINE", 2),
    "free_ports": Column("FREE PORTS", 2),
    "scsi_controllers": Column("SCSI", 3),
    "shared_memory": Column("SHARED MEMORY", 4),
    "attachments": Column("ATTACHED", 1),
    "qmp": path_column("QMP", 3),
}


def logs_json(logs: "EndedLogs") -> dict[str, Any]:
    """The logs of a VM that has ended by itself."""
    found_at = logs.found_at.isoformat(timespec="seconds")
    return {"vm": logs.name, "found_at": found_at, "directory": logs.directory}


def print_logs(kept: "Sequence[EndedLogs]") -> None:
    """Where these logs are."""
    for logs in kept:
        click.echo(f"VM {logs.name} has ended; its last logs are in {one_line(logs.directory)}")


def failed_disk_json(disk: "FailedDisk") -> dict[str, Any]:
    """A disk that has stopped its VM."""
    return {"file": disk.file, "error": str(disk.error)}


def print_stopped_vms(stopped: "Mapping[str, Sequence[FailedDisk]]") -> None:
    """Which disks have stopped these VMs, and what to do."""
    for name, disks in stopped.items():
        told = "; ".join(one_line(str(disk)) for disk in disks)
        for line in wrapped(f"an error has stopped VM {name}: {told}", rest="  "):
            say(line, Style.ERROR)
        click.echo(f"make room or mend the disk, then vmplug vm resume {name}")


def resumed_json(vm: "ResumedVm") -> dict[str, Any]:
    """A VM that runs again."""
    disks = [failed_disk_json(disk) for disk in vm.failed_disks]
    return {"vm": {"name": vm.name}, "failed_disks": disks}


def print_resumed(vm: "ResumedVm") -> None:
    """Which disks had stopped it."""
    files = ", ".join(one_line(disk.file) for disk in vm.failed_disks)
    click.echo(f"VM {vm.name} runs again" + (f", with {files}" if files else ""))


def print_statuses(vms: "Sequence[VmStatus]", ended: "Sequence[EndedLogs]") -> None:
    """A table of known VMs, and the logs of those that have ended."""
    rows = [tuple(_word(status_json(vm)[key]) for key in _COLUMNS) for vm in vms]
    print_table(tuple(_COLUMNS.values()), rows)
    for vm in vms:
        _print_foreign(vm.name, vm.foreign_devices)
    print_stopped_vms({vm.name: vm.failed_disks for vm in vms if vm.failed_disks})
    if not vms:
        click.echo("no VM is known")
    print_logs(ended)


def _print_foreign(name: str, count: int | None) -> None:
    """Devices of another journal, which no other line counts."""
    if count:
        devices = counted(count, "device")
        click.echo(
            f"VM {name} has {devices} of another journal: vmplug reconcile --vm {name} lists them"
        )


def _word(value: object) -> str:
    """A cell of the table."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case _:
            return str(value)
