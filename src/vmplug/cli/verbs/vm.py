"""`vmplug vm`: start, adopt, stop, resume, list."""

import re
from functools import partial
from typing import Any

import click

from vmplug.cli.group import VerbGroup
from vmplug.cli.options import (
    AnsweringPath,
    Seconds,
    allow_option,
    completes,
    json_option,
    managed_option,
    owner_option,
    parse_allow,
    parse_function,
    state_dir_option,
)
from vmplug.cli.progress import at_work
from vmplug.cli.render.output import print_json
from vmplug.cli.render.vms import (
    adopted_json,
    logs_json,
    print_adopted,
    print_resumed,
    print_started,
    print_statuses,
    print_stopped,
    resumed_json,
    started_json,
    status_json,
    stopped_json,
)
from vmplug.cli.request import RequestArguments, device_options, read_request, require_owner
from vmplug.host.root import THIS_HOST
from vmplug.manager.setup import Setup
from vmplug.policy.find import find_policy
from vmplug.vms.start import ACCELS, MAX_MEMORY_SLOTS, MAX_PORTS, Machine, VmSpec, start_vm

_MEMORY = re.compile(r"([0-9]{1,9})([MGT]?)", re.ASCII)
_MIB = {"": 1, "M": 1, "G": 1 << 10, "T": 1 << 20}
_MEMORY_MIN_MIB = 64
_REQUEST = (
    "bundle",
    "devices",
    "read_only",
    "driver_options",
    "root",
    "vhost_user_store",
    "policy",
)


def _parse_memory(ctx: click.Context, param: click.Parameter, said: str) -> int:
    """MiB; the letters are those of all sizes."""
    match = _MEMORY.fullmatch(said)
    mib = int(match[1]) * _MIB[match[2]] if match else 0
    if mib < _MEMORY_MIN_MIB:
        wanted = f"a number of MiB from {_MEMORY_MIN_MIB}, optionally with M, G or T"
        raise click.BadParameter(f"{said!r} is not {wanted}.", ctx, param)
    return mib


@click.group("vm", cls=VerbGroup)
def command() -> None:
    """Start, adopt, stop, resume and list VMs."""


@command.command("start", context_settings={"ignore_unknown_options": False})
@click.argument("name")
@click.option(
    "--kernel", type=AnsweringPath(exists=True, dir_okay=False), help="The kernel to boot."
)
@click.option("--initrd", type=AnsweringPath(exists=True, dir_okay=False), help="Its initrd.")
@click.option("--append", metavar="TEXT", help="The kernel's command line.")
@click.option(
    "--disk", type=AnsweringPath(exists=True, dir_okay=False), help="Boot from this raw image."
)
@click.option(
    "--memory",
    "memory_mib",
    callback=_parse_memory,
    default="512",
    show_default=True,
    metavar="MIB",
    help="Guest memory in MiB, or as 2G or 1T.",
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
    type=click.Choice(ACCELS),
    default=ACCELS[0],
    show_default=True,
    help="auto is KVM if it runs a small guest within 10 s, else TCG, which is slow.",
)
@click.option("--bundle", metavar="BUNDLE", help="Plug its devices before the VM starts.")
@device_options
@owner_option
@allow_option
@managed_option
@click.argument("qemu_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- QEMU_ARGS...]")
@state_dir_option
@json_option
def start(
    *,
    as_json: bool,
    state_dir: str,
    allow: tuple[str, ...],
    owner: str | None,
    name: str,
    qemu_args: tuple[str, ...],
    managed: bool,
    room_for: tuple[str, ...],
    **options: Any,
) -> None:
    """Start a QEMU to plug into, with devices in it from the start.

    A q35 machine has root ports, a virtio-scsi controller, slots for NVDIMMs, and shared memory.
    STATE_DIR/vm/NAME/console.log has what the guest prints, up to 1 MiB, and console.log.1 the MiB
    before; qemu.log has what QEMU prints. Arguments after -- are passed to QEMU unchanged.

    \b
    vmplug vm start sb1 --kernel vmlinuz --initrd initrd.img --append "console=ttyS0"
    vmplug vm start sb2 --disk debian.raw --memory 2048 --ports 16
    vmplug vm start sb3 --machine microvm --kernel vmlinuz --bundle bundle/
    vmplug vm start sb4 --kernel vmlinuz --device share:/srv/work:work -o filesystem=virtio-9p \\
        --owner ctr1
    vmplug vm start sb5 --kernel vmlinuz --room-for 0000:3b:00.0 --bridges 1
    """
    wants_devices = options["bundle"] is not None or bool(options["devices"])
    asked = _read_devices(options)
    if options["ports"] + options["bridges"] > MAX_PORTS:
        raise click.UsageError(f"--ports and --bridges together are at most {MAX_PORTS}")
    spec = VmSpec(
        name=name,
        extra=qemu_args,
        room_for=tuple(map(parse_function, room_for)),
        **options | {"machine": Machine(options["machine"])},
    )
    setup = asked.setup(state_dir)
    with at_work(f"starting VM {name}", setup):
        started = start_vm(
            spec,
            asked.requests,
            owner=require_owner(owner, asked) if wants_devices else None,
            allow=parse_allow(allow),
            managed=managed,
            setup=setup,
        )
    if as_json:
        print_json(started_json(started, asked.resolved_annotations))
    else:
        print_started(started)


def _read_devices(options: dict[str, Any]) -> RequestArguments:
    """Take the request for devices out of the verb's options."""
    request = {key: options.pop(key) for key in _REQUEST}
    if request["bundle"] is None and not request["devices"]:
        return RequestArguments(
            requests=(),
            name=None,
            host=THIS_HOST,
            vhost_user_store=None,
            find_policy=partial(find_policy, request["policy"]),
        )
    return read_request(**request)


@command.command("adopt")
@click.argument("name")
@click.option(
    "--qmp",
    "socket",
    type=AnsweringPath(),
    required=True,
    metavar="SOCKET",
    help="Its QMP socket.",
)
@state_dir_option
@json_option
def adopt(as_json: bool, state_dir: str, socket: str, name: str) -> None:
    """Plug into a QEMU that somebody else started.

    QEMU needs a QMP socket for vmplug alone: -qmp unix:SOCKET,server=on,wait=off

    \b
    vmplug vm adopt sb3 --qmp /run/sb3/qmp.sock
    """
    from vmplug.vms.adopt import adopt_vm  # noqa: PLC0415  each verb has its own

    adopted = adopt_vm(name, socket, setup=Setup(state_dir=state_dir))
    if as_json:
        print_json(adopted_json(adopted))
    else:
        print_adopted(adopted)


@command.command("stop")
@click.argument("name", shell_complete=completes("vm"))
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the guest may take to power down before QEMU is ended.",
)
@state_dir_option
@json_option
def stop(as_json: bool, state_dir: str, timeout_s: float, name: str) -> None:
    """End a VM that `vm start` started, or forget one that was adopted.

    An adopted VM keeps running, and is forgotten only when nothing is attached to it. A QEMU that
    does not answer is ended too.

    \b
    vmplug vm stop sb1
    """
    from vmplug.vms.stop import stop_vm  # noqa: PLC0415  each verb has its own

    setup = Setup(state_dir=state_dir)
    left = f"VM {name} may be powering down, and is still known", f"vmplug vm stop {name} ends it"
    with at_work(f"stopping VM {name}", setup, otherwise=left):
        stopped = stop_vm(name, timeout_s=timeout_s, setup=setup)
    if as_json:
        print_json(stopped_json(stopped))
    else:
        print_stopped(stopped)


@command.command("resume")
@click.argument("name", shell_complete=completes("vm"))
@state_dir_option
@json_option
def resume(as_json: bool, state_dir: str, name: str) -> None:
    """Let a VM run again that an error on a disk has stopped.

    `vmplug vm list` shows such a VM as io-error, and names the disk. Make room first, or mend the
    disk: QEMU repeats the guest's writes, and none of them is lost. Fails when the disk stops the
    VM again, and when no error has stopped it.

    \b
    vmplug vm resume sb1
    vmplug vm resume sb1 --json
    """
    from vmplug.vms.io_errors import resume_vm  # noqa: PLC0415  each verb has its own

    setup = Setup(state_dir=state_dir)
    with at_work(f"resuming VM {name}", setup):
        resumed = resume_vm(name, setup=setup)
    if as_json:
        print_json(resumed_json(resumed))
    else:
        print_resumed(resumed)


@command.command("list")
@state_dir_option
@json_option
def list_known(as_json: bool, state_dir: str) -> None:
    """Print the known VMs and what they offer.

    With --json also the directory of their logs. vmplug keeps the last logs of VMs that ended by
    themselves below STATE_DIR/ended: two of a name, and eight altogether.

    \b
    vmplug vm list
    """
    from vmplug.vms.release import list_ended_logs  # noqa: PLC0415  each verb has its own
    from vmplug.vms.status import list_vms  # noqa: PLC0415

    setup = Setup(state_dir=state_dir)
    vms, ended = list_vms(setup=setup), list_ended_logs(setup=setup)
    if as_json:
        print_json({"vms": [*map(status_json, vms)], "ended": [*map(logs_json, ended)]})
    else:
        print_statuses(vms, ended)
