"""The names that people call the parts of an inventory by."""

from collections.abc import Iterable, Sequence

from vmplug.address import Bdf
from vmplug.errors import NoSuchDevice
from vmplug.host.block.inventory import Disk
from vmplug.host.inventory import HostFunction, HostMediated, Inventory, StoredSocket
from vmplug.host.root import HostRoot


def find_named(
    inventory: Inventory, names: Sequence[str], host: HostRoot, *, require_all: bool = True
) -> Inventory:
    """Return only what has one of the names.

    With `require_all`, raises NoSuchDevice for a name that nothing has. Else the names are those
    of things, such as files, that an inventory may not list.
    """
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
        if require_all and canonical not in known:
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
    """A partition goes by its disk's names too: naming the disk selects both."""
    names = [disk.name, disk.device_node, str(disk.devnum)]
    return [*names, disk.disk, f"/dev/{disk.disk}"] if disk.disk else [*names]


def _socket_names(socket: StoredSocket) -> list[str | None]:
    return [socket.device_node, socket.socket_path, str(socket.devnum)]


def _mediated_names(entry: HostMediated) -> list[str | None]:
    group = entry.iommu_group
    names = [entry.uuid, entry.group_node, entry.cdev_node]
    names.append(entry.device.parent if entry.device else None)
    return names if group is None else [*names, str(group)]
