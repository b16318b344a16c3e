"""`vmplug detach`."""

import click

from vmplug.cli.options import completes, json_option, state_dir_option, timeout_option
from vmplug.cli.progress import at_work
from vmplug.cli.render.detached import detached_json, print_detached
from vmplug.cli.render.output import print_json
from vmplug.manager.setup import Setup
from vmplug.vms.attachments import report_detach, report_detach_owner


@click.command("detach")
@click.argument(
    "attachments", nargs=-1, metavar="[ATTACHMENT]...", shell_complete=completes("attachment")
)
@click.option(
    "--owner",
    metavar="ID",
    shell_complete=completes("owner"),
    help="Detach everything that this owner holds.",
)
@click.option(
    "--vm", metavar="NAME", shell_complete=completes("vm"), help="Only in this VM, with --owner."
)
@timeout_option
@state_dir_option
@json_option
def command(
    as_json: bool,
    state_dir: str,
    timeout_s: float,
    vm: str | None,
    owner: str | None,
    attachments: tuple[str, ...],
) -> None:
    """Take devices out of a VM.

    ATTACHMENT is an id of `vmplug list`, of an attachment or of a device with only one, or as much
    of its beginning as no other id has. One that was attached several times loses one count.
    vmplug unplugs a device when its
    last owner detaches it. If the guest does not answer in time the device stays "detaching", and
    the same command tries again.

    \b
    vmplug detach 0123456789abcdef
    vmplug detach --owner ctr1
    """
    if bool(attachments) == bool(owner):
        raise click.UsageError("name the attachments, or an --owner")
    setup = Setup(state_dir=state_dir)
    with at_work("detaching", setup):
        if owner:
            report = report_detach_owner(owner, vm=vm, timeout_s=timeout_s, setup=setup)
        else:
            report = report_detach(attachments, timeout_s=timeout_s, setup=setup)
    if as_json and (report.detached or not report.failures):
        print_json({"detached": [detached_json(done) for done in report.detached]})
    elif not as_json:
        print_detached(report.detached)
    report.require()
