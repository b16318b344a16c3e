"""`vmplug host`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from vmplug.cli.options import (
    completes,
    host_option,
    json_option,
    open_root,
    open_store,
    state_dir_option,
    store_option,
)
from vmplug.cli.render.inventory_text import inventory_lines
from vmplug.cli.render.output import print_json
from vmplug.cli.render.tree import print_sections
from vmplug.host.inventory import Inventory, Kind
from vmplug.host.pci.pci_ids import PciNames
from vmplug.manager.host_listing import list_host, show_thing
from vmplug.manager.setup import Setup

if TYPE_CHECKING:
    from vmplug.host.thing.thing import Thing


@click.command("host")
@click.argument("names", nargs=-1, metavar="[THING]...", shell_complete=completes("thing"))
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice([str(kind) for kind in Kind]),
    help="List only this kind; may be passed several times. `mdev` are mediated devices. With a "
    "THING, list its rows instead of the tree.",
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
    """What does this host have, what is it made of, and who uses it?

    Without a THING, lists PCI functions by IOMMU group, which is handed over whole; disks with
    their partitions; persistent memory; the sockets of a vhost-user store; mediated devices, and
    the types of them that devices offer.

    With a THING, shows as a tree what it is, what is on it, what it depends on, and who uses any
    of that. A THING is the address of a function, the number of an IOMMU group, a node such as
    /dev/sda, b:MAJOR:MINOR, a UUID, or the path of a file, a directory or a socket. Nothing is
    changed. `vmplug check` says whether it may be handed over.

    \b
    vmplug host
    vmplug host /dev/disk/by-id/wwn-0x5000c500a1b2c3d4
    vmplug host 3b:00.0
    vmplug host 26 --json
    vmplug host /srv/images/a.qcow2
    vmplug host --kind block --kind pmem
    vmplug host --vhost-user-store /run/vhost-user --json
    vmplug host --root report.tar 8:16
    """
    host = open_root(root)
    # The journal is this host's: it says nothing of another one, unless that one's is named.
    said = click.get_current_context().get_parameter_source("state_dir")
    with_vms = host.is_live or said is not click.core.ParameterSource.DEFAULT
    store = open_store(vhost_user_store, host) if vhost_user_store else None
    setup = Setup(host=host, state_dir=state_dir, vhost_user_store=store)
    wanted = () if kinds else names
    things = [show_thing(name, with_vms=with_vms, setup=setup) for name in wanted]
    if things and not as_json:
        from vmplug.cli.render.thing import thing_lines  # noqa: PLC0415  with a THING

        for number, thing in enumerate(things):
            click.echo("\n" * bool(number), nl=False)
            print_sections([thing_lines(thing)])
        return
    inventory = list_host(
        names,
        kinds=frozenset(map(Kind, kinds or Kind)),
        with_vms=with_vms,
        require_all=not things,
        setup=setup,
    )
    if as_json:
        from vmplug.cli.render.inventory_json import inventory_json  # noqa: PLC0415  2 ms in all

        print_json({**_things_json(things), **inventory_json(inventory, PciNames(host))})
    else:
        _print_inventory(inventory, PciNames(host), "of that kind" if kinds else "to hand over")


def _things_json(things: "Sequence[Thing]") -> dict[str, Any]:
    """One has a key of its own; none has no key."""
    if not things:
        return {}
    from vmplug.cli.render.thing import thing_json  # noqa: PLC0415  with a THING

    documents = [thing_json(thing) for thing in things]
    return {"things": documents} if len(documents) > 1 else {"thing": documents[0]}


def _print_inventory(inventory: Inventory, names: PciNames, what: str) -> None:
    sections = inventory_lines(inventory, names)
    if sections:
        print_sections(sections)
    else:
        click.echo(f"the host has nothing {what}")
