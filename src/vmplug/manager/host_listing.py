"""What could a host hand over, and which VM has it?"""

from collections.abc import Collection, Sequence

from msgspec import structs

from vmplug.host.inventory import Inventory, Kind, read_inventory, with_reset_methods
from vmplug.host.inventory_names import find_named
from vmplug.host.kind import Identity
from vmplug.journal import has_journal
from vmplug.manager.setup import DEFAULT_SETUP, Setup


def list_host(
    names: Sequence[str] = (),
    *,
    kinds: Collection[Kind] = frozenset(Kind),
    with_vms: bool = True,
    setup: Setup = DEFAULT_SETUP,
) -> Inventory:
    """Return everything of those kinds that the host has, or only what has one of the names.

    A name is the address of a function, the number of an IOMMU group, a node such as /dev/sda, or
    a UUID. `with_vms` also reads the journal, for the VMs that have it. Raises NoSuchDevice for a
    name that nothing has, and StoreError.
    """
    vms = dict[Identity, str]()
    if with_vms and has_journal(setup.state_dir):
        from vmplug.journal.journal import Journal  # noqa: PLC0415  sqlite3 and its users cost 10 ms

        with Journal.open(setup.state_dir) as journal:
            vms = journal.holders()
    inventory = read_inventory(
        setup.host, vhost_user_store=setup.vhost_user_store, kinds=kinds, vms=vms
    )
    if names:
        inventory = find_named(inventory, names, setup.host)
    functions = tuple(with_reset_methods(entry, setup.host) for entry in inventory.pci)
    return structs.replace(inventory, pci=functions)
