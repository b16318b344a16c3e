"""`vmplug host`."""

from collections.abc import Iterable, Sequence

import click

from vmplug.address import Bdf
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
from vmplug.cli.wiring import has_journal, open_journal
from vmplug.errors import NoSuchDevice
from vmplug.host.block.inventory import Disk
from vmplug.host.inventory import (
    HostFunction,
    HostMediated,
    Inventory,
    Kind,
    StoredSocket,
    read_inventory,
    with_reset_methods,
)
from vmplug.host.pci.pci_ids import PciNames
from vmplug.host.root import HostRoot


@click.command("host")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice([str(kind) for kind in Kind]),
    help="Only this kind; may be said several times. `mdev` are mediated devices.",
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

    PCI functions by IOMMU group, which goes over whole; disks with their partitions; persistent
    memory; the sockets of a vhost-user store; mediated devices, and what devices can be divided
    into. A NAME is the address of a function, the number of a group, a node such as /dev/sda, or a
    UUID. Whether one may go over, `vmplug check` says.

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
    inventory = read_inventory(
        host,
        vhost_user_store=open_store(vhost_user_store, host) if vhost_user_store else None,
        kinds=[Kind(kind) for kind in kinds] or list(Kind),
        vms=_read_holders(state_dir) if host.is_live or is_named else {},
    )
    if names:
        inventory = find_named(inventory, names, host)
    functions = tuple(with_reset_methods(entry, host) for entry in inventory.pci)
    inventory = inventory._replace(pci=functions)
    if as_json:
        print_json(inventory_json(inventory, PciNames(host)))
        return
    sections = inventory_lines(inventory, PciNames(host))
    if sections:
        print_sections(sections)
    else:
        click.echo(f"the host has nothing {'of that kind' if kinds else 'to hand over'}")


def _read_holders(state_dir: str) -> dict[str, str]:
    """The VMs of the journal, by the identities of what they hold."""
    held: dict[str, str] = {}
    if not has_journal(state_dir):
        return held
    with open_journal(state_dir) as journal:
        for vm in journal.vms():
            for device in journal.devices(vm.name):
                functions = device.guest_address.functions if device.guest_address else ()
                members = (f"vfio:{function.host}" for function in functions)
                held |= dict.fromkeys((device.identity, *members), vm.name)
    return held


def find_named(inventory: Inventory, names: Sequence[str], host: HostRoot) -> Inventory:
    """Only what goes by one of the names; NoSuchDevice for one that nothing goes by."""
    wanted = {_canonical(name, host): name for name in names}
    known: set[str] = set()

    def is_wanted(own: Iterable[str | None]) -> bool:
        matched = wanted.keys() & set(own)
        known.update(name for name in matched if name)
        return bool(matched)

    found = Inventory(
        pci=tuple(e for e in inventory.pci if is_wanted(_function_names(e))),
        block=tuple(e for e in inventory.block if is_wanted(_disk_names(e))),
        vhost_user=tuple(e for e in inventory.vhost_user if is_wanted(_socket_names(e))),
        pmem=tuple(e for e in inventory.pmem if is_wanted((e.name, e.device_node))),
        mdev_types=tuple(e for e in inventory.mdev_types if is_wanted((e.parent, e.name))),
        mdev=tuple(e for e in inventory.mdev if is_wanted(_mediated_names(e))),
        unreadable=inventory.unreadable,
    )
    for canonical, name in wanted.items():
        if canonical not in known:
            raise NoSuchDevice(
                name,
                f"nothing on this host goes by {name!r}",
                found="nothing",
                hint="vmplug host shows everything; a name is an address, the number of a group, "
                "a node or a UUID",
            )
    return found


def _canonical(name: str, host: HostRoot) -> str:
    if name.startswith("/dev/"):  # such as /dev/disk/by-id/...
        return host.real_path(name)
    try:
        return str(Bdf.parse_written(name))
    except ValueError:
        return name


def _function_names(entry: HostFunction) -> list[str | None]:
    group = entry.function.iommu_group
    names = [str(entry.function.bdf), entry.group_node, entry.cdev_node]
    return names if group is None else [*names, str(group), f"/dev/vfio/{group}"]


def _disk_names(disk: Disk) -> list[str | None]:
    """A partition goes by its disk's names too: whoever names the disk is shown both."""
    names = [disk.name, disk.device_node, str(disk.devnum)]
    return [*names, disk.disk, f"/dev/{disk.disk}"] if disk.disk else [*names]


def _socket_names(socket: StoredSocket) -> list[str | None]:
    return [socket.device_node, socket.socket_path, str(socket.devnum)]


def _mediated_names(entry: HostMediated) -> list[str | None]:
    group = entry.iommu_group
    names = [entry.uuid, entry.group_node, entry.cdev_node]
    names.append(entry.device.parent if entry.device else None)
    return names if group is None else [*names, str(group)]
