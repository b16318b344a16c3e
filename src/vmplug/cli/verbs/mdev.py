"""`vmplug mdev`: create, remove."""

import click

from vmplug.cli.group import VerbGroup
from vmplug.cli.options import json_option, root_option, state_dir_option
from vmplug.cli.render.output import print_json
from vmplug.host.root import HostRoot
from vmplug.manager.binding.mediated import create_mediated_device, remove_mediated_device
from vmplug.manager.setup import Setup


@click.group("mdev", cls=VerbGroup)
def command() -> None:
    """Create and remove mediated devices."""


@command.command("create")
@click.argument("parent")
@click.argument("type_name", metavar="TYPE")
@click.option("--uuid", metavar="UUID", help="Its UUID; default: a random one.")
@root_option
@json_option
def create(as_json: bool, root: str, uuid: str | None, type_name: str, parent: str) -> None:
    """Create a mediated device of a TYPE that a PARENT offers, and print its UUID.

    PARENT is a PCI function, or the name in sysfs of another device that offers mediated devices.
    The host's next boot removes the device.

    \b
    vmplug mdev create 0000:00:02.0 i915-GVTg_V5_4
    vmplug mdev create mtty mtty-1 --uuid 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    """
    made = create_mediated_device(parent, type_name, uuid=uuid, setup=Setup(host=HostRoot(root)))
    if as_json:
        facts = {"parent": made.parent, "type": made.type_name, "iommu_group": made.iommu_group}
        print_json({"uuid": made.uuid, **facts, "group_node": f"/dev/vfio/{made.iommu_group}"})
    else:
        click.echo(made.uuid)


@command.command("remove")
@click.argument("uuid")
@root_option
@state_dir_option
@json_option
def remove(as_json: bool, state_dir: str, root: str, uuid: str) -> None:
    """Remove a mediated device.

    Refused while a VM or a process has the device.

    \b
    vmplug mdev remove 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    """
    removed = uuid.lower()
    remove_mediated_device(removed, setup=Setup(host=HostRoot(root), state_dir=state_dir))
    if as_json:
        print_json({"removed": removed})
    else:
        click.echo(f"removed {removed}")
