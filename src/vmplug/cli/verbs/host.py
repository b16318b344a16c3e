"""`vmplug host`."""

import click

from vmplug.cli.options import (
    host_option,
    json_option,
    open_root,
    open_store,
    state_dir_option,
    store_option,
)
from vmplug.cli.render.inventory_json import inventory_json
from vmplug.cli.render.inventory_text import inventory_lines
from vmplug.cli.render.output import print_json
from vmplug.cli.render.tree import print_sections
from vmplug.host.inventory import Kind
from vmplug.host.pci.pci_ids import PciNames
from vmplug.manager.host_listing import list_host
from vmplug.manager.setup import Setup


@click.command("host")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice([str(kind) for kind in Kind]),
    help="Only this kind; may be passed several times. `mdev` are mediated devices.",
)
@store_option
@host_option
@state_dir_option
@json_option
def command(
    as_json: bool,
    state_dir: str,
    root: str,
    vhost_user_store: str | None,
    kinds: tuple[str, ...],
    names: tuple[str, ...],
) -> None:
    """What could this host hand over, and what holds it?

    Prints PCI functions by IOMMU group, which is handed over whole; disks with their partitions;
    persistent memory; the sockets of a vhost-user store; mediated devices, and the types of them
    that devices offer. A NAME is the address of a function, the number of a group, a node such as
    /dev/sda, or a UUID. `vmplug check` says whether one may be handed over.

    \b
    vmplug host
    vmplug host 3b:00.0 /dev/sda
    vmplug host --kind block --kind pmem
    vmplug host --vhost-user-store /run/vhost-user --json
    vmplug host --root report.tar
    """
    host = open_root(root)
    # The journal is this host's: it says nothing of another one, unless that one's is named.
    said = click.get_current_context().get_parameter_source("state_dir")
    is_named = said is not click.core.ParameterSource.DEFAULT
    inventory = list_host(
        names,
        kinds=frozenset(map(Kind, kinds or Kind)),
        with_vms=host.is_live or is_named,
        setup=Setup(
            host=host,
            state_dir=state_dir,
            vhost_user_store=open_store(vhost_user_store, host) if vhost_user_store else None,
        ),
    )
    if as_json:
        print_json(inventory_json(inventory, PciNames(host)))
        return
    sections = inventory_lines(inventory, PciNames(host))
    if sections:
        print_sections(sections)
    else:
        click.echo(f"the host has nothing {'of that kind' if kinds else 'to hand over'}")
