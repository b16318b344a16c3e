"""`vmplug reconcile`."""

import click

from vmplug.cli.options import completes, json_option, state_dir_option, timeout_option
from vmplug.cli.progress import at_work
from vmplug.cli.render.output import print_json
from vmplug.cli.render.repairs import print_repairs, repairs_json
from vmplug.manager.setup import Setup
from vmplug.vms.reconcile import reconcile_host


@click.command("reconcile")
@click.option("--vm", metavar="NAME", shell_complete=completes("vm"), help="Only this VM.")
@click.option(
    "--set-aside",
    is_flag=True,
    help="Replace a damaged journal by a new one, and keep the damaged one.",
)
@click.option(
    "--take-over", is_flag=True, help="Unplug devices of other journals and of lost ones too."
)
@timeout_option
@state_dir_option
@json_option
def command(
    as_json: bool,
    state_dir: str,
    timeout_s: float,
    vm: str | None,
    *,
    set_aside: bool,
    take_over: bool,
) -> None:
    """Make the journal and the VMs agree, after a crash of anybody.

    Undoes an interrupted attach, finishes an interrupted detach, and frees what a dead VM held.
    PCI functions that were bound for it go back to their former drivers. The exit status is 5 as
    long as a guest does not release a device: it is still detaching.

    The VMs may have devices that another state directory's journal knows, or that a lost journal
    knew, or a newer copy of this one. They are listed as "another journal" and left alone;
    --take-over unplugs them.

    With --set-aside, vmplug carries over into a new journal what can still be read of a damaged
    one. What it cannot read is then another journal's.

    \b
    vmplug reconcile
    vmplug reconcile --vm sb1 --json
    vmplug reconcile --set-aside
    vmplug reconcile --vm sb1 --take-over
    """
    setup = Setup(state_dir=state_dir)
    with at_work("making the journal agree with the VMs", setup):
        done = reconcile_host(
            vm=vm,
            set_aside=set_aside,
            take_over=take_over,
            timeout_s=timeout_s,
            setup=setup,
        )
    if as_json:
        print_json(repairs_json(done))
    else:
        print_repairs(done)
    done.require()
