"""`vmplug lease`: devices for any process; list and end."""

import click

from vmplug.cli.group import VerbGroup
from vmplug.cli.options import (
    AnsweringPath,
    allow_option,
    completes,
    json_option,
    managed_option,
    owner_option,
    parse_allow,
    state_dir_option,
)
from vmplug.cli.progress import at_work, progress
from vmplug.cli.render.leases import lease_text, print_leases, print_running, status_json
from vmplug.cli.render.output import print_json
from vmplug.cli.request import device_options, read_request
from vmplug.leases.holder import LeaseLock, LeaseTerms
from vmplug.leases.lease import lease
from vmplug.leases.life import end_lease, list_leases
from vmplug.leases.run import (
    check_command,
    complete_command,
    passing_for,
    run_command,
    share_end_for,
    write_description,
)
from vmplug.manager.setup import Setup


class _LeaseGroup(VerbGroup):
    """`vmplug lease OPTIONS -- COMMAND` is the verb `run`, whose name nobody has to write."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The arguments, with `run` before those that no verb begins."""
        if args and args[0] not in {*self.commands, *self.get_help_option_names(ctx)}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group("lease", cls=_LeaseGroup)
def command() -> None:
    """Hand devices to any process, for as long as it runs.

    What stands after -- is the command; `vmplug lease run --help` lists the options.

    \b
    vmplug lease --device vfio:0000:3b:00.0 --managed -- \\
        cloud-hypervisor --device 'path={vfio.sysfs_path}' ...
    vmplug lease list
    vmplug lease end job-17
    """


@command.command("run", context_settings={"ignore_unknown_options": False})
@click.option("--bundle", metavar="BUNDLE", help="Lease the devices of this bundle.")
@device_options
@owner_option
@allow_option
@managed_option
@click.option(
    "--lock",
    type=click.Choice([str(lock) for lock in LeaseLock]),
    default=str(LeaseLock.NONE),
    show_default=True,
    help="Lock disks and images besides: full for a VMM that does not, flock for one that locks "
    "byte ranges, none for one that locks what it opens.",
)
@click.option(
    "--describe",
    type=AnsweringPath(dir_okay=False),
    metavar="FILE",
    help="Write the lease as JSON into this file before the command starts.",
)
@state_dir_option
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.pass_context
def run(
    ctx: click.Context,
    /,
    *,
    state_dir: str,
    describe: str | None,
    lock: str,
    managed: bool,
    allow: tuple[str, ...],
    owner: str | None,
    words: tuple[str, ...],
    **request: object,
) -> None:
    """Run a command that has the devices until it ends, and then give them back.

    In a word of the command {NAME.FIELD} is a field of a device: by its name, as net:eth0 or eth0,
    or by its kind where there is one of it. A word {NAME WORDS} is these words for each device and
    each function, with {FIELD} in them. The word {qemu-args} is all that a QEMU of q35, pc or
    microvm needs to have the devices. The fields: docs/leases.md.

    The exit status is that of the command, 128 + n for a signal n. vmplug passes signals on.

    \b
    vmplug lease --device vfio:0000:3b:00.0 --managed -- \\
        cloud-hypervisor '{vfio --device path={sysfs_path}}' ...
    vmplug lease --device file:/images/a.img --lock full --describe lease.json -- sleep 1
    vmplug lease --bundle bundle/ -- qemu-system-x86_64 -machine q35 ... '{qemu-args}'
    """
    check_command(words)
    asked = read_request(**request)  # type: ignore[arg-type]
    setup = asked.setup(state_dir)
    with at_work("leasing the devices", setup):
        leased = lease(
            asked.requests,
            owner=owner or asked.name,
            managed=managed,
            terms=LeaseTerms(
                allow=parse_allow(allow),
                passing=passing_for(words),
                lock=LeaseLock(lock),
                shares=share_end_for(words, asked.requests),
            ),
            setup=setup,
        )
    with leased:
        rendered = complete_command(leased, words)
        if describe:
            write_description(describe, lease_text(leased))
        status = run_command(leased, rendered)
        with progress("giving the devices back"):
            print_running(leased.settle())
    ctx.exit(status)


@command.command("list")
@state_dir_option
@json_option
def list_(as_json: bool, state_dir: str) -> None:
    """Which process has which devices?

    made: its maker has it so far. held: the process that it was given to. ended: that process has
    ended, and vmplug reconcile gives the devices back. unknown: it is in another PID namespace.

    \b
    vmplug lease list
    """
    leases = list_leases(setup=Setup(state_dir=state_dir))
    if as_json:
        print_json({"leases": [status_json(status) for status in leases]})
    else:
        print_leases(leases)


@command.command("end")
@click.argument("lease_id", metavar="LEASE", shell_complete=completes("lease"))
@state_dir_option
@json_option
def end(as_json: bool, state_dir: str, lease_id: str) -> None:
    """Take a lease back whose process does not use the devices.

    The exit status is 6 while a process uses one: end the process, and the lease ends with it.

    \b
    vmplug lease end job-17
    """
    setup = Setup(state_dir=state_dir)
    with at_work(f"ending lease {lease_id}", setup):
        ended = end_lease(lease_id, setup=setup)
    if as_json:
        print_json({"lease": status_json(ended)})
    else:
        click.echo(f"lease {ended.id} has ended: {len(ended.devices)} given back")
