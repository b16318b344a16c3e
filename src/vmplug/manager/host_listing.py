"""What could a host hand over, what is one thing of it, and which VM has it?"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import structs

from vmplug.errors import NoSuchDevice
from vmplug.host.block.usage import NO_VMS, read_usage
from vmplug.host.inventory import Inventory, Kind, read_inventory, with_reset_methods
from vmplug.host.kind import Identity
from vmplug.host.use.claim import Claim, VmProcess
from vmplug.journal import has_journal
from vmplug.manager.setup import DEFAULT_SETUP, Setup

if TYPE_CHECKING:
    from vmplug.host.thing.thing import Thing


def list_host(
    names: Sequence[str] = (),
    *,
    kinds: Collection[Kind] = frozenset(Kind),
    with_vms: bool = True,
    require_all: bool = True,
    setup: Setup = DEFAULT_SETUP,
) -> Inventory:
    """Return everything of those kinds that the host has, or only what has one of the names.

    A name is the address of a function, the number of an IOMMU group, a node such as /dev/sda, or
    a UUID. `with_vms` also reads the journal, for the VMs that have it. Raises StoreError, and
    NoSuchDevice for a name that nothing has, unless `require_all` is false.
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
        from vmplug.host.inventory_names import find_named  # noqa: PLC0415

        inventory = find_named(inventory, names, setup.host, require_all=require_all)
    functions = tuple(with_reset_methods(entry, setup.host) for entry in inventory.pci)
    return structs.replace(inventory, pci=functions)


def show_thing(name: str, *, with_vms: bool = True, setup: Setup = DEFAULT_SETUP) -> "Thing":
    """Return what one thing of the host is, what it is made of, and who uses it.

    A name is the address of a function, the number of an IOMMU group, `b:MAJOR:MINOR`, a UUID, the
    path of a node, file, directory or socket, or a name of the kernel's such as sda. Nothing is
    changed. `with_vms` also reads the journal, for the VMs that have it; without it they are
    `unknown`. Raises NoSuchDevice for a name that nothing has, SpecError for a number that no
    device can have, AttributeReadError, and StoreError.
    """
    from vmplug.host.thing.describe import (  # noqa: PLC0415  9 ms, with every check
        describe_other,
        describe_thing,
        relate,
    )
    from vmplug.host.thing.name import find_named_device, no_such  # noqa: PLC0415

    host = setup.host
    try:
        device = find_named_device(name, host, setup.vhost_user_store)
    except NoSuchDevice as error:
        try:
            return describe_other(name, read_usage(host), host)
        except NoSuchDevice:
            raise no_such(name) from error
    claims, vms = _read_vms(setup) if with_vms else (None, NO_VMS)
    usage = read_usage(host, vms=vms)
    device = relate(device, usage, host)
    return describe_thing(device, usage=usage, claims=claims, root=host)


def _read_vms(setup: Setup) -> tuple[Sequence[Claim], Mapping[int, VmProcess]]:
    """What all VMs have, and their processes."""
    if not has_journal(setup.state_dir):
        return (), NO_VMS
    from vmplug.journal.journal import Journal  # noqa: PLC0415  sqlite3 and its users cost 10 ms

    with Journal.open(setup.state_dir) as journal:
        pods = journal.pod_devices.claims(journal.worker.boot_id)
        return [*journal.claims(), *pods], journal.vm_processes(setup.host)
