"""`vmplug import-kata`."""

import click

from vmplug.cli.options import AnsweringPath, json_option, state_dir_option, vm_option
from vmplug.cli.progress import at_work
from vmplug.cli.render.output import print_json
from vmplug.cli.render.table import path_column, print_table, reason_column
from vmplug.manager.kata.adopt import Adopted
from vmplug.manager.setup import Setup
from vmplug.vms.import_kata import import_kata


@click.command("import-kata")
@click.argument("state", type=AnsweringPath(), metavar="STATE")
@vm_option
@click.option(
    "--qmp",
    "socket",
    type=AnsweringPath(),
    metavar="SOCKET",
    help="Its QMP socket, if it is not adopted yet.",
)
@state_dir_option
@json_option
def command(as_json: bool, state_dir: str, socket: str | None, vm: str, state: str) -> None:
    """Take over the devices that Kata Containers has attached to a sandbox.

    STATE is a sandbox id below /run/vc/sbs, or a persist.json. vmplug records what QEMU holds of
    it in the journal, with its containers as owners, and changes nothing in the VM. From then on
    vmplug detaches these devices, and hands them to no other VM. Let Kata plug nothing more into
    that VM.

    \b
    vmplug import-kata 5a1f --vm sb1 --qmp /run/vc/vm/5a1f/extra-monitor.sock
    vmplug import-kata /run/vc/sbs/5a1f/persist.json --vm sb1
    """
    setup = Setup(state_dir=state_dir)
    with at_work(f"taking over what VM {vm} has", setup):
        done = import_kata(state, vm, qmp_socket=socket, setup=setup)
    if as_json:
        devices = [_json(one) for one in done.devices]
        print_json({"vm": vm, "sandbox": done.sandbox, "devices": devices})
        return
    rows = [
        (
            one.device.id,
            one.device_id or "-",
            one.device.kind,
            one.device.host_path,
            str(one.outcome),
            one.reason,
        )
        for one in done.devices
    ]
    print_table(
        ("KATA DEVICE", "DEVICE", "KIND", path_column("HOST PATH"), "DONE", reason_column("WHY")),
        rows,
    )
    if not done.devices:
        click.echo(f"Kata has saved no device of sandbox {done.sandbox}")


def _json(one: Adopted) -> dict[str, str | None]:
    return {
        "kata_device": one.device.id,
        "kind": one.device.kind,
        "host_path": one.device.host_path,
        "outcome": str(one.outcome),
        "reason": one.reason,
        "device": one.device_id,
    }
