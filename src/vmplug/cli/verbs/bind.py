"""`vmplug bind`."""

import click

from vmplug.cli.options import (
    allow_option,
    completes,
    json_option,
    parse_allow,
    root_option,
    state_dir_option,
)
from vmplug.cli.progress import at_work
from vmplug.cli.render.output import print_json
from vmplug.cli.render.table import print_table
from vmplug.host.root import HostRoot
from vmplug.manager.binding.groups import BoundFunction, bind_device
from vmplug.manager.setup import Setup


@click.command("bind")
@click.argument("function", shell_complete=completes("function"))
@click.option(
    "--driver",
    metavar="NAME",
    help="A VFIO driver; default: the kernel's variant driver for the function, or vfio-pci.",
)
@allow_option
@root_option
@state_dir_option
@json_option
def command(
    as_json: bool,
    state_dir: str,
    root: str,
    allow: tuple[str, ...],
    driver: str | None,
    function: str,
) -> None:
    """Give a PCI function, with its whole IOMMU group, to VFIO.

    Refuses what the host uses, as `vmplug check` does: a mounted disk, a network interface with an
    address. Functions that VFIO already has stay as they are. `vmplug unbind` gives every function
    back to its former driver. FUNCTION may also be a VFIO node, such as /dev/vfio/26.

    \b
    vmplug bind 0000:3b:00.0
    vmplug bind 3b:00.0 --driver mlx5_vfio_pci
    vmplug bind 3b:00.0 --allow network-in-use --json
    """
    allowed = parse_allow(allow)
    setup = Setup(host=HostRoot(root), state_dir=state_dir)
    with at_work(f"binding {function} to VFIO", setup):
        group = bind_device(
            function,
            driver=driver,
            allow=allowed,
            setup=setup,
        )
    if as_json:
        functions = [_json(member) for member in group.functions]
        facts = {"iommu_group": group.number, "group_node": group.node}
        print_json({**facts, "functions": functions})
        return
    print_table(
        ("FUNCTION", "FORMER", "NOW"),
        [(str(m.bdf), m.former_driver or "-", m.driver or "-") for m in group.functions],
    )
    if group.mediated_uuid:
        click.echo(f"{group.mediated_uuid} is a mediated device: it needs no binding")


def _json(function: BoundFunction) -> dict[str, object]:
    return {
        "address": str(function.bdf),
        "former_driver": function.former_driver,
        "driver": function.driver,
        "bound_by_vmplug": function.is_bound_by_vmplug,
    }
