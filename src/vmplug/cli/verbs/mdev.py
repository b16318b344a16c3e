"""`vmplug mdev`: create, remove."""

import click

from vmplug.cli.options import json_option, root_option, state_dir_option
from vmplug.cli.render.output import print_json
from vmplug.cli.target import parse_function
from vmplug.cli.wiring import open_journal
from vmplug.errors import SpecError
from vmplug.host.pci.mdev_create import create_mediated
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.root import HostRoot
from vmplug.manager.binding.subdevices import remove_unused


@click.group("mdev")
def command() -> None:
    """Make mediated devices, and take them away."""


@command.command("create")
@click.argument("parent")
@click.argument("type_name", metavar="TYPE")
@click.option("--uuid", metavar="UUID", help="Its name; default: one is drawn.")
@root_option
@json_option
def create(as_json: bool, root: str, uuid: str | None, type_name: str, parent: str) -> None:
    """Make a mediated device of a TYPE that a PARENT offers, and tell its UUID.

    PARENT is a PCI function, or the name of another device that can be divided so. It is gone
    after the host's next boot.

    \b
    vmplug mdev create 0000:00:02.0 i915-GVTg_V5_4
    vmplug mdev create mtty mtty-1 --uuid 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    """
    host = HostRoot(root)
    made = create_mediated(_parent(parent), type_name, host, uuid=uuid)
    group = find_vfio_device(made, host)
    if as_json:
        facts = {"parent": _parent(parent), "type": type_name, "iommu_group": group.number}
        print_json({"uuid": made, **facts, "group_node": f"/dev/vfio/{group.number}"})
    else:
        click.echo(made)


@command.command("remove")
@click.argument("uuid")
@root_option
@state_dir_option
@json_option
def remove(as_json: bool, state_dir: str, root: str, uuid: str) -> None:
    """Take a mediated device away.

    It is refused while a VM or a process has the device.

    \b
    vmplug mdev remove 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    """
    uuid = uuid.lower()
    with open_journal(state_dir) as journal:
        remove_unused(uuid, journal=journal, host=HostRoot(root))
    if as_json:
        print_json({"removed": uuid})
    else:
        click.echo(f"removed {uuid}")


def _parent(text: str) -> str:
    """The name as sysfs has it: a function's address may be short."""
    try:
        return str(parse_function(text))
    except SpecError:
        return text
