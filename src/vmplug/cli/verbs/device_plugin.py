"""`vmplug device-plugin`."""

import click

from vmplug.cli.group import VerbGroup
from vmplug.cli.options import AnsweringPath, json_option, root_option, state_dir_option
from vmplug.host.root import HostRoot
from vmplug.kubernetes import DEFAULT_CONFIG
from vmplug.manager.setup import Setup

_config_option = click.option(
    "--config",
    type=AnsweringPath(dir_okay=False),
    default=DEFAULT_CONFIG,
    show_default=True,
    metavar="FILE",
    help="Which devices are which resource; see docs/kubernetes.md.",
)


@click.group("device-plugin", cls=VerbGroup, invoke_without_command=True)
@_config_option
@click.option("--dry-run", is_flag=True, help="Print what would be offered, and change nothing.")
@root_option
@state_dir_option
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON document for each line of the log, or for all of --dry-run.",
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    as_json: bool,
    state_dir: str,
    root: str,
    dry_run: bool,
    config: str,
) -> None:
    """Offer devices of this host to Kubernetes, until Ctrl-C or SIGTERM.

    Needs vmplug[kubernetes], and a kubelet; it waits for one. A device that a VM, a lease, a mount
    or a process has is not healthy, and no pod gets it. What a pod had is given back when it has
    gone. SIGTERM ends it and takes nothing from any pod. See docs/kubernetes.md.

    \b
    vmplug device-plugin --config ./device-plugin.toml --dry-run
    vmplug device-plugin --config ./device-plugin.toml
    vmplug device-plugin --json 2>/var/log/vmplug.json
    vmplug device-plugin status
    vmplug device-plugin give-back
    """
    if ctx.invoked_subcommand:
        return
    from vmplug.cli import device_plugin  # noqa: PLC0415  150 ms, with gRPC

    setup = Setup(host=HostRoot(root), state_dir=state_dir)
    if dry_run:
        device_plugin.print_report(config, setup, as_json=as_json)
    else:
        device_plugin.run(config, setup, as_json=as_json)


@command.command("status")
@_config_option
@root_option
@state_dir_option
@json_option
def status(as_json: bool, state_dir: str, root: str, config: str) -> None:
    """Which devices are offered, which pods have them, and why is one not healthy?

    Asks the host, the journal and kubelet, and not the plugin: it need not run.

    \b
    vmplug device-plugin status
    vmplug device-plugin status --config ./device-plugin.toml --json
    """
    from vmplug.cli import device_plugin  # noqa: PLC0415  150 ms, with gRPC

    setup = Setup(host=HostRoot(root), state_dir=state_dir)
    device_plugin.print_report(config, setup, as_json=as_json)


@command.command("give-back")
@_config_option
@root_option
@state_dir_option
@json_option
def give_back(as_json: bool, state_dir: str, root: str, config: str) -> None:
    """Give the devices that vmplug bound for Kubernetes back to the drivers that they had.

    For when the plugin is removed; end it first. What a pod has, or a process has open, stays and
    is printed.

    \b
    vmplug device-plugin give-back
    vmplug device-plugin give-back --config ./device-plugin.toml --json
    """
    from vmplug.cli import device_plugin  # noqa: PLC0415  150 ms, with gRPC

    setup = Setup(host=HostRoot(root), state_dir=state_dir)
    device_plugin.print_given_back(config, setup, as_json=as_json)
