"""`vmplug vm`: start, adopt, stop, list."""

import re
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import click

from vmplug.cli.options import (
    RequestArguments,
    allow_option,
    complete_vm,
    device_options,
    json_option,
    managed_option,
    owner_option,
    parse_allow,
    policy_option,
    read_request,
    state_dir_option,
)
from vmplug.cli.render.output import (
    attachment_json,
    print_attachments,
    print_json,
    print_table,
    progress,
)
from vmplug.cli.render.text import one_line
from vmplug.cli.target import parse_function
from vmplug.cli.wiring import (
    find_policy,
    find_vm,
    forget_vm,
    give_back_unused,
    is_gone,
    open_cold_manager,
    open_journal,
    windows_for,
)
from vmplug.errors import BindError, HypervisorError, SpecError, StateError, StillAttached
from vmplug.host.permissions import can_all_connect
from vmplug.host.process import read_start_time, wait_for_end
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.start.cold import ColdQemu
from vmplug.hypervisor.qemu.start.launch import launch
from vmplug.hypervisor.qemu.start.machine import MAX_MEMORY_SLOTS, MAX_PORTS, Machine, VmSpec
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, VmRecord, record_vm

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_LIST_TIMEOUT_S = 2.0
_START_TIMEOUT_S = 20.0
_QUIT_TIMEOUT_S = 10.0


@click.group("vm")
def command() -> None:
    """Start, adopt, stop and list VMs."""


@command.command("start", context_settings={"ignore_unknown_options": False})
@click.argument("name")
@click.option("--kernel", type=click.Path(exists=True, dir_okay=False), help="Boot this kernel.")
@click.option("--initrd", type=click.Path(exists=True, dir_okay=False), help="And this initrd.")
@click.option("--append", metavar="TEXT", help="The kernel's command line.")
@click.option(
    "--disk", type=click.Path(exists=True, dir_okay=False), help="Boot from this raw image."
)
@click.option(
    "--memory",
    "memory_mib",
    type=click.IntRange(min=64),
    default=512,
    show_default=True,
    metavar="MIB",
    help="Guest memory in MiB.",
)
@click.option(
    "--cpus", type=click.IntRange(min=1), default=1, show_default=True, help="Virtual CPUs."
)
@click.option(
    "--machine",
    type=click.Choice([str(machine) for machine in Machine]),
    default=str(Machine.Q35),
    show_default=True,
    help="microvm takes devices only before it starts; s390-ccw-virtio is for s390x guests.",
)
@click.option(
    "--ports",
    type=click.IntRange(0, MAX_PORTS),
    default=8,
    help="Root ports of a q35 to plug into (default 8).",
)
@click.option(
    "--bridges",
    type=click.IntRange(0, MAX_PORTS),
    default=0,
    help="Bridges of a q35 for conventional PCI devices of the host (default 0).",
)
@click.option(
    "--room-for",
    "room_for",
    multiple=True,
    metavar="BDF",
    help="Make one port large enough for the BARs of this function, to be plugged in later.",
)
@click.option(
    "--memory-slots",
    type=click.IntRange(0, MAX_MEMORY_SLOTS),
    default=4,
    help="NVDIMMs that a q35 can take (default 4).",
)
@click.option(
    "--accel",
    type=click.Choice(["kvm", "tcg"]),
    default="kvm",
    show_default=True,
    help="tcg needs no KVM and is slow.",
)
@click.option("--bundle", metavar="BUNDLE", help="Plug its devices before the VM starts.")
@device_options
@owner_option
@allow_option
@managed_option
@policy_option
@click.argument("qemu_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- QEMU_ARGS...]")
@state_dir_option
@json_option
def start(
    *,
    as_json: bool,
    state_dir: str,
    allow: tuple[str, ...],
    owner: str | None,
    policy: str | None,
    name: str,
    qemu_args: tuple[str, ...],
    **options: Any,
) -> None:
    """Start a QEMU that others can plug into, and plug devices into it from the start.

    A q35 machine has root ports, a virtio-scsi controller, slots for NVDIMMs and shared memory.
    The console goes to STATE_DIR/vm/NAME/console.log. Arguments after -- go to QEMU as they are.

    \b
    vmplug vm start sb1 --kernel vmlinuz --initrd initrd.img --append "console=ttyS0"
    vmplug vm start sb2 --disk debian.raw --memory 2048 --ports 16
    vmplug vm start sb3 --machine microvm --kernel vmlinuz --bundle bundle/
    vmplug vm start sb4 --kernel vmlinuz --device share:/srv/work:work -o filesystem=virtio-9p \\
        --owner ctr1
    vmplug vm start sb5 --kernel vmlinuz --room-for 0000:3b:00.0 --bridges 1
    """
    _check_name(name)
    asked = _read_devices(options)
    if asked and not (owner or asked.name):
        raise click.UsageError("say --owner: there is no bundle directory to take a name from")
    allowed, rules = parse_allow(allow), find_policy(policy)
    managed = options.pop("managed")
    for key in ("kernel", "initrd", "disk"):
        options[key] = str(Path(options[key]).resolve()) if options[key] else None
    options["machine"] = Machine(options["machine"])
    room_for = [parse_function(text) for text in options.pop("room_for")]
    options["windows"] = windows_for(room_for, HostRoot())
    if options["ports"] + options["bridges"] > MAX_PORTS:
        raise click.UsageError(f"--ports and --bridges together are at most {MAX_PORTS}")
    spec = VmSpec(name=name, extra=qemu_args, **options)
    attachments: list[Attachment] = []
    directory = Path(state_dir).resolve() / "vm" / name
    with open_journal(state_dir) as journal, ColdQemu(spec, directory) as cold:
        _forget_if_gone(journal, name)
        socket = str(cold.qmp_socket)
        record = VmRecord(name=name, qmp_socket=socket, pid=None, started_at=None, is_ours=True)
        if journal.find_vm(name) is None:
            _check_directory(directory, record)
        journal.add_vm(record)
        try:
            directory.parent.mkdir(mode=0o700, exist_ok=True)
            directory.mkdir(mode=0o700)
            if asked:
                with open_cold_manager(
                    cold,
                    state_dir,
                    host=asked.host,
                    vhost_user_store=asked.vhost_user_store,
                    policy=rules,
                ) as devices:
                    attachments = devices.attach_all(
                        asked.requests, owner=owner or asked.name, allow=allowed, managed=managed
                    )
            pid = launch(cold, timeout_s=_START_TIMEOUT_S)
        except BaseException:
            forget_vm(journal, record)
            with suppress(BindError):  # why it failed matters more, and reconcile tries again
                give_back_unused(journal)
            raise
        cold.started()
        journal.set_process(name, pid, read_start_time(pid, HostRoot()))
    if as_json:
        vm = {"name": name, "qmp": socket, "pid": pid, "directory": str(directory)}
        listed = [attachment_json(attachment) for attachment in attachments]
        print_json({"vm": vm, "attachments": listed})
        return
    click.echo(f"VM {name} runs as process {pid}; its files are in {directory}")
    print_attachments(attachments, with_vm=False)


def _check_directory(directory: Path, record: VmRecord) -> None:
    """StateError when a VM that the journal does not know has its files there."""
    if directory.exists():
        raise StateError(
            f"{directory} is there already, and the journal knows no VM in it",
            state="there",
            required="absent",
            hint=f"if its QEMU runs, vmplug vm adopt {record.name} --qmp {record.qmp_socket}; "
            "else remove the directory",
        )


def _read_devices(options: dict[str, Any]) -> RequestArguments | None:
    """What is to be plugged from the start, taken out of the verb's options; None for nothing."""
    keys = ("bundle", "devices", "read_only", "driver_options", "root", "vhost_user_store")
    request = {key: options.pop(key) for key in keys}
    if request["bundle"] is None and not request["devices"]:
        return None
    return read_request(**request)


@command.command("adopt")
@click.argument("name")
@click.option("--qmp", "socket", required=True, metavar="SOCKET", help="Its QMP socket.")
@state_dir_option
@json_option
def adopt(as_json: bool, state_dir: str, socket: str, name: str) -> None:
    """Plug into a QEMU that somebody else started.

    Give it a QMP socket for vmplug alone: -qmp unix:SOCKET,server=on,wait=off

    \b
    vmplug vm adopt sb3 --qmp /run/sb3/qmp.sock
    """
    _check_name(name)
    with open_journal(state_dir) as journal:
        _forget_if_gone(journal, name)
        with closing(Qemu.connect(socket)) as qemu:
            endpoint, offer = qemu.endpoint, qemu.offer()
        assert endpoint
        journal.add_vm(record_vm(name, endpoint, HostRoot()))
    ports = sum(len(port.free) for port in offer.ports)
    is_open = can_all_connect(endpoint.qmp_socket)
    if as_json:
        qmp = {"qmp": endpoint.qmp_socket, "pid": endpoint.pid, "qmp_open_to_all": is_open}
        print_json({"vm": {"name": name, **qmp, "machine": offer.machine}})
    else:
        click.echo(
            f"VM {name} is adopted: {offer.machine} with {ports} free PCI places and "
            f"{len(offer.controllers)} SCSI controller{'s' * (len(offer.controllers) != 1)}"
        )
        if is_open:
            socket_path = one_line(endpoint.qmp_socket)
            click.echo(
                f"vmplug: every user who can reach {socket_path} may connect to it and rule the "
                f"VM, ignoring\nhint: chmod 600 {socket_path}",
                err=True,
            )


@command.command("stop")
@click.argument("name", shell_complete=complete_vm)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the guest may take to power down; then it is ended.",
)
@state_dir_option
@json_option
def stop(as_json: bool, state_dir: str, timeout_s: float, name: str) -> None:
    """End a VM that `vm start` started, or forget one that was adopted.

    An adopted VM is left running, and only forgotten when nothing is attached to it.

    \b
    vmplug vm stop sb1
    """
    with open_journal(state_dir) as journal:
        record = find_vm(journal, name)
        held = journal.attachments(name)
        never_came_up = record.is_ours and not record.pid and not Path(record.qmp_socket).exists()
        is_alive = not (never_came_up or is_gone(record))
        if is_alive and not record.is_ours and held:
            raise StillAttached(
                f"{len(held)} attachments are left in the adopted VM {name}",
                hint="vmplug detach them first",
            )
        if is_alive and record.is_ours:
            with progress(f"waiting for VM {name} to power down"):
                _end(record, timeout_s)
        forget_vm(journal, record)
        give_back_unused(journal)
    what = "stopped" if record.is_ours else "forgotten"
    if as_json:
        print_json({"vm": {"name": name}, "released": [hold.id for hold in held]})
    else:
        released = f", {len(held)} attachments released" if held else ""
        click.echo(f"VM {name} is {what}{released}")


@command.command("list")
@state_dir_option
@json_option
def list_vms(as_json: bool, state_dir: str) -> None:
    """Known VMs and what they offer.

    \b
    vmplug vm list
    """
    with open_journal(state_dir) as journal:
        vms = [_describe(record, journal) for record in journal.vms()]
    if as_json:
        print_json({"vms": vms})
        return
    print_table(
        ("VM", "STATE", "MACHINE", "FREE PORTS", "SCSI", "SHARED MEMORY", "ATTACHED", "QMP"),
        [tuple(_word(value) for value in vm.values()) for vm in vms],
    )
    if not vms:
        click.echo("no VM is known")


def _word(value: object) -> str:
    """A cell of the table."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case _:
            return str(value)


def _describe(record: VmRecord, journal: Journal) -> dict[str, Any]:
    """A VM's state; `busy` when another client holds its QMP socket."""
    state, offer = "gone", None
    if not is_gone(record):
        state = "busy"
        with (
            suppress(HypervisorError),
            closing(Qemu.connect(record.qmp_socket, timeout_s=_LIST_TIMEOUT_S)) as qemu,
        ):
            state, offer = qemu.status(), qemu.offer()
    return {
        "name": record.name,
        "state": state,
        "machine": offer.machine if offer else None,
        "free_ports": sum(len(port.free) for port in offer.ports) if offer else None,
        "scsi_controllers": len(offer.controllers) if offer else None,
        "shared_memory": offer.shared_memory if offer else None,
        "attachments": len(journal.attachments(record.name)),
        "qmp": record.qmp_socket,
    }


def _check_name(name: str) -> None:
    if not _NAME.match(name):
        raise SpecError(
            f"VM name {name!r}", "it is made of letters, digits, '.', '_' and '-', 63 at most"
        )


def _forget_if_gone(journal: Journal, name: str) -> None:
    """Make room for a VM of a name whose last one has ended and left nothing attached.

    VMs of an earlier boot of the host left nothing, whatever they held.
    """
    for record in journal.vms():
        has_left = record.name == name and is_gone(record) and not journal.devices(name)
        if record.is_of_earlier_boot or has_left:
            forget_vm(journal, record)


def _end(record: VmRecord, timeout_s: float) -> None:
    with closing(Qemu.connect(record.qmp_socket)) as qemu:
        if qemu.status() == "running" and timeout_s and record.pid:
            qemu.power_down()
            if wait_for_end(record.pid, timeout_s):
                return
        qemu.quit()
    if record.pid and not wait_for_end(record.pid, _QUIT_TIMEOUT_S):
        raise HypervisorError(f"process {record.pid} of VM {record.name} does not end")
