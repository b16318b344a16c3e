"""`vmplug import-kata`."""

from contextlib import closing

import click

from vmplug.cli.options import json_option, state_dir_option, vm_option
from vmplug.cli.render.output import print_json, print_table
from vmplug.cli.wiring import find_vm, open_journal
from vmplug.errors import StateError
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.manager.kata.adopt import Adopted, adopt
from vmplug.manager.kata.saved_state import read_kata
from vmplug.manager.vm_identity import release_if_restarted


@click.command("import-kata")
@click.argument("state", metavar="STATE")
@vm_option
@click.option(
    "--qmp", "socket", metavar="SOCKET", help="Its QMP socket, if it is not adopted yet."
)
@state_dir_option
@json_option
def command(as_json: bool, state_dir: str, socket: str | None, vm: str, state: str) -> None:
    """Take over the devices that Kata Containers has attached to a sandbox.

    STATE is a sandbox id below /run/vc/sbs, or a persist.json. What QEMU holds of it is written
    into the journal, with its containers as owners; nothing in the VM is changed. From then on
    vmplug detaches it, and hands it to no other VM. Let Kata plug nothing more into that VM.

    \b
    vmplug import-kata 5a1f --vm sb1 --qmp /run/vc/vm/5a1f/extra-monitor.sock
    vmplug import-kata /run/vc/sbs/5a1f/persist.json --vm sb1
    """
    saved = read_kata(state)
    with open_journal(state_dir) as journal, closing(_connect(journal, vm, socket)) as qemu:
        release_if_restarted(vm, journal, qemu)
        told = adopt(saved, vm, journal, qemu)
    if as_json:
        print_json({"vm": vm, "sandbox": saved.sandbox, "devices": [_json(one) for one in told]})
        return
    rows = [
        (one.device.id, one.device.kind, one.device.host_path, str(one.outcome), one.reason)
        for one in told
    ]
    print_table(("KATA DEVICE", "KIND", "HOST PATH", "DONE", "WHY"), rows)
    if not told:
        click.echo(f"Kata has saved no device of sandbox {saved.sandbox}")


def _connect(journal: Journal, vm: str, socket: str | None) -> Qemu:
    """The VM, at the socket that is named, which must be the journal's if that knows the VM."""
    record = find_vm(journal, vm) if socket is None else journal.find_vm(vm)
    qemu = Qemu.connect(socket or (record.qmp_socket if record else ""))
    named = qemu.endpoint.qmp_socket if qemu.endpoint else None
    if record and named != record.qmp_socket:
        qemu.close()
        raise StateError(
            f"VM {vm} is known at {record.qmp_socket}, not at {socket}",
            state="another VM",
            required="this one",
            hint="leave out --qmp, or choose another name with --vm",
        )
    return qemu


def _json(one: Adopted) -> dict[str, str | None]:
    return {
        "kata_device": one.device.id,
        "kind": one.device.kind,
        "host_path": one.device.host_path,
        "outcome": str(one.outcome),
        "reason": one.reason,
        "device": one.device_id,
    }
